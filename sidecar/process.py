"""The single owner of one llama.cpp server process.

One task performs what `sidecar.lifecycle` decides; everyone else sends it requests. No start is silent:
every failure has a name (`sidecar.errors`) and carries the server's last lines.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import random
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from sidecar import lifecycle as life
from sidecar import orphans
from sidecar.client import SidecarClient
from sidecar.config import SidecarConfig, server_arguments
from sidecar.errors import (
    BackendUnreachable,
    ModelLoadFailed,
    OutOfMemory,
    SidecarCrashed,
    SidecarError,
    SidecarStopped,
    SidecarTimeout,
    SidecarUnresponsive,
)
from sidecar.exits import judge
from sidecar.gguf import GgufHeader, read_header
from sidecar.lifecycle import Fault, Policy, State
from sidecar.modes import Settings, settle
from sidecar.output import OutputPump, RotatingFile
from sidecar.runtime import Server

log = logging.getLogger("qmesh.sidecar")

_LAUNCHER = (sys.executable, "-I", "-S", str(Path(__file__).with_name("launch.py")))
_PACKAGE_ROOT = str(Path(__file__).parent.parent)
_ERRORS: Mapping[Fault, type[SidecarError]] = {
    Fault.FATAL: ModelLoadFailed,
    Fault.MEMORY: OutOfMemory,
    Fault.CRASH: SidecarCrashed,
    Fault.HANG: SidecarUnresponsive,
}


@dataclass(frozen=True, slots=True)
class Probing:
    """How often the server is asked, in seconds."""

    loading_first: float = 0.02
    loading_most: float = 0.5
    progress: float = 1.0
    tell: float = 5.0
    idle: float = 5.0
    busy: float = 2.0
    degraded: float = 1.0
    timeout: float = 3.0


@dataclass(frozen=True, slots=True)
class Change:
    """What a subscriber is told: the new state, and the failure that led to it."""

    state: State
    error: SidecarError | None


@dataclass(frozen=True, slots=True)
class Info:
    """What a ready server says of itself. `context` is in tokens per slot."""

    model: str
    context: int
    slots: int
    build: str
    chat_template: str


@dataclass(slots=True)
class _Child:
    """A running process and what belongs to it alone."""

    process: asyncio.subprocess.Process
    client: SidecarClient
    pump: OutputPump
    memory_kills: int | None
    cpu_seconds: float = 0.0


class Supervisor:
    """Keeps one server running.

    `async with Supervisor(config, server) as s: client = await s.ensure_ready()`

    `state`, `pid`, `restarts` (in all), `last_error`, `log_tail`, `info` (None until ready) and
    `metrics` (the last scrape) may be read at any time. Raises ModelLoadFailed on entering when the
    model file is missing or broken.
    """

    def __init__(
        self,
        config: SidecarConfig,
        server: Server,
        *,
        policy: Policy | None = None,
        probing: Probing | None = None,
        random_jitter: Callable[[], float] = random.random,
    ) -> None:
        self.config, self.server = config, server
        self._policy, self._probing = policy or Policy(), probing or Probing()
        self._jitter = random_jitter
        self._events: asyncio.Queue[life.Event] = asyncio.Queue()
        self._subscribers: list[Callable[[Change], None]] = []
        self._changed: asyncio.Event = asyncio.Event()
        self._child: _Child | None = None
        self._owner: asyncio.Task[None] | None = None
        self._machine: life.Machine | None = None
        self._settings: Settings | None = None
        self._tail: list[str] = []
        self._record = config.log_dir / f"{_file_name(config.name)}.pid.json"
        self.last_error: SidecarError | None = None
        self.info: Info | None = None
        self.metrics: dict[str, float] = {}

    # ── for everyone ────────────────────────────────────────────────────────────────────────────

    @property
    def state(self) -> State:
        """The state of the lifecycle."""
        return self._machine.state if self._machine else State.STOPPED

    @property
    def pid(self) -> int | None:
        """The server's process id, or None while there is none."""
        return self._child.process.pid if self._child else None

    @property
    def restarts(self) -> int:
        """Restarts after a failure, since this object was made."""
        return self._machine.restarts if self._machine else 0

    @property
    def log_tail(self) -> list[str]:
        """The server's last lines, oldest first."""
        return self._child.pump.tail() if self._child else list(self._tail)

    def subscribe(self, callback: Callable[[Change], None]) -> Callable[[], None]:
        """Call `callback` on every change of state, in the event loop; returns the way to unsubscribe."""
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    async def __aenter__(self) -> Self:
        model = await asyncio.to_thread(self._prepare)
        self._settings = settings = self._settle(model)
        self._machine = life.new_machine(settings.plan)
        self._owner = asyncio.create_task(self._own(), name=f"sidecar {self.config.name}")
        self._owner.add_done_callback(lambda _: self._changed.set())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        owner = self._owner
        if owner is None:
            return
        try:
            await self.stop()
        finally:
            owner.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await owner

    async def ensure_ready(self, timeout: float | None = None) -> SidecarClient:
        """Start the server unless it runs, and wait until it can answer; returns its client.

        Waits through restarts. Raises ModelLoadFailed, OutOfMemory, SidecarCrashed or
        SidecarUnresponsive once the supervisor gave up, SidecarStopped when it is stopped meanwhile,
        SidecarTimeout after `timeout` seconds.
        """
        if self.state is State.STOPPED:
            self._send(life.StartRequested())
            await self._until(lambda s: s is not State.STOPPED, timeout)
        elif self.state is State.STOPPING:
            self._send(life.StartRequested())
        settled = (State.READY, State.DEGRADED, State.FAILED, State.STOPPED)
        await self._until(lambda s: s in settled, timeout)
        if self.state in life.SERVING and self._child:
            return self._child.client
        if self.state is State.FAILED and self.last_error:
            raise self.last_error.copy()
        raise SidecarStopped(f"{self.config.name} was stopped")

    async def restart(self, reason: str) -> None:
        """Start anew with full settings and a fresh restart budget; returns once the old process is gone."""
        log.info("%s: restart: %s", self.config.name, reason)
        old = self.pid
        self._send(life.RestartRequested())
        await self._until(lambda s: s is not State.STOPPED and (old is None or self.pid != old), None)

    async def stop(self) -> None:
        """End the server and wait until its process is reaped; idempotent."""
        self._send(life.StopRequested())
        await self._until(lambda s: s is State.STOPPED, None)

    async def wait_closed(self) -> None:
        """Wait for the end of the owner; raises what ended it if that was a bug."""
        if self._owner:
            await asyncio.shield(self._owner)

    # ── the owner ───────────────────────────────────────────────────────────────────────────────

    def _prepare(self) -> GgufHeader:
        if self.config.model is None:
            raise ModelLoadFailed("a backend URL has no process to supervise. Give a model file.")
        header = read_header(self.config.model)
        orphan = orphans.reap(self._record)
        if orphan:
            log.warning("%s: ended the server %d that a killed node left behind", self.config.name, orphan)
        return header

    def _settle(self, model: GgufHeader) -> Settings:
        config = self.config
        return settle(
            config.mode,
            model,
            cores=psutil.cpu_count(logical=False) or os.cpu_count() or 1,
            memory=psutil.virtual_memory().total,
            context=config.context,
            slots=config.slots,
            gpu_layers=config.gpu_layers,
            threads=config.threads,
        )

    def _send(self, event: life.Event) -> None:
        if self._owner is None:
            raise SidecarStopped(f"{self.config.name}: the supervisor is not running; use `async with`")
        self._events.put_nowait(event)

    async def _until(self, reached: Callable[[State], bool], timeout: float | None) -> None:
        try:
            async with asyncio.timeout(timeout):
                while True:
                    if self._owner is None or self._owner.done():
                        if self._owner and not self._owner.cancelled() and self._owner.exception():
                            await self._owner  # a bug in the owner surfaces here
                        return
                    if self._events.empty() and reached(self.state):
                        return
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise SidecarTimeout(
                f"{self.config.name} is still {self.state.value} after {timeout} s"
            ) from None

    async def _own(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    await self._apply(await self._next_event(), group)
        finally:
            if self._child:  # cancelled, or a bug: leave no process
                self._kill_group(signal.SIGKILL)
                child, self._child = self._child, None
                await asyncio.shield(self._reap(child))

    async def _next_event(self) -> life.Event:
        assert self._machine
        due = life.deadline(self._machine, self._policy)
        try:
            async with asyncio.timeout(None if due is None else max(0.0, due - time.monotonic())):
                return await self._events.get()
        except TimeoutError:
            return life.Tick()

    async def _apply(self, event: life.Event, group: asyncio.TaskGroup) -> None:
        assert self._machine
        before = self._machine
        after, effects = life.step(before, event, time.monotonic(), self._policy)
        self._machine = after
        if after.failure is not before.failure:
            self._note_failure(after.failure)
        if after.state is not before.state:
            self._announce(after.state)
        for effect in effects:
            match effect:
                case life.Spawn():
                    self._events.put_nowait(await self._spawn(effect.plan, group))
                case life.CloseClients() if self._child:
                    hung = self.last_error if after.goal is life.Goal.RETRY else None
                    stopped = SidecarStopped(f"{self.config.name} is being stopped")
                    await self._child.client.aclose(hung or stopped)
                case life.Terminate():
                    self._kill_group(signal.SIGTERM)
                case life.Kill():
                    self._kill_group(signal.SIGKILL)
        self._changed.set()

    def _note_failure(self, failure: life.Failure | None) -> None:
        if failure is None:
            self.last_error = None
            return
        text = f"{self.config.name}: {failure.message}"
        self.last_error = _ERRORS[failure.fault](text, log_tail=self.log_tail)
        log.error("%s", text)

    def _announce(self, state: State) -> None:
        log.info("%s: %s", self.config.name, state.value)
        for callback in list(self._subscribers):
            callback(Change(state, self.last_error))

    # ── the process ─────────────────────────────────────────────────────────────────────────────

    async def _spawn(self, plan: life.Plan, group: asyncio.TaskGroup) -> life.Event:
        assert self._settings
        port, key, nonce = _free_port(), secrets.token_hex(16), secrets.token_hex(16)
        arguments = server_arguments(self.config, plan, port=port, threads=self._settings.threads)
        program = [*self.server.argv, *arguments]
        environment = {**os.environ, "LLAMA_API_KEY": key, orphans.NONCE_VARIABLE: nonce}
        if self.server.kind == "embedded":
            environment["PYTHONPATH"] = os.pathsep.join(
                filter(None, (_PACKAGE_ROOT, environment.get("PYTHONPATH")))
            )
        pump = OutputPump(RotatingFile(self.config.log_dir / f"{_file_name(self.config.name)}.log"))
        try:
            process = await asyncio.create_subprocess_exec(
                *_LAUNCHER,
                "--nice",
                str(self._settings.nice),
                "--",
                *program,
                stdin=asyncio.subprocess.PIPE,  # the parent-death pipe
                stdout=pump.write_fd,
                stderr=pump.write_fd,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            pump.abandon()
            fatal = error.errno in (errno.ENOENT, errno.EACCES, errno.ENOEXEC)
            return life.SpawnFailed(f"cannot start {self.server.argv[0]}: {error}", fatal, self._jitter())
        pump.start()
        client = SidecarClient(f"http://127.0.0.1:{port}", key)
        self.info, self.metrics = None, {}
        self._child = child = _Child(process, client, pump, _memory_kills())
        with contextlib.suppress(psutil.NoSuchProcess, OSError):  # gone already, or no place to write
            orphans.write_record(self._record, process.pid, nonce)
        prober = group.create_task(self._probe(child))
        group.create_task(self._watch(child, prober))
        return life.Spawned()

    def _kill_group(self, number: signal.Signals) -> None:
        if self._child:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.process.pid, number)

    async def _watch(self, child: _Child, prober: asyncio.Task[None]) -> None:
        """Wait for the end of the process, free what belongs to it, and report."""
        code = await child.process.wait()
        prober.cancel()
        was_ready = self.state in life.SERVING
        self._kill_group(signal.SIGKILL)  # children that the server may have left
        self._tail = await self._reap(child)
        self._child = None
        kills = _memory_kills()
        memory_kill = None if kills is None or child.memory_kills is None else kills > child.memory_kills
        verdict = judge(code, self._tail, was_ready=was_ready, memory_kill=memory_kill)
        self._events.put_nowait(life.Exited(verdict, self._jitter()))

    async def _reap(self, child: _Child) -> list[str]:
        await child.process.wait()
        if child.process.stdin:
            child.process.stdin.close()
        await child.client.aclose(BackendUnreachable("the server's process ended", started=True))
        await asyncio.to_thread(child.pump.finish, 1.0)
        orphans.remove_record(self._record)
        return child.pump.tail()

    # ── probes ──────────────────────────────────────────────────────────────────────────────────

    async def _probe(self, child: _Child) -> None:
        pause, started = self._probing.loading_first, time.monotonic()
        sampled = told = started
        while not await self._is_ours(child):
            now = time.monotonic()
            if now - sampled >= self._probing.progress:
                sampled = now
                self._events.put_nowait(life.Progressed(_progress(child)))
            if now - told >= self._probing.tell:
                told = now
                log.info("%s: loading for %.0f s; %s", self.config.name, now - started, _latest(child))
            await asyncio.sleep(pause)
            pause = min(pause * 1.2, self._probing.loading_most)
        self._events.put_nowait(life.BecameReady())
        while True:
            await asyncio.sleep(self._pause(child))
            self._events.put_nowait(await self._ask(child))

    def _pause(self, child: _Child) -> float:
        if self.state is State.DEGRADED:
            return self._probing.degraded
        return self._probing.busy if child.client.open_responses else self._probing.idle

    async def _is_ours(self, child: _Child) -> bool:
        """Ready, and our process: our key is accepted and another one is not."""
        client, timeout = child.client, self._probing.timeout
        try:
            if not await client.health(timeout=timeout):
                return False
            props = await client.props(timeout=timeout)
            async with await client.request("GET", "/props", timeout=timeout, api_key="not the key") as other:
                if other.status != 401:
                    return False
        except SidecarError:
            return False
        self.info = _info(props, self.config.name)
        return True

    async def _ask(self, child: _Child) -> life.Event:
        """One probe of a serving process."""
        client, timeout = child.client, self._probing.timeout
        in_flight = len(client.open_responses)
        try:
            self.metrics = metrics = await client.metrics(timeout=timeout)
            busy = metrics.get("requests_processing", 0) + metrics.get("requests_deferred", 0) > 0
        except SidecarError:
            # A long prompt keeps /metrics waiting; /health does not queue behind it.
            try:
                if not await client.health(timeout=timeout):
                    return life.Silent("/health does not say 200")
            except SidecarError as error:
                return life.Silent(str(error))
            metrics, busy = self.metrics, in_flight > 0
        names = ("tokens_predicted_total", "prompt_tokens_total", "n_decode_total")
        work = (*(int(metrics.get(name, 0)) for name in names), client.received)
        cpu, before = _cpu_seconds(child), child.cpu_seconds
        child.cpu_seconds = cpu
        return life.Answered(busy, work, computing=cpu - before > 0.2 * self._probing.busy)


def _info(props: Mapping[str, Any], name: str) -> Info:
    settings = props.get("default_generation_settings") or {}
    return Info(
        model=name,
        context=int(settings.get("n_ctx") or 0),
        slots=int(props.get("total_slots") or 1),
        build=str(props.get("build_info") or ""),
        chat_template=str(props.get("chat_template") or ""),
    )


def _progress(child: _Child) -> tuple[int, ...]:
    """Log bytes, CPU seconds, MiB read and MiB resident: any of them moves while a model loads."""
    try:
        process = psutil.Process(child.process.pid)
        resident = process.memory_info().rss
        read = process.io_counters().read_bytes if hasattr(process, "io_counters") else 0
    except psutil.Error:
        return (child.pump.total,)
    return child.pump.total, int(_cpu_seconds(child)), read >> 20, resident >> 20


def _cpu_seconds(child: _Child) -> float:
    try:
        times = psutil.Process(child.process.pid).cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system


def _latest(child: _Child) -> str:
    lines = child.pump.tail(1)
    return lines[0] if lines else "no output yet"


def _memory_kills() -> int | None:
    """How many processes the kernel has killed for memory since boot; None where it does not say."""
    try:
        text = Path("/proc/vmstat").read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("oom_kill "):
            return int(line.split()[1])
    return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-._" else "_" for c in name)[:80]
