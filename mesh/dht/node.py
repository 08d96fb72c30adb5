"""A node of the DHT: joins and stays joined, announces workers, looks them up."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from mesh.dht import limits
from mesh.dht.addresses import Address, normal, subnet
from mesh.dht.crawl import Answer, Crawl
from mesh.dht.datagrams import Codec
from mesh.dht.gather import Gathering
from mesh.dht.membership import Membership
from mesh.dht.protocol import MeshProtocol, Reply, Traffic
from mesh.dht.store import Outcome, RecordStore
from mesh.dht.table import Table
from mesh.errors import ConfigurationError, DeadlineExceeded
from mesh.identity import Identity, NodeId, dht_id
from mesh.network import Network
from mesh.records import (
    SignedRecord,
    WorkerRecord,
    model_key,
    open_record,
    sign_record,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """A contact of the routing table.

    `found` says how: ``join``, ``lan``, ``remembered`` or ``dht``; `last_seen` is seconds ago, `rtt`
    in seconds, `clock_offset` how many seconds its clock is ahead of ours; `failures` unanswered
    requests since it was last heard.
    """

    id: NodeId
    host: str
    port: int
    found: str
    last_seen: float
    rtt: float | None
    clock_offset: float
    failures: int


@dataclass(frozen=True, slots=True)
class Pong:
    """What a DHT peer said to a ping: who it is, how far, where it sees us, and its clock's lead."""

    peer_id: NodeId
    rtt: float
    seen_address: Address | None
    clock_offset: float


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a node keeps for the DHT."""

    contacts: int
    keys: int
    records: int
    traffic: Traffic


class Dht:
    """One node of the mesh's DHT.

    `client` asks without entering anyone's table and holds nothing; it may change at any time.
    `state_path` keeps the contacts over restarts. `limit_private` extends the limits per subnet to
    loopback and private addresses. `wall` (unix seconds) and `rng` are for simulations.
    """

    def __init__(
        self,
        identity: Identity | None,
        network: Network,
        *,
        state_path: Path | None = None,
        client: bool = False,
        limit_private: bool = False,
        wall: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        self._identity = identity
        self._network = network
        self._state_path = state_path
        self._client = client or identity is None
        self._limit_private = limit_private
        self._wall = wall
        self._rng = rng or random.SystemRandom()
        self._seq = 0
        self._own: dict[bytes, bytes] = {}
        self._protocol: MeshProtocol | None = None
        self._membership: Membership | None = None
        self._task: asyncio.Task[None] | None = None
        self._address: Address | None = None
        self._early: list[tuple[str, int, str]] = []

    # Life

    async def start(self, host: str, port: int, *, sock: socket.socket | None = None) -> None:
        """Listen on a UDP address, or on a bound socket. Raises OSError."""
        if self._protocol is not None:
            raise RuntimeError("already started")
        loop = asyncio.get_running_loop()
        identity = self._identity or Identity(self._rng.randbytes(32))
        table = Table(dht_id(identity.id), limit_private=self._limit_private)
        protocol = MeshProtocol(
            identity,
            Codec(self._network),
            RecordStore(limit_private=self._limit_private),
            table,
            client=self._client,
            clock=loop.time,
            wall=self._wall,
            rng=self._rng,
        )
        where = {"local_addr": (host, port)} if sock is None else {"sock": sock}
        transport, _ = await loop.create_datagram_endpoint(lambda: protocol, **where)
        name = transport.get_extra_info("sockname")
        self._address = (name[0], name[1])
        self._protocol = protocol
        self._membership = Membership(protocol, self._state_path, loop.time, self._wall, self._rng)
        for seed in self._early:
            self._membership.add_seed(*seed)
        self._task = loop.create_task(self._membership.run(), name="dht-membership")

    async def stop(self) -> None:
        """Leave: remember the contacts, close the socket, end every wait. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        if self._protocol is not None and self._membership is not None:
            self._membership.save()
            self._protocol.close()
            self._protocol = self._membership = None
        if task is not None and not task.cancelled():
            task.result()

    async def wait(self) -> None:
        """Until the node stops; raises what its upkeep raised, which would be a bug."""
        if self._task is not None:
            await asyncio.wait([self._task])
            if not self._task.cancelled():
                self._task.result()

    def join(self, addresses: Iterable[tuple[str, int]], *, found: str = "join") -> None:
        """Remember addresses (hosts may be names) and keep trying to reach them for ever.

        `found` tells people where an address comes from: ``join`` or ``lan``.
        """
        for host, port in addresses:
            if self._membership is None:
                self._early.append((host, port, found))
            else:
                self._membership.add_seed(host, port, found)

    # State

    @property
    def address(self) -> Address:
        """The local address of the socket."""
        if self._address is None:
            raise RuntimeError("not started")
        return self._address

    @property
    def client(self) -> bool:
        """Whether this node only asks."""
        return self._client

    @client.setter
    def client(self, value: bool) -> None:
        self._client = value or self._identity is None
        if self._protocol is not None:
            self._protocol.client = self._client

    @property
    def peers(self) -> list[PeerInfo]:
        """The contacts, the latest heard first."""
        now = asyncio.get_running_loop().time()
        contacts = sorted(self._running.router, key=lambda c: -c.last_seen)
        return [
            PeerInfo(
                NodeId(c.node_id), c.ip, c.port, c.found, now - c.last_seen, c.rtt, c.clock_offset, c.failures
            )
            for c in contacts
        ]

    @property
    def unreached(self) -> dict[tuple[str, int], str]:
        """The join addresses that do not answer now, and why."""
        return {} if self._membership is None else self._membership.unreached()

    @property
    def seen_address(self) -> Address | None:
        """The address at which most peers (counted by subnet) see this node; None before any said so."""
        votes: dict[Address, set[bytes]] = {}
        for teller, seen in self._running.seen_addresses.items():
            votes.setdefault(seen, set()).add(subnet(teller[0]))
        return max(votes, key=lambda seen: len(votes[seen]), default=None)

    @property
    def holdings(self) -> Holdings:
        """Contacts, records held for others, and traffic."""
        protocol = self._running
        return Holdings(
            len(protocol.router), len(protocol.storage), protocol.storage.records, protocol.traffic
        )

    @property
    def _running(self) -> MeshProtocol:
        if self._protocol is None:
            raise RuntimeError("the DHT node is not running")
        return self._protocol

    # Asking

    async def ping(self, host: str, port: int, timeout: float = limits.REQUEST_TIMEOUT) -> Pong:
        """Ping the DHT node at a numeric address.

        Raises DeadlineExceeded where nobody of this mesh answers, ValueError for a host name.
        """
        contact = await self._running.meet((normal(host), port), "dht", timeout)
        if contact is None or contact.rtt is None:
            raise DeadlineExceeded(
                f"no answer over UDP from {host}:{port} within {timeout:g} s: nobody of this mesh listens "
                "there, or a firewall drops the datagrams"
            )
        return Pong(NodeId(contact.node_id), contact.rtt, contact.seen_address, contact.clock_offset)

    async def lookup(self, model: str, want: int = 16) -> list[SignedRecord]:
        """Up to `want` workers of a model, or a few more; verified, healthy, at most one record each.

        Takes at most about `limits.LOOKUP_DEADLINE` seconds and then returns what there is.
        """
        key = model_key(self._network, model)

        def open_blob(blob: bytes) -> tuple[bytes, int, SignedRecord]:
            record = open_record(blob, self._network, key, self._wall())
            return record.node_id, record.seq, SignedRecord(record, blob, key)

        def useful(signed: SignedRecord) -> bool:
            return signed.record.health > 0 and signed.record.model == model

        gathering = Gathering(open_blob, useful, want, self._rng.randbytes(8))
        await self._gather(key, gathering)
        return gathering.values()

    async def _gather(self, key: bytes, gathering: Gathering[T]) -> None:
        protocol = self._running
        if key in self._own:
            gathering.add(self._own[key])
        for blob in protocol.storage.sample(key, b"", 0, self._wall()):
            gathering.add(blob)
        if gathering.enough:
            return
        try:
            async with asyncio.timeout(limits.LOOKUP_DEADLINE):
                await self._joined()
                crawl = Crawl(
                    protocol,
                    key,
                    self._nearest(key),
                    method="find_value",
                    arguments=gathering.arguments,
                    on_answer=lambda answer: gathering.take(answer.reply),
                )
                await self._page(key, gathering, await crawl.run())
        except TimeoutError:
            pass

    async def _page(self, key: bytes, gathering: Gathering[T], answers: list[Answer]) -> None:
        """Ask the holders for the rest of a key that has more records than fit into their first replies."""
        holders = [answer for answer in answers if answer.reply[3:4] not in ([], [0])]
        for _ in range(limits.MAX_PAGES):
            if gathering.complete or not holders:
                return
            batch, holders = holders[: limits.PARALLEL], holders[limits.PARALLEL :]
            replies = await self._ask_all(
                [(holder, "find_value", [key, *gathering.arguments()]) for holder in batch]
            )
            for holder, reply in zip(batch, replies, strict=True):
                if reply is not None:
                    gathering.take(reply)
                    holders.append(holder)

    # Announcing

    async def announce(self, record: WorkerRecord) -> int:
        """Publish a worker's record; how many other nodes took it (0 for a lone node, which keeps it).

        Raises ConfigurationError where the record does not fit, or the node has no identity.
        """
        if self._identity is None:
            raise ConfigurationError("a client without an identity cannot announce", "")
        key = model_key(self._network, record.model)
        blob = sign_record(record, self._identity, self._network, key)
        self._own[key] = blob
        return await self._publish(key, blob)

    async def withdraw(self, record: WorkerRecord) -> None:
        """Publish that a worker serves its model no more; takes `WITHDRAW_DEADLINE` at the most."""
        now = self._wall()
        last = replace(
            record,
            health=0,
            seq=max(int(now * 1000), record.seq + 1),
            expires=int(now + limits.WITHDRAWN_LIFETIME),
        )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limits.WITHDRAW_DEADLINE):
                await self.announce(last)

    async def _publish(self, key: bytes, blob: bytes) -> int:
        protocol = self._running
        if not self._client:
            protocol.storage.put(key, blob, None, self._wall())
        await self._joined()
        answers = await Crawl(protocol, key, self._nearest(key)).run()
        replies = await self._ask_all([(answer, "store", [key, blob]) for answer in answers])
        return sum(reply is not None and reply[2:3] == [Outcome.STORED] for reply in replies)

    async def _ask_all(self, requests: list[tuple[Answer, str, list[Any]]]) -> list[Reply | None]:
        return await asyncio.gather(
            *(
                self._running.call(answer.address, method, arguments, contact_id=answer.contact_id)
                for answer, method, arguments in requests
            )
        )

    def _nearest(self, key: bytes) -> list[tuple[bytes, Address]]:
        return [(contact.id, contact.address) for contact in self._running.router.closest(key)]

    async def _joined(self) -> None:
        if self._membership is not None:
            await self._membership.attempted()
