"""The rules of one connection: two ends in memory, validated after every step."""

from __future__ import annotations

from itertools import groupby

import pytest

from mesh.errors import (
    AuthenticationError,
    ConnectionClosed,
    DeadlineExceeded,
    ErrorCode,
    FlowControl,
    MalformedMessage,
    ProtocolError,
    ShuttingDown,
    Unauthorized,
)
from mesh.events import Event, Failed, Ponged
from mesh.frames import (
    Credit,
    Data,
    End,
    GoAway,
    Head,
    Message,
    Open,
    Ping,
    Pong,
    Reset,
    Unknown,
    decode,
    encode,
)
from mesh.limits import (
    CREDIT_DEADLINE,
    DEAD_AFTER_IDLE,
    INITIAL_CREDIT,
    MAX_CONNECTION_CREDIT,
    MAX_CREDIT,
    MAX_DATA,
    MAX_PENDING_PONGS,
    PING_AFTER_IDLE,
    RESET_BURST,
)
from tests.wire_support import Link


def bodies(events: list[Event], sid: int = 1) -> bytes:
    return b"".join(event.data for event in events if isinstance(event, Data) and event.sid == sid)


def failure(events: list[Event]) -> Exception:
    (event,) = [event for event in events if isinstance(event, Failed)]
    return event.error


def sent(link: Link, *, by_responder: bool = False) -> list[list[Message | Unknown]]:
    """The frames that one end has to send, decoded by looking over the other's shoulder."""
    end, other = (link.responder, link.initiator) if by_responder else (link.initiator, link.responder)
    pieces = end.outbox.pull(1 << 30)
    return [list(decode(other.inbox._cipher.decrypt(ciphertext))) for ciphertext in pieces[1::2]]


def inject(link: Link, *messages: Message, to_initiator: bool = False) -> list[Event]:
    """Events of one end when the other sends exactly these messages in one frame."""
    sender, receiver = (link.responder, link.initiator) if to_initiator else (link.initiator, link.responder)
    ciphertext = sender.outbox._cipher.encrypt(b"".join(map(encode, messages)))
    events = receiver.receive(len(ciphertext).to_bytes(2, "big") + ciphertext, link.now)
    receiver.validate()
    return events


def test_a_request_and_its_answer_share_frames() -> None:
    link = Link()
    sid = link.initiator.open("infer", {"model": "m"}, b"body")
    assert sid == 1
    at_responder, _ = link.deliver()
    assert at_responder == [Open(1, "infer", {"model": "m"}), Data(1, b"body"), End(1, {})]
    link.responder.send_head(1, {"status": 200})
    link.responder.send_data(1, b"one ")
    link.responder.send_data(1, b"two")
    link.responder.end(1, {"usage": 2})
    assert len(link.responder.outbox.pull(0)) == 0
    _, at_initiator = link.deliver()
    assert at_initiator == [Head(1, {"status": 200}), Data(1, b"one two"), End(1, {"usage": 2})]
    assert link.initiator.streams == link.responder.streams == {}
    assert link.initiator.finished == link.responder.finished == [1]


def test_what_is_ready_together_is_one_frame() -> None:
    link = Link()
    for n in range(10):
        link.initiator.open("infer", {"n": n}, b"prompt")
    link.initiator.ping(0.0)
    frames = sent(link)
    assert len(frames) == 1
    kinds = [kind for kind, _ in groupby(type(message) for message in frames[0])]
    assert kinds[:2] == [Open, Ping], "control goes first"


def test_bodies_take_turns_and_control_passes_them() -> None:
    link = Link()
    for _ in range(3):
        link.initiator.open("upload", {}, bytes(60_000))
    first = [message for frame in sent(link) for message in frame if isinstance(message, Data)]
    turns = [message.sid for message in first]
    assert turns[:6] == [1, 3, 5, 1, 3, 5]
    assert all(len(message.data) <= MAX_DATA for message in first)
    link.initiator.open("small", {}, b"x" * 100)
    link.initiator.reset(1, ErrorCode.CANCELLED)
    frames = sent(link)
    assert [type(message) for message in frames[0][:2]] == [Open, Reset]


