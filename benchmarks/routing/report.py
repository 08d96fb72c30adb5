"""Which policy serves a mesh best? Simulates them all, and writes the table and the plot into docs.

    python -m benchmarks.routing [--quick]

See `benchmarks.routing.simulation` for what is real and what is simulated. The figures depend on the seed in the
scenario alone, not on the machine.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.routing.actors import Scenario
from benchmarks.routing.policies import POLICIES, Policy, WithoutHedging
from benchmarks.routing.simulation import Result, Simulation

SCENARIOS = (
    Scenario("100 workers", workers=100, clients=40, duration=600),
    Scenario("1,000 workers", workers=1000, clients=300, duration=180),
)
ONE_SLOW = tuple(
    Scenario(
        name, workers=4, clients=1, duration=20_000, load=0.2, burst=1.0, crashes=0.0, stalls=0.0,
        spread=0.0, alike=True, one_slow=seconds,
    )
    for name, seconds in (("every 20 s another one", 20), ("every 60 s another one", 60), ("always the same", 20_000))
)  # fmt: skip
DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
COLOURS = ("#1a7f37", "#7fb98f", "#0969da", "#bc4c00", "#8250df")
BEGIN, END = "<!-- simulation -->", "<!-- end of simulation -->"
WIDTH, HEIGHT, LEFT, TOP, GAP = 430, 300, 56, 40, 70
SHORTEST, LONGEST = 0.1, 1000.0
"""The time axis, in seconds."""


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which this share of them lies; nan where there is none."""
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else math.nan


def table(scenario: Scenario, results: Sequence[Result]) -> str:
    """One scenario in Markdown."""
    lines = [
        f"**{scenario.name}**, {scenario.clients} clients, {scenario.duration / 60:g} minutes, "
        f"{len(results[0].answers):,} requests:",
        "",
        "| policy | first token p50 | p99 | whole answer p50 | p99 | utilisation | asked twice | over 5 min |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for one in results:
        times = [
            f"{quantile(values, share):.2f} s"
            for values in (one.first_tokens, one.answers)
            for share in (0.5, 0.99)
        ]
        lines.append(
            f"| {one.policy} | {' | '.join(times)} | {one.utilisation:.0%} | {one.extra:.1%} | {one.unfinished} |"
        )
    return "\n".join(lines)


def table_of_one_slow(scenarios: Sequence[Scenario], results: Sequence[Sequence[Result]]) -> str:
    """What hedging does where one of the workers is slow, in Markdown."""
    lines = [
        f"**{scenarios[0].workers} equal workers, one of them ten times slower**, requests of the same size, "
        f"{len(results[0][0].answers):,} in each run:",
        "",
        "| slow is | policy | first token p50 | p95 | p99 | asked twice |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for scenario, some in zip(scenarios, results, strict=True):
        for one in some:
            times = " | ".join(f"{quantile(one.first_tokens, share):.2f} s" for share in (0.5, 0.95, 0.99))
            lines.append(f"| {scenario.name} | {one.policy} | {times} | {one.extra:.1%} |")
    return "\n".join(lines)


def plot(scenarios: Sequence[Scenario], results: Sequence[Sequence[Result]]) -> str:
    """The share of answers that are whole within a time, for every policy, as an SVG."""
    width = LEFT + len(scenarios) * (WIDTH + GAP)
    height = TOP + HEIGHT + 90
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, (scenario, some) in enumerate(zip(scenarios, results, strict=True)):
        parts += _panel(LEFT + number * (WIDTH + GAP), scenario.name, some)
    for number, one in enumerate(results[0]):
        x = LEFT + number * 180
        parts += [
            f'<rect x="{x}" y="{height - 22}" width="14" height="4" fill="{COLOURS[number]}"/>',
            f'<text x="{x + 20}" y="{height - 14}">{one.policy}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(left: float, title: str, results: Sequence[Result]) -> list[str]:
    def x(seconds: float) -> float:
        share = math.log(min(LONGEST, max(SHORTEST, seconds)) / SHORTEST) / math.log(LONGEST / SHORTEST)
        return left + WIDTH * share

    def y(share: float) -> float:
        return TOP + HEIGHT * (1 - share)

    parts = [f'<text x="{left}" y="{TOP - 14}" font-weight="bold">{title}</text>']
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts += [
            f'<line x1="{left}" x2="{left + WIDTH}" y1="{y(share)}" y2="{y(share)}" stroke="#d0d7de"/>',
            f'<text x="{left - 6}" y="{y(share) + 4}" text-anchor="end">{share:.0%}</text>',
        ]
    seconds = SHORTEST
    while seconds <= LONGEST * 1.001:
        parts += [
            f'<line x1="{x(seconds)}" x2="{x(seconds)}" y1="{TOP}" y2="{TOP + HEIGHT}" stroke="#d0d7de"/>',
            f'<text x="{x(seconds)}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{seconds:g} s</text>',
        ]
        seconds *= 10
    parts.append(
        f'<text x="{left + WIDTH / 2}" y="{TOP + HEIGHT + 38}" text-anchor="middle">'
        "share of answers that are whole within</text>"
    )
    for colour, one in reversed([*zip(COLOURS, results, strict=True)]):
        points = " ".join(
            f"{x(quantile(one.answers, step / 200)):.1f},{y(step / 200):.1f}" for step in range(1, 201)
        )
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{points}"/>')
    return parts


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the time; writes nothing")
    arguments = parser.parse_args()
    short = 0.1 if arguments.quick else 1.0
    tables = []
    scenarios = [replace(one, duration=one.duration * short) for one in SCENARIOS]
    results = []
    for scenario in scenarios:
        results.append([Simulation(scenario, policy()).run() for policy in POLICIES])
        tables.append(table(scenario, results[-1]))
        print(tables[-1] + "\n", flush=True)
    slow = [replace(one, duration=one.duration * short) for one in ONE_SLOW]
    arms = [[Simulation(one, policy()).run() for policy in (Policy, WithoutHedging)] for one in slow]
    tables.append(table_of_one_slow(slow, arms))
    print(tables[-1], flush=True)
    if not arguments.quick:
        write(DOCS, tables, plot(scenarios, results))
    return 0


def write(folder: Path, tables: Sequence[str], picture: str) -> None:
    """Bring routing.md and routing.svg up to date. Raises ValueError where the page has no place for it."""
    page = folder / "routing.md"
    block = "\n\n".join((BEGIN, *tables, END))
    text, count = re.subn(
        f"{BEGIN}.*?{END}", lambda _: block, page.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"{page} has no place for the tables: {BEGIN} … {END}")
    page.write_text(text, encoding="utf-8")
    (folder / "routing.svg").write_text(picture, encoding="utf-8")
