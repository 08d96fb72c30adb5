"""Requests and replies over datagrams: matched, bounded, timed. Nothing here starts a task.

Everything happens inside `datagram_received` or a timer. Replaces rpcudp's task per datagram, its
unbounded waiting and its remote calls by attribute access.
"""

from __future__ import annotations

import asyncio
import socket
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, cast

from kademlia.node import Node
from kademlia.protocol import KademliaProtocol

from mesh.dht import limits
from mesh.dht.addresses import Address, normal, parse, scope
from mesh.dht.datagrams import ID_SIZE, REPLY, REQUEST, Codec, Tokens
from mesh.dht.environment import Environment
from mesh.dht.store import RecordStore
from mesh.dht.table import Table
from mesh.errors import MalformedMessage, ProtocolError
from mesh.identity import NODE_ID_SIZE, Identity, dht_id
from mesh.limits import MAX_AMPLIFICATION, MAX_DATAGRAM

Reply = list[Any]
"""``[node id, token, …]``; the first two are checked."""


class Role(Enum):
    """What a node is to the others."""

    HOLDER = "holder"
    """It is in their tables and keeps records for them."""
    NEWCOMER = "newcomer"
    """It answers, but tells nobody its id while it is not known whether others can reach it."""
    CLIENT = "client"
    """It only asks. Of what it is asked it answers the pings of other clients: so it can be found out
    whether it is reachable after all."""


_NEVER_SILENT = (0.0, limits.FIRST_SILENCE)
"""Until when an address is left out, and for how long after its next failure."""


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


@dataclass(slots=True)
class Recent:
    """Something about addresses; the oldest is forgotten when it is full."""

    size: int
    _items: OrderedDict[Address, Any] = field(default_factory=OrderedDict)

    def set(self, key: Address, value: Any) -> None:
        """Note a value; the address is the newest now."""
        self._items[key] = value
        self._items.move_to_end(key)
        if len(self._items) > self.size:
            self._items.popitem(last=False)

    def get(self, key: Address) -> Any:
        """The value of an address, or None."""
        return self._items.get(key)

    def discard(self, key: Address) -> None:
        """Forget an address."""
        self._items.pop(key, None)

    def clear(self) -> None:
        """Forget all."""
        self._items.clear()

    def items(self) -> list[tuple[Address, Any]]:
        """(address, value), the oldest first."""
        return list(self._items.items())