def test_a_sender_stops_at_the_credit_and_goes_on_with_more() -> None:
    link = Link()
    body = bytes(range(256)) * 1024  # 256 KiB, four times the initial credit
    link.initiator.open("upload", {}, body)
    at_responder, _ = link.settle()
    received = bodies(at_responder)
    assert received == body[:INITIAL_CREDIT]
    assert End(1, {}) not in at_responder
    while len(received) < len(body):
        link.responder.consumed(1, len(bodies(at_responder)))
        at_responder, _ = link.settle()
        assert bodies(at_responder), "credit moved the body on"
        received += bodies(at_responder)
    assert received == body
    assert at_responder[-1] == End(1, {})


def test_the_window_of_a_bulk_transfer_grows_to_its_bound() -> None:
    link = Link()
    for _ in range(6):
        link.initiator.open("upload", {}, bytes(40 << 20))
    while any(stream.queued for stream in link.initiator.streams.values()):
        at_responder, _ = link.settle()
        for sid in range(1, 12, 2):
            size = len(bodies(at_responder, sid))
            assert size <= MAX_CREDIT
            link.responder.consumed(sid, size)
            link.validate()
    windows = [stream.window for stream in link.responder.streams.values()]
    assert max(windows) == MAX_CREDIT
    assert sum(windows) == MAX_CONNECTION_CREDIT + 6 * INITIAL_CREDIT
    for sid in list(link.responder.streams):
        link.responder.reset(sid, ErrorCode.CANCELLED)
        link.validate()


def test_more_data_than_credit_resets_the_stream() -> None:
    link = Link()
    link.initiator.open("upload", {}, end=False)
    link.settle()
    inject(link, *(Data(1, bytes(MAX_DATA)) for _ in range(3)))
    inject(link, Data(1, bytes(MAX_DATA)))
    events = inject(link, Data(1, b"x"))
    assert events == [Reset(1, ErrorCode.FLOW_CONTROL, "more DATA than credit")]
    assert link.settle()[1] == events
    assert link.initiator.streams == {}


def test_more_credit_than_allowed_is_a_protocol_error() -> None:
    link = Link()
    link.initiator.open("upload", {}, end=False)
    link.settle()
    error = failure(inject(link, Credit(1, MAX_CREDIT), to_initiator=True))
    assert isinstance(error, MalformedMessage)


def test_a_stream_without_credit_is_reset_at_its_deadline() -> None:
    link = Link()
    link.initiator.open("download", {})
    link.settle()
    link.responder.send_data(1, bytes(INITIAL_CREDIT + 1))
    link.settle()
    end = link.responder
    events: list[Event] = []
    while not events and link.now < 2 * CREDIT_DEADLINE:
        link.now = min(end.next_tick(link.now), link.now + 5)
        inject(link, Ping(1))  # the peer lives, it just gives no credit
        events = end.tick(link.now)
        end.validate()
    assert events == [Reset(1, ErrorCode.FLOW_CONTROL, "no credit for 30 s")]
    assert CREDIT_DEADLINE <= link.now <= CREDIT_DEADLINE + 10
    assert link.settle()[1] == events


def test_reset_is_idempotent_and_late_messages_are_ignored() -> None:
    link = Link()
    link.initiator.open("infer", {}, b"body")
    link.settle()
    link.initiator.reset(1, ErrorCode.CANCELLED)
    link.initiator.reset(1, ErrorCode.CANCELLED)
    late = inject(
        link, Head(1, {}), Data(1, b"late"), Credit(1, 5), End(1, {}), Reset(1, 7), to_initiator=True
    )
    assert late == []
    assert link.settle()[0] == [Reset(1, ErrorCode.CANCELLED)]
    link.responder.send_head(1, {})
    link.responder.send_data(1, b"too late")
    link.responder.end(1, {})
    link.responder.consumed(1, 5)
    link.responder.stop_receiving(1)
    assert not link.responder.outbox.waiting


def test_reset_carries_its_retry_time_and_a_bounded_message() -> None:
    link = Link()
    link.initiator.open("infer", {})
    link.settle()
    link.responder.reset(1, ErrorCode.OVERLOADED, "x" * 1000, 1500)
    assert link.settle()[1] == [Reset(1, ErrorCode.OVERLOADED, "x" * 256, 1500)]


