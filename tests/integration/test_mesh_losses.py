"""Nodes and their llama.cpp come, go, and are killed: what the others see, and how soon."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from client_sdk import Completion, MeshClient
from mesh.limits import RECORD_TTL
from mesh.transport import Connection
from node.cluster import Cluster, Member
from tests.mesh_support import (
    MODEL,
    PROMPT,
    Llama,
    Marked,
    ask,
    connected,
    found_at,
    json_lines,
    llama_of,
    until,
)
from tests.support import seconds

pytestmark = pytest.mark.xdist_group("mesh")

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
LONG = 1500
"""Tokens of an answer that is longer than what a worker may send ahead, so that it cannot be done already."""


@pytest.fixture
async def newcomer(tmp_path: Path, members: list[Member]) -> AsyncIterator[Member]:
    """A fourth node, which a test may kill."""
    cluster = Cluster(tmp_path, attached=True)
    try:
        (member,) = await cluster.up(
            1, ["--no-gateway", "--slots", "2", "--join", members[0].address, "--join", members[1].address]
        )
        yield member
    finally:
        await cluster.down()


@asynccontextmanager
async def views(members: list[Member]) -> AsyncIterator[list[Connection]]:
    """A connection to each node, to ask it what it finds."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(connected(member)) for member in members]


async def seen(views: list[Connection], worker: str, model: str = MODEL) -> list[bool]:
    """Which nodes find this worker."""
    return [worker in await found_at(view, model) for view in views]


async def test_a_newcomer_is_found_by_all_and_gone_after_sigterm(
    members: list[Member], newcomer: Member, mesh: MeshClient
) -> None:
    async with views(members) as nodes:

        async def found() -> bool:
            known = {worker.id for worker in await mesh.workers(MODEL)}
            return newcomer.worker_id in known and all(await seen(nodes, newcomer.worker_id))

        await until(found, 5)

        async def gone() -> bool:
            known = {worker.id for worker in await mesh.workers(MODEL)}
            return newcomer.worker_id not in known and not any(await seen(nodes, newcomer.worker_id))

        os.kill(newcomer.pid, signal.SIGTERM)
        await until(gone, 2)


async def test_a_node_that_is_killed_takes_its_llama_along_and_no_request_with_it(
    members: list[Member], newcomer: Member
) -> None:
    servers = llama_of(newcomer.pid)
    assert servers
    killed = asyncio.Event()
    done: list[tuple[float, Completion]] = []

    async def load(mesh: MeshClient, number: int) -> None:
        """Ask on and on, until a while after the kill."""
        while not killed.is_set() or time.monotonic() < died + 1.5:
            asked = time.monotonic()
            answer = await mesh.generate(f"{PROMPT} {number}", max_tokens=40, **GREEDY)
            assert answer.usage["completion_tokens"] == 40
            done.append((asked, answer))

    died = 0.0
    async with MeshClient(members[0].address) as mesh, asyncio.timeout(seconds(30)):
        await until(lambda: knows(mesh, newcomer), 5)
        async with asyncio.TaskGroup() as group:
            for number in range(8):
                group.create_task(load(mesh, number))
            await until(lambda: answered(done, newcomer), 10)
            await until(lambda: working(servers[0]), 10, every=0)
            died = time.monotonic()
            os.kill(newcomer.pid, signal.SIGKILL)
            killed.set()
            for server in servers:
                await asyncio.to_thread(server.process.wait, timeout=seconds(2))
    after = [answer for asked, answer in done if asked > died + 0.5]
    assert after
    for answer in after:
        assert [attempt.error for attempt in answer.explain.attempts] == [None]
        assert answer.explain.worker != newcomer.worker_id


async def knows(mesh: MeshClient, worker: Member) -> bool:
    return worker.worker_id in {one.id for one in await mesh.workers(MODEL)}


async def answered(done: list[tuple[float, Completion]], worker: Member) -> bool:
    return any(answer.explain.worker == worker.worker_id for _, answer in done)


async def working(server: Llama) -> bool:
    return await server.busy() > 0


async def test_an_answer_in_progress_goes_on_from_another_worker(
    members: list[Member], newcomer: Member
) -> None:
    """Of the workers that answer, one is killed in mid-answer."""
    async with MeshClient(f"{newcomer.worker_id}@{newcomer.address}") as mesh:
        await until(lambda: knows(mesh, members[2]), 5)
        streams = [mesh.generate_stream(PROMPT, model=MODEL, max_tokens=LONG, **GREEDY) for _ in range(8)]
        running = [aiter(stream) for stream in streams]
        begun = await asyncio.gather(*(anext(tokens) for tokens in running))
        (chosen, *_) = [index for index, token in enumerate(begun) if token.worker == newcomer.worker_id]
        stream, tokens, first = streams[chosen], running[chosen], begun[chosen]
        await asyncio.gather(*(other.aclose() for other in streams if other is not stream))
        os.kill(newcomer.pid, signal.SIGKILL)
        rest = [token async for token in tokens]
    assert first.text + "".join(token.text for token in rest) == stream.completion().text
    assert stream.completion().usage["completion_tokens"] == LONG
    assert sum(len(token.ids) for token in (first, *rest)) == LONG
    assert stream.explain.splices == 1
    assert [token.worker for token in rest if token.spliced] == [stream.explain.worker]
    assert stream.explain.worker in {member.worker_id for member in members}


SHORT = 3.0
SHORT_LIVED = f"""
import mesh.limits
mesh.limits.RECORD_TTL = {SHORT}
mesh.limits.ANNOUNCE_INTERVAL = {SHORT / 4}
mesh.limits.MIN_ANNOUNCE_INTERVAL = {SHORT / 10}
from node.cli import main
main()
"""
"""A node whose records live for seconds instead of minutes; everything else is as ever, in it and in
the nodes that keep its records."""


