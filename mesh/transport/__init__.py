"""Opening, accepting and using connections: the asyncio shell around `mesh.connection`.

`connect` and `connect_any` call a peer, `serve` listens; both give `Connection`s, on which either side
opens `Stream`s. `redeem` turns an invitation into the mesh that it leads to.
"""

from mesh.transport.admit import redeem
from mesh.transport.connection import Connection
from mesh.transport.dial import connect, connect_any
from mesh.transport.listen import Listener, serve
from mesh.transport.stream import Handler, Stream

__all__ = ["Connection", "Handler", "Listener", "Stream", "connect", "connect_any", "redeem", "serve"]
