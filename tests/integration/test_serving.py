"""Serving on real nodes with real llama.cpp: slots that are freed, requests that spread, caches that are used,
second workers that are asked, and floods that are borne. Speeds are for `benchmarks/serving`; here only what
must hold on any machine.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import psutil
import pytest

from benchmarks.serving import overload, slots, spread
from benchmarks.serving.common import GREEDY, Slowed, quantile
from client_sdk import MeshClient, RouteEvent, Timeouts
from mesh.errors import ConnectionClosed, DeadlineExceeded, QMeshError
from node.cluster import Cluster, Member
from tests.mesh_support import MODEL, PROMPT, ask, connected, llama_of, until
from tests.support import seconds

pytestmark = pytest.mark.xdist_group("serving")


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four nodes with four slots each."""
    cluster = Cluster(tmp_path_factory.mktemp("four"), attached=True)
    try:
        asyncio.run(cluster.up(4, ["--no-gateway"]))
        yield cluster
    finally:
        asyncio.run(cluster.down())


@pytest.fixture
async def mesh(four: Cluster) -> AsyncIterator[MeshClient]:
    async with MeshClient([member.address for member in four.members]) as client:
        yield client


async def idle(members: list[Member]) -> bool:
    for member in members:
        async with connected(member) as connection:
            load = (await ask(connection, "status"))["load"]
        if load["busy"] or load["queue"]:
            return False
    return True


# --- slots


@pytest.mark.parametrize("way", slots.WAYS)
async def test_a_stream_that_is_left_frees_its_slot(four: Cluster, way: str) -> None:
    took = await slots.freed_after(four.members, way, streaming=True)
    assert took < seconds(1.5)
    await until(lambda: idle(four.members), 5)


@pytest.mark.parametrize("way", ["cancel the task", "kill the client"])
async def test_a_whole_answer_that_is_left_frees_its_slot(four: Cluster, way: str) -> None:
    """llama.cpp itself looks only once a second whether anybody still waits."""
    await slots.freed_after(four.members, way, streaming=False)
    await until(lambda: idle(four.members), 15)


def _left_behind(mesh: MeshClient) -> list[str]:
    """What a request must not leave in a client."""
    found = [
        f"{len(score_of)} requests are reserved"
        for score_of in [[one for one in mesh._dispatcher.board._scores.values() if one.in_flight]]
        if score_of
    ]
    streams = sum(one.open_streams for one in mesh._pool._connections.values())
    if streams:
        found.append(f"{streams} streams are open")
    tasks = [task.get_name() for task in mesh._dispatcher._tasks._tasks]
    if tasks:
        found.append(f"tasks run: {tasks}")
    return found


async def _whole(mesh: MeshClient) -> None:
    async with mesh.request("/completion", {"prompt": PROMPT, "n_predict": 400}, model=MODEL) as answer:
        await answer.read()


async def _tokens(mesh: MeshClient) -> None:
    async for _ in mesh.generate_stream(PROMPT, max_tokens=400, **GREEDY):
        pass


@pytest.mark.parametrize("work", [_tokens, _whole])
@pytest.mark.parametrize("hedged", [False, True])
async def test_cancelling_at_any_await_leaves_nothing(
    mesh: MeshClient, four: Cluster, work: Callable[[MeshClient], Coroutine[Any, Any, None]], hedged: bool
) -> None:
    """One request for each step of the event loop, cancelled there; with hedging also between two workers."""
    await mesh.workers(MODEL)
    await mesh.generate(PROMPT, max_tokens=2, **GREEDY)
    kind = ("/completion", work is _tokens)
    policy = mesh._dispatcher.hedging((MODEL, *kind))
    for step in range(28):
        if hedged:
            policy._delay, policy._budget = 0.0, 4.0  # at once, and again
        task = asyncio.create_task(work(mesh))
        for _ in range(step if step < 20 else 4 * step):
            await asyncio.sleep(0)
        finished = not task.cancel()  # on a busy machine one step may bring the whole answer
        await asyncio.wait([task])
        assert task.cancelled() or finished

        async def nothing() -> bool:
            return not _left_behind(mesh)

        await until(nothing, 5, every=0)
    await until(lambda: idle(four.members), 20)


async def test_closing_the_client_ends_its_requests_with_a_reason(four: Cluster) -> None:
    mesh = MeshClient(four.members[0].address)
    tasks = [asyncio.create_task(_tokens(mesh)) for _ in range(6)]
    for _ in range(5):
        await asyncio.sleep(0)
    tasks += [asyncio.create_task(_whole(mesh)) for _ in range(3)]
    await asyncio.sleep(0)
    async with asyncio.timeout(seconds(5)):
        await mesh.close()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(end, ConnectionClosed) for end in ends), ends
    with pytest.raises(ConnectionClosed):
        await mesh.generate(PROMPT, model=MODEL)


async def test_the_callers_own_deadline_is_no_workers_fault(four: Cluster) -> None:
    async with MeshClient(four.members[0].address, timeouts=Timeouts(total=0.05)) as mesh:
        await mesh.workers(MODEL)
        for _ in range(6):
            with pytest.raises(DeadlineExceeded, match="longer than"):
                await mesh.generate(PROMPT, max_tokens=1900, **GREEDY)
        assert not any(worker.banned for worker in await mesh.workers(MODEL))
        assert not _left_behind(mesh)


