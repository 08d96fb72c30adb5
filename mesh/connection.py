"""One connection after its handshake: streams, credit, priorities, liveness and leaving. Pure.

Bytes and the time come in through `receive` and `tick`, which return events (`mesh.events`); what is to
be sent is collected in the `outbox` and pulled from there as whole frames.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from mesh.errors import (
    ConnectionClosed,
    DeadlineExceeded,
    ErrorCode,
    MalformedMessage,
    ProtocolError,
    TransportError,
    remote_error,
)
from mesh.events import Event, Failed, Ponged, goaway_error
from mesh.frames import (
    Credit,
    Data,
    End,
    GoAway,
    Head,
    Meta,
    Open,
    Ping,
    Pong,
    Reset,
    Unknown,
    encode,
)
from mesh.inbox import Inbox
from mesh.limits import (
    CREDIT_DEADLINE,
    INITIAL_CREDIT,
    MAX_CONNECTION_CREDIT,
    MAX_CREDIT,
    MAX_SID,
    MAX_STREAMS,
    MAX_TEXT,
    REKEY_AFTER_FRAMES,
    RESET_BURST,
    RESETS_PER_SECOND,
)
from mesh.liveness import Health, Liveness, TokenBucket
from mesh.noise import CipherState
from mesh.outbox import Outbox
from mesh.streams import StreamState


class ConnectionState:
    """A connection's rules. `now` is a monotonic time in seconds, the same clock in every call.

    `load` is asked for this side's live load whenever a PONG is made.
    """

    __slots__ = (
        "_extra_window", "_ignored_opens", "_initiator", "_last_peer_sid", "_liveness", "_next_sid",
        "_peer_max_streams", "_peer_window", "_resets",
        "failed", "finished", "goaway_received", "goaway_sent", "inbox",
        "max_streams", "outbox", "own_streams", "peer_streams", "streams",
    )  # fmt: skip

    def __init__(
        self,
        *,
        initiator: bool,
        send: CipherState,
        receive: CipherState,
        now: float,
        load: Callable[[], Meta],
        max_streams: int = MAX_STREAMS,
        peer_max_streams: int = MAX_STREAMS,
        peer_window: int = INITIAL_CREDIT,
        rekey_after: int = REKEY_AFTER_FRAMES,
    ) -> None:
        self._initiator = initiator
        self.inbox = Inbox(receive, rekey_after=rekey_after)
        self.outbox = Outbox(send, load=load, on_ended=self._on_ended, rekey_after=rekey_after)
        self._peer_max_streams = peer_max_streams
        self._peer_window = peer_window
        self._liveness = Liveness(now)
        self._resets = TokenBucket(RESET_BURST, RESETS_PER_SECOND, now)
        self._next_sid = 1 if initiator else 2
        self._last_peer_sid = 0
        self._ignored_opens = 0
        self._extra_window = 0
        self.max_streams = max_streams
        self.streams: dict[int, StreamState] = {}
        self.own_streams = 0
        self.peer_streams = 0
        self.goaway_sent = False
        self.goaway_received: GoAway | None = None
        self.failed = False
        self.finished: list[int] = []
        """Streams that are over; whoever keeps something for them empties this list."""

    # --- what the application does -------------------------------------------------------------

    def open(self, method: str, meta: Meta, body: bytes | None = None, *, end: bool = True) -> int:
        """Start a stream and return its sid. With `end` the request is complete with `body`.

        Raises RemoteError where the peer said that it takes no more streams, ValueError for a meta
        that does not fit into one message.
        """
        if self.goaway_received is not None:
            raise goaway_error(self.goaway_received)
        if self.failed or self.goaway_sent or self._next_sid > MAX_SID:
            raise ConnectionClosed("this connection takes no new streams")
        if self.own_streams >= self._peer_max_streams:
            raise remote_error(
                ErrorCode.FLOW_CONTROL, f"{self.own_streams} streams are open, which is the peer's limit"
            )
        sid = self._next_sid
        self.outbox.control(Open(sid, method, meta))
        self._next_sid += 2
        self.own_streams += 1
        stream = self.streams[sid] = StreamState(sid, self._peer_window)
        if body:
            stream.enqueue(body)
        if end:
            stream.end = encode(End(sid, {}))
        self.outbox.schedule(stream)
        return sid

    def send_head(self, sid: int, meta: Meta) -> None:
        """Send the head of a response, once and before its body. No effect on a stream that is over."""
        stream = self.streams.get(sid)
        if stream is None:
            return
        if self._is_own(sid) or stream.head_sent or stream.queued or stream.end is not None:
            raise RuntimeError("a head is sent once, by the side that answers, before the body")
        self.outbox.control(Head(sid, meta))
        stream.head_sent = True

    def send_data(self, sid: int, data: bytes) -> int:
        """Queue body bytes and return how many are queued now. No effect on a stream that is over."""
        stream = self.streams.get(sid)
        if stream is None:
            return 0
        if stream.end is not None:
            raise RuntimeError("the body was already ended")
        stream.head_sent = True
        stream.enqueue(data)
        self.outbox.schedule(stream)
        return stream.queued

    def end(self, sid: int, meta: Meta) -> None:
        """End this direction once everything queued is sent. No effect on a stream that is over."""
        stream = self.streams.get(sid)
        if stream is None:
            return
        if stream.end is not None:
            raise RuntimeError("the body was already ended")
        stream.end = encode(End(sid, meta))
        self.outbox.schedule(stream)

    def reset(self, sid: int, code: int, message: str = "", retry_after_ms: int | None = None) -> None:
        """Cancel or fail a stream. No effect on one that is over."""
        stream = self.streams.get(sid)
        if stream is not None:
            self.outbox.control(Reset(sid, code, message[:MAX_TEXT], retry_after_ms))
            self._remove(stream)

    def stop_receiving(self, sid: int) -> None:
        """Drop what still arrives on a stream; once this side's END is sent the peer is told to stop."""
        stream = self.streams.get(sid)
        if stream is not None:
            stream.stop_receiving = True
            if stream.local_ended and not stream.remote_ended:
                self.reset(sid, ErrorCode.CANCELLED, "the rest of the body is not wanted")

    def consumed(self, sid: int, size: int) -> None:
        """The application took `size` body bytes: the peer may send that much again."""
        stream = self.streams.get(sid)
        if stream is None or stream.stop_receiving:
            return
        before = stream.window
        amount = stream.consumed(size, MAX_CONNECTION_CREDIT - self._extra_window)
        self._extra_window += stream.window - before
        if amount:
            self.outbox.control(Credit(sid, amount))

    def ping(self, now: float) -> int:
        """Ask for a PONG; its token."""
        token = self._liveness.ping(now)
        self.outbox.control(Ping(token))
        return token

    def forget_ping(self, token: int) -> None:
        """Nobody waits for this PONG any more."""
        self._liveness.forget(token)

    def goaway(self, code: int, message: str = "") -> None:
        """Take no new streams; those that are open go on. Sent once."""
        if not self.goaway_sent:
            self.goaway_sent = True
            self.outbox.control(GoAway(self._last_peer_sid, code, message[:MAX_TEXT]))

    @property
    def leaving(self) -> bool:
        """Whether either side takes no new streams."""
        return self.goaway_sent or self.goaway_received is not None

    # --- what arrives --------------------------------------------------------------------------

    def receive(self, data: bytes | memoryview, now: float, at_most: int | None = None) -> list[Event]:
        """Bytes from the socket; deals with `at_most` messages and keeps the rest as `backlog`.

        After a `Failed` event the connection is dead and takes no more.
        """
        events: list[Event] = []
        if self.failed:
            return events
        try:
            if data:
                self._liveness.heard(now)
                self.inbox.feed(data)
            for message in islice(self.inbox, at_most):
                _ON[type(message)](self, message, now, events)
        except ProtocolError as error:
            self._fail(error, events)
        return events

    @property
    def backlog(self) -> bool:
        """Whether more was received than was dealt with."""
        return not self.failed and self.inbox.waiting

    def tick(self, now: float) -> list[Event]:
        """Do what is due: PING a silent peer, give up a dead one, reset streams without credit."""
        events: list[Event] = []
        if self.failed:
            return events
        match self._liveness.check(now):
            case Health.DEAD:
                silence = self._liveness.silence(now)
                self._fail(DeadlineExceeded(f"the peer was silent for {silence:.0f} s"), events)
                return events
            case Health.ASK:
                self.ping(now)
        for stream in list(self.streams.values()):
            if not stream.starved:
                continue
            if stream.blocked_since is None:
                stream.blocked_since = now
            elif now - stream.blocked_since >= CREDIT_DEADLINE:
                self._reset_locally(stream, f"no credit for {CREDIT_DEADLINE:.0f} s", events)
        return events

    def next_tick(self, now: float) -> float:
        """When `tick` should be called next."""
        silence_at = max(now, self._liveness.next_check())
        return min(silence_at, now + CREDIT_DEADLINE / 6) if self.streams else silence_at

    # --- handlers, one per message type --------------------------------------------------------

    def _on_open(self, message: Open, now: float, events: list[Event]) -> None:
        sid = message.sid
        if self._is_own(sid):
            raise MalformedMessage("the peer opened a stream with an id of ours")
        if sid <= self._last_peer_sid:
            raise MalformedMessage("the peer used a stream id twice")
        if self.goaway_sent:  # above its last_sid, so the peer will know that it was not started
            self._ignored_opens += 1
            if self._ignored_opens > self.max_streams:
                raise ProtocolError("the peer goes on opening streams after GOAWAY")
            return
        self._last_peer_sid = sid
        if self.peer_streams >= self.max_streams:
            self._spend_reset(now)
            self.outbox.control(Reset(sid, ErrorCode.FLOW_CONTROL, f"more than {self.max_streams} streams"))
            return
        self.peer_streams += 1
        self.streams[sid] = StreamState(sid, INITIAL_CREDIT)
        events.append(message)

    def _on_head(self, message: Head, now: float, events: list[Event]) -> None:
        stream = self._find(message.sid)
        if stream is None:
            return
        if not self._is_own(message.sid) or stream.head_received or stream.remote_ended:
            raise MalformedMessage("HEAD comes once, from the side that answers, before the body")
        stream.head_received = True
        events.append(message)

    def _on_data(self, message: Data, now: float, events: list[Event]) -> None:
        stream = self._find(message.sid)
        if stream is None or not message.data:
            return
        if stream.remote_ended:
            raise MalformedMessage("DATA after END")
        stream.head_received = True
        if not stream.received(len(message.data)):
            self._spend_reset(now)
            self._reset_locally(stream, "more DATA than credit", events)
        elif not stream.stop_receiving:
            events.append(message)

    def _on_end(self, message: End, now: float, events: list[Event]) -> None:
        stream = self._find(message.sid)
        if stream is None:
            return
        if stream.remote_ended:
            raise MalformedMessage("END twice")
        stream.head_received = stream.remote_ended = True
        if stream.local_ended:
            self._remove(stream)
        events.append(message)

    def _on_reset(self, message: Reset, now: float, events: list[Event]) -> None:
        stream = self._find(message.sid)
        if stream is None:
            return
        if not self._is_own(message.sid):
            self._spend_reset(now)  # the peer cancels what it opened: cheap for it, work for us
        self._remove(stream)
        events.append(message)

    def _on_credit(self, message: Credit, now: float, events: list[Event]) -> None:
        stream = self._find(message.sid)
        if stream is None:
            return
        if stream.send_credit + message.amount > MAX_CREDIT:
            raise MalformedMessage(f"more than {MAX_CREDIT} bytes of credit on one stream")
        stream.send_credit += message.amount
        stream.blocked_since = None
        self.outbox.schedule(stream)

    def _on_ping(self, message: Ping, now: float, events: list[Event]) -> None:
        self.outbox.pong(message.token)

    def _on_pong(self, message: Pong, now: float, events: list[Event]) -> None:
        rtt = self._liveness.pong(message.token, now) if isinstance(message.token, int) else None
        if rtt is not None and isinstance(message.token, int):
            events.append(Ponged(message.token, rtt, message.load))

    def _on_goaway(self, message: GoAway, now: float, events: list[Event]) -> None:
        self.goaway_received = message
        events.append(message)
        error = goaway_error(message)
        for stream in list(self.streams.values()):
            if self._is_own(stream.sid) and stream.sid > message.last_sid:
                self._remove(stream)
                events.append(Reset(stream.sid, error.code, error.message))

    # --- helpers -------------------------------------------------------------------------------

    def _on_ended(self, stream: StreamState) -> None:
        if stream.remote_ended:
            self._remove(stream)
        elif stream.stop_receiving:
            self.reset(stream.sid, ErrorCode.CANCELLED, "the rest of the body is not wanted")

    def _is_own(self, sid: int) -> bool:
        return (sid % 2 == 1) == self._initiator

    def _find(self, sid: int) -> StreamState | None:
        """The stream, None if it is over. Raises MalformedMessage if it never was."""
        stream = self.streams.get(sid)
        if stream is None:
            never = (
                sid >= self._next_sid
                if self._is_own(sid)
                else sid > self._last_peer_sid and not self.goaway_sent
            )
            if never:
                raise MalformedMessage(f"a message for stream {sid}, which was never opened")
        return stream

    def _remove(self, stream: StreamState) -> None:
        del self.streams[stream.sid]
        self.finished.append(stream.sid)
        self._extra_window -= stream.window - INITIAL_CREDIT
        stream.drop_queue()
        self.outbox.withdraw(stream)
        if self._is_own(stream.sid):
            self.own_streams -= 1
        else:
            self.peer_streams -= 1

    def _reset_locally(self, stream: StreamState, reason: str, events: list[Event]) -> None:
        self.reset(stream.sid, ErrorCode.FLOW_CONTROL, reason)
        events.append(Reset(stream.sid, ErrorCode.FLOW_CONTROL, reason))

    def _spend_reset(self, now: float) -> None:
        if not self._resets.take(now):
            self.goaway(ErrorCode.FLOW_CONTROL, "too many resets")

    def _fail(self, error: ProtocolError | TransportError, events: list[Event]) -> None:
        if isinstance(error, ProtocolError):
            self.goaway(ErrorCode.BAD_REQUEST, type(error).__name__)
        self.failed = True
        events.append(Failed(error))

    def validate(self) -> None:
        """Raises AssertionError where an invariant does not hold. For tests, after every step."""
        for sid, stream in self.streams.items():
            stream.validate()
            if stream.sid != sid or (stream.local_ended and stream.remote_ended):
                raise AssertionError("a stream is filed under its sid and gone when both sides ended")
        self.outbox.validate(self.streams)
        own = sum(map(self._is_own, self.streams))
        if (own, len(self.streams) - own) != (self.own_streams, self.peer_streams):
            raise AssertionError("the counters count the streams")
        if self.peer_streams > self.max_streams or self.own_streams > self._peer_max_streams:
            raise AssertionError("no side has more streams than agreed")
        extra = sum(stream.window - INITIAL_CREDIT for stream in self.streams.values())
        if extra != self._extra_window or extra > MAX_CONNECTION_CREDIT:
            raise AssertionError("the windows are within the connection's bound")


_ON: dict[type, Callable[..., None]] = {
    Open: ConnectionState._on_open,
    Head: ConnectionState._on_head,
    Data: ConnectionState._on_data,
    End: ConnectionState._on_end,
    Reset: ConnectionState._on_reset,
    Credit: ConnectionState._on_credit,
    Ping: ConnectionState._on_ping,
    Pong: ConnectionState._on_pong,
    GoAway: ConnectionState._on_goaway,
    Unknown: lambda *_: None,
}
