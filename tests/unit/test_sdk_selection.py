"""Which worker is asked: what is measured of it, bans, spreading, affinity. With an injected clock and dice."""

from __future__ import annotations

import math
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client_sdk.scoreboard import BAN, FADE, LOAD_FADE, MAX_BAN, Mean, Scoreboard
from client_sdk.selection import LOAD_BOUND, Choice, Need, choose, expected
from mesh.identity import NodeId
from mesh.records import WorkerRecord

MODEL = "m"


def worker(number: int, **facts: object) -> WorkerRecord:
    usual: dict[str, object] = {
        "node_id": NodeId(bytes([number]) * 32),
        "seq": 1,
        "expires": 1,
        "addresses": ("127.0.0.1:1",),
        "model": MODEL,
        "digest": bytes(16),
        "health": 100,
        "slots": 4,
        "context": 2048,
        "generation_speed": 100.0,
        "prompt_speed": 1000.0,
        "flags": frozenset(),
        "software": "test",
    }
    return WorkerRecord(**(usual | facts))  # type: ignore[arg-type]


def ask(
    workers: list[WorkerRecord],
    board: Scoreboard,
    rng: Random,
    now: float = 0.0,
    need: Need = Need(),  # noqa: B008 - frozen
    **more: object,
) -> Choice | None:
    return choose(workers, board, need, now=now, rng=rng, **more)  # type: ignore[arg-type]


# --- scoreboard


def test_a_mean_starts_with_its_first_sample_and_moves_with_the_others() -> None:
    mean = Mean()
    mean.add(10, 0)
    assert mean.value == 10
    mean.add(20, 1)
    assert 10 < mean.value < 20


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 1e6), min_size=1, max_size=30), st.floats(0.1, 1e6), st.floats(0, 1e5))
def test_the_blend_lies_between_prior_and_measurement(samples: list[float], prior: float, age: float) -> None:
    mean = Mean()
    for sample in samples:
        mean.add(sample, 0)
    low, high = min(prior, *samples), max(prior, *samples)
    assert low * 0.999999 <= mean.blend(prior, age) <= high * 1.000001


def test_measurements_replace_the_prior_with_use_and_fade_with_age() -> None:
    mean = Mean()
    assert mean.blend(50, 0) == 50
    distances = []
    for _ in range(20):
        mean.add(100, 0)
        distances.append(100 - mean.blend(50, 0))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 5
    assert mean.blend(50, 20 * FADE) == pytest.approx(50, abs=0.01)
    assert mean.blend(0, 0) == mean.value, "without a prior the measurement is all there is"
    for _ in range(10_000):
        mean.add(100, 0)
    assert mean.blend(50, 5 * FADE) < 51, "however often it was measured"
    assert mean.faded(0) == mean.value
    assert mean.faded(FADE) == pytest.approx(mean.value / math.e)
    assert Mean().faded(0) == 0


def test_bans_double_and_end() -> None:
    board, one = Scoreboard(), b"w"
    now, length = 0.0, BAN
    for _ in range(12):
        board.failed(one, now)
        assert not board.available(one, now + length - 0.01)
        assert board.available(one, now + length)
        now += length
        length = min(MAX_BAN, 2 * length)
    board.succeeded(one, now, first_token=0.1, speed=None)
    board.failed(one, now)
    assert board.available(one, now + BAN)


def test_after_a_ban_one_request_probes() -> None:
    board, one = Scoreboard(), b"w"
    board.failed(one, 0)
    probe = board.reserve(one, BAN)
    assert not board.available(one, BAN), "a second request before the first has come through"
    board.release(probe)
    assert board.available(one, BAN)


def test_an_overloaded_worker_is_left_alone_for_the_time_it_named() -> None:
    board, one = Scoreboard(), b"w"
    board.busy_until(one, 2.0)
    assert not board.available(one, 1.9)
    assert board.available(one, 2.0)
    assert board[one].failures == 0


