"""The failure table: every failure of a server seen in the wild → what the supervisor does, in how
long, with which error. Each row is a test, on the fake server; `test_sidecar_real.py` has those that a
real llama.cpp can be made to show.

Times are those of `QUICK`, a policy whose waits are short; docs/sidecar.md has the table with the
default ones.
"""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from sidecar.errors import (
    BackendError,
    BackendUnreachable,
    ModelLoadFailed,
    OutOfMemory,
    SidecarCrashed,
    SidecarError,
    SidecarStopped,
    SidecarTimeout,
    SidecarUnresponsive,
)
from sidecar.process import Change, Policy, State, Supervisor
from sidecar.runtime import Server
from tests.sidecar_support import QUICK, QUICK_PROBES, Watcher, alive, config, fake, until
from tests.support import seconds

LONG = bool(os.environ.get("QMESH_TEST_LONG"))
GENERATE = {"prompt": "x", "n_predict": 10}


@dataclass(frozen=True)
class Row:
    """A start that fails: the fault, what it ends as, within how many seconds, after how many restarts."""

    name: str
    faults: Sequence[str]
    error: type[SidecarError]
    says: str
    restarts: int = 0
    within: float = 3.0


STALLED = ["--load-seconds", "99", "--load-silently", "1"]
DEAF = ["--hang-health-after", "1", "--hang-stream-after", "3"]

STARTS = [
    Row("refused model", ["--die-while-loading", "1"], ModelLoadFailed, "exit code 1"),
    Row("program missing", [], ModelLoadFailed, "exit code 127"),
    Row("illegal instruction", ["--die-while-loading", "-4"], ModelLoadFailed, "another CPU"),
    Row("crashes while loading", ["--die-while-loading", "3"], SidecarCrashed, "exit code 3", restarts=3),
    Row("segfaults while loading", ["--die-while-loading", "-11"], SidecarCrashed, "signal 11", restarts=3),
    Row("exits 0 unasked", ["--die-while-loading", "0"], SidecarCrashed, "exit code 0", restarts=3),
    Row("always out of memory", ["--oom-above", "10"], OutOfMemory, "out of memory", restarts=5, within=5),
    Row("loading stands still", STALLED, SidecarUnresponsive, "no sign of progress", restarts=1, within=6),
]  # fmt: skip


@pytest.mark.parametrize("row", STARTS, ids=lambda row: row.name)
async def test_starts_that_fail(tmp_path: Path, row: Row) -> None:
    server = fake(tmp_path, *row.faults)
    if row.name == "program missing":
        server.server = Server("explicit", ("/nonexistent/llama-server",), "", "")
    if row.name == "loading stands still":
        server = fake(tmp_path, *row.faults, policy=replace(QUICK, load_stall=0.5, max_restarts=1))
    async with server:
        start = time.monotonic()
        with pytest.raises(row.error, match=row.says) as caught:
            await server.ensure_ready(seconds(20))
        assert time.monotonic() - start < seconds(row.within)
        assert type(caught.value) is row.error
        assert server.state is State.FAILED
        assert server.restarts == row.restarts
        assert caught.value.log_tail, "the last lines are in the error"
        assert server.pid is None


RECOVERIES = [
    Row("dies in mid-stream", ["--die-after-tokens", "3"], SidecarCrashed, "exit code 3"),
    Row("aborts in mid-stream", ["--die-after-tokens", "3", "--die-code", "-6"], SidecarCrashed, "signal 6"),
    Row("exits 0 in mid-stream", ["--die-after-tokens", "3", "--die-code", "0"], SidecarCrashed, "exit code 0"),
    Row("hangs, /health silent", DEAF, SidecarUnresponsive, "no answer"),
    Row("hangs, /health says 200", ["--hang-stream-after", "3"], SidecarUnresponsive, "no token"),
    Row("queued work never starts", ["--freeze-work", "1"], SidecarUnresponsive, "no token"),
    Row("hangs with /metrics silent", ["--freeze-work", "1", "--hang-metrics", "1"], SidecarUnresponsive, "no token"),
]  # fmt: skip


@pytest.mark.parametrize("row", RECOVERIES, ids=lambda row: row.name)
async def test_running_servers_that_fail_are_replaced(tmp_path: Path, row: Row) -> None:
    faults = [*row.faults, "--only-first", f"{tmp_path / 'starts'}:1"]
    async with fake(tmp_path, *faults) as server:
        client = await server.ensure_ready(seconds(10))
        watcher, start = Watcher(server), time.monotonic()
        with pytest.raises(SidecarError):  # the reader is told, it does not wait for ever
            async for _ in client.stream_completion(GENERATE):
                pass
        failure = await watcher.state(State.BACKING_OFF)
        assert type(failure.error) is row.error
        assert row.says in str(failure.error)
        again = await server.ensure_ready(seconds(10))
        assert time.monotonic() - start < seconds(6)
        answers = [event async for event in again.stream_completion(GENERATE)]
        assert answers[-1]["stop"]
        assert server.restarts == 1
        assert server.last_error is None