VIOLATIONS: dict[str, list[Message]] = {
    "an id of the other side": [Open(2, "infer", {})],
    "an id used twice": [Open(1, "infer", {}), Open(1, "infer", {})],
    "an id below an earlier one": [Open(9, "infer", {}), Open(3, "infer", {})],
    "body of no stream": [Data(1, b"x")],
    "body of our unopened stream": [Data(2, b"x")],
    "end of no stream": [End(5, {})],
    "reset of no stream": [Reset(5, 7)],
    "credit for no stream": [Credit(5, 7)],
    "head from the side that asks": [Open(1, "infer", {}), Head(1, {})],
    "body after the end": [Open(1, "infer", {}), End(1, {}), Data(1, b"x")],
    "two ends": [Open(1, "infer", {}), End(1, {}), End(1, {})],
}


@pytest.mark.parametrize("messages", VIOLATIONS.values(), ids=[name.replace(" ", "-") for name in VIOLATIONS])
def test_violations_end_the_connection(messages: list[Message]) -> None:
    link = Link()
    events = inject(link, *messages)
    assert isinstance(failure(events), MalformedMessage)
    assert len(events) == len(messages), "what came before is delivered, then it is over"
    assert link.responder.receive(b"anything", 0.0) == []
    assert any(isinstance(event, GoAway) for event in link.settle()[1]), "the peer is told"


@pytest.mark.parametrize(
    "messages",
    [[Head(1, {}), Head(1, {})], [Data(1, b"x"), Head(1, {})], [End(1, {}), Head(1, {})]],
    ids=["twice", "after the body", "after the end"],
)
def test_a_misplaced_head_ends_the_connection(messages: list[Message]) -> None:
    link = Link()
    link.initiator.open("infer", {}, end=False)
    link.settle()
    assert isinstance(failure(inject(link, *messages, to_initiator=True)), MalformedMessage)


def test_streams_are_bounded_on_both_sides() -> None:
    link = Link(max_streams=2)
    link.initiator.open("infer", {})
    link.initiator.open("infer", {})
    with pytest.raises(FlowControl):
        link.initiator.open("infer", {})
    link.settle()
    assert inject(link, Open(5, "infer", {})) == []
    assert sent(link, by_responder=True) == [[Reset(5, ErrorCode.FLOW_CONTROL, "more than 2 streams")]]
    assert inject(link, Data(5, b"late"), End(5, {})) == [], "it is known as closed"
    link.responder.end(1, {})
    assert inject(link, Open(7, "infer", {})) == [], "END is not sent yet"
    link.settle()
    assert inject(link, Open(9, "infer", {})) == [Open(9, "infer", {})]


def test_a_flood_of_resets_ends_in_goaway() -> None:
    link = Link()
    for _ in range(int(RESET_BURST)):
        link.initiator.open("infer", {})
        link.settle()
        link.initiator.reset(max(link.initiator.streams), 7)
        link.settle()
    assert not link.responder.goaway_sent
    link.now += 1.0
    for _ in range(10):
        sid = link.initiator.open("infer", {})
        link.initiator.reset(sid, 7)
        link.settle()
    assert not link.responder.goaway_sent, "ten more are earned in a second"
    sid = link.initiator.open("infer", {})
    other = link.initiator.open("infer", {})
    link.initiator.reset(sid, 7)
    _, at_initiator = link.settle()
    (goaway,) = [event for event in at_initiator if isinstance(event, GoAway)]
    assert (goaway.last_sid, goaway.code) == (other, ErrorCode.FLOW_CONTROL)
    link.responder.end(other, {})
    assert link.settle()[1] == [End(other, {})], "what was open goes on"


def test_opening_streams_after_goaway_without_end_is_fatal() -> None:
    link = Link(max_streams=3)
    link.responder.goaway(ErrorCode.SHUTTING_DOWN)
    assert inject(link, *(Open(sid, "infer", {}) for sid in (1, 3, 5))) == []
    assert type(failure(inject(link, Open(7, "infer", {})))) is ProtocolError


def test_resets_by_the_side_that_answers_are_free() -> None:
    link = Link()
    for _ in range(300):
        sid = link.initiator.open("infer", {})
        link.settle()
        link.responder.reset(sid, ErrorCode.OVERLOADED)
        link.settle()
    assert not link.initiator.goaway_sent
    assert not link.responder.goaway_sent


