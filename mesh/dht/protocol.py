"""The DHT's datagrams in and out: requests answered at once, replies matched, contacts verified.

Four methods (docs/discovery.md gives their arrays): ``ping``, ``find_node``, ``find_value``, ``store``.
Everything happens inside `datagram_received` or a timer: no task is ever started here.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from kademlia.node import Node
from kademlia.protocol import KademliaProtocol

from mesh.dht import limits
from mesh.dht.addresses import (
    Address,
    may_introduce,
    normal,
    pack_address,
    pack_neighbours,
    parse,
    scope,
    unpack_address,
)
from mesh.dht.datagrams import ID_SIZE, OVERHEAD, REPLY, REQUEST, Codec, Tokens
from mesh.dht.store import Outcome, RecordStore
from mesh.dht.table import Contact, Table
from mesh.errors import MalformedMessage, ProtocolError
from mesh.identity import NODE_ID_SIZE, Identity, dht_id, verify
from mesh.limits import MAX_AMPLIFICATION, MAX_DATAGRAM
from mesh.records import KEY_SIZE

Reply = list[Any]
"""``[node id, token, …]``; the first two are checked."""

_PONG_DOMAIN = b"qmesh/dht/1"
"""Keeps a pong's signature from passing for one over anything else."""
_NONCE_SIZE = 16
_SEEN_ADDRESSES = 64
_FIND_HEAD = OVERHEAD + 64
"""Bytes of a find reply besides its neighbours and records: ids, token, counts and msgpack's own."""
_NEIGHBOURS_WITH_RECORDS = 8


@dataclass(slots=True)
class Traffic:
    """Counters since the start."""

    datagrams_in: int = 0
    datagrams_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    dropped: int = 0
    """Datagrams that were not valid, or whose answer would have been too large."""


@dataclass(slots=True)
class Request:
    """A checked request: who asks from where, and how large the answer may be."""

    address: Address
    asker: bytes
    """32-byte node id, or empty for a client."""
    trusted: bool
    """It showed a token: the address is really its own."""
    arguments: list[Any]
    budget: int


@dataclass(slots=True)
class _Pending:
    address: Address
    contact_id: bytes | None
    sent: float
    done: Callable[[Reply | None], None]
    slow: Callable[[], None] | None
    timer: asyncio.TimerHandle | None = None


@dataclass(frozen=True, slots=True)
class _Ping:
    """What is needed to judge a pong."""

    address: Address
    nonce: bytes
    token: bytes
    sent: float
    found: str


@dataclass(slots=True)
class _Bounded:
    """A dict that forgets its oldest entry when it is full."""

    size: int
    _items: OrderedDict[Address, Any] = field(default_factory=OrderedDict)

    def set(self, key: Address, value: Any) -> None:
        self._items[key] = value
        self._items.move_to_end(key)
        if len(self._items) > self.size:
            self._items.popitem(last=False)

    def get(self, key: Address) -> Any:
        return self._items.get(key)

    def discard(self, key: Address) -> None:
        self._items.pop(key, None)

    def clear(self) -> None:
        self._items.clear()

    def items(self) -> list[tuple[Address, Any]]:
        return list(self._items.items())


