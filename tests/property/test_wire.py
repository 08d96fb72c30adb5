"""What must hold for every way in which bytes are cut, streams interleave and connections break."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mesh.connection import ConnectionState
from mesh.errors import ConnectionClosed, FlowControl, RemoteError
from mesh.events import Event, Failed
from mesh.frames import Data, End, GoAway, Head, Open, Reset, decode, encode
from mesh.limits import INITIAL_CREDIT
from mesh.noise import CipherState
from mesh.transport.memory import Plain
from tests.wire_support import Link, no_load

META = st.dictionaries(
    st.text(max_size=8),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats(allow_nan=False)
        | st.text(max_size=20)
        | st.binary(max_size=20),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
        max_leaves=8,
    ),
    max_size=4,
)


def responder(rekey_after: int) -> ConnectionState:
    return ConnectionState(
        initiator=False,
        send=CipherState(bytes([5]) * 32),
        receive=CipherState(bytes([4]) * 32),
        now=0.0,
        load=no_load,
        rekey_after=rekey_after,
    )


@settings(deadline=None)
@given(META)
def test_every_meta_survives_the_wire(meta: dict[str, object]) -> None:
    message = Open(1, "method", meta)
    assert list(decode(encode(message))) == [message]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_cutting_of_the_bytes_gives_the_same_events(data: st.DataObject) -> None:
    rekey_after = data.draw(st.sampled_from([2, 3, 1000]))
    link = Link(rekey_after=rekey_after)
    for n in range(data.draw(st.integers(1, 5))):
        link.initiator.open("method", {"n": n}, bytes([n]) * data.draw(st.integers(0, 3000)))
        link.collect()
        if data.draw(st.booleans()):
            link.initiator.reset(2 * n + 1, 7, "changed my mind")
            link.collect()
    if data.draw(st.booleans()):
        link.to_responder[data.draw(st.integers(0, len(link.to_responder) - 1))] ^= 1
    stream = bytes(link.to_responder)
    whole = summary(responder(rekey_after).receive(stream, 0.0))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=30)))
    pieces: list[Event] = []
    end = responder(rekey_after)
    at_most = data.draw(st.sampled_from([1, 2, 5, None]))
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        pieces += end.receive(stream[start:stop], 0.0, at_most)
        end.validate()
        while end.backlog:
            pieces += end.receive(b"", 0.0, at_most)
            end.validate()
    assert summary(pieces) == whole


def summary(events: list[Event]) -> list[object]:
    """Events, with errors made comparable."""
    return [(type(e.error), str(e.error)) if isinstance(e, Failed) else e for e in events]


class Interleaving(RuleBasedStateMachine):
    """Two ends do whatever they may; each stream's bytes arrive in order and exactly once.

    What was sent on a stream is a counting pattern, so that any byte out of place is seen.
    """

    cipher: Callable[[bytes], CipherState] = CipherState

    def __init__(self) -> None:
        super().__init__()
        self.link = Link(max_streams=8, rekey_after=5, cipher=type(self).cipher)
        self.ends = {"initiator": self.link.initiator, "responder": self.link.responder}
        self.sent: dict[tuple[str, int], int] = defaultdict(int)
        self.ended: set[tuple[str, int]] = set()
        self.received: dict[tuple[str, int], int] = defaultdict(int)
        self.finished: set[tuple[str, int]] = set()
        self.unread: dict[tuple[str, int], int] = defaultdict(int)
        self.opened: set[tuple[str, int]] = set()
        self.was_reset: set[int] = set()
        self.broken = False

    sides = st.sampled_from(["initiator", "responder"])

    def pattern(self, start: int, size: int, sid: int) -> bytes:
        whole = bytes((sid * 31 + n) % 251 for n in range(251))
        offset = start % 251
        return (whole * (size // 251 + 2))[offset : offset + size]

    @initialize()
    def begin(self) -> None:
        self.link.validate()

    @rule(side=sides, size=st.sampled_from([0, 1, 500, 20_000, 200_000]), end=st.booleans())
    def open(self, side: str, size: int, end: bool) -> None:
        state = self.ends[side]
        sid = state._next_sid
        try:
            assert state.open("method", {}, self.pattern(0, size, sid), end=end) == sid
        except (RemoteError, ConnectionClosed) as error:
            full = isinstance(error, FlowControl) and state.own_streams == state._peer_max_streams
            assert full or state.goaway_sent or state.goaway_received or state.failed
            return
        self.sent[side, sid] = size
        if end:
            self.ended.add((side, sid))

    @rule(side=sides, pick=st.integers(0, 7), size=st.integers(0, 90_000))
    def send(self, side: str, pick: int, size: int) -> None:
        state = self.ends[side]
        sids = [sid for sid, stream in state.streams.items() if stream.end is None]
        if sids:
            sid = sids[pick % len(sids)]
            state.send_data(sid, self.pattern(self.sent[side, sid], size, sid))
            self.sent[side, sid] += size

    @rule(side=sides, pick=st.integers(0, 7))
    def end(self, side: str, pick: int) -> None:
        state = self.ends[side]
        sids = [sid for sid, stream in state.streams.items() if stream.end is None]
        if sids:
            sid = sids[pick % len(sids)]
            state.end(sid, {"sent": self.sent[side, sid]})
            self.ended.add((side, sid))

    @rule(side=sides, pick=st.integers(0, 7))
    def reset(self, side: str, pick: int) -> None:
        state = self.ends[side]
        if state.streams:
            sid = list(state.streams)[pick % len(state.streams)]
            state.reset(sid, 7)
            self.was_reset.add(sid)

    @rule(side=sides, share=st.floats(0, 1))
    def consume(self, side: str, share: float) -> None:
        for sid in list(self.ends[side].streams):
            size = int(self.unread[side, sid] * share)
            self.unread[side, sid] -= size
            self.ends[side].consumed(sid, size)

    @rule(side=sides)
    def ping(self, side: str) -> None:
        self.ends[side].ping(self.link.now)

    @rule(limit=st.sampled_from([1, 70_000, 1 << 20]), side=sides)
    def transmit(self, limit: int, side: str) -> None:
        wire = self.link.to_responder if side == "initiator" else self.link.to_initiator
        wire += b"".join(self.ends[side].outbox.pull(limit))

    @rule(side=sides, size=st.sampled_from([1, 100, 10_000, 1 << 30]))
    def arrive(self, side: str, size: int) -> None:
        wire = self.link.to_responder if side == "responder" else self.link.to_initiator
        piece = bytes(wire[:size])
        del wire[:size]
        self.take(side, self.ends[side].receive(piece, self.link.now))

    @precondition(lambda self: not self.broken)
    @rule(side=sides, size=st.integers(0, 5000))
    def lose_the_connection(self, side: str, size: int) -> None:
        """From here on nothing arrives at one side, but for a last part."""
        wire = self.link.to_responder if side == "responder" else self.link.to_initiator
        del wire[size:]
        self.take(side, self.ends[side].receive(bytes(wire), self.link.now))
        wire.clear()
        self.ends[side].failed = True
        self.broken = True

    def take(self, side: str, events: list[Event]) -> None:
        other = "responder" if side == "initiator" else "initiator"
        for event in events:
            assert not isinstance(event, Failed), event
            if isinstance(event, Open):
                assert (side, event.sid) not in self.opened, "opened once"
                self.opened.add((side, event.sid))
            elif isinstance(event, Data):
                key = (side, event.sid)
                assert key not in self.finished
                assert event.data == self.pattern(self.received[key], len(event.data), event.sid)
                self.received[key] += len(event.data)
                self.unread[key] += len(event.data)
                assert self.received[key] <= self.sent[other, event.sid]
            elif isinstance(event, End):
                key = (side, event.sid)
                assert key not in self.finished, "ended once"
                assert (other, event.sid) in self.ended
                assert self.received[key] == self.sent[other, event.sid], "nothing is missing at the end"
                self.finished.add(key)
            elif isinstance(event, Reset):
                assert event.sid in self.was_reset or self.ends[side].goaway_received
                self.was_reset.add(event.sid)
            elif isinstance(event, GoAway | Head):
                assert self.ends[other].goaway_sent

    @invariant()
    def rules_hold(self) -> None:
        self.link.validate()

    def teardown(self) -> None:
        """Let everything arrive: all that ended and was not reset is complete."""
        if self.broken:
            return
        for _ in range(2000):
            for side in self.ends:
                self.transmit(1 << 30, side)
            for side in self.ends:
                self.arrive(side, 1 << 30)
                self.consume(side, 1.0)
            self.link.validate()
            if not any(end.outbox.waiting for end in self.ends.values()):
                break
        other = {"initiator": "responder", "responder": "initiator"}
        for side, sid in self.ended:
            if sid not in self.was_reset and not any(end.goaway_sent for end in self.ends.values()):
                assert (other[side], sid) in self.finished


TestInterleaving = Interleaving.TestCase
TestInterleaving.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


class InterleavingWithin(Interleaving):
    """The same where nothing is encrypted: between a node and its own client."""

    cipher = staticmethod(lambda _: Plain())


TestInterleavingWithin = InterleavingWithin.TestCase
TestInterleavingWithin.settings = settings(TestInterleaving.settings, max_examples=50)


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 300_000), min_size=1, max_size=6), seed=st.randoms())
def test_every_order_of_reading_moves_bodies_within_the_window(sizes: list[int], seed: object) -> None:
    link = Link()
    for size in sizes:
        link.initiator.open("upload", {}, bytes(size))
    unread: dict[int, int] = defaultdict(int)
    received: dict[int, int] = defaultdict(int)
    ended: set[int] = set()
    while len(ended) < len(sizes):
        for event in link.settle()[0]:
            if isinstance(event, Data):
                unread[event.sid] += len(event.data)
                received[event.sid] += len(event.data)
            elif isinstance(event, End):
                ended.add(event.sid)
        for sid in sorted(unread, key=lambda _: seed.random()):  # type: ignore[attr-defined]
            stream = link.responder.streams.get(sid)
            assert unread[sid] <= (stream.window if stream else 4 << 20)
            link.responder.consumed(sid, unread.pop(sid))
    assert [received[2 * n + 1] for n in range(len(sizes))] == sizes
    assert link.responder._extra_window <= (16 << 20)
    assert INITIAL_CREDIT == 65_536
