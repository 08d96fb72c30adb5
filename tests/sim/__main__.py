"""The scenarios at large sizes: ``python -m tests.sim [NAME …] [--nodes N] [--seed S]``.

Prints one JSON object a line, and on stderr how far it is. Takes minutes to hours; the small sizes are in
the test suite.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import gc
import json
import resource
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from mesh import records
from tests.sim import hostile, popular, scenarios
from tests.sim.world import World

Scenario = Callable[[World, int], Awaitable[dict[str, Any]]]

SCENARIOS: dict[str, tuple[Scenario, int]] = {
    "routing": (lambda w, n: scenarios.routing(w, n, lookups=1000), 10_000),
    "churn": (lambda w, n: scenarios.churn(w, n, minutes=3, announcing=1 if n < 5000 else 0.25), 10_000),
    "liars": (lambda w, n: hostile.liars(w, n, lookups=500), 10_000),
    "popular": (lambda w, n: popular.popular(w, n, workers=40 * n, samples=2000, settle=420), 500),
    "catalogue": (lambda w, n: popular.catalogue(w, n, settle=300, readers=10), 300),
    "hostile": (lambda w, n: hostile.hostile(w, n, datagrams=1_000_000), 12),
    "halves": (scenarios.halves, 500),
    "bootstrap": (scenarios.bootstrap_lost, 500),
    "partition": (scenarios.partition, 200),
}


def main() -> None:
    """Run the named scenarios, or all."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *SCENARIOS], help="all where none is named")
    parser.add_argument("--nodes", type=int, help="instead of the scenario's own size")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    # The 20 holders of a record share one verification: the same answer, a sixth less to wait.
    records.verify = functools.lru_cache(1 << 16)(records.verify)  # type: ignore[attr-defined]  # imported there
    # Thousands of nodes live as long as the run: looking for garbage among them costs a sixth.
    gc.set_threshold(200_000, 20, 100)
    for name in options.names or SCENARIOS:
        scenario, nodes = SCENARIOS[name]
        began = time.perf_counter()
        world = World(options.seed)
        result = world.run(watched(world, scenario(world, options.nodes or nodes)))
        result = {
            "scenario": name,
            "seed": options.seed,
            **result,
            "datagrams": world.datagrams,
            "took_s": round(time.perf_counter() - began, 1),
            "peak_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        print(json.dumps(result), flush=True)


async def watched(world: World, scenario: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """The scenario, with a sign of life for every simulated minute."""

    async def report() -> None:
        while True:
            await asyncio.sleep(60)
            minutes = round(world.loop.time() / 60)
            print(f"{minutes} min simulated, {world.datagrams:,} datagrams", file=sys.stderr)

    reporting = asyncio.create_task(report())
    try:
        return await scenario
    finally:
        reporting.cancel()


if __name__ == "__main__":
    main()
