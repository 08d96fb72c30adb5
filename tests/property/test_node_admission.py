"""The queue of a model under random operations: bounded, work-conserving, fair."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from node.admission import Admission, Ticket

PEERS = (b"a", b"b", b"c")
LARGEST = 1024.0


class Queue(RuleBasedStateMachine):
    """Random requests, ends, withdrawals and resizings; `validate` after each."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.admission = Admission(2, 5)
        self.waiting: list[Ticket] = []

    def _started(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            assert ticket.started == self.now
            self.waiting.remove(ticket)

    @rule(
        peer=st.sampled_from(PEERS),
        cost=st.floats(1, 4096),
        priority=st.integers(-1, 1),
        patience=st.floats(0.1, 20),
    )
    def offer(self, peer: bytes, cost: float, priority: int, patience: float) -> None:
        ticket = Ticket(peer, cost, priority, self.now + patience)
        full = self.admission.waiting >= self.admission.queue_limit
        accepted, displaced = self.admission.offer(ticket, self.now)
        if displaced is not None:
            assert full and accepted and displaced.displaced and displaced.peer != peer
            self.waiting.remove(displaced)
        if accepted:
            assert (ticket.started is not None) == (ticket in self.admission.running)
            if ticket.started is None:
                self.waiting.append(ticket)
        else:
            assert full

    @precondition(lambda self: self.admission.running)
    @rule(data=st.data(), after=st.floats(0, 5))
    def release(self, data: st.DataObject, after: float) -> None:
        self.now += after
        running = sorted(self.admission.running, key=lambda ticket: (ticket.started, ticket.peer))
        self._started(self.admission.release(data.draw(st.sampled_from(running)), self.now))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.waiting))
        assert self.admission.withdraw(ticket)
        assert not self.admission.withdraw(ticket)
        self.waiting.remove(ticket)

    @rule(after=st.floats(0, 10))
    def expire(self, after: float) -> None:
        self.now += after
        late = self.admission.expire(self.now)
        assert set(late) == {ticket for ticket in self.waiting if ticket.deadline <= self.now}
        self.waiting = [ticket for ticket in self.waiting if ticket not in late]

    @rule(slots=st.integers(1, 4))
    def resize(self, slots: int) -> None:
        self._started(self.admission.resize(slots, self.now))

    @invariant()
    def holds(self) -> None:
        self.admission.validate()
        assert self.admission.waiting == len(self.waiting)
        assert self.admission.retry_after(self.now) > 0


TestQueue = Queue.TestCase
TestQueue.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def drain(admission: Admission, first: Ticket) -> list[Ticket]:
    """End the one running request after the other; the order in which the waiting ones ran."""
    order, running = [], first
    while started := admission.release(running, 0.0):
        (running,) = started
        admission.validate()
        order.append(running)
    return order


def ask(admission: Admission, peer: bytes, cost: float = 1, priority: int = 0) -> Ticket:
    ticket = Ticket(peer, cost, priority, 1e9)
    assert admission.offer(ticket, 0.0)[0]
    return ticket


@given(
    st.dictionaries(st.sampled_from(PEERS), st.lists(st.floats(1, LARGEST), min_size=30, max_size=40), min_size=2)
)  # fmt: skip
def test_peers_that_keep_asking_get_equal_shares(costs: dict[bytes, list[float]]) -> None:
    admission = Admission(1, 1000)
    first = ask(admission, b"first")
    for peer, its in costs.items():
        for cost in its:
            ask(admission, peer, cost)
    got: Counter[bytes] = Counter()
    left = {peer: len(its) for peer, its in costs.items()}
    for ticket in drain(admission, first):
        got[ticket.peer] += ticket.cost  # type: ignore[assignment]
        left[ticket.peer] -= 1
        if not left[ticket.peer]:
            break  # from here on it no longer asks
        # what weighted fair queueing promises: the shares differ by at most the largest requests of both
        assert max(got.values()) - min(got[peer] for peer in costs) <= 2 * LARGEST + 1e-6


