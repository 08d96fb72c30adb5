"""First tokens from four workers of which one is ten times slower, with and without asking a second one.

A worker that is always slow is found out by its first answers and asked no more: hedging has nothing to do.
What hurts is one that becomes slow. So every so many requests another one does: the one that answered last, since
one that nobody asks hurts nobody. What it is like when the slow one stays is measured too. One request at a time
is asked for, so that the workers and not the cores that they share make the times.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.serving.common import GREEDY, MODEL, Slots, Slowed, quantile
from client_sdk import MeshClient, RouteEvent
from node.cluster import Member
from tests.mesh_support import completion, connected, llama_of

WORDS = ("fox", "bear", "tree", "river", "moon", "cake", "boat", "wind", "song", "stone")
PROMPT_WORDS = 250
TOKENS = 8
WARM_UP = 48
SLOWER = 10.0


@dataclass
class Run:
    """What one run gave. Times in seconds."""

    requests: int
    first_tokens: list[float] = field(default_factory=list)
    hedges: int = 0
    won: int = 0
    met: int = 0
    """Requests that were given to the slow one first."""

    @property
    def extra(self) -> float:
        """Requests sent twice, as a share of all."""
        return self.hedges / self.requests


async def calibrated(member: Member) -> tuple[float, float]:
    """For how long the server has to be stopped between two short runs to be ten times slower, and how
    many times slower that makes it: on a busy machine a process that is stopped often is also the first to run.
    """
    dice = random.Random()
    pid = llama_of(member.pid)[0].process.pid
    async with connected(member) as connection:

        async def first_token() -> float:
            began = time.perf_counter()
            async with await connection.open("infer", completion(1, _prompt(dice))) as stream:
                await stream.read(timeout=60)
            return time.perf_counter() - began

        usual = quantile([await first_token() for _ in range(9)], 0.5)
        stop, factor = 0.012, 1.0
        while factor < SLOWER and stop < 0.3:
            stop *= 1.5
            with Slowed(stop).running() as slow:
                slow.slow_down(pid)
                factor = quantile([await first_token() for _ in range(5)], 0.5) / usual
    return stop, factor


async def run(
    members: Sequence[Member], requests: int, stop: float, *, hedged: bool, change_every: int | None
) -> Run:
    """Ask so many times. Without `change_every` the slow one stays the same."""
    dice = random.Random()
    result = Run(requests)
    slow = Slowed(stop)
    pids = {member.worker_id: llama_of(member.pid)[0].process.pid for member in members}
    late: list[str] = []

    def note(event: RouteEvent) -> None:
        if event.kind == "hedge":
            late.append(event.worker)

    async with MeshClient([one.address for one in members], on_event=note) as mesh:
        mesh._dispatcher.hedge_share = mesh._dispatcher.hedge_share if hedged else 0.0
        await mesh.workers(MODEL)
        for _ in range(WARM_UP):
            *_, last = await _ask(mesh, dice)
        with slow.running():
            for number in range(requests):
                if number % (change_every or requests) == 0:
                    slow_one = last
                    slow.slow_down(pids[slow_one])
                late.clear()
                took, won, last = await _ask(mesh, dice)
                result.first_tokens.append(took)
                result.hedges += len(late)
                result.won += won
                result.met += slow_one in (late or [last])
    return result


async def losers(members: Sequence[Member], count: int) -> list[float]:
    """Seconds from a hedge's first token until the slot of the one that lost is free, one request at a
    time. The one that loses is stopped outright while it begins, and goes on once it has lost.
    """
    dice = random.Random()
    freed: list[float] = []
    numbers = {member.worker_id: number for number, member in enumerate(members)}
    pids = [llama_of(member.pid)[0].process.pid for member in members]
    lost: list[str] = []

    def note(event: RouteEvent) -> None:
        if event.kind == "hedge":
            lost.append(event.worker)

    async with (
        MeshClient([one.address for one in members], on_event=note) as mesh,
        Slots.of(members) as slots,
    ):
        await mesh.workers(MODEL)
        for _ in range(WARM_UP):
            await _ask(mesh, dice)
        slow = Slowed()
        with slow.running():
            for number in range(60 * count):
                if len(freed) >= count:
                    break
                if number % 6 == 0:
                    slow.slow_down(dice.choice(pids))
                lost.clear()
                pieces = aiter(mesh.generate_stream(_prompt(dice), max_tokens=TOKENS, **GREEDY))
                first = await anext(pieces)
                began = time.perf_counter()
                if lost and first.worker != lost[0]:
                    slow.slow_down(None)
                    await slots.until(0, number=numbers[lost[0]])
                    freed.append(time.perf_counter() - began)
                async for _ in pieces:
                    pass
    return freed


async def _ask(mesh: MeshClient, dice: random.Random) -> tuple[float, bool, str]:
    """Seconds to the first token, whether it was a second worker's, and whose."""
    began = time.perf_counter()
    stream = mesh.generate_stream(_prompt(dice), max_tokens=TOKENS, **GREEDY)
    first: float | None = None
    async for _ in stream:
        first = first or time.perf_counter() - began
    assert first is not None
    return first, stream.explain.hedged > 0, str(stream.explain.worker)


def _prompt(dice: random.Random) -> str:
    return " ".join(dice.choice(WORDS) for _ in range(PROMPT_WORDS))


def describe(name: str, one: Run) -> str:
    """One line."""
    times = "  ".join(
        f"p{share:g} {quantile(one.first_tokens, share / 100) * 1000:7.1f} ms" for share in (50, 95, 99)
    )
    return (
        f"{name:32} {times}  {one.met / one.requests:.1%} given to the slow one, "
        f"{one.extra:.1%} sent twice, {one.won} of these answered by the second"
    )