# --- whom requests go to


async def test_a_burst_spreads_over_equal_workers(four: Cluster) -> None:
    """Who answers depends on the machine's cores where queues are full: 80 are room for."""
    given, _ = await spread.burst(four.members, 100)
    assert spread.unevenness(given, four.members) <= 1.3, given
    given, answered = await spread.burst(four.members, 64)
    assert spread.unevenness(given, four.members) <= 1.3, given
    assert len(answered) == 4


async def test_a_conversation_finds_its_beginning_in_the_cache(four: Cluster) -> None:
    await until(lambda: idle(four.members), 20)
    ours = await spread.cached(four.members, conversations=2)
    chance = await spread.cached(four.members, conversations=2, by_chance=True)
    assert ours >= 0.85, "of the prompt tokens"
    assert chance < ours


async def test_a_late_worker_is_overtaken_and_its_slot_freed(mesh: MeshClient, four: Cluster) -> None:
    events: list[RouteEvent] = []
    mesh._dispatcher._on_event = events.append
    await mesh.workers(MODEL)
    for number in range(24):
        await mesh.generate(f"{PROMPT} {number}", max_tokens=4, **GREEDY)
    policy = mesh._dispatcher.hedging((MODEL, "/completion", True))
    assert policy.delay() is not None
    overtaken = 0
    with Slowed().running() as slow:
        for number in range(120):
            slow.slow_down(llama_of(four.members[number % 4].pid)[0].process.pid)
            policy._budget = 8.0
            answer = await mesh.generate(f"{number} {PROMPT}", max_tokens=4, **GREEDY)
            overtaken += answer.explain.hedged
            if overtaken:
                break
    assert overtaken, "no late worker was overtaken"
    assert any(event.kind == "hedge" and event.model == MODEL for event in events)
    assert all(event.kind == "hedge" for event in events), events
    await until(lambda: idle(four.members), 10)
    assert not _left_behind(mesh)


async def test_without_a_share_nobody_is_asked_twice(four: Cluster) -> None:
    async with MeshClient(four.members[0].address) as mesh:
        mesh._dispatcher.hedge_share = 0.0
        policy = mesh._dispatcher.hedging((MODEL, "/completion", True))
        for _ in range(100):
            policy.requested()
            policy.answered(1.0)
        assert policy.delay() is not None
        assert not policy.take()


# --- floods and crowds


async def test_a_flood_is_refused_and_a_modest_peer_served(tmp_path_factory: pytest.TempPathFactory) -> None:
    cluster = Cluster(tmp_path_factory.mktemp("one"), attached=True)
    try:
        (node,) = await cluster.up(1, ["--no-gateway", "--slots", "1"])
        outcome = await overload.run(node, 1, seconds(3), tokens=150)
    finally:
        await cluster.down()
    assert outcome.rejected
    assert len(outcome.retry_after) == len(outcome.rejected) + outcome.displaced, "every refusal names a time"
    assert not outcome.broken
    assert outcome.finished == outcome.accepted > 0
    assert outcome.light, "the modest peer is served"
    assert quantile(outcome.light, 0.5) < 10 * quantile(outcome.quiet, 0.5), "its turn comes"


async def test_a_thousand_requests_leave_neither_memory_nor_tasks_nor_sockets(mesh: MeshClient) -> None:
    """A small soak; `benchmarks/soak.py` makes 20,000."""

    async def some(count: int) -> None:
        async def work() -> None:
            for number in range(count // 10):
                await mesh.generate(f"{number} {PROMPT}", max_tokens=2, **GREEDY)

        async with asyncio.TaskGroup() as group:
            for _ in range(10):
                group.create_task(work())

    me = psutil.Process()
    await some(200)
    gc.collect()
    tasks, files, memory = len(asyncio.all_tasks()), me.num_fds(), me.memory_info().rss
    await some(1000)
    gc.collect()
    assert len(asyncio.all_tasks()) <= tasks
    assert me.num_fds() <= files
    assert me.memory_info().rss - memory < 4 << 20
    assert not _left_behind(mesh)


async def test_a_dead_worker_is_left_alone_after_its_first_failure(four: Cluster) -> None:
    """Last in this module: it kills a node."""
    _, late = await spread.after_a_death(four, 80)
    assert late == 0


async def test_a_node_that_is_back_is_asked_again(four: Cluster) -> None:
    dead = next((member for member in four.members if member.process() is None), four.members[-1])
    os.kill(dead.pid, signal.SIGKILL) if dead.process() else None
    back = await four.restart(dead)
    assert back.worker_id == dead.worker_id
    async with MeshClient(back.address) as mesh:
        shares: Counter[str | None] = Counter()

        async def asked() -> bool:
            try:
                answer = await mesh.generate(PROMPT, max_tokens=2, **GREEDY)
            except QMeshError:
                return False
            shares[answer.explain.worker] += 1
            return back.worker_id in shares

        await until(asked, 20)
