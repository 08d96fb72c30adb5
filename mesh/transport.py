"""Opening and accepting connections: TCP, the handshake, and who is let in (asyncio shell).

`connect` and `connect_any` call a peer, `serve` listens. What happens on an open connection is in
`mesh.session`, whose `Connection` and `Stream` are used through this module.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from typing import Any, cast

from mesh.admission import Admission, AdmissionPolicy, Refusal
from mesh.errors import (
    AuthenticationError,
    ConnectFailed,
    DeadlineExceeded,
    ErrorCode,
    ProtocolError,
    QMeshError,
    TransportError,
)
from mesh.frames import Meta
from mesh.handshake import (
    WHOIS_NONCE_SIZE,
    WHOIS_REQUEST,
    Agreed,
    Initiator,
    Responder,
    open_whois_reply,
    take_message,
    whois_reply,
)
from mesh.identity import Identity, NodeId, short_id
from mesh.limits import CONNECT_STAGGER, HANDSHAKE_TIMEOUT, MAX_HANDSHAKE_MESSAGE
from mesh.network import Network
from mesh.noise import KEY_SIZE
from mesh.session import Connection, Handler, Stream, peer_address, read_buffer

__all__ = ["Connection", "Handler", "Listener", "Stream", "connect", "connect_any", "serve"]

logger = logging.getLogger("mesh.wire")

USER_AGENT = "qmesh/0.1.0"
_BACKLOG = 512
_READ = MAX_HANDSHAKE_MESSAGE + 2


async def connect(
    host: str,
    port: int,
    *,
    identity: Identity,
    network: Network,
    peer_id: NodeId | None = None,
    user_agent: str = USER_AGENT,
    on_stream: Handler | None = None,
    load: Callable[[], Meta] | None = None,
    timeout: float = HANDSHAKE_TIMEOUT,
) -> Connection:
    """An authenticated connection to the node at one address; all that the name resolves to are tried.

    Without `peer_id` the node is asked for its id first and believed (trust on first use). `on_stream`
    serves streams that the peer opens. `timeout` in seconds is for everything together.

    Raises ConnectFailed, DeadlineExceeded, AuthenticationError, VersionMismatch or another ProtocolError.
    """
    return await connect_any(
        [(host, port)], identity=identity, network=network, peer_id=peer_id, user_agent=user_agent,
        on_stream=on_stream, load=load, timeout=timeout,
    )  # fmt: skip


async def connect_any(
    addresses: Iterable[tuple[str, int]],
    *,
    identity: Identity,
    network: Network,
    peer_id: NodeId | None = None,
    user_agent: str = USER_AGENT,
    on_stream: Handler | None = None,
    load: Callable[[], Meta] | None = None,
    timeout: float = HANDSHAKE_TIMEOUT,
) -> Connection:
    """As `connect`, to whichever of a peer's addresses completes the handshake first.

    The next address is tried CONNECT_STAGGER after the last one, or at once when one failed (RFC 8305);
    the losers are dropped.
    """
    addresses = list(addresses)

    async def attempt(host: str, port: int) -> Connection:
        caller = _Caller(identity, network, peer_id, user_agent)
        try:
            await asyncio.get_running_loop().create_connection(lambda: caller, host, port)
            agreed = await caller.agreed
        except OSError as error:
            caller.abort()
            raise ConnectFailed(f"{host} port {port}: {error.strerror or error}") from error
        except BaseException:
            caller.abort()
            raise
        connection = Connection(agreed, initiator=True, on_stream=on_stream, load=load)
        caller.hand_over(connection)
        return connection

    try:
        async with asyncio.timeout(timeout):
            return await _first(attempt, await _resolve(addresses))
    except TimeoutError as error:
        where = ", ".join(f"{host} port {port}" for host, port in addresses)
        raise DeadlineExceeded(f"no connection to {where} within {timeout} s") from error


async def serve(
    host: str,
    port: int,
    *,
    identity: Identity,
    network: Network,
    on_stream: Handler,
    load: Callable[[], Meta] | None = None,
    policy: AdmissionPolicy | None = None,
    user_agent: str = USER_AGENT,
    sock: socket.socket | None = None,
) -> Listener:
    """Listen on an address (port 0: any), or on a bound socket. Raises OSError where that fails."""
    listener = Listener(identity, network, on_stream, load, policy or AdmissionPolicy(), user_agent)
    await listener.start(host, port, sock)
    return listener


class Listener:
    """Accepts connections until it is closed."""

    def __init__(
        self,
        identity: Identity,
        network: Network,
        on_stream: Handler,
        load: Callable[[], Meta] | None,
        policy: AdmissionPolicy,
        user_agent: str,
    ) -> None:
        self.identity = identity
        self.network = network
        self.user_agent = user_agent
        self.admission = Admission(policy)
        self.connections: set[Connection] = set()
        self._visitors: set[_Visitor] = set()
        self._on_stream = on_stream
        self._load = load
        self._server: asyncio.Server | None = None
        self._closing = False
        self._ended = asyncio.Event()
        self._bug: BaseException | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that it listens on."""
        if self._server is None or not self._server.sockets:
            raise RuntimeError("the listener is not listening")
        name = self._server.sockets[0].getsockname()
        return str(name[0]), int(name[1])

    async def start(self, host: str, port: int, sock: socket.socket | None) -> None:
        """Bind and listen. Raises OSError."""
        loop = asyncio.get_running_loop()
        if sock is not None:
            self._server = await loop.create_server(lambda: _Visitor(self), sock=sock, backlog=_BACKLOG)
        else:
            self._server = await loop.create_server(lambda: _Visitor(self), host, port, backlog=_BACKLOG)

    async def wait_closed(self) -> None:
        """Wait until the listener is closed. Raises the exception of a handler that has a bug."""
        await self._ended.wait()
        if self._bug is not None:
            raise self._bug

    async def close(self, grace: float = 0.0) -> None:
        """Accept no more, tell every peer, let open streams finish for `grace` seconds, end the rest."""
        if self._server is not None:
            self._server.close()
        self._closing = True
        for visitor in list(self._visitors):
            visitor.abort()
        for connection in list(self.connections):
            await connection.goaway(ErrorCode.SHUTTING_DOWN, "the node is shutting down")
        await self._drained(grace)
        ending = [connection.close(ErrorCode.SHUTTING_DOWN) for connection in list(self.connections)]
        results = await asyncio.gather(*ending, return_exceptions=True)
        self._ended.set()
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _drained(self, grace: float) -> None:
        waits = [asyncio.ensure_future(connection.wait_closed()) for connection in self.connections]
        if waits:
            try:
                await asyncio.wait(waits, timeout=grace)
            finally:
                for wait in waits:
                    wait.cancel()
                await asyncio.gather(*waits, return_exceptions=True)

    # --- called by visitors and connections

    def arrived(self, visitor: _Visitor, host: str) -> Refusal | None:
        """A socket was accepted."""
        if self._closing:
            return Refusal(ErrorCode.SHUTTING_DOWN, "the node is shutting down")
        refusal, leaving = self.admission.arrived(visitor, host)
        if refusal is None:
            self._visitors.add(visitor)
        if leaving is not None:
            cast("_Visitor", leaving).abort()
        return refusal

    def left(self, visitor: _Visitor) -> None:
        """A visitor's socket is gone."""
        self._visitors.discard(visitor)
        self.admission.left(visitor)

    def agreed(self, visitor: _Visitor, agreed: Agreed) -> Connection:
        """A visitor completed its handshake."""
        connection = Connection(
            agreed, initiator=False, on_stream=self._on_stream, load=self._load, on_bug=self._broken,
            on_lost=visitor.lost, on_heard=visitor.heard,
        )  # fmt: skip
        self._visitors.discard(visitor)
        self.connections.add(connection)
        return connection

    def _broken(self, error: BaseException) -> None:
        self._bug = self._bug or error
        self._ended.set()


