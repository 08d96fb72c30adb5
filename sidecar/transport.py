"""HTTP to one llama.cpp server: raw bytes as they come, or parsed events and answers.

Every request has a connection of its own: the server closes kept-alive ones without warning, and a
fresh one costs 0.1 ms on loopback. When it breaks before the first response byte the request is sent
once more. Leaving a response early closes its connection at once, which is what frees the slot.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from types import TracebackType
from typing import Any, Self

import aiohttp
import orjson

from sidecar.errors import (
    BackendError,
    BackendUnreachable,
    SidecarError,
    SidecarStopped,
    SidecarTimeout,
    backend_error,
)
from sidecar.sse import EventParser

CONNECT_TIMEOUT = 5.0
MAX_ANSWER_BYTES = 64 << 20
_READ_BUFFER = 1 << 18
_CLOSE_TIMEOUT = 1.0
_SAFE_HEADERS = frozenset({"content-type", "accept"})
"""Only these are passed on: X-Conversation-Id would keep a generation alive after its client left."""

Json = Any
Body = bytes | Mapping[str, Json] | None


class Response:
    """One answer: status at once, body as it comes. An async context manager; iterate it for bytes.

    `status` and `content_type` are the server's. Iterating raises BackendUnreachable when the
    connection breaks, SidecarTimeout after `idle_timeout` seconds of silence, SidecarStopped when the
    server is being stopped.
    """

    def __init__(self, client: HttpClient, raw: aiohttp.ClientResponse, idle_timeout: float | None) -> None:
        self._client, self._raw, self._idle = client, raw, idle_timeout
        self.status = raw.status
        self.content_type = raw.headers.get("Content-Type", "")
        self._fault: SidecarError | None = None

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
                data = await self._raw.content.readany()
            else:
                async with asyncio.timeout(self._idle):
                    data = await self._raw.content.readany()
        except TimeoutError:
            self.abort(None)
            raise SidecarTimeout(f"the server sent nothing for {self._idle} s") from None
        except (aiohttp.ClientError, OSError) as error:
            self._client.open_responses.discard(self)
            if self._fault:
                raise self._fault from None
            raise BackendUnreachable(f"the answer broke off: {error}", started=True) from error
        if self._fault:
            raise self._fault
        if not data:
            self._client.open_responses.discard(self)
            raise StopAsyncIteration
        return data

    async def read(self, limit: int = MAX_ANSWER_BYTES) -> bytes:
        """The whole body; raises as iterating does, and SidecarError when it is over `limit` bytes."""
        parts, size = [], 0
        async for data in self:
            size += len(data)
            if size > limit:
                self.abort(None)
                raise SidecarError(f"the server's answer is over {limit} bytes")
            parts.append(data)
        return b"".join(parts)

    def abort(self, fault: SidecarError | None) -> None:
        """Close the connection at once; a reader that waits gets `fault`."""
        self._fault = fault
        self._client.open_responses.discard(self)
        self._raw.close()

    async def aclose(self) -> None:
        """Close the connection at once; idempotent."""
        self.abort(self._fault)


class HttpClient:
    """Talks to one server. Cheap to make; `aclose` closes everything that is open."""

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        self.base_url = base_url.rstrip("/")
        self.api_key = api_key
        self.open_responses: set[Response] = set()
        self._waiting = 0
        self._session: aiohttp.ClientSession | None = None
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
        return self._waiting + len(self.open_responses)

    async def aclose(self, reason: SidecarError | None = None) -> None:
        """Close every connection and refuse new requests; idempotent.

        Whoever reads a response or waits for one gets `reason`, or SidecarStopped.
        """
        self._closed = self._closed or reason or SidecarStopped("the server is stopped")
        for response in list(self.open_responses):
            response.abort(self._closed.copy())
        if self._session:
            with contextlib.suppress(TimeoutError):  # a hung server does not take what is still to be sent
                async with asyncio.timeout(_CLOSE_TIMEOUT):
                    await self._session.close()

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
        bound). Raises BackendUnreachable, SidecarTimeout, SidecarStopped.
        """
        sent = {k: v for k, v in (headers or {}).items() if k.lower() in _SAFE_HEADERS}
        data = orjson.dumps(body) if isinstance(body, Mapping) else body
        if data is not None and not any(k.lower() == "content-type" for k in sent):
            sent["Content-Type"] = "application/json"
        key = self.api_key if api_key is None else api_key
        if key:
            sent["Authorization"] = f"Bearer {key}"
        self._waiting += 1
        try:
            async with asyncio.timeout(timeout):
                raw = await self._send(method, path, data, sent)
        except TimeoutError:
            raise SidecarTimeout(f"no answer to {method} {path} within {timeout} s") from None
        finally:
            self._waiting -= 1
        response = Response(self, raw, idle_timeout)
        if self._closed:
            raw.close()
            raise self._closed.copy()
        self.open_responses.add(response)
        return response

    async def _send(
        self, method: str, path: str, data: bytes | None, headers: dict[str, str]
    ) -> aiohttp.ClientResponse:
        for attempt in (1, 2):
            if self._closed:
                raise self._closed.copy()
            try:
                return await self._connection().request(
                    method, self.base_url + path, data=data, headers=headers
                )
            except aiohttp.ClientConnectorError as error:
                fault = BackendUnreachable(f"no connection to {self.base_url}: {error.strerror}")
                raise self._closed_or(fault) from error
            except (aiohttp.ClientError, OSError) as error:
                if attempt == 2:
                    raise self._closed_or(
                        BackendUnreachable(f"{method} {path} got no answer: {error}")
                    ) from error
        raise AssertionError("the second attempt returns or raises")

    def _closed_or(self, fault: SidecarError) -> SidecarError:
        return self._closed.copy() if self._closed else fault

    def _connection(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(force_close=True, limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT),
                read_bufsize=_READ_BUFFER,
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("User-Agent", "Accept-Encoding"),
            )
        return self._session

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
