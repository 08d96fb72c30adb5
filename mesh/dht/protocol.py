"""What a node of the DHT answers, and whom it takes into its table.

Four methods (docs/discovery.md gives their arrays): ``ping``, ``find_node``, ``find_value``, ``store``.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import Any

from mesh.dht import limits
from mesh.dht.addresses import (
    Address,
    may_introduce,
    pack_address,
    unpack_address,
)
from mesh.dht.datagrams import OVERHEAD
from mesh.dht.rpc import Recent, Reply, Request, Role, RpcProtocol
from mesh.dht.store import Outcome
from mesh.dht.table import Contact
from mesh.errors import MalformedMessage
from mesh.identity import dht_id, verify
from mesh.records import KEY_SIZE

_PONG_DOMAIN = b"qmesh/dht/1"
"""Keeps a pong's signature from passing for one over anything else."""
_NONCE_SIZE = 16
_INSTANCE_SIZE = 16
_OWN_ADDRESS_MEMORY = 60.0
_MOVED_AFTER = 30.0
_SEEN_ADDRESSES = 64
_FIND_HEAD = OVERHEAD + 64
"""Bytes of a find reply besides its neighbours and records: ids, token, counts and msgpack's own."""
_NEIGHBOURS_WITH_RECORDS = 8


@dataclass(frozen=True, slots=True)
class _Ping:
    """What is needed to judge a pong."""

    address: Address
    nonce: bytes
    token: bytes
    sent: float
    found: str


@dataclass(frozen=True, slots=True)
class Duplicate:
    """Another running node has our identity. The one that started `later` is to stop."""

    address: Address
    later: bool
    """Whether we are that one."""


