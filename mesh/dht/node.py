"""A node of the DHT: joins and stays joined, announces workers, looks them up."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesh.dht import limits
from mesh.dht.addresses import Address, normal, subnet
from mesh.dht.announcing import Announcing
from mesh.dht.datagrams import Codec
from mesh.dht.environment import Environment
from mesh.dht.lookups import Lookups
from mesh.dht.membership import Membership
from mesh.dht.protocol import Duplicate, MeshProtocol
from mesh.dht.rpc import Role, Traffic
from mesh.dht.store import RecordStore
from mesh.dht.table import Table
from mesh.errors import ConfigurationError, DeadlineExceeded
from mesh.identity import Identity, NodeId, dht_id
from mesh.network import Network
from mesh.records import SignedRecord, WorkerRecord


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


@dataclass(frozen=True, slots=True)
class _Parts:
    protocol: MeshProtocol
    membership: Membership
    lookups: Lookups
    announcing: Announcing | None


class Dht:
    """One node of the mesh's DHT.

    `role` may change at any time; without an identity a node is a client.
    `state_path` keeps the contacts over restarts. `limit_private` extends the limits per subnet to
    loopback and private addresses. `clock` (monotonic seconds; an event loop's own may be too coarse for
    round trips), `wall` (unix seconds) and `rng` are for simulations.
    """

    def __init__(
        self,
        identity: Identity | None,
        network: Network,
        *,
        state_path: Path | None = None,
        role: Role = Role.HOLDER,
        limit_private: bool = False,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        self._identity = identity
        self._network = network
        self._state_path = state_path
        self._role = Role.CLIENT if identity is None else role
        self._limit_private = limit_private
        self._clock = clock
        self._wall = wall
        self._rng = rng or random.SystemRandom()
        self._running: _Parts | None = None
        self._task: asyncio.Task[None] | None = None
        self._address: Address | None = None
        self._early: list[tuple[str, int, str]] = []

    # Life

    async def start(self, host: str, port: int, *, sock: socket.socket | None = None) -> None:
        """Listen on a UDP address, or on a bound socket. Raises OSError."""
        if self._running is not None:
            raise RuntimeError("already started")
        loop = asyncio.get_running_loop()
        parts = self._build(Environment(self._clock, self._wall, self._rng))
        where: dict[str, Any] = {"local_addr": (host, port)} if sock is None else {"sock": sock}
        transport, _ = await loop.create_datagram_endpoint(lambda: parts.protocol, **where)
        name = transport.get_extra_info("sockname")
        self._address = (name[0], name[1])
        self._running = parts
        for seed in self._early:
            parts.membership.add_seed(*seed)
        self._task = loop.create_task(parts.membership.run(), name="dht-membership")

    def _build(self, environment: Environment) -> _Parts:
        identity = self._identity or Identity(self._rng.randbytes(32))
        protocol = MeshProtocol(
            identity,
            Codec(self._network),
            RecordStore(limit_private=self._limit_private),
            Table(dht_id(identity.id), limit_private=self._limit_private),
            environment,
            role=self._role,
        )
        membership = Membership(protocol, self._state_path, environment)
        lookups = Lookups(
            protocol,
            self._network,
            joined=membership.attempted,
            own=self._own_records,
            environment=environment,
        )
        announcing = None
        if self._identity is not None:
            announcing = Announcing(protocol, lookups, self._identity, self._network, environment)
        return _Parts(protocol, membership, lookups, announcing)

    def _own_records(self, key: bytes) -> Iterable[bytes]:
        announcing = self._parts.announcing
        return () if announcing is None else announcing.own(key)

    async def stop(self) -> None:
        """Leave: remember the contacts, close the socket, end every wait. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        if self._running is not None:
            self._running.membership.save()
            self._running.protocol.close()
            self._running = None
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
            if self._running is None:
                self._early.append((host, port, found))
            else:
                self._running.membership.add_seed(host, port, found)

    # State

    @property
    def address(self) -> Address:
        """The local address of the socket."""
        if self._address is None:
            raise RuntimeError("not started")
        return self._address

    @property
    def role(self) -> Role:
        """What this node is to the others."""
        return self._role

    @role.setter
    def role(self, role: Role) -> None:
        self._role = Role.CLIENT if self._identity is None else role
        if self._running is not None:
            self._running.protocol.role = self._role

    @property
    def peers(self) -> list[PeerInfo]:
        """The contacts, the latest heard first."""
        now = self._clock()
        contacts = sorted(self._parts.protocol.router, key=lambda c: -c.last_seen)
        return [
            PeerInfo(
                NodeId(c.node_id), c.ip, c.port, c.found, now - c.last_seen, c.rtt, c.clock_offset, c.failures
            )
            for c in contacts
        ]

    @property
    def unreached(self) -> dict[tuple[str, int], str]:
        """The join addresses that do not answer now, and why."""
        return {} if self._running is None else self._running.membership.unreached()

    @property
    def seen_address(self) -> Address | None:
        """The address at which most peers (counted by subnet) see this node; None before any said so."""
        votes: dict[Address, set[bytes]] = {}
        for teller, seen in self._parts.protocol.seen_addresses.items():
            votes.setdefault(seen, set()).add(subnet(teller[0]))
        return max(votes, key=lambda seen: len(votes[seen]), default=None)

    async def duplicate(self) -> Duplicate:
        """Wait until another running node shows that it has our identity, which may be never."""
        return await asyncio.shield(self._parts.protocol.duplicate)

    @property
    def holdings(self) -> Holdings:
        """Contacts, records held for others, and traffic."""
        protocol = self._parts.protocol
        return Holdings(
            len(protocol.router), len(protocol.storage), protocol.storage.records, protocol.traffic
        )

    # Asking

    async def ping(self, host: str, port: int, timeout: float = limits.REQUEST_TIMEOUT) -> Pong:
        """Ping the DHT node at a numeric address.

        Raises DeadlineExceeded where nobody of this mesh answers, ValueError for a host name.
        """
        contact = await self._parts.protocol.meet((normal(host), port), "dht", timeout)
        if contact is None or contact.rtt is None:
            raise DeadlineExceeded(
                f"no answer over UDP from {host}:{port} within {timeout:g} s: nobody of this mesh listens "
                "there, or a firewall drops the datagrams"
            )
        return Pong(NodeId(contact.node_id), contact.rtt, contact.seen_address, contact.clock_offset)

    async def lookup(self, model: str, want: int = 16) -> list[SignedRecord]:
        """About `want` workers of a model; verified, healthy, at most one record of each.

        A random sample where there are more. Takes at most about `limits.LOOKUP_DEADLINE` seconds and
        then returns what there is.
        """
        return await self._parts.lookups.lookup(model, want)

    async def models(self) -> dict[str, int]:
        """The models of the mesh, each with its number of workers (exact for few, else an estimate)."""
        return await self._parts.lookups.models()

    # Announcing

    async def announce(self, record: WorkerRecord) -> int:
        """Publish a worker's record; how many other nodes took it (0 for a lone node, which keeps it).

        Raises ConfigurationError where the record does not fit, or the node has no identity.
        """
        return await self._announcing.announce(record)

    async def withdraw(self, record: WorkerRecord) -> None:
        """Publish that a worker serves its model no more; takes `WITHDRAW_DEADLINE` at the most."""
        await self._announcing.withdraw(record)

    @property
    def _announcing(self) -> Announcing:
        if self._parts.announcing is None:
            raise ConfigurationError("a client without an identity cannot announce", "Give it an identity.")
        return self._parts.announcing

    @property
    def _parts(self) -> _Parts:
        if self._running is None:
            raise RuntimeError("the DHT node is not running")
        return self._running
