"""Connections and streams for asyncio: the shell around `mesh.connection`.

One `Connection` is one socket after its handshake. It is its own Protocol and reads into a buffer
that all connections of a thread share, since what was read is dealt with before the next read. What
becomes ready in one turn of the event loop is sent together in the next.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from time import monotonic
from types import TracebackType
from typing import Any, cast

from mesh.connection import ConnectionState, Event, Failed, Ponged
from mesh.errors import (
    ConnectionClosed,
    DeadlineExceeded,
    ErrorCode,
    ProtocolError,
    QMeshError,
    RemoteError,
    TransportError,
    remote_error,
)
from mesh.frames import Data, End, GoAway, Head, Meta, Open, Reset
from mesh.handshake import Agreed
from mesh.identity import NodeId, short_id
from mesh.limits import (
    CLOSE_TIMEOUT,
    DEAD_AFTER_IDLE,
    MAX_STREAMS,
    READ_BUFFER,
    SEND_BUFFER,
    WRITE_HIGH_WATER,
)

logger = logging.getLogger("mesh.wire")

Handler = Callable[["Stream"], Awaitable[None]]
_NO_META: Meta = {}
_thread = threading.local()


def read_buffer() -> memoryview:
    """The calling thread's buffer for reading from sockets."""
    buffer: memoryview | None = getattr(_thread, "buffer", None)
    if buffer is None:
        buffer = _thread.buffer = memoryview(bytearray(READ_BUFFER))
    return buffer


class Stream:
    """A request and its answer. Both directions; used by one reader and one writer at a time.

    As an async context manager it resets the stream with CANCELLED when it is left early. Every method
    raises ConnectionClosed when the connection is gone and a RemoteError when the peer reset the stream;
    body bytes that came before that are still delivered.
    """

    __slots__ = ("_body", "_ended", "_failure", "_head", "_reader", "_send_failure", "_writer", "connection",
                 "meta", "method", "sid", "trailer")  # fmt: skip

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
        """Send the head of the answer: once, by the side that was called, before the body."""
        self._check_sending()
        self.connection.state.send_head(self.sid, meta)
        self.connection.schedule_flush()

    async def send(self, data: bytes) -> None:
        """Queue body bytes of any size; waits while more than SEND_BUFFER bytes are queued.

        Raises FlowControl when the peer granted no credit for CREDIT_DEADLINE.
        """
        if self.send_nowait(data) > SEND_BUFFER:
            await self._drained()

    def send_nowait(self, data: bytes) -> int:
        """Queue body bytes and return how many are queued now. The caller bounds what it queues."""
        self._check_sending()
        queued = self.connection.state.send_data(self.sid, data)
        self.connection.schedule_flush()
        return queued

    async def end(self, meta: Meta | None = None) -> None:
        """End this direction. What is queued is still sent."""
        self._check_sending()
        self.connection.state.end(self.sid, meta or _NO_META)
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
                return _NO_META
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
        trailer = self.trailer or _NO_META
        code = trailer.get("code")
        if isinstance(code, int) and code:
            message, ms = trailer.get("message"), trailer.get("retry_after_ms")
            retry_after = ms / 1000 if isinstance(ms, int) and ms >= 0 else None
            raise remote_error(code, message if isinstance(message, str) else "", retry_after)

    async def _arrival(self, timeout: float | None, what: str) -> None:
        if self._reader is not None:
            raise RuntimeError("a stream has one reader at a time")
        self._reader = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout):
                await self._reader
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"{what} did not come from {short_id(self.peer_id)} within {timeout} s"
            ) from error
        finally:
            self._reader = None

    async def _drained(self) -> None:
        if self._writer is not None:
            raise RuntimeError("a stream has one writer at a time")
        self._writer = asyncio.get_running_loop().create_future()
        self.connection.blocked_writers.add(self)
        try:
            await self._writer
        finally:
            self._writer = None
            self.connection.blocked_writers.discard(self)
        self._check_sending()