class _Visitor(asyncio.BufferedProtocol):
    """An accepted socket until its handshake is done."""

    __slots__ = ("_asked", "_buffer", "_connection", "_listener", "_read_buffer", "_timer", "_transport")

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._read_buffer = read_buffer()[:_READ]
        self._buffer = bytearray()
        self._asked = False
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._connection: Connection | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        host, _ = peer_address(transport)
        refusal = self._listener.arrived(self, host)
        if refusal is not None:
            self._transport.abort()
            return
        _set_options(transport)
        self._timer = asyncio.get_running_loop().call_later(HANDSHAKE_TIMEOUT, self.abort)

    def abort(self) -> None:
        """Drop the socket."""
        if self._connection is not None:
            self._connection.abort()
        elif self._transport is not None:
            self._transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._read_buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._buffer += self._read_buffer[:nbytes]
        try:
            while (message := take_message(self._buffer)) is not None:
                if message or self._asked:
                    self._answer(message)
                    return
                self._asked = True
                nonce = secrets.token_bytes(WHOIS_NONCE_SIZE)
                self._write(whois_reply(self._listener.network, self._listener.identity.id, nonce))
        except ProtocolError as error:
            logger.info("refused a handshake from %s: %s", self._where(), error)
            self._close()

    def _answer(self, message: bytes) -> None:
        listener = self._listener
        responder = Responder(
            listener.identity,
            listener.network,
            ephemeral=secrets.token_bytes(KEY_SIZE),
            user_agent=listener.user_agent,
        )
        peer_id = responder.message_1(message)
        reply, agreed = responder.message_2(peer_id, _unix_ms())
        self._write(reply)
        responder.check_version()
        self._cancel_timer()
        connection = self._connection = listener.agreed(self, agreed)
        if self._transport is not None:
            self._transport.set_protocol(connection)
            connection.connection_made(self._transport)
        refusal = listener.admission.introduced(peer_id)
        if refusal is not None:
            self._turn_away(refusal)
        elif self._buffer:
            connection.feed(bytes(self._buffer))
        self._buffer.clear()

    def heard(self, connection: Connection) -> None:
        """A frame authenticated."""
        refusal = self._listener.admission.proven(self, connection.peer_id)
        if refusal is not None:
            self._turn_away(refusal)

    def lost(self, connection: Connection) -> None:
        """The connection that this visitor became is gone."""
        self._listener.connections.discard(connection)
        self._listener.left(self)

    def _turn_away(self, refusal: Refusal) -> None:
        if self._connection is not None:
            logger.info("turned %s away: %s", short_id(self._connection.peer_id), refusal.message)
            self._connection.turn_away(refusal.code, refusal.message)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timer()
        self._listener.left(self)

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _where(self) -> str:
        return peer_address(self._transport)[0] if self._transport is not None else "?"


