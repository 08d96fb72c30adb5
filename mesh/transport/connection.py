"""Connections for asyncio: the shell around one `mesh.connection.ConnectionState` and its socket.

A `Connection` is its own Protocol. What becomes ready in one turn of the event loop is sent together in
the next.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from time import monotonic
from typing import Any, cast

from mesh.connection import ConnectionState
from mesh.errors import (
    ConnectionClosed,
    DeadlineExceeded,
    ErrorCode,
    ProtocolError,
    QMeshError,
    RemoteError,
)
from mesh.events import Event, Failed, Ponged
from mesh.frames import Data, End, GoAway, Head, Meta, Open, Reset
from mesh.handshake import Agreed
from mesh.identity import short_id
from mesh.limits import (
    CLOSE_TIMEOUT,
    DEAD_AFTER_IDLE,
    GATHER,
    MESSAGES_PER_TURN,
    SEND_BUFFER,
    WRITE_HIGH_WATER,
)
from mesh.transport.sockets import complain, peer_address, read_buffer
from mesh.transport.stream import NO_META, Handler, Stream

logger = logging.getLogger("mesh.wire")


class Connection(asyncio.BufferedProtocol):
    """An authenticated connection to a peer. The Protocol methods are for the event loop only.

    `rtt` (seconds) and `load` are those of the last PONG, None before one. `clock_skew`: the peer's clock
    minus ours in seconds, None where it told none.
    """

    __slots__ = (
        "_buffer", "_flush_later", "_flush_scheduled", "_flushed", "_gone", "_loop", "_lost", "_on_bug",
        "_on_gone", "_on_heard", "_on_stream", "_paused_since", "_ping_waiters", "_streams", "_tasks",
        "_timer", "_transport", "blocked_writers", "bug", "clock_skew", "close_reason",
        "closed", "error", "load", "peer_agent", "peer_id", "remote_address", "rtt", "state",
    )  # fmt: skip

    def __init__(
        self,
        agreed: Agreed,
        *,
        initiator: bool,
        on_stream: Handler | None,
        load: Callable[[], Meta] | None,
        on_bug: Callable[[BaseException], None] | None = None,
        on_gone: Callable[[Connection], None] | None = None,
        on_heard: Callable[[Connection], None] | None = None,
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
            load=load or _no_load, peer_max_streams=agreed.max_streams,
            peer_window=agreed.window,
        )  # fmt: skip
        self.blocked_writers: set[Stream] = set()
        self._on_stream = on_stream
        self._on_bug = on_bug
        self._on_gone = on_gone
        self._on_heard = on_heard
        self._streams: dict[int, Stream] = {}
        self._tasks: dict[Stream, asyncio.Task[None]] = {}
        self._ping_waiters: dict[int, asyncio.Future[float]] = {}
        self._buffer = read_buffer()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._flush_scheduled = False
        self._flush_later: asyncio.TimerHandle | None = None
        self._flushed = 0.0
        self._paused_since: float | None = None
        self._lost = False
        self._gone = asyncio.Event()

    # --- the public interface

    @property
    def open_streams(self) -> int:
        """Streams of both sides that are not over."""
        return len(self.state.streams)

    @property
    def accepts_streams(self) -> bool:
        """Whether `open` would be of use: not closed, and no side is going away."""
        return not (self.closed or self.state.leaving)

    async def open(
        self, method: str, meta: Mapping[str, Any], body: bytes | None = None, *, end: bool = True
    ) -> Stream:
        """Start a stream. With `end` the request is complete with `body` and shares a frame where it fits.

        Raises ConnectionClosed, ShuttingDown and other RemoteErrors where the peer takes no more streams,
        ValueError for a meta that no message can hold (send it as a body).
        """
        if self.closed and self.state.goaway_received is None:
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
        waiter: asyncio.Future[float] = self._loop.create_future()
        self._ping_waiters[token] = waiter
        self.schedule_flush()
        try:
            async with asyncio.timeout(timeout):
                await waiter
        except TimeoutError as error:
            raise DeadlineExceeded(f"no PONG from {short_id(self.peer_id)} within {timeout} s") from error
        finally:
            del self._ping_waiters[token]
            self.state.forget_ping(token)
        return waiter.result()

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
        await self._gone.wait()
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

    def schedule_gathered(self) -> None:
        """Send what is ready, together with what becomes ready within GATHER of the last time: the pieces
        of running answers come faster than it is worth a frame, a system call and a wake-up for each.
        """
        if self._loop.time() - self._flushed >= GATHER:
            self.schedule_flush()
        else:
            self.schedule_with_next()

    def schedule_with_next(self) -> None:
        """Send what is ready together with whatever is sent next, at the latest after GATHER."""
        if self._flush_later is None:
            self._flush_later = self._loop.call_later(GATHER, self.schedule_flush)

    def consumed(self, sid: int, size: int) -> None:
        """The application read body bytes of a stream."""
        self.state.consumed(sid, size)
        if self.state.outbox.waiting:
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
        self._handle(self.state.receive(data, monotonic(), MESSAGES_PER_TURN))
        if self._on_heard is not None and self.state.inbox.heard:
            on_heard, self._on_heard = self._on_heard, None
            on_heard(self)
        if self.state.backlog and not self.closed and self._transport is not None:
            self._transport.pause_reading()  # others have their turn first
            self._loop.call_soon(self._work_off)

    def _work_off(self) -> None:
        if self.closed or self._transport is None:
            return
        self._handle(self.state.receive(b"", monotonic(), MESSAGES_PER_TURN))
        if self.state.backlog:
            self._loop.call_soon(self._work_off)
        elif not self._transport.is_closing():
            self._transport.resume_reading()

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
        if self.state.backlog and not self.closed:
            self._handle(self.state.receive(b"", monotonic()))
        lost = f"lost: {exc}" if exc else "closed by the peer"
        reason = self._goaway_reason() or lost
        self._end(reason, ConnectionClosed(reason))
        if self._timer is not None:
            self._timer.cancel()
        self._lost = True
        self._check_gone()

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
        if self.state.outbox.waiting or self.state.leaving:
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
            if not self.closed:
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
                self.state.end(stream.sid, NO_META)
            self.state.stop_receiving(stream.sid)
            self.schedule_flush()

    def _served(self, stream: Stream, task: asyncio.Task[None]) -> None:
        del self._tasks[stream]
        self._check_gone()
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
        if self._flush_later is not None:
            self._flush_later.cancel()
            self._flush_later = None
        if self.closed:
            return
        self._flushed = self._loop.time()
        self._write()
        for stream in list(self.blocked_writers):
            state = self.state.streams.get(stream.sid)
            if state is None or state.queued <= SEND_BUFFER:
                stream.wake_writer()
        self._forget_finished()
        if self.state.leaving and not (self.state.streams or self._tasks or self.state.outbox.waiting):
            self._end(self._goaway_reason() or "drained", None)

    def _write(self) -> None:
        transport = self._transport
        while transport is not None and self._paused_since is None and self.state.outbox.waiting:
            transport.writelines(self.state.outbox.pull(WRITE_HIGH_WATER))

    def _tick(self) -> None:
        now = monotonic()
        if self._paused_since is not None and now - self._paused_since >= DEAD_AFTER_IDLE:
            error = DeadlineExceeded(f"the peer did not read for {DEAD_AFTER_IDLE:.0f} s")
            self._end(str(error), error)
            self.abort()
            return
        self._handle(self.state.tick(now))
        if not self.closed:
            self._schedule_tick(now)

    def _schedule_tick(self, now: float) -> None:
        self._timer = self._loop.call_later(self.state.next_tick(now) - now, self._tick)

    def _end(self, reason: str, error: QMeshError | None) -> None:
        """Fail what is open, send what is queued, close the socket. The first reason stays."""
        if self.closed:
            return
        self._write()
        self.closed = True
        self.close_reason = reason
        self.error = error
        if isinstance(error, ProtocolError):
            complain("closing the connection to %s: %s", short_id(self.peer_id), reason)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._flush_later is not None:
            self._flush_later.cancel()
            self._flush_later = None
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

    def _check_gone(self) -> None:
        if self._lost and not self._tasks and not self._gone.is_set():
            self._gone.set()
            if self._on_gone is not None:
                self._on_gone(self)

    def _goaway_reason(self) -> str | None:
        goaway = self.state.goaway_received
        if goaway is None:
            return None
        return f"closed by the peer: {goaway.message or f'code {goaway.code}'}"

    def _closed_error(self) -> ConnectionClosed:
        error = ConnectionClosed(f"the connection to {short_id(self.peer_id)} is over: {self.close_reason}")
        error.__cause__ = self.error
        return error


def _no_load() -> Meta:
    return NO_META
