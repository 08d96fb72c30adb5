"""Request bodies: read within limits of time and size, and all of them together within a budget."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import orjson
from aiohttp import web
from aiohttp.http import HttpVersion11

from node.gateway.errors import ApiError

BODY_SECONDS = 60.0
"""A body has this long to arrive."""
MAX_HELD = 256 << 20
"""Bytes of all bodies and buffered answers together."""


class Budget:
    """Bytes that may be held for all requests at the same time."""

    def __init__(self, limit: int = MAX_HELD) -> None:
        self._limit = limit
        self.held = 0

    def take(self, size: int) -> None:
        """Raises ApiError (503) where the budget does not allow it."""
        if self.held + size > self._limit:
            raise ApiError(
                503, "too many large requests are being answered", code="overloaded", retry_after=2.0
            )
        self.held += size

    def give_back(self, size: int) -> None:
        """What was taken is free again."""
        self.held -= size


class Intake:
    """Reads bodies of at most `limit` bytes each."""

    def __init__(self, limit: int, budget: Budget) -> None:
        self._limit = limit
        self._budget = budget

    @asynccontextmanager
    async def body(self, request: web.BaseRequest) -> AsyncIterator[bytes]:
        """The whole body, counted in the budget until the block ends.

        Raises ApiError: 400 for a broken body, 408 for a slow one, 413 for a large one, 503 without budget.
        """
        if request.content_length is not None and request.content_length > self._limit:
            raise self._too_large()
        await _continue(request)
        parts: list[bytes] = []
        size = 0
        try:
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    while data := await request.content.readany():
                        if size + len(data) > self._limit:
                            raise self._too_large()
                        self._budget.take(len(data))
                        size += len(data)
                        parts.append(data)
            except TimeoutError:
                raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s") from None
            except web.RequestPayloadError as error:
                raise ApiError(400, f"the body cannot be read: {error}") from error
            yield b"".join(parts)
        finally:
            self._budget.give_back(size)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request body is larger than {self._limit >> 20} MB")


def fields(body: bytes) -> Mapping[str, Any]:
    """The body's fields. Raises ApiError (400) for anything but a JSON object."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    return value


async def _continue(request: web.BaseRequest) -> None:
    """Tell a client that asked before it sends its body to go on (RFC 9110, 10.1.1)."""
    if request.version == HttpVersion11 and request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0
