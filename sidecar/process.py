"""The single owner of one llama.cpp server process.

One task performs what `sidecar.lifecycle` decides; everyone else sends it requests. Every failure has
a name (`sidecar.errors`) and carries the server's last lines.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

import psutil

from sidecar import lifecycle as life
from sidecar import orphans, states
from sidecar.changes import Change, Changes
from sidecar.child import Child, record_path
from sidecar.client import SidecarClient
from sidecar.config import SidecarConfig
from sidecar.errors import (
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
from sidecar.modes import Settings, settle
from sidecar.probe import Info, Probing, examine, introduce
from sidecar.runtime import Server
from sidecar.states import Fault, Policy, State

__all__ = ["Change", "Info", "Policy", "Probing", "State", "Supervisor"]

log = logging.getLogger("qmesh.sidecar")

_ERRORS: Mapping[Fault, type[SidecarError]] = {
    Fault.FATAL: ModelLoadFailed,
    Fault.MEMORY: OutOfMemory,
    Fault.CRASH: SidecarCrashed,
    Fault.HANG: SidecarUnresponsive,
}
_jitter = random.SystemRandom().random
_PASSING = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""Why a process could not be made although it may succeed later."""
_SETTLED = (State.READY, State.DEGRADED, State.FAILED, State.STOPPED)