def test_one_with_few_small_requests_is_not_crowded_out() -> None:
    admission = Admission(1, 100)
    first = ask(admission, b"greedy", 4096)
    for _ in range(20):
        ask(admission, b"greedy", 4096)
    small = ask(admission, b"modest", 10)
    assert small in drain(admission, first)[:1]


@given(st.integers(1, 4), st.floats(1, 4096), st.floats(1, 4096))
def test_one_that_asks_now_and_then_waits_for_the_end_of_one_request(
    slots: int, large: float, small: float
) -> None:
    """Another one's request begins as soon as its own has ended, since it does not ask again at once."""
    admission = Admission(slots, 1000)
    running = [ask(admission, b"greedy", large) for _ in range(slots)]
    for _ in range(100):
        ask(admission, b"greedy", large)
    for _ in range(12):
        mine = ask(admission, b"modest", min(small, large))
        assert admission.release(running.pop(0), 0.0) == [mine]
        running += admission.release(mine, 0.0)
        admission.validate()


def test_those_who_ask_in_turn_do_not_shut_out_one_who_waits() -> None:
    admission = Admission(1, 100)
    running = ask(admission, b"a", 100)
    ask(admission, b"b", 100)
    ask(admission, b"waits", 100)
    order = []
    for _ in range(12):
        (started,) = admission.release(running, 0.0)
        ask(admission, running.peer, 100)
        running = started
        order.append(running.peer)
    assert Counter(order) == {b"a": 4, b"b": 4, b"waits": 4}


def test_peers_that_are_gone_are_forgotten() -> None:
    admission = Admission(2, 8)
    steady = ask(admission, b"steady", 4096)
    for number in range(1000):
        one = ask(admission, number.to_bytes(2), 100)
        admission.release(one, 0.0)
        assert len(admission._given) < 10
    admission.release(steady, 0.0)
    assert admission.busy == admission.waiting == 0


def test_higher_priorities_go_first_and_arrival_counts_within_a_peer() -> None:
    admission = Admission(1)
    first = ask(admission, b"x")
    low = ask(admission, b"a", priority=-1)
    usual = [ask(admission, b"b"), ask(admission, b"b")]
    high = ask(admission, b"c", priority=1)
    assert drain(admission, first) == [high, *usual, low]


def test_a_full_queue_makes_room_for_a_peer_with_less_in_it() -> None:
    admission = Admission(1, 3)
    ask(admission, b"x")
    mine = [ask(admission, b"greedy") for _ in range(3)]
    accepted, displaced = admission.offer(Ticket(b"modest", 1, 0, 1e9), 0.0)
    assert accepted
    assert displaced is mine[-1]
    assert displaced.displaced
    # Two against one: displacing another would only turn the tables.
    assert admission.offer(Ticket(b"modest", 1, 0, 1e9), 0.0) == (False, None)
    admission.validate()


def test_the_greedy_peer_itself_is_refused_at_the_limit() -> None:
    admission = Admission(1, 2)
    for _ in range(3):
        ask(admission, b"greedy")
    assert admission.offer(Ticket(b"greedy", 1, 0, 1e9), 0.0) == (False, None)


def test_without_a_queue_only_free_slots_are_given() -> None:
    admission = Admission(1, 0)
    ask(admission, b"a")
    assert admission.offer(Ticket(b"b", 1, 0, 1e9), 0.0) == (False, None)


def test_fewer_slots_take_effect_as_requests_end() -> None:
    admission = Admission(3)
    running = [ask(admission, b"a") for _ in range(3)]
    waiting = ask(admission, b"b")
    assert admission.resize(1, 0.0) == []
    assert admission.release(running[0], 0.0) == []
    assert admission.release(running[1], 0.0) == []
    assert admission.release(running[2], 0.0) == [waiting]


def test_retry_after_follows_the_measured_time() -> None:
    admission = Admission(2, 8)
    assert admission.retry_after(0) == pytest.approx(0.05)
    one = ask(admission, b"a")
    admission.release(one, 10.0)
    assert admission.retry_after(100) == pytest.approx(5.0)
    for _ in range(6):
        ask(admission, b"a")
    assert admission.retry_after(100) == pytest.approx(10.0 * (1 + 4 / 2) / 2)


def test_a_model_without_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one slot"):
        Admission(0)
