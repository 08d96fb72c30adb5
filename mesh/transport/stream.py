"""Streams for asyncio: one request and its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING

from mesh.errors import DeadlineExceeded, ErrorCode, QMeshError, remote_error
from mesh.frames import Data, End, Head, Meta, Reset
from mesh.identity import NodeId, short_id
from mesh.limits import SEND_BUFFER

if TYPE_CHECKING:
    from mesh.transport.connection import Connection

Handler = Callable[["Stream"], Awaitable[None]]
"""Serves one stream that the peer opened. Cancelled when the peer resets it or the connection ends."""

NO_META: Meta = {}


class Stream:
    """A request and its answer. Both directions; used by one reader and one writer at a time.

    As an async context manager it resets the stream with CANCELLED when it is left early. Every method
    raises ConnectionClosed when the connection is gone and a RemoteError when the peer reset the stream;
    body bytes that came before that are still delivered.
    """

    __slots__ = (
        "_body", "_ended", "_failure", "_flowing", "_head", "_reader", "_send_failure", "_writer",
        "connection", "meta", "method", "sid", "trailer",
    )  # fmt: skip

    def __init__(self, connection: Connection, sid: int, method: str, meta: Meta) -> None:
        self.connection = connection
        self.sid = sid
        self.method = method
        self.meta = meta
        self.trailer: Meta | None = None
        """The meta of the peer's END, once it came."""
        self._head: Meta | None = None
        self._body: bytes | bytearray = b""
        self._ended = False
        self._flowing = False
        """The first bytes of the body were sent."""
        self._failure: Callable[[], QMeshError] | None = None
        self._send_failure: Callable[[], QMeshError] | None = None
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None

    @property
    def peer_id(self) -> NodeId:
        """Who is at the other end."""
        return self.connection.peer_id

    @property
    def closed(self) -> bool:
        """Whether both directions are over."""
        return self.sid not in self.connection.state.streams

    # --- sending

    async def send_head(self, meta: Meta) -> None:
        """Send the head of the answer: once, by the side that was called, before the body, and with it where
        that begins within GATHER.
        """
        self._check_sending()
        self.connection.state.send_head(self.sid, meta)
        self.connection.schedule_with_next()

    async def send(self, data: bytes) -> None:
        """Queue body bytes of any size; waits while more than SEND_BUFFER bytes are queued.

        Raises FlowControl when the peer granted no credit for CREDIT_DEADLINE.
        """
        if self.send_nowait(data) > SEND_BUFFER:
            await self.drained()

    def send_nowait(self, data: bytes) -> int:
        """Queue body bytes and return how many are queued now. Over SEND_BUFFER wait until it has `drained`.

        The first bytes of a body are sent at once, later ones within GATHER.
        """
        self._check_sending()
        queued = self.connection.state.send_data(self.sid, data)
        if self._flowing:
            self.connection.schedule_gathered()
        else:
            self._flowing = True
            self.connection.schedule_flush()
        return queued

    async def drained(self) -> None:
        """Wait until at most SEND_BUFFER bytes are queued. Raises as `send` does."""
        if self._writer is not None:
            raise RuntimeError("a stream has one writer at a time")
        self._check_sending()
        self._writer = asyncio.get_running_loop().create_future()
        self.connection.blocked_writers.add(self)
        self.connection.schedule_flush()  # which looks at the queue again: it may have shrunk already
        try:
            await self._writer
        finally:
            self._writer = None
            self.connection.blocked_writers.discard(self)
        self._check_sending()

    async def end(self, meta: Meta | None = None) -> None:
        """End this direction. What is queued is still sent."""
        self._check_sending()
        self.connection.state.end(self.sid, meta or NO_META)
        self.connection.schedule_flush()

    def reset(self, code: ErrorCode, message: str = "", retry_after: float | None = None) -> None:
        """Cancel or fail the stream, both directions; `retry_after` in seconds. Idempotent."""
        retry_after_ms = None if retry_after is None else max(0, round(retry_after * 1000))
        self.connection.state.reset(self.sid, code, message, retry_after_ms)
        self.connection.schedule_flush()
        self.fail(lambda: remote_error(code, message or "the stream was reset here", retry_after), drop=True)

    # --- receiving

    async def head(self, timeout: float | None = None) -> Meta:
        """The head of the answer; an empty one if the peer answers without. `timeout` in seconds.

        Raises DeadlineExceeded.
        """
        while self._head is None:
            if self._ended:
                self._check_trailer()
            if self._ended or self._body:
                return NO_META
            self._check_receiving()
            await self._arrival(timeout, "the head of an answer")
        return self._head

    async def read(self, timeout: float | None = None) -> bytes | None:
        """The next body bytes, all that are there; None at the end. Lets the peer send as much again.

        Raises DeadlineExceeded when nothing came for `timeout` seconds, and the RemoteError that an
        END with an error code stands for.
        """
        while not self._body:
            if self._ended:
                self._check_trailer()
                return None
            self._check_receiving()
            await self._arrival(timeout, "more of an answer")
        data = bytes(self._body)
        self._body = b""
        self.connection.consumed(self.sid, len(data))
        return data

    async def read_all(self, limit: int, timeout: float | None = None) -> bytes:
        """The whole body. Raises BadRequest over `limit` bytes; `timeout` is for each part."""
        body = bytearray()
        while (part := await self.read(timeout)) is not None:
            body += part
            if len(body) > limit:
                raise remote_error(ErrorCode.BAD_REQUEST, f"a body has at most {limit} bytes")
        return bytes(body)

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.closed:
            self.reset(ErrorCode.CANCELLED)

    # --- called by the connection

    def on_event(self, event: Head | Data | End | Reset) -> None:
        """A message of the peer for this stream."""
        if type(event) is Data:
            if self._body:
                if type(self._body) is bytes:
                    self._body = bytearray(self._body)
                self._body += event.data  # joined, so that tiny messages cost no more than their bytes
            else:
                self._body = event.data
        elif type(event) is Head:
            self._head = event.meta
        elif type(event) is End:
            self.trailer = event.meta
            self._ended = True
        elif type(event) is Reset:
            code, message, ms = event.code, event.message, event.retry_after_ms
            self.fail(lambda: remote_error(code, message, None if ms is None else ms / 1000))
        _wake(self._reader)

    def fail(self, failure: Callable[[], QMeshError], *, drop: bool = False) -> None:
        """Both directions are over. What was received whole stays readable unless `drop` is set."""
        if self._send_failure is None:
            self._send_failure = failure
        if drop:
            self._body = b""
        if self._failure is None and (drop or not self._ended):
            self._ended = False
            self._failure = failure
        _wake(self._reader)
        _wake(self._writer)

    def wake_writer(self) -> None:
        """The queue shrank."""
        _wake(self._writer)

    def _check_sending(self) -> None:
        if self._send_failure is not None:
            raise self._send_failure()

    def _check_receiving(self) -> None:
        if self._failure is not None:
            raise self._failure()

    def _check_trailer(self) -> None:
        trailer = self.trailer or NO_META
        code = trailer.get("code")
        if isinstance(code, int) and code:
            message, ms = trailer.get("message"), trailer.get("retry_after_ms")
            retry_after = ms / 1000 if isinstance(ms, int) and ms >= 0 else None
            raise remote_error(code, message if isinstance(message, str) else "", retry_after)

    async def _arrival(self, timeout: float | None, what: str) -> None:
        if self._reader is not None:
            raise RuntimeError("a stream has one reader at a time")
        loop = asyncio.get_running_loop()
        self._reader = waiter = loop.create_future()
        timer = None if timeout is None else loop.call_later(timeout, _expire, waiter)
        try:
            await waiter
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"{what} did not come from {short_id(self.peer_id)} within {timeout} s"
            ) from error
        finally:
            self._reader = None
            if timer is not None:
                timer.cancel()


def _expire(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_exception(TimeoutError())


def _wake(future: asyncio.Future[None] | None) -> None:
    if future is not None and not future.done():
        future.set_result(None)