class _Caller(asyncio.BufferedProtocol):
    """A socket that we opened, until its handshake is done; `agreed` then has the result."""

    def __init__(self, identity: Identity, network: Network, peer_id: NodeId | None, user_agent: str) -> None:
        self._identity = identity
        self._network = network
        self._peer_id = peer_id
        self._user_agent = user_agent
        self._read_buffer = read_buffer()[:_READ]
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self._initiator: Initiator | None = None
        self.agreed: asyncio.Future[Agreed] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        _set_options(transport)
        if self._peer_id is None:
            self._transport.write(WHOIS_REQUEST)
        else:
            self._call(self._peer_id)

    def _call(self, peer_id: NodeId) -> None:
        try:
            self._initiator = Initiator(
                self._identity, self._network, peer_id, ephemeral=secrets.token_bytes(KEY_SIZE),
                user_agent=self._user_agent,
            )  # fmt: skip
        except ProtocolError as error:
            self._fail(error)
            return
        if self._transport is not None:
            self._transport.write(self._initiator.message_1(_unix_ms()))

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._read_buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._buffer += self._read_buffer[:nbytes]
        if self.agreed.done():
            return
        try:
            message = take_message(self._buffer)
            if message is None:
                return
            if self._initiator is None:
                self._call(open_whois_reply(self._network, message))
                return
            agreed = self._initiator.message_2(message, _unix_ms())
        except ProtocolError as error:
            self._fail(error)
            return
        if self._transport is not None:
            self._transport.pause_reading()  # what follows is for the connection
        self.agreed.set_result(agreed)

    def hand_over(self, connection: Connection) -> None:
        """Let `connection` take the socket, and greet the peer so that it knows us to be no replay."""
        transport = self._transport
        if transport is None:
            raise RuntimeError("there is no socket to hand over")
        transport.set_protocol(connection)
        connection.connection_made(transport)
        connection.greet()
        if self._buffer:
            connection.feed(bytes(self._buffer))
        if not transport.is_closing():
            transport.resume_reading()

    def abort(self) -> None:
        """Drop the socket."""
        self.agreed.cancel()
        if self._transport is not None:
            self._transport.abort()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self._fail(ConnectFailed(f"the peer dropped the connection in the handshake: {exc}"))
        elif self._initiator is None:
            self._fail(ConnectFailed("the peer closed the connection without telling its node id"))
        else:
            self._fail(
                AuthenticationError(
                    "the peer refused the handshake: it is in another network, has another secret or another node id"
                )
            )

    def _fail(self, error: QMeshError) -> None:
        if not self.agreed.done():
            self.agreed.set_exception(error)


async def _resolve(addresses: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """All IP addresses behind the given ones, in their order. Raises ConnectFailed if there are none."""
    loop = asyncio.get_running_loop()
    found: dict[tuple[str, int], None] = {}
    problems: list[str] = []
    for host, port in addresses:
        try:
            answers = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            problems.append(f"{host}: {error.strerror or error}")
            continue
        for _, _, _, _, where in answers:
            found[str(where[0]), int(where[1])] = None
    if not found:
        raise ConnectFailed("; ".join(problems) or "the peer has no address")
    return list(found)


async def _first(
    attempt: Callable[[str, int], Coroutine[Any, Any, Connection]], addresses: list[tuple[str, int]]
) -> Connection:
    """The first attempt that succeeds, staggered. Raises the most telling error if none does."""
    waiting = deque(addresses)
    running: set[asyncio.Task[Connection]] = set()
    errors: list[QMeshError] = []
    winner: Connection | None = None
    try:
        while winner is None and (waiting or running):
            if waiting:
                running.add(asyncio.create_task(attempt(*waiting.popleft())))
            timeout = CONNECT_STAGGER if waiting else None
            done, running = await asyncio.wait(running, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                try:
                    connection = task.result()
                except (ProtocolError, TransportError) as error:
                    errors.append(error)
                    continue
                if winner is None:
                    winner = connection
                else:
                    connection.abort()
    finally:
        for task in running:
            task.cancel()
        for result in await asyncio.gather(*running, return_exceptions=True):
            if isinstance(result, Connection):
                result.abort()
    if winner is not None:
        return winner
    for error in errors:
        if isinstance(error, ProtocolError):
            raise error
    raise ConnectFailed("; ".join(str(error) for error in errors))


def _set_options(transport: asyncio.BaseTransport) -> None:
    sock = transport.get_extra_info("socket")
    if sock is not None:
        with suppress(OSError):  # the peer may have hung up already
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _unix_ms() -> int:
    return time.time_ns() // 1_000_000
