"""Where requests go: a burst over equal workers, a worker that died, the turns of a conversation."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.serving.common import GREEDY, MODEL
from client_sdk import MeshClient, dispatch, selection
from client_sdk.selection import Choice, Need, expected
from node.cluster import Cluster, Member

SYSTEM = "You are a friendly teller of stories for children. You like foxes, bears and the sea."
SAYINGS = (
    "Tell me a story about a fox.", "What did the fox do then?", "Was there a bear as well?",
    "What did they eat?", "Did it rain?", "Where did they sleep?", "Who woke up first?",
    "What did the bear say?", "Were they happy?", "How does it end?",
)  # fmt: skip


async def burst(members: Sequence[Member], count: int = 100) -> tuple[Counter[str], Counter[str]]:
    """So many requests at the same moment: to whom they were given, and who answered them. That differs where
    queues were full: what is refused goes to those that are through first.
    """
    async with MeshClient([member.address for member in members]) as mesh:
        answers = await asyncio.gather(
            *(mesh.generate(f"Tale {number}", max_tokens=24, **GREEDY) for number in range(count))
        )
    given = Counter(answer.explain.attempts[0].worker for answer in answers)
    return given, Counter(str(answer.explain.worker) for answer in answers)


def unevenness(shares: Counter[str], members: Sequence[Member]) -> float:
    """The most / the mean."""
    return max(shares.values()) * len(members) / shares.total()


async def after_a_death(cluster: Cluster, count: int = 200, at_once: int = 4) -> tuple[int, int]:
    """Requests that a worker gets after it was killed, although its record and its last load (none) still
    speak for it: those before its first failure was known, and those after.
    """
    victim = cluster.members[-1]
    early = late = 0
    async with MeshClient(cluster.members[0].address) as mesh:
        await mesh.workers(MODEL)
        for _ in range(8):
            await mesh.generate("Tale", max_tokens=4, **GREEDY)
        process = victim.process()
        assert process is not None
        process.kill()
        known = False

        async def work() -> None:
            nonlocal early, late, known
            for number in range(count // at_once):
                suspected = known
                answer = await mesh.generate(f"Tale {number}", max_tokens=4, **GREEDY)
                asked = sum(one.worker == victim.worker_id for one in answer.explain.attempts)
                known |= asked > 0
                early, late = early + asked * (not suspected), late + asked * suspected

        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(work())
        # Nobody happened to ask it: then a first request must fail and the next ones leave it alone.
        assert {worker.id: worker.banned for worker in await mesh.workers(MODEL)}.get(victim.worker_id, True)
    return early, late


async def cached(members: Sequence[Member], *, conversations: int = 6, by_chance: bool = False) -> float:
    """The share of all prompt tokens of conversations of ten turns that came from a worker's cache."""
    counts: Counter[str] = Counter()
    async with MeshClient([member.address for member in members]) as mesh:
        await mesh.workers(MODEL)

        async def talk(number: int) -> None:
            conversation = mesh.conversation(
                system=f"{SYSTEM} This is story number {number}.", max_tokens=32, temperature=0, model=MODEL
            )
            for saying in SAYINGS:
                await conversation.say(saying)
                assert conversation.last is not None
                for key in ("cache_n", "prompt_n"):
                    counts[key] += conversation.last.timings.get(key, 0)

        with _by_chance() if by_chance else _by_policy():
            for number in range(conversations):
                await talk(number)
    return counts["cache_n"] / (counts["cache_n"] + counts["prompt_n"])


@contextmanager
def _by_policy() -> Iterator[None]:
    yield


@contextmanager
def _by_chance() -> Iterator[None]:
    """Have clients ask anybody."""

    def anybody(records: Any, board: Any, need: Need, *, now: float, rng: random.Random, **_: Any) -> Choice:
        candidates = tuple(expected(record, board, need, now) for record in records)
        return Choice(rng.choice(candidates), "chance", candidates)

    setattr(dispatch, "choose", anybody)  # noqa: B010 - to the type checker it is no attribute
    try:
        yield
    finally:
        setattr(dispatch, "choose", selection.choose)  # noqa: B010