def test_goaway_drains() -> None:
    link = Link()
    link.initiator.open("infer", {})
    link.settle()
    link.initiator.open("infer", {})  # crosses the GOAWAY
    link.responder.goaway(ErrorCode.SHUTTING_DOWN, "bye")
    link.responder.goaway(ErrorCode.INTERNAL, "only the first counts")
    at_responder, at_initiator = link.settle()
    assert at_responder == [], "the new stream was not started"
    assert at_initiator == [
        GoAway(1, ErrorCode.SHUTTING_DOWN, "bye"),
        Reset(3, ErrorCode.SHUTTING_DOWN, "bye"),
    ]
    with pytest.raises(ShuttingDown):
        link.initiator.open("infer", {})
    with pytest.raises(ConnectionClosed):
        link.responder.open("infer", {})
    link.responder.end(1, {})
    assert link.settle()[1] == [End(1, {})]
    assert link.initiator.streams == link.responder.streams == {}
    assert inject(link, Data(3, b"late"), End(3, {})) == []


def test_being_turned_away_says_why() -> None:
    link = Link()
    link.responder.goaway(ErrorCode.UNAUTHORIZED, "not you")
    link.settle()
    with pytest.raises(Unauthorized, match="not you"):
        link.initiator.open("infer", {})
    left = Link()
    left.responder.goaway(ErrorCode.CANCELLED)
    left.settle()
    with pytest.raises(ShuttingDown):
        left.initiator.open("infer", {})


def test_pings_are_answered_with_the_live_load() -> None:
    load = {"busy": 0}
    link = Link(load=lambda: load)
    token = link.initiator.ping(link.now)
    load["busy"] = 3
    link.collect()
    link.now = 0.25
    _, at_initiator = link.settle()
    assert at_initiator == [Ponged(token, 0.25, {"busy": 3})]
    assert inject(link, Pong(token, {}), to_initiator=True) == [], "only once"
    link.initiator.forget_ping(link.initiator.ping(link.now))
    assert link.settle()[1] == []


def test_a_peer_that_only_asks_costs_a_bounded_answer() -> None:
    link = Link()
    for token in range(1000):
        inject(link, Ping(token))
    (answers,) = sent(link, by_responder=True)
    assert answers == [Pong(token, {}) for token in range(1000 - MAX_PENDING_PONGS, 1000)]


def test_silence_is_asked_about_and_then_fatal() -> None:
    link = Link()
    end = link.initiator
    assert end.next_tick(0.0) == PING_AFTER_IDLE
    assert end.tick(PING_AFTER_IDLE) == []
    assert [type(message) for frame in sent(link) for message in frame] == [Ping]
    assert end.next_tick(PING_AFTER_IDLE) == DEAD_AFTER_IDLE
    assert end.tick(30.0) == []
    assert not end.outbox.waiting, "one PING is enough"
    assert isinstance(failure(end.tick(DEAD_AFTER_IDLE)), DeadlineExceeded)
    assert end.tick(100.0) == []


def test_any_byte_is_a_sign_of_life() -> None:
    link = Link()
    link.initiator.receive(b"\x00", 14.0)
    assert link.initiator.next_tick(15.0) == 29.0
    link.initiator.tick(15.0)
    assert not link.initiator.outbox.waiting


@pytest.mark.parametrize("size", [0, 1, 15, 16])
def test_lengths_that_no_frame_has_end_the_connection(size: int) -> None:
    link = Link()
    link.initiator.open("infer", {})
    good = b"".join(link.initiator.outbox.pull(1 << 20))
    events = link.responder.receive(good + size.to_bytes(2, "big") + bytes(size), 0.0)
    assert events[:2] == [Open(1, "infer", {}), End(1, {})], "what came before is delivered"
    assert isinstance(failure(events), AuthenticationError)