class Connection(asyncio.BufferedProtocol):
    """An authenticated connection to a peer. The Protocol methods are for the event loop only.

    `rtt` (seconds) and `load` are those of the last PONG, None before one. `clock_skew`: the peer's clock
    minus ours in seconds, None where it told none.
    """

    def __init__(
        self,
        agreed: Agreed,
        *,
        initiator: bool,
        on_stream: Handler | None,
        load: Callable[[], Meta] | None,
        on_bug: Callable[[BaseException], None] | None = None,
        on_lost: Callable[[Connection], None] | None = None,
        on_heard: Callable[[Connection], None] | None = None,
        max_streams: int = MAX_STREAMS,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.peer_id = agreed.peer_id
        self.peer_agent = agreed.peer_agent
        self.clock_skew = agreed.clock_skew
        self.remote_address: tuple[str, int] = ("", 0)
        self.rtt: float | None = None
        self.load: Meta | None = None
        self.closed = False
        self.close_reason = ""
        self.error: QMeshError | None = None
        """What ended the connection, if it was not closed on purpose."""
        self.bug: BaseException | None = None
        self.state = ConnectionState(
            initiator=initiator, send=agreed.send, receive=agreed.receive, now=monotonic(),
            load=load or _no_load, max_streams=max_streams, peer_max_streams=agreed.max_streams,
            peer_window=agreed.window,
        )  # fmt: skip
        self.blocked_writers: set[Stream] = set()
        self._on_stream = on_stream
        self._on_bug = on_bug
        self._on_lost = on_lost
        self._on_heard = on_heard
        self._streams: dict[int, Stream] = {}
        self._tasks: dict[Stream, asyncio.Task[None]] = {}
        self._ping_waiters: dict[int, asyncio.Future[float]] = {}
        self._buffer = read_buffer()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._flush_scheduled = False
        self._paused_since: float | None = None
        self._lost = asyncio.Event()

    # --- the public interface

    @property
    def open_streams(self) -> int:
        """Streams of both sides that are not over."""
        return len(self.state.streams)

    @property
    def accepts_streams(self) -> bool:
        """Whether `open` would be of use: not closed, and no side is going away."""
        return not (self.closed or self.state.goaway_sent or self.state.goaway_received)

    async def open(
        self, method: str, meta: Mapping[str, Any], body: bytes | None = None, *, end: bool = True
    ) -> Stream:
        """Start a stream. With `end` the request is complete with `body` and shares a frame where it fits.

        Raises ConnectionClosed, ShuttingDown and other RemoteErrors where the peer takes no more streams,
        ValueError for a meta that no message can hold (send it as a body).
        """
        if self.closed:
            raise self._closed_error()
        sid = self.state.open(method, meta, body, end=end)
        stream = self._streams[sid] = Stream(self, sid, method, meta)
        self.schedule_flush()
        return stream

    async def ping(self, timeout: float) -> float:
        """The round trip in seconds. Raises DeadlineExceeded and ConnectionClosed."""
        if self.closed:
            raise self._closed_error()
        token = self.state.ping(monotonic())
        waiter = self._ping_waiters[token] = self._loop.create_future()
        self.schedule_flush()
        try:
            async with asyncio.timeout(timeout):
                return await waiter
        except TimeoutError as error:
            raise DeadlineExceeded(f"no PONG from {short_id(self.peer_id)} within {timeout} s") from error
        finally:
            del self._ping_waiters[token]
            self.state.forget_ping(token)

    async def goaway(self, code: ErrorCode = ErrorCode.SHUTTING_DOWN, message: str = "") -> None:
        """Take no new streams. The connection closes itself when the open ones are done."""
        self.state.goaway(code, message)
        self.schedule_flush()

    async def close(self, code: ErrorCode = ErrorCode.CANCELLED, message: str = "") -> None:
        """Tell the peer, end every stream and wait for the end, at most CLOSE_TIMEOUT. Idempotent."""
        if not self.closed:
            self.state.goaway(code, message)
            self._end(f"closed here: {message or code.name.lower()}", None)
        await self.wait_closed()

    async def wait_closed(self) -> None:
        """Wait until the socket is closed and every handler has ended. Raises a handler's bug."""
        await self._lost.wait()
        if self._tasks:
            await asyncio.wait(self._tasks.values())
        if self.bug is not None:
            raise self.bug

    def turn_away(self, code: ErrorCode, message: str) -> None:
        """Tell a peer that is not let in why, and close."""
        self.state.goaway(code, message)
        self._end(message, None)

    def greet(self) -> None:
        """Send a first frame: it proves that the handshake was no replay, and measures the round trip."""
        self.state.ping(monotonic())
        self.schedule_flush()

    def abort(self) -> None:
        """Drop the connection at once, with what is queued."""
        self._end("aborted here", None)
        if self._transport is not None:
            self._transport.abort()

    # --- called by streams

    def schedule_flush(self) -> None:
        """Send what is ready once this turn of the event loop is over."""
        if not self._flush_scheduled and self._paused_since is None and not self.closed:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def consumed(self, sid: int, size: int) -> None:
        """The application read body bytes of a stream."""
        self.state.consumed(sid, size)
        if self.state.wants_to_send:
            self.schedule_flush()

    # --- called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start: take over a socket whose handshake is done."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)
        self.remote_address = peer_address(self._transport)
        self._schedule_tick(monotonic())

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where to read to."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes were read."""
        self.feed(self._buffer[:nbytes])

    def feed(self, data: bytes | memoryview) -> None:
        """Bytes from the socket, also those that came right behind the handshake."""
        self._handle(self.state.receive(data, monotonic()))
        if self._on_heard is not None and self.state.heard:
            on_heard, self._on_heard = self._on_heard, None
            on_heard(self)

    def eof_received(self) -> bool:
        """The peer sends no more: nothing can come of the connection."""
        return False

    def pause_writing(self) -> None:
        """The socket's buffer is full: the streams wait, reading goes on."""
        self._paused_since = monotonic()

    def resume_writing(self) -> None:
        """The socket's buffer has room again."""
        self._paused_since = None
        self.schedule_flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is gone."""
        goaway = self.state.goaway_received
        if goaway is not None:
            reason = f"closed by the peer: {goaway.message or f'code {goaway.code}'}"
        else:
            reason = f"lost: {exc}" if exc else "closed by the peer"
        self._end(reason, ConnectionClosed(reason))
        if self._timer is not None:
            self._timer.cancel()
        self._lost.set()
        if self._on_lost is not None:
            self._on_lost(self)

    # --- inside

    def _handle(self, events: Iterable[Event]) -> None:
        for event in events:
            kind = type(event)
            if kind is Open:
                self._accept(cast("Open", event))
            elif kind is Ponged:
                self._ponged(cast("Ponged", event))
            elif kind is Failed:
                error = cast("Failed", event).error
                self._end(f"{type(error).__name__}: {error}", error)
            elif kind is not GoAway:
                message = cast("Head | Data | End | Reset", event)
                stream = self._streams.get(message.sid)
                if stream is not None:
                    stream.on_event(message)
                    if kind is Reset and stream in self._tasks:
                        self._tasks[stream].cancel()
        self._forget_finished()
        if self.state.wants_to_send or not self._streams:
            self.schedule_flush()

    def _accept(self, event: Open) -> None:
        stream = Stream(self, event.sid, event.method, event.meta)
        if self._on_stream is None:
            stream.reset(ErrorCode.BAD_REQUEST, "this side serves no requests")
            return
        self._streams[event.sid] = stream
        task = self._loop.create_task(self._serve(stream, self._on_stream))
        self._tasks[stream] = task
        task.add_done_callback(partial(self._served, stream))

    async def _serve(self, stream: Stream, handler: Handler) -> None:
        try:
            await handler(stream)
        except RemoteError as error:
            stream.reset(error.code, error.message, error.retry_after)
        except DeadlineExceeded:
            stream.reset(ErrorCode.DEADLINE, "a deadline passed at the worker")
        except QMeshError as error:
            logger.warning("stream %d of %s failed: %s", stream.sid, short_id(self.peer_id), error)
            stream.reset(ErrorCode.INTERNAL, "the request failed at the worker")
        except BaseException as error:
            cancelled = isinstance(error, asyncio.CancelledError)
            stream.reset(ErrorCode.CANCELLED if cancelled else ErrorCode.INTERNAL)
            raise
        else:
            self._handler_done(stream)

    def _handler_done(self, stream: Stream) -> None:
        state = self.state.streams.get(stream.sid)
        if state is not None:
            if state.end is None:
                self.state.end(stream.sid, _NO_META)
            self.state.stop_receiving(stream.sid)
            self.schedule_flush()

    def _served(self, stream: Stream, task: asyncio.Task[None]) -> None:
        del self._tasks[stream]
        error = None if task.cancelled() else task.exception()
        if error is None:
            self.schedule_flush()  # it may have been what a drained connection waited for
            return
        logger.error("a handler of %s is broken", stream.method, exc_info=error)
        if self._on_bug is not None:
            self._on_bug(error)
        else:
            self.bug = error
            self._end("a bug in a handler", ConnectionClosed("a bug in a handler"))

    def _ponged(self, event: Ponged) -> None:
        self.rtt, self.load = event.rtt, event.load
        waiter = self._ping_waiters.get(event.token)
        if waiter is not None and not waiter.done():
            waiter.set_result(event.rtt)

    def _forget_finished(self) -> None:
        finished = self.state.finished
        if finished:
            for sid in finished:
                self._streams.pop(sid, None)
            finished.clear()

    def _flush(self) -> None:
        self._flush_scheduled = False
        if self.closed:
            return
        self._write()
        for stream in list(self.blocked_writers):
            state = self.state.streams.get(stream.sid)
            if state is None or state.queued <= SEND_BUFFER:
                stream.wake_writer()
        self._forget_finished()
        leaving = self.state.goaway_sent or self.state.goaway_received is not None
        if leaving and not (self.state.streams or self._tasks or self.state.wants_to_send):
            self._end("drained", ConnectionClosed("the connection was drained and closed"))

    def _write(self) -> None:
        transport = self._transport
        while transport is not None and self._paused_since is None:
            pieces = self.state.pull(WRITE_HIGH_WATER)
            if not pieces:
                break
            transport.writelines(pieces)

    def _tick(self) -> None:
        now = monotonic()
        if self._paused_since is not None and now - self._paused_since >= DEAD_AFTER_IDLE:
            self.abort_with(DeadlineExceeded(f"the peer did not read for {DEAD_AFTER_IDLE:.0f} s"))
            return
        self._handle(self.state.tick(now))
        if not self.closed:
            self._schedule_tick(now)

    def _schedule_tick(self, now: float) -> None:
        self._timer = self._loop.call_later(self.state.next_tick(now) - now, self._tick)

    def abort_with(self, error: TransportError) -> None:
        """Drop the connection for a reason."""
        self._end(str(error), error)
        if self._transport is not None:
            self._transport.abort()

    def _end(self, reason: str, error: QMeshError | None) -> None:
        """Fail what is open, send what is queued, close the socket. The first reason stays."""
        if self.closed:
            return
        self._write()
        self.closed = True
        self.close_reason = reason
        self.error = error
        if isinstance(error, ProtocolError):
            logger.warning("closing the connection to %s: %s", short_id(self.peer_id), reason)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for stream in self._streams.values():
            stream.fail(self._closed_error)
        self._streams.clear()
        for task in self._tasks.values():
            task.cancel()
        for waiter in self._ping_waiters.values():
            if not waiter.done():
                waiter.set_exception(self._closed_error())
        transport = self._transport
        if transport is not None and not transport.is_closing():
            transport.close()
            self._timer = self._loop.call_later(CLOSE_TIMEOUT, transport.abort)

    def _closed_error(self) -> ConnectionClosed:
        error = ConnectionClosed(f"the connection to {short_id(self.peer_id)} is over: {self.close_reason}")
        error.__cause__ = self.error
        return error


def peer_address(transport: asyncio.BaseTransport) -> tuple[str, int]:
    """The remote host and port."""
    name = transport.get_extra_info("peername")
    return (str(name[0]), int(name[1])) if name else ("", 0)


def _no_load() -> Meta:
    return _NO_META


def _wake(future: asyncio.Future[None] | None) -> None:
    if future is not None and not future.done():
        future.set_result(None)