class Supervisor:
    """Keeps one server running.

    `async with Supervisor(config, server) as s: client = await s.ensure_ready()`

    `state`, `pid`, `restarts` (in all), `last_error`, `log_tail`, `info` (None until ready) and
    `metrics` (the last scrape) may be read at any time. Raises ModelLoadFailed on entering when the
    model file is missing or broken, SidecarError when the log folder cannot be made.
    """

    def __init__(
        self,
        config: SidecarConfig,
        server: Server,
        *,
        policy: Policy | None = None,
        probing: Probing | None = None,
    ) -> None:
        self.config, self.server = config, server
        self.last_error: SidecarError | None = None
        self.info: Info | None = None
        self.metrics: Mapping[str, float] = {}
        self._policy, self._probing = policy or Policy(), probing or Probing()
        self._events: asyncio.Queue[states.Event] = asyncio.Queue()
        self._changes = Changes()
        self._changed = asyncio.Event()
        self._child: Child | None = None
        self._owner: asyncio.Task[None] | None = None
        self._machine: states.Machine | None = None
        self._settings: Settings | None = None
        self._model: GgufHeader | None = None
        self._tail: list[str] = []

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
    def client(self) -> SidecarClient | None:
        """The server's client while it can answer, else None."""
        child = self._child
        return child.client if child and not child.ended and self.state in states.SERVING else None

    @property
    def restarts(self) -> int:
        """Restarts after a failure, since this object was made."""
        return self._machine.restarts if self._machine else 0

    @property
    def memory(self) -> int:
        """Estimated bytes that the server takes while it runs; 0 before entering the context."""
        if not (self._model and self._machine):
            return 0
        return self._model.memory(self._machine.plan.context * self._machine.plan.slots)

    @property
    def log_tail(self) -> list[str]:
        """The server's last lines, oldest first."""
        return self._child.pump.tail() if self._child else list(self._tail)

    def subscribe(self, callback: Callable[[Change], None]) -> Callable[[], None]:
        """Call `callback` on every change of state, in the event loop; returns the way to unsubscribe."""
        return self._changes.subscribe(callback)

    async def __aenter__(self) -> Self:
        self._model = await asyncio.to_thread(self._prepare)
        self._settings = self._settle(self._model)
        self._machine = life.new_machine(self._settings.plan)
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
            if not owner.done():
                await self.stop()
        finally:
            owner.cancel()
            self._owner = None
            with contextlib.suppress(asyncio.CancelledError):
                await owner

    async def ensure_ready(self, timeout: float | None = None) -> SidecarClient:
        """Start the server unless it runs, and wait until it can answer; returns its client.

        Waits through restarts. Raises ModelLoadFailed, OutOfMemory, SidecarCrashed or
        SidecarUnresponsive once the supervisor gave up, SidecarStopped when it is stopped meanwhile,
        SidecarTimeout after `timeout` seconds.
        """
        if self.state in (State.STOPPED, State.STOPPING):
            self._send(states.StartRequested())
        await self._until(self._is_settled, timeout)
        if client := self.client:
            return client
        if self.state is State.FAILED and self.last_error:
            raise self.last_error.copy()
        raise SidecarStopped(f"{self.config.name} was stopped")

    async def restart(self, reason: str) -> None:
        """Start anew with full settings and a fresh restart budget; returns once the old process is gone."""
        log.info("%s: restart: %s", self.config.name, reason)
        old = self._child
        self._send(states.RestartRequested())
        await self._until(lambda: self._child is not old or self.state not in states.ALIVE, None)

    async def stop(self) -> None:
        """End the server and wait until its process is reaped; idempotent."""
        if self._owner:
            self._send(states.StopRequested())
            # Not until `stopped`: someone may have asked for a new start meanwhile.
            await self._until(lambda: self.state is not State.STOPPING, None)

    async def wait_closed(self) -> None:
        """Wait for the end of the owner; raises what ended it if that was a bug."""
        if owner := self._owner:
            await asyncio.wait([owner])
            if not owner.cancelled():
                owner.result()

    # ── the owner ───────────────────────────────────────────────────────────────────────────────

    def _prepare(self) -> GgufHeader:
        if self.config.model is None:
            raise ModelLoadFailed("a backend URL has no process to supervise. Give a model file.")
        header, folder = read_header(self.config.model), self.config.log_dir
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            text = f"the log folder {folder} cannot be made: {error.strerror}. Choose another."
            raise SidecarError(text) from error
        orphan = orphans.reap(record_path(self.config))
        if orphan:
            log.warning("%s: ended the server %d that a killed node left behind", self.config.name, orphan)
        return header

    def _settle(self, model: GgufHeader) -> Settings:
        return settle(
            self.config.mode,
            model,
            cores=psutil.cpu_count(logical=False) or os.cpu_count() or 1,
            memory=psutil.virtual_memory().total,
            context=self.config.context,
            slots=self.config.slots,
            gpu_layers=self.config.gpu_layers,
            threads=self.config.threads,
            embeddings=self.config.embeddings,
        )

    def _is_settled(self) -> bool:
        return self.state in _SETTLED and not (self._child and self._child.ended)

    def _send(self, event: states.Event) -> None:
        if self._owner is None:
            raise SidecarStopped(f"{self.config.name}: the supervisor is not running; use `async with`")
        self._events.put_nowait(event)

    async def _until(self, reached: Callable[[], bool], timeout: float | None) -> None:
        """Wait until all that was sent is done and `reached` holds."""
        owner = self._owner
        assert owner
        try:
            async with asyncio.timeout(timeout):
                while not owner.done():
                    if self._events.empty() and reached():
                        return
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise SidecarTimeout(
                f"{self.config.name} is still {self.state.value} after {timeout} s"
            ) from None
        if not owner.cancelled():
            owner.result()  # a bug in the owner surfaces here
        raise SidecarStopped(f"{self.config.name}: the supervisor has ended")

    async def _own(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    await self._apply(await self._next_event(), group)
        finally:
            child, self._child = self._child, None
            if child:  # cancelled, or a bug: leave no process
                child.signal_group(signal.SIGKILL)
                await asyncio.shield(child.reap())

    async def _next_event(self) -> states.Event:
        assert self._machine
        due = life.deadline(self._machine, self._policy)
        try:
            async with asyncio.timeout(None if due is None else max(0.0, due - time.monotonic())):
                return await self._events.get()
        except TimeoutError:
            return states.Tick()

    async def _apply(self, event: states.Event, group: asyncio.TaskGroup) -> None:
        assert self._machine
        before = self._machine
        self._machine, effects = life.step(before, event, time.monotonic(), self._policy)
        if self._machine.failure is not before.failure:
            self._note_failure(self._machine.failure)
        if self._machine.state is not before.state:
            self._announce(self._machine.state)
        for effect in effects:
            await self._perform(effect, group)
        self._changed.set()

    async def _perform(self, effect: states.Effect, group: asyncio.TaskGroup) -> None:
        match effect:
            case states.Spawn():
                # Reported before any other event: nobody else sees `starting`.
                await self._apply(await self._spawn(effect.plan, group), group)
            case states.CloseClients() if self._child:
                stopped = SidecarStopped(f"{self.config.name} is being stopped")
                await self._child.client.aclose(self.last_error or stopped)
            case states.Terminate() if self._child:
                self._child.signal_group(signal.SIGTERM)
            case states.Kill() if self._child:
                self._child.signal_group(signal.SIGKILL)

    def _note_failure(self, failure: states.Failure | None) -> None:
        if failure is None:
            self.last_error = None
            return
        text = f"{self.config.name}: {failure.message}"
        self.last_error = _ERRORS[failure.fault](text, log_tail=self.log_tail)
        log.error("%s", text)

    def _announce(self, state: State) -> None:
        log.info("%s: %s", self.config.name, state.value)
        self._changes.publish(Change(state, self.last_error))

    # ── the process ─────────────────────────────────────────────────────────────────────────────

    async def _spawn(self, plan: states.Plan, group: asyncio.TaskGroup) -> states.Event:
        assert self._settings
        self.info, self.metrics = None, {}
        try:
            self._child = child = await Child.spawn(self.config, self.server, plan, self._settings)
        except OSError as error:
            fatal = error.errno not in _PASSING
            return states.SpawnFailed(f"cannot start {self.server.argv[0]}: {error}", fatal, _jitter())
        prober = group.create_task(self._probe(child))
        group.create_task(self._watch(child, prober))
        return states.Spawned()

    async def _watch(self, child: Child, prober: asyncio.Task[None]) -> None:
        """Wait for the end of the process, free what belongs to it, and report."""
        await child.process.wait()
        prober.cancel()
        was_ready, self.info = self.info is not None, None
        code = await child.reap()
        self._tail, self._child = child.pump.tail(), None
        verdict = judge(
            code,
            self._tail,
            was_ready=was_ready,
            memory_kill=child.killed_for_memory(),
            port_taken=child.port_taken(),
        )
        self._events.put_nowait(states.Exited(verdict, _jitter()))

    async def _probe(self, child: Child) -> None:
        """Report progress until the server is ready, then its answers, until cancelled."""
        probing, started = self._probing, time.monotonic()
        pause, sampled, told = probing.loading_first, started, started
        while isinstance(info := await introduce(child, self.config.name, probing.timeout), str):
            now = time.monotonic()
            if now - sampled >= probing.progress:
                sampled = now
                self._events.put_nowait(states.Progressed(child.progress(), info))
            if now - told >= probing.tell:
                told = now
                last = (child.pump.tail(1) or ["no output yet"])[0]
                log.info("%s: loading for %.0f s; %s", self.config.name, now - started, last)
            await asyncio.sleep(pause)
            pause = min(pause * 1.2, probing.loading_most)
        self.info = info
        self._events.put_nowait(states.BecameReady())
        while True:
            await asyncio.sleep(self._pause(child))
            await asyncio.sleep(child.client.quiet_until - time.monotonic())
            event, self.metrics = await examine(child, self.metrics, probing)
            self._events.put_nowait(event)

    def _pause(self, child: Child) -> float:
        if self.state is State.DEGRADED:
            return self._probing.degraded
        return self._probing.busy if child.client.in_flight else self._probing.idle