async def test_out_of_memory_steps_down_until_it_fits(tmp_path: Path) -> None:
    settings = config(tmp_path, "--oom-above", "3000", context=8192, slots=4)
    async with Supervisor(settings, fake(tmp_path).server, policy=QUICK, probing=QUICK_PROBES) as server:
        watcher = Watcher(server)
        await server.ensure_ready(seconds(10))
        assert server.info is not None
        assert server.info.context * server.info.slots <= 3000
        assert server.restarts == 4
        assert isinstance((await watcher.state(State.BACKING_OFF)).error, OutOfMemory)


async def test_slow_loading_has_no_limit_while_it_progresses(tmp_path: Path) -> None:
    async with fake(tmp_path, "--load-seconds", "1.5", policy=replace(QUICK, load_stall=0.5)) as server:
        with pytest.raises(SidecarTimeout, match="still loading"):
            await server.ensure_ready(0.4)  # the caller's deadline does not end the load
        await server.ensure_ready(seconds(10))
        assert server.restarts == 0


@pytest.mark.parametrize("fault", ["--wrong-key", "--any-key"])
async def test_a_foreign_server_on_our_port_is_never_ready(tmp_path: Path, fault: str) -> None:
    async with fake(tmp_path, fault, "1", policy=replace(QUICK, load_stall=0.5, max_restarts=0)) as server:
        with pytest.raises(SidecarUnresponsive, match="another server"):
            await server.ensure_ready(seconds(10))


async def test_term_is_ignored(tmp_path: Path) -> None:
    async with fake(tmp_path, "--ignore-term", "1") as server:
        await server.ensure_ready(seconds(10))
        pid, start = server.pid, time.monotonic()
        await server.stop()
        assert 0.7 <= time.monotonic() - start < seconds(3)  # TERM, 0.4 s, TERM, 0.3 s, KILL
        assert pid
        assert not alive(pid)


async def test_a_grandchild_is_ended_too(tmp_path: Path) -> None:
    async with fake(tmp_path, "--fork-grandchild", "1") as server:
        for end in (server.stop, lambda: kill_and_wait(server)):
            await server.ensure_ready(seconds(10))
            assert server.pid
            (grandchild,) = psutil.Process(server.pid).children()
            await end()
            await until(lambda pid=grandchild.pid: not alive(pid))  # type: ignore[misc]


async def kill_and_wait(server: Supervisor) -> None:
    watcher = Watcher(server)
    assert server.pid
    os.kill(server.pid, signal.SIGKILL)
    await watcher.state(State.BACKING_OFF)


async def test_stop_while_loading(tmp_path: Path) -> None:
    async with fake(tmp_path, "--load-seconds", "60") as server:
        waiter = asyncio.create_task(server.ensure_ready(seconds(20)))
        await Watcher(server).state(State.LOADING)
        start = time.monotonic()
        await server.stop()
        assert time.monotonic() - start < seconds(2)
        with pytest.raises(SidecarStopped):
            await waiter


async def test_stop_ends_although_someone_starts_it_again(tmp_path: Path) -> None:
    async with fake(tmp_path) as server:
        await server.ensure_ready(seconds(10))
        pid = server.pid
        stopping = asyncio.create_task(server.stop())
        await Watcher(server).state(State.STOPPING)
        starting = asyncio.create_task(server.ensure_ready(seconds(10)))
        async with asyncio.timeout(seconds(10)):
            await stopping
            await starting
        assert server.pid not in (pid, None)


async def test_leaving_the_context_while_cancelled_leaves_no_process(tmp_path: Path) -> None:
    started = asyncio.Event()
    pids: list[int] = []

    async def node() -> None:
        async with fake(tmp_path, "--ignore-term", "1", policy=replace(QUICK, term_again=60)) as server:
            await server.ensure_ready(seconds(10))
            pids.append(server.pid or 0)
            started.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(node())
    await started.wait()
    task.cancel()
    await asyncio.sleep(0.1)  # now it waits for the server, which ignores SIGTERM
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not alive(pids[0])


async def test_a_bug_in_a_subscriber_surfaces_and_leaves_no_process(tmp_path: Path) -> None:
    def fails(change: Change) -> None:
        raise KeyError(change)

    before = set(psutil.Process().children())  # those of other tests' fixtures
    with pytest.raises(ExceptionGroup) as caught:
        async with fake(tmp_path) as server:
            server.subscribe(fails)
            await server.ensure_ready(seconds(10))
    assert caught.value.subgroup(KeyError)
    assert set(psutil.Process().children()) <= before


async def test_a_log_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SidecarError, match="Not a directory"):
        async with fake(tmp_path / "file" / "logs"):
            pass


# ── a request's own failures ────────────────────────────────────────────────────────────────────


