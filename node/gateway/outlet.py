"""The answer to one request, on its way to a client that may be slow, impatient or gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager

from aiohttp import web

from node.gateway.call import Call
from node.gateway.endpoints import Form
from node.gateway.errors import ApiError

WRITE_SECONDS = 20.0
"""A client that takes nothing for this long is cut off, before the worker's node loses patience."""
UNHURRIED = 16 << 10
"""With less than this in its buffer a connection takes more at once (asyncio's mark is 64 KiB)."""
FIRST_PING = 3.0
"""Seconds without a beginning, after which a streaming client is told that it is not forgotten."""
NEXT_PING = 10.0
_PINGS = {
    Form.OPENAI: b": waiting for a worker\n\n",
    Form.ANTHROPIC: b'event: ping\ndata: {"type": "ping"}\n\n',
}


class Streamed(web.StreamResponse):
    """A response whose head leaves with its first piece, which is there: one packet instead of two."""

    _send_headers_immediately = False


class ClientGone(Exception):
    """The client closed its connection, or takes nothing any more."""


class Outlet:
    """Writes an answer: a stream piece by piece, or a body at once."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._response: web.StreamResponse | None = None

    @property
    def begun(self) -> bool:
        """Whether a status was sent already."""
        return self._response is not None

    async def begin(self, status: int, content_type: str, headers: Mapping[str, str]) -> None:
        """Send the head of a streamed answer, unless a ping has done so."""
        if self._response is not None:
            return
        self._response = Streamed(
            status=status,
            headers={
                "Content-Type": content_type,
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
                **self._call.headers,
                **headers,
            },
        )
        self._call.status = status
        await self._guarded(self._response.prepare(self._call.request))

    async def write(self, data: bytes) -> None:
        """The next piece of a streamed answer."""
        assert self._response is not None
        await self._guarded(self._response.write(data))

    async def end(self) -> web.StreamResponse:
        """The streamed answer is whole."""
        assert self._response is not None
        await self._guarded(self._response.write_eof())
        return self._response

    async def fail(self, error: ApiError) -> web.StreamResponse:
        """A streamed answer breaks off: its last event says why."""
        await self.write(error.event(self._call.form, self._call.id))
        return await self.end()

    def whole(self, status: int, content_type: str, body: bytes, headers: Mapping[str, str]) -> web.Response:
        """An answer in one piece."""
        self._call.status = status
        return web.Response(
            status=status,
            body=body,
            headers={"Content-Type": content_type, **self._call.headers, **headers},
        )

    @asynccontextmanager
    async def pings(self) -> AsyncIterator[None]:
        """While the block runs, pings keep a streaming client's patience; the first sends the head."""
        loop = asyncio.get_running_loop()
        done = asyncio.Event()
        pinging: list[asyncio.Task[None]] = []

        def start() -> None:
            pinging.append(loop.create_task(self._ping(done), name="pings"))

        # Most answers begin before the first ping: they cost a timer and no task.
        timer = loop.call_later(FIRST_PING, start)
        try:
            yield
        finally:
            timer.cancel()
            done.set()
            for task in pinging:
                await task

    async def _ping(self, done: asyncio.Event) -> None:
        while not done.is_set():
            await self.begin(200, "text/event-stream", {})
            await self.write(_PINGS[self._call.form])
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(NEXT_PING):
                    await done.wait()

    async def _guarded(self, writing: Awaitable[object]) -> None:
        """Wait for a client that takes its time, but not for ever."""
        transport = self._call.request.transport
        try:
            if transport is not None and transport.get_write_buffer_size() < UNHURRIED:
                await writing  # goes into the buffer, there is nothing to wait for
                return
            async with asyncio.timeout(WRITE_SECONDS):
                await writing
        except (OSError, TimeoutError) as error:
            if transport is not None:
                transport.abort()
            raise ClientGone from error
