"""Calling a peer: TCP to whichever of its addresses answers first, then the handshake."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, cast

from mesh.errors import (
    AuthenticationError,
    ConnectFailed,
    DeadlineExceeded,
    ProtocolError,
    QMeshError,
    TransportError,
)
from mesh.frames import Meta
from mesh.handshake import (
    WHOIS_REQUEST,
    Agreed,
    Initiator,
    announce_invitation,
    open_whois_reply,
    take_message,
)
from mesh.identity import Identity, NodeId
from mesh.limits import CONNECT_STAGGER, HANDSHAKE_TIMEOUT, MAX_HANDSHAKE_MESSAGE
from mesh.network import Network
from mesh.noise import KEY_SIZE
from mesh.transport.connection import Connection
from mesh.transport.sockets import USER_AGENT, read_buffer, set_options, unix_ms
from mesh.transport.stream import Handler


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
    invitation_id: bytes | None = None,
) -> Connection:
    """As `connect`, to whichever of a peer's addresses completes the handshake first.

    The next address is tried CONNECT_STAGGER after the last one, or at once when one failed (RFC 8305);
    the losers are dropped. With `invitation_id` it calls the inviter `peer_id` as its guest, through the
    `network` that is the invitation's door.
    """
    addresses = list(addresses)

    def become(agreed: Agreed) -> Connection:
        return Connection(agreed, initiator=True, on_stream=on_stream, load=load)

    async def attempt(host: str, port: int) -> Connection:
        caller = _Caller(identity, network, peer_id, user_agent, become, invitation_id)
        try:
            await asyncio.get_running_loop().create_connection(lambda: caller, host, port)
            return await caller.connected
        except BaseException as error:
            caller.abort()
            if isinstance(error, OSError):
                raise ConnectFailed(f"{host} port {port}: {_reason(error)}") from error
            raise

    try:
        async with asyncio.timeout(timeout):
            return await _first(attempt, await _resolve(addresses))
    except TimeoutError as error:
        where = ", ".join(f"{host} port {port}" for host, port in addresses)
        raise DeadlineExceeded(f"no connection to {where} within {timeout} s") from error


class _Caller(asyncio.BufferedProtocol):
    """A socket that we opened, until its handshake is done and a Connection takes it over."""

    __slots__ = (
        "_become", "_buffer", "_identity", "_initiator", "_invitation_id", "_network", "_peer_id",
        "_read_buffer", "_transport", "_user_agent", "connected",
    )  # fmt: skip

    def __init__(
        self,
        identity: Identity,
        network: Network,
        peer_id: NodeId | None,
        user_agent: str,
        become: Callable[[Agreed], Connection],
        invitation_id: bytes | None,
    ) -> None:
        self._identity = identity
        self._network = network
        self._peer_id = peer_id
        self._user_agent = user_agent
        self._read_buffer = read_buffer()[: MAX_HANDSHAKE_MESSAGE + 2]
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self._initiator: Initiator | None = None
        self._become = become
        self._invitation_id = invitation_id
        self.connected: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        set_options(transport)
        if self._peer_id is None:
            self._transport.write(WHOIS_REQUEST)
            return
        try:
            self._call(self._peer_id)
        except ProtocolError as error:
            self._fail(error)

    def _call(self, peer_id: NodeId) -> None:
        self._initiator = Initiator(
            self._identity, self._network, peer_id, ephemeral=secrets.token_bytes(KEY_SIZE),
            user_agent=self._user_agent,
        )  # fmt: skip
        opening = b"" if self._invitation_id is None else announce_invitation(self._invitation_id)
        cast("asyncio.Transport", self._transport).write(opening + self._initiator.message_1(unix_ms()))

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._read_buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._buffer += self._read_buffer[:nbytes]
        if self.connected.done():
            return  # refused or cancelled; the socket is closing
        try:
            message = take_message(self._buffer)
            if message is None:
                return
            if self._initiator is None:
                self._call(open_whois_reply(self._network, message))
            else:
                self._hand_over(self._initiator.message_2(message, unix_ms()))
        except ProtocolError as error:
            self._fail(error)

    def _hand_over(self, agreed: Agreed) -> None:
        transport = cast("asyncio.Transport", self._transport)
        connection = self._become(agreed)
        transport.set_protocol(connection)
        connection.connection_made(transport)
        connection.greet()
        if self._buffer:
            connection.feed(bytes(self._buffer))
        self.connected.set_result(connection)

    def abort(self) -> None:
        """Drop the socket."""
        self.connected.cancel()
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
                    "the peer refused the handshake: it has another network name, secret or node id"
                )
            )

    def _fail(self, error: QMeshError) -> None:
        if not self.connected.done():
            self.connected.set_exception(error)


def _reason(error: OSError) -> str:
    """The system's words: asyncio puts its own in their place."""
    return os.strerror(error.errno) if error.errno else str(error)


async def _resolve(addresses: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """All IP addresses behind the given ones, in their order. Raises ConnectFailed if there are none."""
    loop = asyncio.get_running_loop()
    addresses = list(addresses)
    lookups = [loop.getaddrinfo(host, port, type=socket.SOCK_STREAM) for host, port in addresses]
    answers = await asyncio.gather(*lookups, return_exceptions=True)
    found: dict[tuple[str, int], None] = {}
    problems: list[str] = []
    for (host, _), answer in zip(addresses, answers, strict=True):
        if isinstance(answer, OSError):
            problems.append(f"{host}: {answer.strerror or answer}")
        elif isinstance(answer, BaseException):
            raise answer
        else:
            found.update({(str(where[0]), int(where[1])): None for *_, where in answer})
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
            await asyncio.wait(running, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in running if task.done()]:
                try:
                    winner = winner or task.result()
                except (ProtocolError, TransportError) as error:
                    errors.append(error)
                    running.discard(task)
        await _drop(running, keep=winner)
    except BaseException:  # nobody waits any more: not for the winner either
        await _drop(running, keep=None)
        raise
    if winner is not None:
        return winner
    raise next(
        (one for one in errors if isinstance(one, ProtocolError)),
        ConnectFailed("; ".join(str(one) for one in errors)),
    )


async def _drop(attempts: Iterable[asyncio.Task[Connection]], keep: Connection | None) -> None:
    """End attempts, with the connections that they may have made already."""
    for task in attempts:
        task.cancel()
    for result in await asyncio.gather(*attempts, return_exceptions=True):
        if isinstance(result, Connection) and result is not keep:
            result.abort()
