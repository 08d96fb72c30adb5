"""One encrypted connection per peer, shared by every request of the client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from mesh.errors import ConnectFailed, ConnectionClosed, DeadlineExceeded, ErrorCode
from mesh.identity import Identity, NodeId
from mesh.join import Invitation
from mesh.network import Network
from mesh.tasks import TaskOwner
from mesh.transport import Connection, connect_any, redeem

Address = tuple[str, int]

KEPT = 64
"""Connections kept open although nothing runs on them."""


class Pool:
    """Connections by node id. Callers that want the same peer at once share one connection attempt.

    `own_node` connects to the node that this client is a part of, whose identity it then has. With an
    `invitation` the network's secret is asked of the inviter before the first connection.
    """

    def __init__(
        self,
        identity: Identity,
        network: Network,
        *,
        connect_timeout: float,
        own_node: Callable[[], Connection] | None = None,
        invitation: Invitation | None = None,
    ) -> None:
        self.identity = identity
        self.network = network
        self.connect_timeout = connect_timeout
        self._own_node = own_node
        self._invitation = invitation
        self._connections: dict[NodeId, Connection] = {}
        """The one used last is the last one."""
        self._leaving: set[Connection] = set()
        """Connections that take no new requests but still have some."""
        self._tasks = TaskOwner()
        self._closed = False

    def __len__(self) -> int:
        return sum(not one.closed for one in (*self._connections.values(), *self._leaving))

    def peek(self, peer: NodeId) -> Connection | None:
        """The connection to a peer, if there is one that takes requests."""
        connection = self._connections.get(peer)
        return connection if connection is not None and connection.accepts_streams else None

    async def get(self, peer: NodeId, addresses: Sequence[Address]) -> Connection:
        """A connection to the peer at one of its addresses.

        Raises ConnectFailed, DeadlineExceeded, ConnectionClosed (the client is closed) or the
        handshake's errors.
        """
        connection = self.peek(peer)
        if connection is not None:
            self._connections[peer] = self._connections.pop(peer)  # the last one used is the last one
            return connection
        if self._closed:
            raise ConnectionClosed("the client is closed")
        if not addresses and self._within(peer) is None:
            raise ConnectFailed(f"the worker {peer.hex()[:12]} has no address that can be used from here")
        return await self._tasks.shared(peer, lambda: self._open(addresses, peer))

    async def enter(self, address: Address, peer: NodeId | None = None) -> Connection:
        """A connection to whoever is at an address (an entry point), or to the given peer there.

        Raises as `get` does.
        """
        if peer is not None:
            return await self.get(peer, [address])
        if self._closed:
            raise ConnectionClosed("the client is closed")
        return await self._tasks.shared(address, lambda: self._open([address], None))

    async def verify(self, connection: Connection, timeout: float) -> None:
        """Make sure that a peer that keeps silent is there. Where it does not answer a ping, every request
        on its connection fails at once.

        However many requests ask at the same time, the peer is pinged once: it owes only a few PONGs and
        drops older ones, so that hundreds of silent requests would each seem to prove it dead.
        Raises ConnectionClosed.
        """
        await self._tasks.shared(("verify", id(connection)), lambda: self._verify(connection, timeout))

    async def _verify(self, connection: Connection, timeout: float) -> None:
        try:
            await connection.ping(timeout)
        except DeadlineExceeded as error:
            connection.abort()
            raise ConnectionClosed(
                f"the node {connection.peer_id.hex()[:12]} does not answer any more"
            ) from error

    async def close(self) -> None:
        """Close every connection. Idempotent."""
        self._closed = True
        await self._tasks.close()
        connections = [*self._connections.values(), *self._leaving]
        self._connections.clear()
        self._leaving.clear()
        await asyncio.gather(
            *(connection.close(ErrorCode.CANCELLED, "client closed") for connection in connections)
        )

    async def _open(self, addresses: Sequence[Address], peer: NodeId | None) -> Connection:
        within = self._within(peer)
        if within is not None:
            connection = within()
        else:
            connection = await connect_any(
                addresses,
                identity=self.identity,
                network=await self._admitted(),
                peer_id=peer,
                timeout=self.connect_timeout,
            )
        if self._closed:
            await connection.close(ErrorCode.CANCELLED, "client closed")
            raise ConnectionClosed("the client is closed")
        known = self.peek(connection.peer_id)
        if known is not None:
            await connection.close(ErrorCode.CANCELLED, "already connected")
            return known
        former = self._connections.pop(connection.peer_id, None)
        if former is not None and not former.closed:
            self._leaving.add(former)
        self._tidy()
        self._connections[connection.peer_id] = connection
        return connection

    async def _admitted(self) -> Network:
        """The network, with its secret. Raises as `redeem` does."""
        invitation = self._invitation
        if invitation is not None:
            self.network = await self._tasks.shared("join", lambda: redeem(invitation, self.identity))
            self._invitation = None
        return self.network

    def _within(self, peer: NodeId | None) -> Callable[[], Connection] | None:
        return self._own_node if peer == self.identity.id else None

    def _tidy(self) -> None:
        """Forget what is closed, and close what was not used for longest where there is much of it."""
        self._leaving = {connection for connection in self._leaving if not connection.closed}
        for peer in [peer for peer, connection in self._connections.items() if connection.closed]:
            del self._connections[peer]
        idle = [peer for peer, connection in self._connections.items() if not connection.open_streams]
        for peer in idle[: max(0, len(idle) - KEPT)]:
            unused = self._connections.pop(peer)
            self._tasks.spawn(unused.close(ErrorCode.CANCELLED, "not used"), name="close")