async def test_a_connection_closed_before_the_first_byte_is_tried_once_more(tmp_path: Path) -> None:
    async with fake(tmp_path, "--drop-first", "1") as server:
        client = await server.ensure_ready(seconds(10))
        assert [event async for event in client.stream_completion(GENERATE)][-1]["stop"]


async def test_twice_closed_before_the_first_byte_is_an_error(tmp_path: Path) -> None:
    async with fake(tmp_path, "--drop-first", "2") as server:
        client = await server.ensure_ready(seconds(10))
        with pytest.raises(BackendUnreachable) as caught:
            await client.completion(GENERATE)
        assert not caught.value.started


async def test_a_stream_cut_off_is_never_retried(tmp_path: Path) -> None:
    async with fake(tmp_path, "--cut-after", "3") as server:
        client = await server.ensure_ready(seconds(10))
        events = []
        with pytest.raises(BackendUnreachable) as caught:
            async for event in client.stream_completion(GENERATE):
                events.append(event)  # noqa: PERF401 - what came before the error counts
        assert caught.value.started
        assert len(events) == 3


async def test_an_error_in_mid_stream_is_raised(tmp_path: Path) -> None:
    async with fake(tmp_path, "--error-after", "3") as server:
        client = await server.ensure_ready(seconds(10))
        events = []
        with pytest.raises(BackendError, match="server_error"):
            async for event in client.stream_chat(GENERATE):
                events.append(event)  # noqa: PERF401
        assert len(events) == 3


async def test_silence_in_mid_stream_reaches_the_readers_deadline(tmp_path: Path) -> None:
    async with fake(tmp_path, "--hang-stream-after", "3", policy=Policy()) as server:
        client = await server.ensure_ready(seconds(10))
        with pytest.raises(SidecarTimeout, match="nothing for"):
            async for _ in client.stream_completion(GENERATE, idle_timeout=0.2):
                pass
        await until(lambda: client.in_flight == 0)


async def test_only_harmless_headers_are_passed_on(tmp_path: Path) -> None:
    async with fake(tmp_path) as server:
        client = await server.ensure_ready(seconds(10))
        headers = {"X-Conversation-Id": "c", "Authorization": "Bearer theirs", "Accept": "a/b", "Cookie": "c"}
        async with await client.request("POST", "/echo", {"a": 1}, headers) as response:
            sent = await response.read()
        assert b"conversation" not in sent.lower()
        assert b"theirs" not in sent
        assert b"cookie" not in sent.lower()
        assert b'"accept": "a/b"' in sent
        assert client.api_key is not None
        assert client.api_key.encode() in sent


# ── long runs ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.timeout(900 if LONG else 120)
async def test_crash_and_restart_cycles_do_not_grow(tmp_path: Path) -> None:
    """500 cycles with QMESH_TEST_LONG=1, otherwise 16."""
    cycles, warm = (500, 20) if LONG else (16, 6)
    policy = replace(QUICK, max_restarts=10_000, backoff_first=0.0)
    async with fake(tmp_path, policy=policy) as server:
        watcher = Watcher(server)
        me = psutil.Process()

        def usage() -> tuple[int, int, int]:
            gc.collect()
            return me.num_fds(), len(asyncio.all_tasks()), me.num_threads()

        async def crash() -> None:
            await server.ensure_ready(seconds(20))
            watcher.changes.clear()
            assert server.pid
            os.kill(server.pid, signal.SIGKILL)
            await watcher.state(State.BACKING_OFF)

        for _ in range(warm):
            await crash()
        await server.ensure_ready(seconds(20))
        before, memory = usage(), me.memory_info().rss
        for _ in range(cycles - warm):
            await crash()
        await server.ensure_ready(seconds(20))
        assert usage() == before
        assert me.memory_info().rss - memory < 8 << 20
        assert server.restarts == cycles
        assert not [child for child in me.children() if child.status() == psutil.STATUS_ZOMBIE]


async def test_a_flood_of_log_output_stalls_nothing(tmp_path: Path) -> None:
    """1 GB while streaming with QMESH_TEST_LONG=1, otherwise 100 MB."""
    tokens, per_token = 100, (10_000_000 if LONG else 1_000_000)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with fake(tmp_path, "--flood-log", str(per_token)) as server:
        client = await server.ensure_ready(seconds(10))
        longest, last = 0.0, time.monotonic()
        async for _ in client.stream_completion(
            {"prompt": "x", "n_predict": tokens}, idle_timeout=seconds(5)
        ):
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        assert longest < seconds(2)
        assert server.log_tail[-1].startswith("xxx")
    used = sum(file.stat().st_size for file in tmp_path.glob("*.log*"))  # noqa: ASYNC240 - a test may block
    assert 40_000_000 < used <= 50 * 1024 * 1024
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 20_000  # KiB


def test_the_fake_says_that_a_port_is_taken() -> None:
    import subprocess

    from tests.sidecar_support import FAKE

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = subprocess.run([FAKE, "--port", str(taken.getsockname()[1])], capture_output=True, check=False)
    assert done.returncode == 1
    assert b"couldn't bind" in done.stdout