def test_reported_load_leaves_out_this_clients_own_requests_and_fades() -> None:
    board, one = Scoreboard(), b"w"
    board.reserve(one, 0)
    board.report(one, busy=3, queue=2, slots=4, now=0)
    assert board[one].foreign_load(0) == 4
    assert board[one].foreign_load(LOAD_FADE) == pytest.approx(4 / math.e)
    assert board[b"other"].foreign_load(0) == 0


def test_the_board_is_bounded_and_keeps_those_in_use() -> None:
    board = Scoreboard(capacity=10)
    board.reserve(b"busy", 0)
    for number in range(100):
        board[number.to_bytes(2)].first_token.add(1, number)
    assert len(board._scores) <= 10
    assert board[b"busy"].in_flight == 1


# --- selection


def test_a_request_spends_less_time_on_a_better_worker() -> None:
    board = Scoreboard()
    usual = expected(worker(1), board, Need(), 0).cost
    assert expected(worker(2, generation_speed=200.0), board, Need(), 0).cost < usual
    assert expected(worker(3, prompt_speed=10_000.0), board, Need(), 0).cost < usual
    assert expected(worker(4, health=50), board, Need(), 0).cost > usual
    board.report(worker(5).node_id, busy=4, queue=4, slots=4, now=0)
    assert expected(worker(5), board, Need(), 0).cost > usual
    board[worker(6).node_id].rtt.add(3.0, 0)
    assert expected(worker(6), board, Need(), 0).cost > usual


def test_a_newcomer_without_measurements_is_tried_soon() -> None:
    """Fast workers that were measured must not starve one of which nothing is known yet."""
    board = Scoreboard()
    old = [worker(number, generation_speed=2000.0, prompt_speed=9000.0) for number in (1, 2)]
    new = worker(3, generation_speed=0.0, prompt_speed=0.0)
    for one in (*old, new):
        board[one.node_id].rtt.add(0.001, 0)
    chosen = Counter(
        choice.chosen.id for seed in range(300) if (choice := ask([*old, new], board, Random(seed)))
    )
    assert chosen[new.node_id] > 30


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(1, 16))
def test_more_requests_never_make_a_worker_look_better(requests: int, slots: int) -> None:
    board = Scoreboard()
    costs = []
    for _ in range(requests):
        costs.append(expected(worker(1, slots=slots), board, Need(), 0).cost)
        board.reserve(worker(1).node_id, 0)
    assert costs == sorted(costs)


def test_of_two_the_much_better_one_is_chosen_but_for_exploration() -> None:
    workers = [worker(1), worker(2, generation_speed=10.0)]
    rng = Random(1)
    chosen: Counter[bytes] = Counter()
    reasons = set()
    for _ in range(3000):
        choice = ask(workers, Scoreboard(), rng)
        assert choice is not None
        assert [one.id for one in choice.candidates] == [workers[0].node_id, workers[1].node_id]
        chosen[choice.chosen.id] += 1
        reasons.add(choice.reason)
    assert 0.003 < chosen[workers[1].node_id] / 3000 < 0.03
    assert reasons == {"least expected time", "exploration"}


def test_a_burst_spreads_over_equal_workers() -> None:
    workers = [worker(number, slots=2) for number in range(1, 5)]
    board, rng = Scoreboard(), Random(2)
    for _ in range(16):
        choice = ask(workers, board, rng)
        assert choice is not None
        board.reserve(choice.chosen.id, 0)
    shares = [board[one.node_id].in_flight for one in workers]
    assert min(shares) >= 2
    assert max(shares) <= 7


@pytest.mark.parametrize("seed", range(20))
def test_a_burst_spreads_although_the_measurements_differ(seed: int) -> None:
    workers = [worker(number) for number in range(1, 5)]
    board, rng = Scoreboard(), Random(seed)
    for one in workers:
        board.succeeded(one.node_id, 0, first_token=rng.uniform(0.07, 0.1), speed=rng.uniform(80, 120))
    for _ in range(100):
        choice = ask(workers, board, rng)
        assert choice is not None
        board.reserve(choice.chosen.id, 0)
    assert max(board[one.node_id].in_flight for one in workers) <= 1.3 * 25