class RpcProtocol(KademliaProtocol):  # type: ignore[misc]  # the package has no types
    """The sockets' side of a node. Only a holder tells its id."""

    router: Table
    storage: RecordStore
    source_node: Node

    def __init__(
        self,
        identity: Identity,
        codec: Codec,
        storage: RecordStore,
        table: Table,
        environment: Environment,
        *,
        role: Role,
    ) -> None:
        super().__init__(Node(dht_id(identity.id)), storage, limits.BUCKET_SIZE)
        self.router = table
        self.role = role
        self.identity = identity
        self.environment = environment
        self.traffic = Traffic()
        self.transport: asyncio.DatagramTransport | None = None
        self.socket_error: OSError | None = None
        """The last refusal of the system to send."""
        self._codec = codec
        self._issued = Tokens(environment.rng.randbytes(32))
        self._pending: dict[bytes, _Pending] = {}
        self._tokens = Recent(limits.MAX_REMEMBERED_TOKENS)
        self._silent = Recent(limits.MAX_REMEMBERED_FAILURES)
        self._family = socket.AF_INET
        self._dual_stack = False

    def __getattr__(self, name: str) -> Any:
        """The package turns unknown attributes into remote calls; here they are the mistakes they are."""
        raise AttributeError(name)

    # Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: the socket is bound."""
        self.transport = cast(asyncio.DatagramTransport, transport)
        sock = transport.get_extra_info("socket")
        self._family = sock.family
        if self._family == socket.AF_INET6:
            self._dual_stack = not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)

    def error_received(self, exc: OSError) -> None:
        """asyncio: the system would not send. Whom it concerns, the timeout of the request tells."""
        self.socket_error = exc

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
            if kind == REQUEST:
                self._answer(message_id, payload, address, len(data))
            elif kind == REPLY:
                self._settle(message_id, payload, address)
        except ProtocolError:
            self.traffic.dropped += 1

    # Answering

    def answer(self, method: str, request: Request) -> Reply:
        """The reply's part behind node id and token. Raises MalformedMessage."""
        raise NotImplementedError

    def heard(self, node_id: bytes, address: Address) -> None:
        """Somebody asked or answered from an address that is shown to be its own."""
        raise NotImplementedError

    def _answer(self, message_id: bytes, payload: list[Any], address: Address, size: int) -> None:
        match payload:
            case [str(method), [bytes(asker), bytes(token), *arguments]]:
                pass
            case _:
                raise MalformedMessage("not a request")
        if len(asker) not in (0, NODE_ID_SIZE) or not self.reachable(address):
            raise MalformedMessage("not an asker")
        if self.role is Role.CLIENT and (asker or method != "ping"):
            raise MalformedMessage("nothing to ask of a client")
        now = self.environment.clock()
        trusted = self._issued.valid(token, address[0], now)
        budget = MAX_DATAGRAM if trusted else min(MAX_DATAGRAM, MAX_AMPLIFICATION * size)
        parts = self.answer(method, Request(address, asker, trusted, arguments, budget))
        token = self._issued.issue(address[0], now)
        reply = self._codec.encode(REPLY, message_id, [self.identity.id, token, *parts])
        if len(reply) > budget:
            raise MalformedMessage("a request too small for its answer")
        self._send(reply, address)
        if trusted and asker:
            self.heard(asker, address)

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
        introduce: bool = False,
    ) -> None:
        """Send a request; `done` is called once, with the reply or None, `slow` before if it takes long.

        A reply of another peer than `contact_id` (a DHT id) counts as none. `introduce` tells our id
        whatever our role.
        """
        if self.transport is None or len(self._pending) >= limits.MAX_PENDING or not self.reachable(address):
            done(None)
            return
        message_id = self.environment.rng.randbytes(ID_SIZE)
        token = self.token(address)
        asker = self.identity.id if introduce or self.role is Role.HOLDER else b""
        payload = [asker, token, *arguments]
        data = self._codec.encode(REQUEST, message_id, [method, payload])
        lacking = limits.LEAST_SIZES.get(method, 0) - len(data)
        if not token and lacking > 0:
            data = self._codec.encode(REQUEST, message_id, [method, [*payload, bytes(lacking)]])
        pending = _Pending(address, contact_id, self.environment.clock(), done, slow)
        self._pending[message_id] = pending
        loop = asyncio.get_running_loop()
        if slow is None:
            pending.timer = loop.call_later(timeout, self._expire, message_id)
        else:
            pending.timer = loop.call_later(limits.SOFT_TIMEOUT, self._slow, message_id, timeout)
        self._send(data, address)

    def call(
        self, address: Address, method: str, arguments: list[Any], **how: Any
    ) -> asyncio.Future[Reply | None]:
        """`request` to be awaited; cancelling it leaves no trace."""
        future: asyncio.Future[Reply | None] = asyncio.get_running_loop().create_future()

        def done(reply: Reply | None) -> None:
            if not future.done():
                future.set_result(reply)

        self.request(address, method, arguments, done, **how)
        return future

    def is_silent(self, address: Address) -> bool:
        """Whether a request to the address went unanswered a short while ago."""
        until, _ = self._silent.get(address) or _NEVER_SILENT
        return bool(until > self.environment.clock())

    def forget_silence(self, address: Address | None = None) -> None:
        """Try an address again, or everybody, as after a time without a network."""
        if address is None:
            self._silent.clear()
        else:
            self._silent.discard(address)

    def token(self, address: Address) -> bytes:
        """The address's token, if it gave us one lately; else empty."""
        token, since = self._tokens.get(address) or (b"", 0.0)
        return token if self.environment.clock() - since < limits.TOKEN_REUSE else b""

    def _slow(self, message_id: bytes, timeout: float) -> None:
        pending = self._pending[message_id]
        rest = timeout - limits.SOFT_TIMEOUT
        pending.timer = asyncio.get_running_loop().call_later(rest, self._expire, message_id)
        _, pause = self._silent.get(pending.address) or _NEVER_SILENT
        self._silent.set(pending.address, (self.environment.clock() + rest, pause))
        if pending.slow is not None:
            pending.slow()

    def _expire(self, message_id: bytes) -> None:
        pending = self._pending.pop(message_id)
        self._failed(pending.address)
        pending.done(None)

    def _failed(self, address: Address) -> None:
        # A busy machine answers late: one failure is soon forgiven, repeated ones later and later.
        _, pause = self._silent.get(address) or _NEVER_SILENT
        self._silent.set(address, (self.environment.clock() + pause, min(2 * pause, limits.MAX_SILENCE)))
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
        if not contact_id or pending.contact_id not in (None, contact_id):
            self._failed(address)
            pending.done(None)
            return
        now = self.environment.clock()
        self._tokens.set(address, (token, now))
        contact = self.router.at(address)
        if contact is not None and contact.id == contact_id:
            contact.seen(now, now - pending.sent)
        elif contact is not None:
            # Somebody else lives there now.
            self.router.failed(contact)
        pending.done(reply)
        self.heard(node_id, address)
