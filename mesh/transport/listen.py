"""Accepting connections: the handshake of strangers, and who is let in."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import cast

from mesh.admission import Admission, AdmissionPolicy, Refusal
from mesh.errors import ConnectFailed, ErrorCode, ProtocolError
from mesh.frames import Meta
from mesh.handshake import WHOIS_NONCE_SIZE, Agreed, Responder, take_message, whois_reply
from mesh.identity import Identity, short_id
from mesh.join import INVITATION_ID_SIZE, invitation_key
from mesh.limits import HANDSHAKE_TIMEOUT, MAX_HANDSHAKE_MESSAGE
from mesh.network import Network
from mesh.noise import KEY_SIZE
from mesh.transport.admit import admitting
from mesh.transport.connection import Connection
from mesh.transport.memory import agreed_within, link
from mesh.transport.sockets import USER_AGENT, complain, peer_address, read_buffer, set_options, unix_ms
from mesh.transport.stream import Handler

_BACKLOG = 128


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
    invited: Callable[[bytes], bool] | None = None,
) -> Listener:
    """Listen on an address (port 0: any), or on a bound socket. Raises OSError where that fails.

    `invited` says whether the invitation of an id is one of this node's and still good; without it there
    are none.
    """
    listener = Listener(
        identity=identity, network=network, on_stream=on_stream, load=load,
        policy=policy or AdmissionPolicy(), user_agent=user_agent, invited=invited,
    )  # fmt: skip
    await listener.start(host, port, sock)
    return listener


class Listener:
    """Accepts connections until it is closed."""

    def __init__(
        self,
        *,
        identity: Identity,
        network: Network,
        on_stream: Handler,
        load: Callable[[], Meta] | None,
        policy: AdmissionPolicy,
        user_agent: str,
        invited: Callable[[bytes], bool] | None,
    ) -> None:
        self.address: tuple[str, int] = ("", 0)
        """Host and port that it listens on."""
        self.identity = identity
        self.network = network
        self.user_agent = user_agent
        self.admission = Admission(policy)
        self.connections: set[Connection] = set()
        self._visitors: set[_Visitor] = set()
        self._on_stream = on_stream
        self._load = load
        self._invited = invited
        self._server: asyncio.Server | None = None
        self._closing = False
        self._empty = asyncio.Event()
        self._ended = asyncio.Event()
        self._bug: BaseException | None = None

    async def start(self, host: str, port: int, sock: socket.socket | None) -> None:
        """Bind and listen. Raises OSError."""
        loop = asyncio.get_running_loop()
        if sock is not None:
            self._server = await loop.create_server(lambda: _Visitor(self), sock=sock, backlog=_BACKLOG)
        else:
            self._server = await loop.create_server(lambda: _Visitor(self), host, port, backlog=_BACKLOG)
        name = self._server.sockets[0].getsockname()
        self.address = (str(name[0]), int(name[1]))

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
        self._check_empty()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._empty.wait()
        await asyncio.gather(*(one.close(ErrorCode.SHUTTING_DOWN) for one in list(self.connections)))
        await self._empty.wait()
        self._ended.set()

    def connect_within(self) -> Connection:
        """A connection to this listener for its node's own client: in memory, so not encrypted, and never
        reachable from outside the process. It is drained and closed with the others.

        Raises ConnectFailed when the listener is closing.
        """
        if self._closing:
            raise ConnectFailed("the node is shutting down")
        own_id = self.identity.id
        served = Connection(
            agreed_within(own_id, self.user_agent), initiator=False, on_stream=self._on_stream,
            load=self._load, on_bug=self._broken, on_gone=self._gone_within,
        )  # fmt: skip
        calling = Connection(
            agreed_within(own_id, self.user_agent), initiator=True, on_stream=None, load=None
        )
        self.connections.add(served)
        link(calling, served)
        calling.greet()
        return calling

    def _gone_within(self, connection: Connection) -> None:
        self.connections.discard(connection)
        self._check_empty()

    def _check_empty(self) -> None:
        if self._closing and not self._visitors and not self.connections:
            self._empty.set()

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
        self._check_empty()

    def gone(self, visitor: _Visitor, connection: Connection) -> None:
        """The connection that a visitor became is gone, and its handlers are."""
        self.connections.discard(connection)
        self.left(visitor)

    def door(self, invitation_id: bytes) -> Network:
        """The network of the handshake with a guest. Where the invitation is no good, it is one whose key
        nobody has, so that the guest cannot tell that from another mesh.
        """
        good = self._invited is not None and self._invited(invitation_id)
        key = invitation_key(self.network, invitation_id) if good else None
        return Network(self.network.name, key or secrets.token_bytes(KEY_SIZE))

    def agreed(self, visitor: _Visitor, agreed: Agreed, invitation_id: bytes | None) -> Connection:
        """A visitor completed its handshake. A guest, who has shown no more than an invitation, counts as
        half-open to its end, and is told nothing but the secret.
        """
        if invitation_id is None:
            on_stream, load, on_heard = self._on_stream, self._load, visitor.heard
        else:
            on_stream, load, on_heard = admitting(self.network, invitation_id), None, None
        connection = Connection(
            agreed, initiator=False, on_stream=on_stream, load=load, on_bug=self._broken,
            on_gone=visitor.gone, on_heard=on_heard,
        )  # fmt: skip
        self._visitors.discard(visitor)
        self.connections.add(connection)
        return connection

    def _broken(self, error: BaseException) -> None:
        self._bug = self._bug or error
        self._ended.set()


class _Visitor(asyncio.BufferedProtocol):
    """An accepted socket until its handshake is done."""

    __slots__ = (
        "_asked", "_buffer", "_connection", "_invitation_id", "_listener", "_read_buffer", "_timer",
        "_transport",
    )  # fmt: skip

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._read_buffer = read_buffer()[: MAX_HANDSHAKE_MESSAGE + 2]
        self._buffer = bytearray()
        self._asked = False
        self._invitation_id: bytes | None = None
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._connection: Connection | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        host, _ = peer_address(transport)
        if not host or self._listener.arrived(self, host) is not None:
            self._transport.abort()
            return
        set_options(transport)
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
                if self._asked or len(message) not in {0, INVITATION_ID_SIZE}:
                    self._answer(message)
                    return
                self._asked = True
                if message:
                    self._invitation_id = message
                    continue
                nonce = secrets.token_bytes(WHOIS_NONCE_SIZE)
                self._write(whois_reply(self._listener.network, self._listener.identity.id, nonce))
        except ProtocolError as error:
            complain("refused a handshake from %s: %s", self._where(), error)
            self._close()

    def _answer(self, message: bytes) -> None:
        listener, invitation_id = self._listener, self._invitation_id
        responder = Responder(
            listener.identity,
            listener.network if invitation_id is None else listener.door(invitation_id),
            ephemeral=secrets.token_bytes(KEY_SIZE),
            user_agent=listener.user_agent,
        )
        peer_id = responder.message_1(message)
        reply, agreed = responder.message_2(peer_id, unix_ms())
        self._write(reply)
        responder.check_version()
        if invitation_id is None:
            self._cancel_timer()  # a guest has no longer than the handshake
        connection = self._connection = listener.agreed(self, agreed, invitation_id)
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

    def gone(self, connection: Connection) -> None:
        """The connection that this visitor became is gone."""
        self._cancel_timer()
        self._listener.gone(self, connection)

    def _turn_away(self, refusal: Refusal) -> None:
        if self._connection is not None:
            complain("turned %s away: %s", short_id(self._connection.peer_id), refusal.message)
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