@pytest.mark.parametrize("change", ["tampered", "replayed", "reordered", "dropped"])
def test_the_bytes_of_another_hand_end_the_connection(change: str) -> None:
    link = Link()
    frames = []
    for n in range(3):
        link.initiator.open("infer", {"n": n})
        frames.append(b"".join(link.initiator.outbox.pull(1 << 20)))
    if change == "tampered":
        frames[1] = frames[1][:-1] + bytes([frames[1][-1] ^ 1])
    elif change == "replayed":
        frames.insert(1, frames[0])
    elif change == "reordered":
        frames[1], frames[2] = frames[2], frames[1]
    else:
        del frames[1]
    events = link.responder.receive(b"".join(frames), 0.0)
    assert isinstance(failure(events), AuthenticationError)
    assert events[:2] == [Open(1, "infer", {"n": 0}), End(1, {})]
    assert len(events) == 3


def test_both_directions_rekey_in_step() -> None:
    link = Link(rekey_after=4)
    keys = {link.initiator.outbox._cipher._key}
    for n in range(20):
        link.initiator.open("infer", {"n": n})
        link.deliver()
        link.responder.end(2 * n + 1, {"n": n})
        assert End(2 * n + 1, {"n": n}) in link.deliver()[1]
        keys.add(link.initiator.outbox._cipher._key)
    assert len(keys) == 6
    assert link.initiator.outbox._cipher.nonce == 20, "the nonce goes on"


def test_an_answer_may_come_before_the_request_is_complete() -> None:
    link = Link()
    link.initiator.open("upload", {}, bytes(200_000))
    link.settle()
    link.responder.end(1, {"refused": "too large"})
    link.responder.stop_receiving(1)
    _, at_initiator = link.settle()
    assert at_initiator == [
        End(1, {"refused": "too large"}),
        Reset(1, ErrorCode.CANCELLED, "the rest of the body is not wanted"),
    ]
    assert link.initiator.streams == link.responder.streams == {}


def test_what_is_not_wanted_is_not_delivered() -> None:
    link = Link()
    link.initiator.open("upload", {}, end=False)
    link.settle()
    link.responder.stop_receiving(1)
    link.initiator.send_data(1, b"dropped")
    assert link.settle()[0] == []
    link.responder.end(1, {})
    assert link.settle()[1][-1] == Reset(1, ErrorCode.CANCELLED, "the rest of the body is not wanted")


def test_an_end_that_does_not_fit_waits_for_the_next_frame() -> None:
    link = Link()
    for _ in range(3):
        link.initiator.open("method", {})
    link.settle()
    trailer = {"k": "x" * 40_000}
    for sid in (1, 3, 5):
        link.responder.send_data(sid, bytes(10_000))
        link.responder.end(sid, trailer)
    frames = sent(link, by_responder=True)
    order = [
        (type(message), message.sid)
        for frame in frames
        for message in frame
        if isinstance(message, Data | End)
    ]
    assert sorted(order, key=str) == sorted(
        ((kind, sid) for kind in (Data, End) for sid in (1, 3, 5)), key=str
    )
    for sid in (1, 3, 5):
        assert order.index((Data, sid)) < order.index((End, sid))
    assert len(frames) == 3
    assert not link.responder.streams


def test_both_sides_open_streams() -> None:
    link = Link()
    assert link.initiator.open("there", {}) == 1
    assert link.responder.open("back", {}) == 2
    at_responder, at_initiator = link.settle()
    assert Open(1, "there", {}) in at_responder
    assert Open(2, "back", {}) in at_initiator
    link.initiator.send_head(2, {})
    link.initiator.end(2, {})
    assert link.settle()[0] == [Head(2, {}), End(2, {})]


def test_misuse_is_a_bug_of_the_caller() -> None:
    link = Link()
    link.initiator.open("infer", {}, end=False)
    link.settle()
    with pytest.raises(RuntimeError):
        link.initiator.send_head(1, {})
    link.responder.send_head(1, {})
    with pytest.raises(RuntimeError):
        link.responder.send_head(1, {})
    link.responder.end(1, {})
    with pytest.raises(RuntimeError):
        link.responder.end(1, {})
    with pytest.raises(RuntimeError):
        link.responder.send_data(1, b"x")
    with pytest.raises(ValueError, match="items"):
        link.initiator.open("infer", {"k": [0] * 5000})
    assert link.initiator.open("infer", {}) == 3, "a refused meta leaves nothing behind"
    link.settle()


def test_a_small_window_of_the_peer_is_kept() -> None:
    link = Link(window=10)
    link.initiator.open("upload", {}, bytes(100))
    assert bodies(link.settle()[0]) == bytes(10)
