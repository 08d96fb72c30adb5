"""Cancelled at any moment: nothing stays open, no process is left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from sidecar.client import SidecarClient
from sidecar.probe import examine
from tests.sidecar_support import fake
from tests.support import seconds

BODY = {"prompt": "x", "n_predict": 20}


async def cancelled_after(turns: int, work: Awaitable[object]) -> bool:
    """Run `work` for some turns of the event loop, then cancel it; True when it had not ended yet."""
    task = asyncio.ensure_future(work)
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    (result,) = await asyncio.gather(task, return_exceptions=True)
    return isinstance(result, asyncio.CancelledError)


async def streamed(client: SidecarClient) -> None:
    async for _ in client.stream_completion(BODY):
        pass


async def raw(client: SidecarClient) -> None:
    async with await client.request("POST", "/completion", {**BODY, "stream": True}, timeout=5) as response:
        await response.read()


async def asked(client: SidecarClient) -> None:
    await client.completion(BODY, timeout=5)


async def test_requests_leave_nothing_open(tmp_path: Path) -> None:
    async with fake(tmp_path, "--token-delay", "0.001") as server:
        ready = await server.ensure_ready(seconds(10))
        client = SidecarClient(ready.base_url, ready.api_key)  # one that the supervisor's probes do not use
        ways: list[Callable[[SidecarClient], Awaitable[None]]] = [streamed, raw, asked]
        cancelled = 0
        for way in ways:
            for turns in [*range(30), 100, 1000]:
                cancelled += await cancelled_after(turns, way(client))
                assert client.in_flight == 0
        assert cancelled > 60
        await asked(client)
        before = {id(task) for task in asyncio.all_tasks()}
        await asked(client)
        assert {id(task) for task in asyncio.all_tasks()} == before


async def test_starting_leaves_no_process(tmp_path: Path) -> None:
    me = psutil.Process()
    before = set(me.children(recursive=True))  # those of other tests' fixtures
    pids = set()

    async def start() -> None:
        async with fake(tmp_path, "--ignore-term", "1") as server:
            server.subscribe(lambda _: pids.add(server.pid))
            await server.ensure_ready(seconds(10))
            await asyncio.sleep(60)

    for delay in range(0, 120, 8):
        task = asyncio.create_task(start())
        await asyncio.sleep(delay / 1000)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert set(me.children(recursive=True)) <= before
    assert len(pids) > 3, "some were cancelled with a process already running"
    names = {task.get_name() for task in asyncio.all_tasks()}
    assert not any(name.startswith("sidecar") for name in names)


async def test_a_server_that_is_to_be_left_alone_is_probed_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes: asyncio.Queue[float] = asyncio.Queue()

    async def noted(*arguments: Any) -> Any:
        probes.put_nowait(time.monotonic())
        return await examine(*arguments)

    monkeypatch.setattr("sidecar.process.examine", noted)
    async with fake(tmp_path) as server, asyncio.timeout(seconds(10)):
        client = await server.ensure_ready(seconds(10))
        await probes.get()
        until = client.quiet_until = time.monotonic() + 1.0
        asked = [await probes.get()]
        while asked[-1] < until:
            asked.append(await probes.get())
    assert len(asked) <= 2, "one may have been under way"
