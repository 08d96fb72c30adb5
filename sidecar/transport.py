"""HTTP to one llama.cpp server: raw bytes as they come, or parsed events and answers.

Every request has a connection of its own: the server closes kept-alive ones without warning, and a
fresh one costs 0.1 ms on loopback. When it breaks before the first response byte the request is sent
once more. Leaving a response early closes its connection at once, which is what frees the slot.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Mapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import orjson

from sidecar.errors import (
    BackendError,
    BackendUnreachable,
    InvalidRequest,
    SidecarError,
    SidecarStopped,
    SidecarTimeout,
    backend_error,
)
from sidecar.http1 import Exchange
from sidecar.sse import EventParser

CONNECT_TIMEOUT = 5.0
MAX_ANSWER_BYTES = 64 << 20
_CLOSE_TIMEOUT = 1.0
_SAFE_HEADERS = frozenset({"content-type", "accept"})
"""Only these are passed on: X-Conversation-Id would keep a generation alive after its client left."""

_PATH = re.compile(r"/[!-~]*")
_LINE = re.compile(r"[ -~]*")

Json = Any
Body = bytes | Mapping[str, Json] | None


class Response:
    """One answer: status at once, body as it comes. An async context manager; iterate it for bytes.

    `status` and `content_type` are the server's. Iterating raises BackendUnreachable when the
    connection breaks, SidecarTimeout after `idle_timeout` seconds of silence, SidecarStopped when the
    server is being stopped.
    """

    def __init__(self, exchange: Exchange, idle_timeout: float | None) -> None:
        self._exchange, self._idle = exchange, idle_timeout
        self.status = exchange.status
        self.content_type = exchange.content_type

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        try:
            if self._idle is None:
                data = await self._exchange.read()
            else:
                async with asyncio.timeout(self._idle):
                    data = await self._exchange.read()
        except TimeoutError:
            self._exchange.close()
            raise SidecarTimeout(f"the server sent nothing for {self._idle} s") from None
        if not data:
            raise StopAsyncIteration
        return data

    async def pump(self, sink: Callable[[bytes], bool]) -> bool:
        """Hand the body to `sink` piece by piece, as soon as each arrives and without a bound on silence.

        Returns True at the end of the body, and False once `sink` returned False: call again when there
        is room. Raises as iterating does, and what `sink` raises.
        """
        return await self._exchange.pump(sink)

    async def read(self, limit: int = MAX_ANSWER_BYTES) -> bytes:
        """The whole body; raises as iterating does, and SidecarError when it is over `limit` bytes."""
        parts, size = [], 0
        async for data in self:
            size += len(data)
            if size > limit:
                self._exchange.close()
                raise SidecarError(f"the server's answer is over {limit} bytes")
            parts.append(data)
        return b"".join(parts)

    async def aclose(self) -> None:
        """Close the connection at once; idempotent."""
        self._exchange.close()


class HttpClient:
    """Talks to one server. Cheap to make; `aclose` closes everything that is open."""

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        self.base_url = base_url.rstrip("/")
        self.api_key = api_key
        self._url = urlsplit(self.base_url)
        self._exchanges: set[Exchange] = set()
        self._closed: SidecarError | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def in_flight(self) -> int:
        """Requests whose answer has not ended yet."""
        return sum(not exchange.finished for exchange in self._exchanges)

    async def aclose(self, reason: SidecarError | None = None) -> None:
        """Close every connection and refuse new requests; idempotent.

        Whoever reads a response or waits for one gets `reason`, or SidecarStopped. Returns when the
        server can see that the connections are closed.
        """
        self._closed = self._closed or reason or SidecarStopped("the server is stopped")
        open_now = list(self._exchanges)
        for exchange in open_now:
            exchange.fail(self._closed.copy())
        if open_now:
            await asyncio.wait([exchange.closed for exchange in open_now], timeout=_CLOSE_TIMEOUT)

    async def request(
        self,
        method: str,
        path: str,
        body: Body = None,
        headers: Mapping[str, str] | None = None,
        *,
        timeout: float | None = None,
        idle_timeout: float | None = None,
        api_key: str | None = None,
    ) -> Response:
        """Send a request and wait for the head of its answer, whatever its status.

        `timeout` bounds the time to the head, `idle_timeout` every later silence (seconds; None: no
        bound). Raises InvalidRequest for a path or header that cannot be sent, BackendUnreachable,
        SidecarTimeout, SidecarStopped.
        """
        data = orjson.dumps(body) if isinstance(body, Mapping) else body
        request = self._head(method, path, data, headers or {}, api_key or self.api_key) + (data or b"")
        try:
            async with asyncio.timeout(timeout):
                return Response(await self._send(request, f"{method} {path}"), idle_timeout)
        except TimeoutError:
            raise SidecarTimeout(f"no answer to {method} {path} within {timeout} s") from None

    def _head(
        self, method: str, path: str, data: bytes | None, headers: Mapping[str, str], key: str | None
    ) -> bytes:
        sent = {k.lower(): v for k, v in headers.items() if k.lower() in _SAFE_HEADERS}
        if data is not None:
            sent.setdefault("content-type", "application/json")
            sent["content-length"] = str(len(data))
        if key:
            sent["authorization"] = f"Bearer {key}"
        lines = [
            f"{method} {self._url.path}{path} HTTP/1.1",
            f"host: {self._url.netloc}",
            "connection: close",
        ]
        lines += [f"{name}: {value}" for name, value in sent.items()]
        if not (_PATH.fullmatch(path) and all(map(_LINE.fullmatch, lines))):
            # The path may come from a peer: nothing in it may become a header of ours.
            raise InvalidRequest(f"{method} {path!r} cannot be sent: only printable ASCII can", status=400)
        return "\r\n".join([*lines, "", ""]).encode()

    async def _send(self, request: bytes, what: str) -> Exchange:
        for attempt in (1, 2):
            exchange = await self._connect(request)
            try:
                await exchange.head()
            except BackendUnreachable as error:
                if attempt == 2:
                    raise BackendUnreachable(f"{what} got no answer: {error}") from error
            except BaseException:
                exchange.close()
                raise
            else:
                return exchange
        raise AssertionError("the second attempt returns or raises")

    async def _connect(self, request: bytes) -> Exchange:
        if self._closed:
            raise self._closed.copy()
        exchange = Exchange(asyncio.get_running_loop())
        self._exchanges.add(exchange)
        exchange.closed.add_done_callback(lambda _: self._exchanges.discard(exchange))
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await exchange.open(self._url, request)
        except (OSError, ValueError, TimeoutError) as error:
            exchange.close()
            raise BackendUnreachable(f"no connection to {self.base_url}: {error}") from error
        except BaseException:
            exchange.close()
            raise
        return exchange

    async def call(
        self,
        method: str,
        path: str,
        body: Body = None,
        headers: Mapping[str, str] | None = None,
        *,
        timeout: float | None = None,
    ) -> Json:
        """Send a request and decode its JSON answer.

        Raises BackendError (by status) as well as what `request` raises.
        """
        async with await self.request(
            method, path, body, headers, timeout=timeout, idle_timeout=timeout
        ) as response:
            data = await response.read()
            if response.status >= 400:
                raise error_of(response.status, data)
            return _decoded(data, response.status)

    async def stream_events(
        self,
        path: str,
        body: Mapping[str, Json],
        *,
        timeout: float | None = None,
        idle_timeout: float | None = None,
    ) -> AsyncGenerator[Json, None]:
        """The decoded `data` of every event of a streamed answer, without the final `[DONE]`.

        Raises BackendError for an error answer, also for one in mid-stream.
        """
        request = {**body, "stream": True}
        async with await self.request(
            "POST", path, request, timeout=timeout, idle_timeout=idle_timeout
        ) as response:
            if response.status >= 400:
                raise error_of(response.status, await response.read())
            parser = EventParser()
            async for chunk in response:
                for event in parser.feed(chunk):
                    if event.data == b"[DONE]":
                        return
                    data = _decoded(event.data, response.status)
                    if isinstance(data, dict) and "error" in data:
                        raise backend_error(500, data["error"], event.data)
                    yield data


def error_of(status: int, body: bytes) -> SidecarError:
    """The exception for the body of an error answer."""
    try:
        decoded = orjson.loads(body)
    except orjson.JSONDecodeError:
        return backend_error(status, body[:500].decode("utf-8", "replace"), body)
    return backend_error(status, decoded.get("error") if isinstance(decoded, dict) else decoded, body)


def _decoded(data: bytes, status: int) -> Json:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        shown = data[:200].decode("utf-8", "replace")
        raise BackendError(f"the server's answer is not JSON: {shown!r}", status=status) from error
