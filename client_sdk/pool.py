"""One encrypted connection per peer, shared by every request of the client."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from mesh.errors import ConnectFailed, ConnectionClosed, ErrorCode
from mesh.identity import Identity, NodeId
from mesh.network import Network
from mesh.tasks import TaskOwner
from mesh.transport import Connection, connect_any

Address = tuple[str, int]


class Pool:
    """Connections by node id. Callers that want the same peer at once share one connection attempt."""

    def __init__(self, identity: Identity, network: Network, *, connect_timeout: float) -> None:
        self.identity = identity
        self.network = network
        self.connect_timeout = connect_timeout
        self._connections: dict[NodeId, Connection] = {}
        self._tasks = TaskOwner()
        self._closed = False

    def __len__(self) -> int:
        return sum(not connection.closed for connection in self._connections.values())

    def peek(self, peer: NodeId) -> Connection | None:
        """The open connection to a peer, if there is one."""
        connection = self._connections.get(peer)
        return connection if connection is not None and not connection.closed else None

    async def get(self, peer: NodeId, addresses: Sequence[Address]) -> Connection:
        """A connection to the peer at one of its addresses.

        Raises ConnectFailed, DeadlineExceeded, ConnectionClosed (the client is closed) or the
        handshake's errors.
        """
        connection = self.peek(peer)
        if connection is not None:
            return connection
        if self._closed:
            raise ConnectionClosed("the client is closed")
        if not addresses:
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

    def drop(self, peer: NodeId, connection: Connection) -> None:
        """Do not give this connection to anybody again; its open streams go on."""
        if self._connections.get(peer) is connection:
            del self._connections[peer]

    async def close(self) -> None:
        """Close every connection. Idempotent."""
        self._closed = True
        await self._tasks.close()
        connections = [*self._connections.values()]
        self._connections.clear()
        await asyncio.gather(
            *(connection.close(ErrorCode.CANCELLED, "client closed") for connection in connections)
        )

    async def _open(self, addresses: Sequence[Address], peer: NodeId | None) -> Connection:
        connection = await connect_any(
            addresses,
            identity=self.identity,
            network=self.network,
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
        self._connections[connection.peer_id] = connection
        return connection
