"""Slots, spreading, caches, hedging and overload, measured on four real nodes on this machine.

    python -m benchmarks.serving [--only slots spread cache hedging overload] [--quick]

The clients, the nodes and their llama.cpp share the machine's cores: on a busy or small one the times are
those of waiting for a core.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import uvloop

from benchmarks.serving import hedging, overload, slots, spread
from benchmarks.serving.common import quantile
from node.cluster import Cluster

PARTS = ("slots", "spread", "cache", "hedging", "overload")


ROOMY = 8
"""Slots of a node that has places (slots and queue) for 40 requests."""


async def run(parts: list[str], *, quick: bool) -> None:
    """Measure these parts."""
    if set(parts) - {"spread", "overload"}:
        async with _cluster(4) as cluster:
            await _measure(cluster, parts, quick=quick)
    if "spread" in parts:
        async with _cluster(4, "--slots", str(ROOMY)) as cluster:
            await _spread(cluster, 3 if quick else 10)
    if "overload" in parts:
        # With more than one slot the light peer's answers share the model's thread with those of the heavy one.
        for count in (1, 2, 4):
            async with _cluster(1, "--slots", str(count)) as cluster:
                print(f"\noverload: one node, slots: {count}")
                told = await overload.run(cluster.members[0], count, 5 if quick else 30)
                print(overload.describe(told), flush=True)


@asynccontextmanager
async def _cluster(nodes: int, *extra: str) -> AsyncIterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="qmesh-serving-") as folder:
        cluster = Cluster(Path(folder), attached=True)
        try:
            await cluster.up(nodes, ["--no-gateway", *extra])
            yield cluster
        finally:
            await cluster.down()


async def _spread(cluster: Cluster, bursts: int) -> None:
    print("\n100 requests at once over 4 workers that have places for all of them")
    for _ in range(bursts):
        told = [
            f"{word} {sorted(shares.values())}, most/mean {spread.unevenness(shares, cluster.members):.2f}"
            for word, shares in zip(("given", "answered"), await spread.burst(cluster.members), strict=True)
        ]
        print("  " + "; ".join(told), flush=True)
    early, late = await spread.after_a_death(cluster)
    print(
        f"a killed worker: {early} requests until its first failure was known, {late} after that", flush=True
    )


async def _measure(cluster: Cluster, parts: list[str], *, quick: bool) -> None:
    members = cluster.members
    if "slots" in parts:
        print("until every slot of llama.cpp is free (median, worst; ms)")
        for streaming in (True, False):
            for way in slots.WAYS:
                times = [
                    await slots.freed_after(members, way, streaming=streaming)
                    for _ in range(3 if quick else 10)
                ]
                kind = "stream" if streaming else "whole answer"
                print(
                    f"  {kind:16} {way:18} {quantile(times, 0.5) * 1000:6.0f} {max(times) * 1000:6.0f}",
                    flush=True,
                )
    if "cache" in parts:
        count = 2 if quick else 12
        ours = await spread.cached(members, conversations=count)
        chance = await spread.cached(members, conversations=count, by_chance=True)
        print(
            f"\nprompt tokens from the cache, conversations of 10 turns: {ours:.1%}; asking anybody: {chance:.1%}"
        )
    if "hedging" in parts:
        stop, factor = await hedging.calibrated(members[0])
        print(f"\nfirst tokens, one of four workers {factor:.1f} times slower")
        requests = 400 if quick else 1500
        for name, change in (("the slow one changes", 50), ("the slow one stays", None)):
            for hedged in (False, True):
                one = await hedging.run(members, requests, stop, hedged=hedged, change_every=change)
                print(
                    "  " + hedging.describe(f"{name}, {'hedged' if hedged else 'not hedged'}", one),
                    flush=True,
                )
        freed = await hedging.losers(members, 5 if quick else 20)
        print(
            f"  the loser's slot is free after {quantile(freed, 0.5) * 1000:.0f} ms (median), "
            f"{max(freed, default=0) * 1000:.0f} ms (worst of {len(freed)})",
            flush=True,
        )


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    uvloop.run(run(arguments.only, quick=arguments.quick))
    return 0


if __name__ == "__main__":
    sys.exit(main())