def test_a_worker_that_keeps_a_request_waiting_gets_no_other() -> None:
    """It may have become slow or be stuck: nothing else tells that yet."""
    workers = [worker(number) for number in range(1, 4)]
    board, silent = Scoreboard(), worker(1).node_id
    waiting = board.reserve(silent, 0.0, due=1.0)
    usual = expected(workers[0], board, Need(), 0.0).first_token
    assert expected(workers[0], board, Need(), 1.0).first_token == pytest.approx(usual), (
        "it was to be expected"
    )
    assert expected(workers[0], board, Need(), 30.0).first_token == 60.0, "as long again"
    for seed in range(100):
        choice = ask(workers, board, Random(seed), now=30.0)
        assert choice is not None
        assert choice.chosen.id != silent or choice.reason == "exploration"
    board.spoke(waiting)
    assert expected(workers[0], board, Need(), 30.0).first_token == pytest.approx(usual)
    board.release(waiting)


def test_requests_that_end_unanswered_leave_no_silence_behind() -> None:
    board = Scoreboard()
    first, second = board.reserve(b"w", 0.0, due=0.5), board.reserve(b"w", 1.0, due=1.5)
    assert board[b"w"].silence(2.0) == 4.0
    board.release(first)
    assert board[b"w"].silence(2.0) == 2.0
    board.release(second)
    assert board[b"w"].silence(2.0) == 0.0
    assert board[b"w"].in_flight == 0


def test_near_equal_means_the_first_token_too() -> None:
    """Someone waits for it: the rest of a long answer does not make up for a late beginning."""
    workers, board = [worker(1), worker(2), worker(3)], Scoreboard()
    board.late(workers[0].node_id, 0.0, 0.1)
    first, second = (expected(one, board, Need(), 0.0) for one in workers[:2])
    assert first.cost < 1.25 * second.cost
    for seed in range(100):
        choice = ask(workers, board, Random(seed))
        assert choice is not None
        assert choice.chosen.id != first.id or choice.reason == "exploration"


def test_clients_with_the_same_view_do_not_herd() -> None:
    """The best of all by a hair must not get everything."""
    workers = [worker(number, generation_speed=100 + number / 10) for number in range(1, 6)]
    chosen = Counter(
        choice.chosen.id for seed in range(2000) if (choice := ask(workers, Scoreboard(), Random(seed)))
    )
    assert len(chosen) >= 4
    assert max(chosen.values()) / 2000 < 0.5


def test_banned_excluded_and_unwell_workers_are_never_chosen() -> None:
    board = Scoreboard()
    workers = [worker(1), worker(2), worker(3, health=0), worker(4)]
    board.failed(workers[0].node_id, 0)
    for seed in range(200):
        choice = ask(workers, board, Random(seed), exclude={workers[1].node_id})
        assert choice is not None
        assert choice.chosen.id == workers[3].node_id
        assert choice.reason == "the only one"
    assert ask(workers[:3], board, Random(0), exclude={workers[1].node_id}) is None
    back = ask(workers[:1], board, Random(0), now=BAN)
    assert back is not None
    assert ask([], board, Random(0)) is None


def test_a_conversation_stays_with_its_worker_while_the_load_allows() -> None:
    workers = [worker(number) for number in range(1, 6)]
    board = Scoreboard()
    homes = {}
    for conversation in range(40):
        prefix = conversation.to_bytes(2)
        answers = [ask(workers, board, Random(seed), need=Need(prefix=prefix)) for seed in range(10)]
        assert len({one.chosen.id for one in answers if one is not None}) == 1
        assert answers[0] is not None
        assert answers[0].reason == "holds the conversation's prefix"
        homes[prefix] = answers[0].chosen.id
    assert len(set(homes.values())) == 5, "conversations are spread"
    # The loss of a worker moves only its own conversations.
    gone = workers[0].node_id
    for prefix, home in homes.items():
        now = ask(workers[1:], board, Random(0), need=Need(prefix=prefix))
        assert now is not None
        assert (now.chosen.id == home) == (home != gone)