class MeshProtocol(KademliaProtocol):  # type: ignore[misc]  # the package has no types
    """One node's side of the DHT.

    `identity` None is a client that has no id of its own; with `client` True nobody is told an id,
    and no request is answered. `clock` is monotonic, `wall` unix time, both in seconds.
    """

    def __init__(
        self,
        identity: Identity,
        codec: Codec,
        storage: RecordStore,
        table: Table,
        *,
        client: bool,
        clock: Callable[[], float],
        wall: Callable[[], float],
        rng: random.Random,
    ) -> None:
        super().__init__(Node(dht_id(identity.id)), storage, limits.BUCKET_SIZE)
        self.router = table
        self.client = client
        self.traffic = Traffic()
        self.seen_addresses = _Bounded(_SEEN_ADDRESSES)
        self._identity = identity
        self._codec = codec
        self._clock = clock
        self._wall = wall
        self._rng = rng
        self._issued = Tokens(rng.randbytes(32))
        self._pending: dict[bytes, _Pending] = {}
        self._verifying: set[Address] = set()
        self._tokens = _Bounded(limits.MAX_REMEMBERED_TOKENS)
        self._silent = _Bounded(limits.MAX_REMEMBERED_FAILURES)
        self._family = socket.AF_INET
        self._dual_stack = False
        self._methods = {
            "ping": self.rpc_ping,
            "find_node": self.rpc_find_node,
            "find_value": self.rpc_find_value,
            "store": self.rpc_store,
        }

    def __getattr__(self, name: str) -> Any:
        """The package turns unknown attributes into remote calls; here they are the mistakes they are."""
        raise AttributeError(name)

    # Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: the socket is bound."""
        self.transport: asyncio.DatagramTransport | None = cast(asyncio.DatagramTransport, transport)
        sock = transport.get_extra_info("socket")
        self._family = sock.family
        if self._family == socket.AF_INET6:
            self._dual_stack = not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)

    def error_received(self, exc: OSError) -> None:
        """asyncio: an ICMP error. The timeout of the request says the same, of the right peer."""

    def reachable(self, address: Address) -> bool:
        """Whether the socket can send there at all."""
        host, port = address
        if not 0 < port < 65536 or scope(host) == 3:
            return False
        if parse(host).version == 4:
            return self._family == socket.AF_INET or self._dual_stack
        return self._family == socket.AF_INET6

    def close(self) -> None:
        """End every wait; nothing is sent or answered from now on."""
        transport, self.transport = self.transport, None
        if transport is not None:
            transport.close()
        pending, self._pending = self._pending, {}
        for waiting in pending.values():
            if waiting.timer is not None:
                waiting.timer.cancel()
            waiting.done(None)

    def _send(self, data: bytes, address: Address) -> None:
        if self.transport is None:
            return
        host, port = address
        if self._family == socket.AF_INET6 and parse(host).version == 4:
            host = f"::ffff:{host}"
        self.traffic.datagrams_out += 1
        self.traffic.bytes_out += len(data)
        self.transport.sendto(data, (host, port))

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        """asyncio: a datagram, from anybody and holding anything."""
        self.traffic.datagrams_in += 1
        self.traffic.bytes_in += len(data)
        try:
            kind, message_id, payload = self._codec.decode(data)
            address = (normal(addr[0]), addr[1])
            if kind == REQUEST and not self.client:
                self._answer(message_id, payload, address, len(data))
            elif kind == REPLY:
                self._settle(message_id, payload, address)
        except ProtocolError:
            self.traffic.dropped += 1

    # Answering

    def _answer(self, message_id: bytes, payload: list[Any], address: Address, size: int) -> None:
        match payload:
            case [str(method), [bytes(asker), bytes(token), *arguments]] if method in self._methods:
                pass
            case _:
                raise MalformedMessage("not a request")
        if len(asker) not in (0, NODE_ID_SIZE) or not self.reachable(address):
            raise MalformedMessage("not an asker")
        trusted = self._issued.valid(token, address[0], self._clock())
        budget = MAX_DATAGRAM if trusted else min(MAX_DATAGRAM, MAX_AMPLIFICATION * size)
        request = Request(address, asker, trusted, arguments, budget)
        own_token = self._issued.issue(address[0], self._clock())
        answer = self._methods[method](request)
        reply = self._codec.encode(REPLY, message_id, [self._identity.id, own_token, *answer])
        if len(reply) > budget:
            raise MalformedMessage("a request too small for its answer")
        self._send(reply, address)
        if trusted and asker:
            self._heard(asker, address)

    def rpc_ping(self, request: Request) -> Reply:
        """``[nonce] → [seen address, unix ms, signature]``: proves the id, tells the asker its address."""
        match request.arguments:
            case [bytes(nonce), *_] if len(nonce) == _NONCE_SIZE:
                seen = pack_address(request.address)
                now = int(self._wall() * 1000)
                return [seen, now, self._identity.sign(_pong_text(nonce, seen, now))]
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
        now = self._wall()
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
        now = self._wall()
        if not request.trusted:
            return [Outcome.BAD_TOKEN, 0]
        outcome = self.storage.put(key, blob, request.address[0], now)
        return [outcome, self.storage.count(key, now)]

    def _neighbours(self, target: bytes, request: Request, most: int) -> bytes:
        room = request.budget - _FIND_HEAD
        near = [
            (contact.id, contact.address)
            for contact in self.router.closest(target, most + 1)
            if contact.node_id != request.asker and may_introduce(request.address[0], contact.ip)
        ]
        packed = b""
        for item in pack_neighbours(near[:most]):
            if len(packed) + len(item) > room:
                break
            packed += item
        return packed

    # Asking

    def request(
        self,
        address: Address,
        method: str,
        arguments: list[Any],
        done: Callable[[Reply | None], None],
        *,
        contact_id: bytes | None = None,
        slow: Callable[[], None] | None = None,
        timeout: float = limits.REQUEST_TIMEOUT,
    ) -> None:
        """Send a request; `done` is called once, with the reply or None, `slow` before if it takes long.

        A reply of another peer than `contact_id` (a DHT id) counts as none.
        """
        if self.transport is None or len(self._pending) >= limits.MAX_PENDING or not self.reachable(address):
            done(None)
            return
        message_id = self._rng.randbytes(ID_SIZE)
        token = self._token(address)
        asker = b"" if self.client else self._identity.id
        payload = [asker, token, *arguments]
        data = self._codec.encode(REQUEST, message_id, [method, payload])
        if not token and method.startswith("find_"):
            padding = bytes(max(0, limits.FIND_REQUEST_SIZE - len(data)))
            data = self._codec.encode(REQUEST, message_id, [method, [*payload, padding]])
        pending = _Pending(address, contact_id, self._clock(), done, slow)
        self._pending[message_id] = pending
        loop = asyncio.get_running_loop()
        if slow is None:
            pending.timer = loop.call_later(timeout, self._expire, message_id)
        else:
            pending.timer = loop.call_later(limits.SOFT_TIMEOUT, self._slow, message_id, timeout)
        self._send(data, address)

    async def call(self, address: Address, method: str, arguments: list[Any], **how: Any) -> Reply | None:
        """`request` to be awaited; cancelling it leaves no trace."""
        future: asyncio.Future[Reply | None] = asyncio.get_running_loop().create_future()

        def done(reply: Reply | None) -> None:
            if not future.done():
                future.set_result(reply)

        self.request(address, method, arguments, done, **how)
        return await future

    def is_silent(self, address: Address) -> bool:
        """Whether a request to the address went unanswered a short while ago."""
        until = self._silent.get(address)
        return until is not None and until > self._clock()

    def forget_silence(self) -> None:
        """Try everybody again, as after a time without a network."""
        self._silent.clear()

    def _token(self, address: Address) -> bytes:
        token, since = self._tokens.get(address) or (b"", 0.0)
        return token if self._clock() - since < limits.TOKEN_REUSE else b""

    def _slow(self, message_id: bytes, timeout: float) -> None:
        pending = self._pending[message_id]
        rest = timeout - limits.SOFT_TIMEOUT
        pending.timer = asyncio.get_running_loop().call_later(rest, self._expire, message_id)
        self._silent.set(pending.address, self._clock() + rest)
        if pending.slow is not None:
            pending.slow()

    def _expire(self, message_id: bytes) -> None:
        pending = self._pending.pop(message_id)
        self._failed(pending.address)
        pending.done(None)

    def _failed(self, address: Address) -> None:
        self._silent.set(address, self._clock() + limits.FAILURE_MEMORY)
        contact = self.router.at(address)
        if contact is not None:
            self.router.failed(contact)

    def _settle(self, message_id: bytes, reply: list[Any], address: Address) -> None:
        pending = self._pending.get(message_id)
        if pending is None or pending.address != address:
            raise MalformedMessage("a reply to nothing")
        del self._pending[message_id]
        if pending.timer is not None:
            pending.timer.cancel()
        match reply:
            case [bytes(node_id), bytes(token), *_] if len(node_id) == NODE_ID_SIZE and len(token) <= 64:
                contact_id = dht_id(node_id)
            case _:
                contact_id = b""
        if contact_id in (b"", self.source_node.id) or pending.contact_id not in (None, contact_id):
            self._failed(address)
            pending.done(None)
            return
        now = self._clock()
        self._silent.discard(address)
        self._tokens.set(address, (token, now))
        contact = self.router.at(address)
        if contact is not None and contact.id == contact_id:
            contact.seen(now, now - pending.sent)
        pending.done(reply)
        self._heard(node_id, address)

    # Contacts

    def _heard(self, node_id: bytes, address: Address) -> None:
        """A peer asked or answered from an address that is its own: verify it if it may enter the table."""
        contact_id = dht_id(node_id)
        contact = self.router.get(contact_id)
        if contact is not None and contact.address == address:
            contact.seen(self._clock())
        elif not self.is_silent(address) and self.router.wants(contact_id, address):
            self._verify(address, contact_id)

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
        return _Ping(address, nonce, self._token(address), self._clock(), found)

    def ping_arguments(self) -> list[bytes]:
        """What a ping carries: the nonce that its answer must sign."""
        return [self._rng.randbytes(_NONCE_SIZE)]

    def _admit(self, ping: _Ping, reply: Reply) -> Contact | None:
        contact = self._proven(ping, reply)
        if contact is None:
            return None
        self.router.add(contact)
        if reply[1] != ping.token and not self.client:
            # The peer could not trust our first ping; this one shows its token, so that it can meet us.
            arguments = self.ping_arguments()
            self.request(ping.address, "ping", arguments, lambda _: None, contact_id=contact.id)
        return contact

    def _proven(self, ping: _Ping, reply: Reply) -> Contact | None:
        match reply:
            case [bytes(node_id), _, bytes(seen), int(unix_ms), bytes(signature), *_] if (
                0 <= unix_ms < 1 << 53
            ):
                pass
            case _:
                return None
        if not verify(node_id, _pong_text(ping.nonce, seen, unix_ms), signature):
            return None
        now = self._clock()
        contact = Contact(node_id, ping.address, ping.found, now)
        contact.seen(now, now - ping.sent)
        contact.clock_offset = unix_ms / 1000 - (self._wall() - (now - ping.sent) / 2)
        try:
            contact.seen_address = unpack_address(seen)
        except MalformedMessage:
            return None
        self.seen_addresses.set(ping.address, contact.seen_address)
        return contact


def _pong_text(nonce: bytes, seen: bytes, unix_ms: int) -> bytes:
    return _PONG_DOMAIN + nonce + seen + unix_ms.to_bytes(8)
