"""The simulated mesh: the same from run to run, and better served by QMesh's choice than by simple ones."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.routing import report as routing
from benchmarks.routing.actors import Scenario
from benchmarks.routing.policies import POLICIES, LeastConnections, Policy, RandomChoice, WithoutHedging
from benchmarks.routing.simulation import Simulation

SMALL = Scenario("small", workers=60, clients=20, duration=90)


def test_a_run_is_the_same_every_time_and_every_request_ends() -> None:
    first, second = (Simulation(SMALL, Policy()) for _ in range(2))
    result = first.run()
    assert result == second.run()
    assert result.unfinished == 0
    assert len(result.answers) == len(first.requests) > 500
    for client in first.clients:
        assert all(client.board[one.record.node_id].in_flight == 0 for one in first.workers)
    for worker in first.workers:
        assert worker.admission.busy == worker.admission.waiting == 0, "every slot is free in the end"
        worker.admission.validate()


def test_hedging_stays_within_its_budget() -> None:
    simulation = Simulation(SMALL, Policy())
    result = simulation.run()
    assert result.extra <= 0.05
    assert result.extra > 0.01


@pytest.mark.parametrize("other", [LeastConnections, RandomChoice])
def test_the_tail_is_shorter_than_with_simple_policies(other: type[Policy]) -> None:
    ours, theirs = (Simulation(SMALL, policy()).run() for policy in (Policy, other))
    assert routing.quantile(ours.answers, 0.99) < routing.quantile(theirs.answers, 0.99) / 2


def test_hedging_halves_the_tail_where_another_worker_becomes_slow_now_and_then() -> None:
    scenario = replace(routing.ONE_SLOW[1], duration=4000)
    hedged, alone = (Simulation(scenario, policy()).run() for policy in (Policy, WithoutHedging))
    assert routing.quantile(hedged.first_tokens, 0.99) < routing.quantile(alone.first_tokens, 0.99) / 2
    assert hedged.extra <= 0.05
    table = routing.table_of_one_slow([scenario], [[hedged, alone]])
    assert table.count(scenario.name) == 2
    assert "nan" not in table


def test_a_worker_that_stays_slow_does_not_make_the_tail() -> None:
    scenario = replace(routing.ONE_SLOW[-1], duration=4000)
    without = replace(scenario, one_slow=None)
    slow, none = (Simulation(one, Policy()).run() for one in (scenario, without))
    assert routing.quantile(slow.first_tokens, 0.98) < 1.5 * routing.quantile(none.first_tokens, 0.98)


def test_table_and_plot_hold_every_policy() -> None:
    scenario = Scenario("tiny", workers=5, clients=2, duration=10)
    results = [Simulation(scenario, policy()).run() for policy in POLICIES]
    table, picture = routing.table(scenario, results), routing.plot([scenario], [results])
    for policy in POLICIES:
        assert policy.name in table
        assert policy.name in picture
    assert "nan" not in table


def test_quantiles() -> None:
    assert routing.quantile([3, 1, 2], 0.5) == 2
    assert routing.quantile([3, 1, 2], 0.99) == 3
    assert math.isnan(routing.quantile([], 0.5))


def test_the_page_in_docs_holds_the_tables(tmp_path: Path) -> None:
    scenario = Scenario("tiny", workers=5, clients=2, duration=10)
    results = [Simulation(scenario, policy()).run() for policy in POLICIES]
    page = (routing.DOCS / "routing.md").read_text(encoding="utf-8")
    for one in (*routing.SCENARIOS, *routing.ONE_SLOW):
        assert one.name in page
    (tmp_path / "routing.md").write_text(page, encoding="utf-8")
    for _ in range(2):
        routing.write(tmp_path, [routing.table(scenario, results)], routing.plot([scenario], [results]))
        written = (tmp_path / "routing.md").read_text(encoding="utf-8")
        assert written.count("**tiny**") == 1
        assert "100 workers" not in written
    assert (tmp_path / "routing.svg").read_text(encoding="utf-8").startswith("<svg")
    (tmp_path / "routing.md").write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match="no place"):
        routing.write(tmp_path, [], "")