def test_an_overloaded_home_lets_its_conversations_overflow() -> None:
    workers = [worker(number) for number in range(1, 4)]
    board, need = Scoreboard(), Need(prefix=b"p")
    first = ask(workers, board, Random(0), need=need)
    assert first is not None
    for _ in range(8):
        board.reserve(first.chosen.id, 0)
    other = ask(workers, board, Random(0), need=need)
    assert other is not None
    assert other.chosen.id != first.chosen.id
    assert other.chosen.load <= LOAD_BOUND * sum(one.load for one in other.candidates) / 3


@settings(deadline=None)
@given(
    st.lists(
        st.builds(
            worker,
            st.integers(1, 255),
            health=st.integers(0, 100),
            slots=st.integers(0, 1 << 16),
            generation_speed=st.floats(0, 1e9),
            prompt_speed=st.floats(0, 1e9),
        ),
        max_size=8,
        unique_by=lambda one: one.node_id,
    ),
    st.integers(0, 10**6),
    st.none() | st.binary(max_size=4),
)
def test_whatever_workers_say_of_themselves_a_choice_is_made(
    workers: list[WorkerRecord], seed: int, prefix: bytes | None
) -> None:
    choice = ask(workers, Scoreboard(), Random(seed), need=Need(prefix=prefix))
    able = {one.node_id for one in workers if one.health}
    if choice is None:
        assert not able
    else:
        assert {one.id for one in choice.candidates} == able
        assert choice.chosen.id in able
        costs = [one.cost for one in choice.candidates]
        assert costs == sorted(costs)
        assert all(math.isfinite(cost) and cost > 0 for cost in costs)


# --- full, banned and slow workers


def test_a_full_worker_is_left_alone_until_it_has_room() -> None:
    board, one = Scoreboard(), worker(1)
    board.busy_until(one.node_id, 30.0)
    assert ask([one], board, Random(1), now=1.0) is None
    assert ask([one], board, Random(1), now=1.0, banned=True) is None, "being full is no failure"
    assert board.full_for(one.node_id, 10.0) == 20.0
    board.report(one.node_id, busy=4, queue=4, slots=4, now=2.0)
    assert ask([one], board, Random(1), now=2.0) is None
    board.report(one.node_id, busy=4, queue=1, slots=4, now=3.0)
    for _ in range(3):
        assert ask([one], board, Random(1), now=3.0) is not None
        board.reserve(one.node_id, 3.0)
    assert ask([one], board, Random(1), now=3.0) is None, "as many may wait as it has slots, not all at once"
    assert ask([one], board, Random(1), now=30.0) is not None


def test_a_banned_worker_is_the_last_resort() -> None:
    board, one, two = Scoreboard(), worker(1), worker(2)
    board.failed(one.node_id, 0.0)
    for seed in range(20):
        choice = ask([one, two], board, Random(seed), now=1.0)
        assert choice is not None
        assert choice.chosen.id == two.node_id
    assert ask([one], board, Random(1), now=1.0) is None
    assert ask([one], board, Random(1), now=1.0, banned=True) is not None


def test_a_worker_that_began_to_answer_is_no_longer_on_trial() -> None:
    board, one = Scoreboard(), worker(1)
    board.failed(one.node_id, 0.0)
    test = board.reserve(one.node_id, BAN + 1)
    assert not board.available(one.node_id, BAN + 1), "one request tests it"
    board.spoke(test)
    assert board.available(one.node_id, BAN + 1)


def test_a_conversation_does_not_stay_with_a_slow_worker() -> None:
    workers = [worker(number) for number in range(1, 5)]
    need = Need(prefix=b"talk")
    home = ask(workers, Scoreboard(), Random(1), need=need)
    assert home is not None
    assert home.reason == "holds the conversation's prefix"
    slower = [
        worker(number, generation_speed=10.0 if one.node_id == home.chosen.id else 100.0)
        for number, one in enumerate(workers, 1)
    ]
    for seed in range(20):
        moved = ask(slower, Scoreboard(), Random(seed), need=need)
        assert moved is not None
        assert moved.chosen.id != home.chosen.id
        assert moved.reason == "holds the conversation's prefix", "the next one in its order"
