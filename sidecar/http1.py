"""One HTTP/1.1 exchange on a connection of its own: send a request, read the answer as it arrives.

llhttp (the httptools package) parses; this is the asyncio side of it. A general client library was
measured first: it costs 0.3 ms and 0.3 ms of CPU per request, a third of the time to the first token of
a small model (docs/sidecar.md, "The HTTP client").
"""

from __future__ import annotations

import asyncio
import functools
import ssl
from collections.abc import Callable
from typing import cast
from urllib.parse import SplitResult

import httptools

from sidecar.errors import BackendUnreachable, SidecarError

MAX_HEAD_BYTES = 1 << 18
"""Headers and whatever of the body came with them."""
HIGH_WATER = 1 << 20
"""Unread bytes of an answer at which the server is made to wait."""


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


class Exchange(asyncio.Protocol):
    """A request and its answer. `open` connects and sends; await `head()`, then `read()` until b"", or `pump`.

    Every failure is the SidecarError that `fail` was given, or BackendUnreachable; `started` in it says
    that the head of the answer had arrived.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.status = 0
        self.content_type = ""
        self.closed: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._parts: list[bytes] = []
        self._size = self._head_bytes = 0
        self._paused = self._framed = self._complete = self._left = self._headed = False
        self._error: SidecarError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._sink: Callable[[bytes], bool] | None = None
        self._room = False

    async def open(self, url: SplitResult, request: bytes) -> None:
        """Connect and send. Raises OSError."""
        port = url.port or (443 if url.scheme == "https" else 80)
        context = _tls() if url.scheme == "https" else None
        await self._loop.create_connection(lambda: self, url.hostname or "", port, ssl=context)
        if self._transport:
            self._transport.write(request)

    async def head(self) -> None:
        """Wait for status and headers."""
        while not self._headed:
            await self._news()

    async def read(self) -> bytes:
        """The next bytes of the body, all that are there; b"" at its end."""
        while not self._parts:
            if self._complete:
                return b""
            await self._news()
        return self._take()

    async def pump(self, sink: Callable[[bytes], bool]) -> bool:
        """Hand the body to `sink` from within the event loop's callback, which spares every piece a turn of
        this task. True at the end of the body; False once `sink` returned False, for it has no more room now.
        What `sink` raises is raised here.
        """
        self._sink, self._room = sink, True
        try:
            while self._offer() and not self._complete:
                await self._news()
        finally:
            self._sink = None
        return self._room

    def fail(self, error: SidecarError) -> None:
        """Close at once; whoever waits or reads gets `error`, not what is unread."""
        self._parts.clear()
        self._break(error)

    @property
    def finished(self) -> bool:
        """Whether the answer has ended, broken off, or was left."""
        return self._complete or self._left or self._error is not None

    def close(self) -> None:
        """Close at once, whatever is unread or unsent; idempotent."""
        self._left = True
        if self._transport:
            self._transport.abort()
        elif not self.closed.done():
            self.closed.set_result(None)

    def _take(self) -> bytes:
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._size = 0
        if self._paused and self._transport and not self.finished:
            self._paused = False
            self._transport.resume_reading()
        return data

    def _offer(self) -> bool:
        """Hand what is there to the sink, if it has room; whether it has room for more."""
        if self._sink and self._room and self._parts:
            self._room = self._sink(self._take())
        return self._room

    async def _news(self) -> None:
        if self._error:
            raise self._error
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _break(self, error: SidecarError) -> None:
        if self._error is None:
            self._error = error
        self.close()
        self._wake()

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    # ── asyncio.Protocol ────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of asyncio.Protocol."""
        self._transport = cast("asyncio.Transport", transport)
        if self._left:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Part of asyncio.Protocol."""
        if not self._headed:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._break(BackendUnreachable(f"the answer's headers are over {MAX_HEAD_BYTES} bytes"))
                return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            if not self._complete:
                self._break(BackendUnreachable(f"the answer is not HTTP: {error}", started=self._headed))
            return
        if self._sink and self._room:
            try:
                if self._offer() and not self._complete:
                    return
            except Exception as error:  # noqa: BLE001 - whatever the sink raises, `pump` raises it
                self._room = False
                if self._waiter and not self._waiter.done():
                    self._waiter.set_exception(error)
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        """Part of asyncio.Protocol."""
        self._transport = None
        if not self._complete and self._error is None:
            if self._headed and not self._framed and error is None:
                self._complete = True  # a body without a length ends with its connection
            else:
                text = f"the connection was closed{f': {error}' if error else ''}"
                self._error = BackendUnreachable(text, started=self._headed)
        if not self.closed.done():
            self.closed.set_result(None)
        self._wake()

    # ── httptools callbacks ─────────────────────────────────────────────────────────────────────

    def on_header(self, name: bytes, value: bytes) -> None:
        """Part of httptools' protocol."""
        lower = name.lower()
        if lower == b"content-type":
            self.content_type = value.decode("latin-1")
        elif lower in (b"content-length", b"transfer-encoding"):
            self._framed = True

    def on_headers_complete(self) -> None:
        """Part of httptools' protocol."""
        self.status = self._parser.get_status_code()
        self._headed = self.status >= 200

    def on_body(self, body: bytes) -> None:
        """Part of httptools' protocol."""
        self._parts.append(body)
        self._size += len(body)
        if self._size > HIGH_WATER and not self._paused and self._transport:
            self._paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        """Part of httptools' protocol."""
        if self._headed:
            self._complete = True
            if self._transport:
                self._transport.close()
