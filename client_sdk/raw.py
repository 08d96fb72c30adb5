"""Any endpoint of llama-server over the mesh: its bytes, its status, the mesh's routing and failover."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self

from client_sdk.attempts import Attempts
from client_sdk.call import Call, Request
from client_sdk.dispatch import Dispatcher, queue_seconds
from client_sdk.passthrough import Passthrough
from client_sdk.types import Explanation
from mesh.errors import BackendFailed

UNAVAILABLE = frozenset({502, 503, 504})
"""What another worker may do better. 500 is not among them: llama-server says it of requests that it
cannot make sense of (a missing field, a token id out of range), and blaming the worker would let one
bad request ban every worker.
"""


class RawAnswer:
    """An answer as llama-server wrote it. An async context manager; entering waits for its beginning.

    `status` and `content_type` are the server's; iterate once for the body. An error status that
    is not in `UNAVAILABLE` is an answer like any other: no worker would say otherwise. Entering and iterating raise
    what `Attempts.run` raises.
    """

    def __init__(
        self, dispatcher: Dispatcher, journal: Passthrough, request: Request, explain: Explanation
    ) -> None:
        self._dispatcher = dispatcher
        self._journal = journal
        self._request = request
        self._attempts = Attempts(dispatcher, journal, explain)
        self._pieces: AsyncGenerator[bytes, None] | None = None
        self._first = b""
        self.explain = explain
        self.status = 0
        self.content_type = ""
        self.trailer: Mapping[str, Any] | None = None
        """Usage, timings and load as the worker told them, once the answer is whole."""

    async def __aenter__(self) -> Self:
        self._pieces = self._attempts.run(self._request, self._relay)
        try:
            self._first = await anext(self._pieces, b"")
        except BaseException:
            await self._pieces.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pieces is not None:
            await self._pieces.aclose()

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        if self._pieces is None:
            raise RuntimeError("use `async with` before reading an answer")
        if self._first:
            yield self._first
        async for piece in self._pieces:
            yield piece

    async def read(self) -> bytes:
        """The whole body."""
        return b"".join([piece async for piece in self])

    async def _relay(self, call: Call) -> AsyncGenerator[bytes, None]:
        journal = self._journal
        status = int(call.head.get("status") or 0)
        if status in UNAVAILABLE:
            raise BackendFailed(f"the model server answered {status}")
        if not journal.started:
            self.status = status
            self.content_type = str(call.head.get("content_type") or "")
            journal.streaming &= self.content_type.startswith("text/event-stream")
        self.explain.queue = queue_seconds(call.head)
        async with aclosing(call.chunks()) as chunks:
            async for data in chunks:
                if piece := journal.feed(data):
                    yield piece
        if piece := journal.finish():
            yield piece
        self.trailer = dict(call.stream.trailer or {})
        timings = self.trailer.get("timings") or {}
        self.explain.speed = timings.get("predicted_per_second")
        call.succeeded(timings)