async def test_a_killed_node_is_gone_when_its_record_expires(tmp_path: Path, members: list[Member]) -> None:
    marked = Marked()
    command = [
        sys.executable, "-c", SHORT_LIVED, "run", "--json", "--listen", "127.0.0.1:0", "--no-mdns",
        "--no-gateway", "--data-dir", str(tmp_path / "node"), "--join", members[0].address,
    ]  # fmt: skip
    with (tmp_path / "events").open("wb") as events:
        node = subprocess.Popen(  # noqa: ASYNC220 - ended below, whatever happens
            command, stdout=events, stderr=subprocess.DEVNULL, env=marked.environ
        )
    try:

        async def ready() -> bool:
            assert node.poll() is None
            return any(one["event"] == "ready" for one in json_lines((tmp_path / "events").read_bytes()))

        await until(ready, 20)
        (worker,) = [
            one["worker_id"]
            for one in json_lines((tmp_path / "events").read_bytes())
            if one["event"] == "ready"
        ]
        async with views(members) as nodes:

            async def found() -> bool:
                return all(await seen(nodes, worker))

            await until(found, 5)
            await asyncio.sleep(SHORT * 1.2)  # longer than one record lives
            assert await found(), "it does not announce itself again"
            node.kill()
            expires = max([(await found_at(view))[worker].expires for view in nodes])
            assert expires <= time.time() + SHORT + 1

            async def gone() -> bool:
                return not any(await seen(nodes, worker))

            await until(gone, SHORT + 2)
            assert time.time() <= expires + seconds(1)
    finally:
        node.kill()
        node.wait()
    assert marked.gone(within=2) == []


async def test_a_record_lives_for_three_minutes(members: list[Member]) -> None:
    async with connected(members[0]) as connection:
        for record in (await found_at(connection)).values():
            assert 0 < record.expires - time.time() <= RECORD_TTL


async def test_a_killed_llama_is_withdrawn_restarted_and_serves_again(
    members: list[Member], newcomer: Member
) -> None:
    healths: list[int] = []
    absent = asyncio.Event()

    async def watch(own: Connection, other: Connection) -> None:
        """What the node says of itself and what another one finds, every few milliseconds."""
        while True:
            healths.append((await ask(own, "status"))["health"])
            if newcomer.worker_id not in await found_at(other):
                absent.set()
            await asyncio.sleep(0.005)

    async with connected(newcomer) as own, connected(members[1]) as other:

        async def found() -> bool:
            return newcomer.worker_id in await found_at(other)

        await until(found, 5)
        (server,) = llama_of(newcomer.pid)
        watching = asyncio.create_task(watch(own, other))
        died = time.monotonic()
        server.process.kill()
        async with asyncio.timeout(seconds(5)):
            await absent.wait()

        async def serving() -> bool:
            fresh = [one for one in llama_of(newcomer.pid) if one.process.pid != server.process.pid]
            return bool(fresh) and bool(healths) and healths[-1] > 0 and await found()

        await until(serving, 5)
        async with MeshClient(f"{newcomer.worker_id}@{newcomer.address}") as mesh:
            answers: list[Completion] = []
            while not any(answer.explain.worker == newcomer.worker_id for answer in answers):
                answers += await asyncio.gather(
                    *(mesh.generate(PROMPT, max_tokens=4, **GREEDY) for _ in range(6))
                )
        assert time.monotonic() - died < seconds(5)
        watching.cancel()
        await asyncio.wait([watching])
        assert 0 in healths
        (model,) = (await ask(own, "status"))["models"]
        assert model["restarts"] == 1


async def test_requests_during_the_restart_are_answered_by_others(
    members: list[Member], newcomer: Member
) -> None:
    async with MeshClient([newcomer.address, members[0].address]) as mesh:
        await until(lambda: knows(mesh, newcomer), 5)
        (server,) = llama_of(newcomer.pid)
        asked = [
            asyncio.create_task(mesh.generate(f"{PROMPT} {number}", max_tokens=400, **GREEDY))
            for number in range(12)
        ]
        await until(lambda: working(server), 10, every=0)
        server.process.kill()
        asked += [
            asyncio.create_task(mesh.generate(f"{PROMPT} {number}", max_tokens=8, **GREEDY))
            for number in range(12)
        ]
        async with asyncio.timeout(seconds(20)):
            answers = await asyncio.gather(*asked)
        assert [answer.usage["completion_tokens"] for answer in answers] == [400] * 12 + [8] * 12


# --- the demo


@pytest.mark.parametrize(
    ("number", "at", "status"),
    [
        (signal.SIGINT, "   node 1", 130),
        (signal.SIGTERM, "   node 2", -signal.SIGTERM),
        (signal.SIGKILL, "3. The best one", -signal.SIGKILL),
    ],
)
def test_an_interrupted_demo_leaves_no_process(number: signal.Signals, at: str, status: int) -> None:
    marked = Marked()
    with subprocess.Popen(
        [sys.executable, "-m", "examples.demo"], env=marked.environ,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as demo:  # fmt: skip
        assert demo.stdout is not None
        try:
            assert any(line.startswith(at) for line in demo.stdout), "it ended before that"
            assert len(marked.alive()) > 1
            demo.send_signal(number)
            said = demo.stdout.read()
            assert demo.wait(timeout=seconds(20)) == status
        finally:
            demo.kill()
    assert "Traceback" not in said
    assert marked.gone(within=3) == []
