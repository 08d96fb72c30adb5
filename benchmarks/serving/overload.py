"""A node that is asked for ten times what it can do, by one peer, while another one asks for little.

Whole answers are asked for, so that the model is what is short, not the cores that its tokens are relayed with.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from benchmarks.serving.common import MODEL, Slots, quantile
from mesh.errors import Overloaded, QMeshError
from mesh.transport import Connection
from node.cluster import Member
from node.gate import DISPLACED
from tests.mesh_support import ask, completion, connected

TOKENS = 600
PATIENCE = 60.0


@dataclass
class Outcome:
    """What became of it. Times in seconds."""

    capacity: float = 0.0
    """Requests per second that the node answers."""
    offered: float = 0.0
    quiet: list[float] = field(default_factory=list)
    """The light peer's answers, alone."""
    light: list[float] = field(default_factory=list)
    """The light peer's answers in the flood."""
    waits: list[float] = field(default_factory=list)
    """The part of each of these that was waiting for a slot."""
    rejected: list[float] = field(default_factory=list)
    """From the request to its refusal, for those that were refused when they came."""
    displaced: int = 0
    """Requests that waited and then had to give their place to the light peer."""
    retry_after: list[float] = field(default_factory=list)
    accepted: int = 0
    finished: int = 0
    broken: list[str] = field(default_factory=list)
    settled: float = 0.0
    """From the last request's end until nothing runs or waits."""


async def run(
    member: Member, slots: int, seconds: float, *, times: float = 10.0, tokens: int = TOKENS
) -> Outcome:
    """Flood one node with `times` its capacity."""
    outcome = Outcome()
    async with connected(member) as heavy, connected(member) as light, Slots.of([member]) as busy:
        outcome.capacity = await _capacity(heavy, slots, tokens)
        for _ in range(15):
            outcome.quiet.append((await _answer(light, tokens))[0])
        rate = times * outcome.capacity
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            peer = group.create_task(_light(light, outcome, tokens, began + seconds))
            number = 0
            while time.perf_counter() < began + seconds:
                number += 1
                group.create_task(_heavy(heavy, outcome, tokens))
                await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
            outcome.offered = number / (time.perf_counter() - began)
            await peer
        ended = time.perf_counter()
        await busy.until(0)
        while await _loaded(light):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.005)
        outcome.settled = time.perf_counter() - ended
    return outcome


async def _loaded(connection: Connection) -> bool:
    load = (await ask(connection, "status"))["load"]
    return bool(load["busy"] or load["queue"])


async def _capacity(connection: Connection, slots: int, tokens: int) -> float:
    async def work() -> None:
        for _ in range(4):
            await _answer(connection, tokens)

    await _answer(connection, tokens)
    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(slots)))
    return 4 * slots / (time.perf_counter() - began)


def _request(tokens: int) -> dict[str, Any]:
    request = completion(tokens)
    return request | {"body": request["body"] | {"stream": False}}


async def _answer(connection: Connection, tokens: int) -> tuple[float, float]:
    """How long it took, and how much of that it waited for a slot."""
    began = time.perf_counter()
    async with await connection.open("infer", _request(tokens)) as stream:
        waited = (await stream.head(timeout=PATIENCE))["queue_ms"] / 1000
        while await stream.read(timeout=PATIENCE) is not None:
            pass
    return time.perf_counter() - began, waited


async def _heavy(connection: Connection, outcome: Outcome, tokens: int) -> None:
    began = time.perf_counter()
    try:
        async with await connection.open("infer", _request(tokens)) as stream:
            await stream.head(timeout=PATIENCE)
            outcome.accepted += 1
            while await stream.read(timeout=PATIENCE) is not None:
                pass
            outcome.finished += 1
    except Overloaded as error:
        if error.message == DISPLACED:
            outcome.displaced += 1
        else:
            outcome.rejected.append(time.perf_counter() - began)
        if error.retry_after:
            outcome.retry_after.append(error.retry_after)
    except QMeshError as error:
        outcome.broken.append(f"{type(error).__name__}: {error}")


async def _light(connection: Connection, outcome: Outcome, tokens: int, until: float) -> None:
    await asyncio.sleep(0.5)
    while time.perf_counter() < until - 0.5:
        took, waited = await _answer(connection, tokens)
        outcome.light.append(took)
        outcome.waits.append(waited)
        await asyncio.sleep(0.05)


def describe(one: Outcome) -> str:
    """A few lines."""
    quiet, light = quantile(one.quiet, 0.5), quantile(one.light, 0.5)
    return (
        f"model {MODEL}: {one.capacity:.1f} answers/s possible, {one.offered:.0f} requests/s offered\n"
        f"rejected at once {len(one.rejected)}, displaced {one.displaced} (all but "
        f"{len(one.rejected) + one.displaced - len(one.retry_after)} with retry_after); at once: "
        f"p50 {quantile(one.rejected, 0.5) * 1000:.1f} ms, p99 {quantile(one.rejected, 0.99) * 1000:.1f} ms\n"
        f"accepted {one.accepted}, finished {one.finished}, broken {len(one.broken)}\n"
        f"light peer: p50 {quiet * 1000:.0f} ms alone, {light * 1000:.0f} ms in the flood "
        f"({light / quiet:.2f} times), {quantile(one.waits, 0.5) * 1000:.0f} ms of it waiting for a slot; "
        f"{len(one.light)} answers\n"
        f"everything free {one.settled * 1000:.0f} ms after the last answer"
    )
