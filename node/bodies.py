"""The bodies of peers' requests: read within limits of size and time, and all together within a budget."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager

import orjson

from mesh.errors import BadRequest, Overloaded, RemoteDeadline
from mesh.identity import NodeId
from mesh.limits import MAX_BODY
from mesh.transport import Stream

PATIENCE = 60.0
"""Seconds within which a body must have come."""
MAX_HELD = 256 << 20
"""Bytes of all bodies that are held at the same time, from their arrival to the end of their request."""
MAX_HELD_PER_PEER = 64 << 20
RETRY_AFTER = 1.0


class Bodies:
    """Reads them. `own_id`: this machine's own client, which only the whole budget bounds."""

    def __init__(self, own_id: NodeId) -> None:
        self._own_id = own_id
        self._per_peer: Counter[NodeId] = Counter()
        self.held = 0
        """Bytes."""

    @asynccontextmanager
    async def of(self, stream: Stream) -> AsyncIterator[bytes]:
        """The request's body as JSON bytes, from `body` of OPEN or from DATA; counted until the block ends.

        Raises BadRequest for one that is too large or no JSON, RemoteDeadline for a slow one, Overloaded
        where this peer, or all of them, have too much underway.
        """
        peer, size = stream.peer_id, 0
        parts: list[bytes] = []
        try:
            try:
                async with asyncio.timeout(PATIENCE), aclosing(_parts(stream)) as arriving:
                    async for part in arriving:
                        if size + len(part) > MAX_BODY:
                            raise BadRequest(f"a body has at most {MAX_BODY} bytes")
                        self._take(peer, len(part))
                        size += len(part)
                        parts.append(part)
            except TimeoutError:
                raise RemoteDeadline(f"the request's body did not come within {PATIENCE:g} s") from None
            body = b"".join(parts)
            parts.clear()
            yield body
        finally:
            self._give_back(peer, size)

    def _take(self, peer: NodeId, size: int) -> None:
        if peer != self._own_id and self._per_peer[peer] + size > MAX_HELD_PER_PEER:
            raise Overloaded("this peer has too many large requests underway", retry_after=RETRY_AFTER)
        if self.held + size > MAX_HELD:
            raise Overloaded("too many large requests are being answered", retry_after=RETRY_AFTER)
        self.held += size
        self._per_peer[peer] += size

    def _give_back(self, peer: NodeId, size: int) -> None:
        self.held -= size
        self._per_peer[peer] -= size
        if not self._per_peer[peer]:
            del self._per_peer[peer]


async def _parts(stream: Stream) -> AsyncGenerator[bytes, None]:
    inline = stream.meta.get("body")
    if inline is None:
        while (data := await stream.read()) is not None:
            yield data
    elif isinstance(inline, Mapping):
        try:
            yield orjson.dumps(inline)
        except TypeError as error:
            raise BadRequest("body cannot be written as JSON") from error
    else:
        raise BadRequest("body must be a map; send JSON bytes as data")