class MeshProtocol(RpcProtocol):
    """One node's side of the DHT."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        started = int(self.environment.wall() * 1000).to_bytes(8)
        self._instance = started + self.environment.rng.randbytes(_INSTANCE_SIZE - 8)
        """When we started, then chance: who tells us the same instance is ourselves."""
        self.duplicate: asyncio.Future[Duplicate] = asyncio.get_running_loop().create_future()
        self._own_addresses = Recent(_SEEN_ADDRESSES)
        self.seen_addresses = Recent(_SEEN_ADDRESSES)
        """Where peers see us, by their address."""
        self._verifying: set[Address] = set()
        self._methods = {
            "ping": self.rpc_ping,
            "find_node": self.rpc_find_node,
            "find_value": self.rpc_find_value,
            "store": self.rpc_store,
        }

    # Answering

    def answer(self, method: str, request: Request) -> Reply:
        """The reply's part behind node id and token. Raises MalformedMessage."""
        handler = self._methods.get(method)
        if handler is None:
            raise MalformedMessage("no such method")
        return handler(request)

    def rpc_ping(self, request: Request) -> Reply:
        """``[nonce] → [seen address, unix ms, instance, signature]``: proves who we are and since when."""
        match request.arguments:
            case [bytes(nonce), *_] if len(nonce) == _NONCE_SIZE:
                seen = pack_address(request.address)
                now = int(self.environment.wall() * 1000)
                signature = self.identity.sign(_pong_text(nonce, seen, now, self._instance))
                return [seen, now, self._instance, signature]
        raise MalformedMessage("not a ping")

    def rpc_find_node(self, request: Request) -> Reply:
        """``[target, padding] → [neighbours]``."""
        match request.arguments:
            case [bytes(target), *_] if len(target) == KEY_SIZE:
                return [self._neighbours(target, request, limits.BUCKET_SIZE)]
        raise MalformedMessage("not a find_node")

    def rpc_find_value(self, request: Request) -> Reply:
        """``[key, salt, skip, padding] → [neighbours, count, [record, …]]``."""
        match request.arguments:
            case [bytes(key), bytes(salt), int(skip), *_] if len(key) == KEY_SIZE and len(salt) <= 64:
                pass
            case _:
                raise MalformedMessage("not a find_value")
        now = self.environment.wall()
        count = self.storage.count(key, now)
        neighbours = self._neighbours(key, request, _NEIGHBOURS_WITH_RECORDS if count else limits.BUCKET_SIZE)
        room = request.budget - _FIND_HEAD - len(neighbours)
        records = []
        for blob in self.storage.sample(key, salt, skip, now) if count else ():
            room -= len(blob) + 3
            if room < 0:
                break
            records.append(blob)
        return [neighbours, count, records]

    def rpc_store(self, request: Request) -> Reply:
        """``[key, record] → [outcome, count]``."""
        match request.arguments:
            case [bytes(key), bytes(blob)] if len(key) == KEY_SIZE:
                pass
            case _:
                raise MalformedMessage("not a store")
        now = self.environment.wall()
        if not request.trusted:
            return [Outcome.BAD_TOKEN, 0]
        outcome = self.storage.put(key, blob, request.address[0], now)
        return [outcome, self.storage.count(key, now)]

    def _neighbours(self, target: bytes, request: Request, most: int) -> bytes:
        room = request.budget - _FIND_HEAD
        packed = b""
        for contact in self.router.closest(target, most):
            if contact.address == request.address or not may_introduce(request.address[0], contact.ip):
                continue
            if len(packed) + len(contact.packed) > room:
                break
            packed += contact.packed
        return packed

    # Contacts

    def heard(self, node_id: bytes, address: Address) -> None:
        """Verify whom we meet, if there is room in the table."""
        self.forget_silence(address)
        now = self.environment.clock()
        contact_id = dht_id(node_id)
        contact = self.router.get(contact_id)
        if contact_id == self.source_node.id:
            self.met_own_id(address)
        elif contact is not None and contact.address == address:
            contact.seen(now)
        elif self.router.wants(contact_id, address):
            self._verify(address, contact_id)
        elif contact is not None and now - contact.last_seen > _MOVED_AFTER:
            # It may have moved: whether it is still at its old address decides.
            self._verify(contact.address, contact_id)

    def met_own_id(self, address: Address) -> None:
        """Somebody says that our id is at an address: ours, or of another node with our key."""
        now = self.environment.clock()
        if now - (self._own_addresses.get(address) or -math.inf) > _OWN_ADDRESS_MEMORY:
            self._own_addresses.set(address, now)
            self._verify(address, self.source_node.id)

    def _verify(self, address: Address, contact_id: bytes) -> None:
        """Ping a peer that was met; it enters the table if it proves its id."""
        if address in self._verifying or len(self._verifying) >= limits.MAX_VERIFYING:
            return
        self._verifying.add(address)
        ping = self._ping(address, "dht")

        def finish(reply: Reply | None) -> None:
            self._verifying.discard(address)
            if reply is not None:
                self._admit(ping, reply)

        self.request(address, "ping", [ping.nonce], finish, contact_id=contact_id)

    async def meet(
        self, address: Address, found: str, timeout: float = limits.REQUEST_TIMEOUT
    ) -> Contact | None:
        """Ping an address; who answers and proves its id enters the table where there is room."""
        ping = self._ping(address, found)
        reply = await self.call(address, "ping", [ping.nonce], timeout=timeout)
        return None if reply is None else self._admit(ping, reply)

    def _ping(self, address: Address, found: str) -> _Ping:
        [nonce] = self.ping_arguments()
        return _Ping(address, nonce, self.token(address), self.environment.clock(), found)

    def ping_arguments(self) -> list[bytes]:
        """What a ping carries: the nonce that its answer must sign."""
        return [self.environment.rng.randbytes(_NONCE_SIZE)]

    def _admit(self, ping: _Ping, reply: Reply) -> Contact | None:
        contact = self._proven(ping, reply)
        if contact is None:
            return None
        if reply[1] != ping.token and self.role is Role.HOLDER:
            # The peer could not trust our first ping; this one shows its token, so that it can meet us.
            arguments = self.ping_arguments()
            self.request(ping.address, "ping", arguments, lambda _: None, contact_id=contact.id)
        if contact.id == self.source_node.id:
            self._compare_instances(ping.address, reply[4])
            return None
        known = self.router.get(contact.id)
        if known is not None and known.address == contact.address:
            known.update(contact)
        else:
            if self.router.isolated:
                # We were without a network, and blamed the others for it.
                self.forget_silence()
            self.router.add(contact)
        return contact

    def _compare_instances(self, address: Address, instance: bytes) -> None:
        self._own_addresses.set(address, self.environment.clock())
        if instance != self._instance and not self.duplicate.done():
            self.duplicate.set_result(Duplicate(address, self._instance > instance))
            # The other is to know it too.
            self.request(address, "ping", self.ping_arguments(), lambda _: None, introduce=True)

    def _proven(self, ping: _Ping, reply: Reply) -> Contact | None:
        match reply:
            case [bytes(node_id), _, bytes(seen), int(unix_ms), bytes(instance), bytes(signature), *_] if (
                0 <= unix_ms < 1 << 53 and len(instance) == _INSTANCE_SIZE
            ):
                pass
            case _:
                return None
        if not verify(node_id, _pong_text(ping.nonce, seen, unix_ms, instance), signature):
            return None
        now = self.environment.clock()
        contact = Contact(node_id, ping.address, ping.found, now)
        contact.seen(now, now - ping.sent)
        contact.clock_offset = unix_ms / 1000 - (self.environment.wall() - (now - ping.sent) / 2)
        try:
            contact.seen_address = unpack_address(seen)
        except MalformedMessage:
            return None
        self.seen_addresses.set(ping.address, contact.seen_address)
        return contact


def _pong_text(nonce: bytes, seen: bytes, unix_ms: int, instance: bytes) -> bytes:
    return _PONG_DOMAIN + nonce + seen + unix_ms.to_bytes(8) + instance
