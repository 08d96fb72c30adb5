"""The health score falls when anything gets worse, and is 0 only for a model that cannot answer."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from node.health import HealthInputs, health

fractions = st.floats(0, 1)
counts = st.integers(0, 300)
inputs = st.builds(
    HealthInputs,
    ready=st.booleans(),
    loaded=st.booleans(),
    slots=counts,
    busy=counts,
    queue=counts,
    queue_limit=counts,
    foreign_cpu=fractions,
    foreign_gpu=fractions,
    memory_available=fractions,
    recent_crashes=st.integers(0, 100),
)


@given(inputs)
def test_the_score_is_between_0_and_100_and_0_only_when_not_ready(one: HealthInputs) -> None:
    told = health(one)
    assert (told.score == 0) == (not one.ready)
    assert 0 <= told.score <= 100
    assert all(0 <= part <= 1 for part in told.parts.values())


@given(inputs, st.sampled_from(["busy", "queue", "recent_crashes"]), counts)
def test_more_work_or_crashes_never_raise_it(one: HealthInputs, name: str, more: int) -> None:
    worse = replace(one, **{name: getattr(one, name) + more})
    assert health(worse).score <= health(one).score


@given(inputs)
def test_what_is_loaded_is_better_than_what_is_not(one: HealthInputs) -> None:
    assert health(replace(one, loaded=False)).score <= health(replace(one, loaded=True)).score


@given(inputs, st.sampled_from(["slots", "queue_limit"]), counts)
def test_more_room_never_lowers_it(one: HealthInputs, name: str, more: int) -> None:
    better = replace(one, **{name: getattr(one, name) + more})
    assert health(better).score >= health(one).score


@given(inputs, fractions, fractions)
def test_it_is_monotone_in_the_machine(one: HealthInputs, low: float, high: float) -> None:
    low, high = min(low, high), max(low, high)
    assert health(replace(one, foreign_cpu=high)).score <= health(replace(one, foreign_cpu=low)).score
    assert health(replace(one, foreign_gpu=high)).score <= health(replace(one, foreign_gpu=low)).score
    assert (
        health(replace(one, memory_available=high)).score >= health(replace(one, memory_available=low)).score
    )


def test_the_documented_points() -> None:
    best = HealthInputs(
        ready=True, loaded=True, slots=4, busy=0, queue=0, queue_limit=16,
        foreign_cpu=0.6, foreign_gpu=0.6, memory_available=0.15, recent_crashes=0,
    )  # fmt: skip
    assert health(best).score == 100
    assert health(replace(best, busy=4)).score == 50
    assert health(replace(best, queue=16)).score == 20
    assert health(replace(best, foreign_cpu=1.0)).score == 50
    assert health(replace(best, foreign_gpu=1.0)).score == 50
    assert health(replace(best, memory_available=0.0)).score == 30
    assert health(replace(best, recent_crashes=2)).score == 49
    assert health(replace(best, loaded=False)).score == 40
