"""Several models in one node: loaded on request, unloaded least recently used, never while in use.

A load first makes room: idle models are stopped, least recently used first; busy ones are drained, that
is, they take no new request until the load that waits for them is through, so that a busy model cannot
keep another out for ever. Whoever waits does so within a deadline of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

from sidecar.changes import Backend, Change
from sidecar.client import SidecarClient
from sidecar.config import SidecarConfig
from sidecar.errors import SidecarError, SidecarStopped, SidecarTimeout, UnknownModel
from sidecar.external import ExternalBackend
from sidecar.modes import SHARES, Mode
from sidecar.process import Supervisor
from sidecar.runtime import Server
from sidecar.states import State

log = logging.getLogger("qmesh.sidecar")


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A model of the pool. `ttl`: seconds without use after which it is unloaded, None for never."""

    config: SidecarConfig
    ttl: float | None = None
    autostart: bool = False


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One line of `ps`. `memory` in bytes (an estimate), `idle` and `expires_in` in seconds."""

    name: str
    state: State
    pid: int | None
    memory: int
    users: int
    idle: float
    expires_in: float | None
    error: SidecarError | None


class _Model:
    """An entry, its backend once it was needed, and who uses it."""

    def __init__(self, entry: ModelEntry) -> None:
        self.entry = entry
        self.backend: Backend | None = None
        self.users = 0
        self.used_at = 0.0
        self.queued = False
        self.starting = False
        self.draining = 0

    @property
    def state(self) -> State:
        return self.backend.state if self.backend else State.STOPPED

    @property
    def memory(self) -> int:
        return self.backend.memory if self.backend else 0

    @property
    def resident(self) -> bool:
        """Whether it takes memory, or is about to."""
        return self.starting or self.state not in (State.STOPPED, State.FAILED)


def memory_limit(mode: Mode, total: int) -> int:
    """How many bytes all models together may take of a machine with `total` bytes."""
    return int(total * SHARES[mode].memory)


class ModelPool:
    """The models of one node; an async context manager that leaves no process.

    `limit` is in bytes for all models together. A model that is larger than that is loaded alone.
    `on_change` is told the name of a model whose state changed, and how. `make` builds a backend for a
    configuration; it is there for tests.
    """

    def __init__(
        self,
        entries: Iterable[ModelEntry],
        server: Server | None,
        limit: int,
        *,
        on_change: Callable[[str, Change], None] | None = None,
        make: Callable[[SidecarConfig], Backend] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._models = {entry.config.name: _Model(entry) for entry in entries}
        self._server, self._limit, self._clock = server, limit, clock
        self._make = make or self._backend
        self._told = on_change
        self._loading = asyncio.Lock()
        self._changed = asyncio.Condition()
        self._keeper: asyncio.Task[None] | None = None
        self._notes: asyncio.Event = asyncio.Event()

    @property
    def names(self) -> list[str]:
        """The configured models."""
        return list(self._models)

    def backend(self, name: str) -> Backend | None:
        """A model's backend, or None while it was never needed. Raises UnknownModel."""
        return self._find(name).backend

    def ps(self) -> list[ModelStatus]:
        """What is configured and what of it is loaded."""
        return [self.status(name) for name in self._models]

    def status(self, name: str) -> ModelStatus:
        """One model's line of `ps`. Raises UnknownModel."""
        model = self._find(name)
        return ModelStatus(
            name=name,
            state=model.state,
            pid=model.backend.pid if model.backend else None,
            memory=model.memory if model.resident else 0,
            users=model.users,
            idle=0.0 if model.users or not model.resident else self._clock() - model.used_at,
            expires_in=self._expiry(model),
            error=model.backend.last_error if model.backend else None,
        )

    async def __aenter__(self) -> Self:
        self._keeper = asyncio.create_task(self._keep(), name="model pool")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        keeper, self._keeper = self._keeper, None
        await self._notify()  # whoever waits learns that the pool is closed
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._exit_backends)
            if keeper:
                keeper.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await keeper

    @asynccontextmanager
    async def use(self, name: str, timeout: float | None = None) -> AsyncIterator[SidecarClient]:
        """Have a model for a request: loads it if need be, and keeps it loaded meanwhile.

        `timeout` (seconds) bounds the wait for the model, not its use. Raises UnknownModel,
        SidecarTimeout, and what loading raises (see `Supervisor.ensure_ready`).
        """
        model = self._find(name)
        if self._keeper and self._keeper.done():
            self._keeper.result()  # a bug surfaces here
        try:
            async with asyncio.timeout(timeout):
                await self._until(lambda: not model.draining)
                model.users += 1
                try:
                    client = await self._ready(model)
                except BaseException:
                    await self._release(model)
                    raise
        except TimeoutError:
            raise SidecarTimeout(f"{name} was not ready within {timeout} s") from None
        try:
            yield client
        finally:
            await self._release(model)

    async def load(self, name: str, timeout: float | None = None) -> None:
        """Load a model now, also one that failed before. Raises as `use`."""
        model = self._find(name)
        if model.backend and model.state is State.FAILED and model.memory:
            await model.backend.stop()
        async with self.use(name, timeout):
            pass

    async def unload(self, name: str, timeout: float | None = None) -> None:
        """Wait until nobody uses a model, and stop it.

        Raises UnknownModel, SidecarTimeout, and SidecarError for a server that somebody else runs.
        """
        model = self._find(name)
        if model.entry.config.backend_url:
            raise SidecarError(f"{name} is not ours to unload: {model.entry.config.backend_url} runs it")
        try:
            async with asyncio.timeout(timeout):
                await self._evict(model)
        except TimeoutError:
            raise SidecarTimeout(f"{name} is still in use after {timeout} s") from None

    # ── loading and making room ─────────────────────────────────────────────────────────────────

    async def _ready(self, model: _Model) -> SidecarClient:
        # Whoever waits for a model counts as its user, so nobody may wait for the lock on behalf of a
        # model that is resident: the lock's holder may be waiting for that model to have no users.
        while not model.resident:
            if model.queued:
                await self._until(lambda: not model.queued)
                continue
            model.queued = True
            theirs = model.entry.config.backend_url is not None  # takes no memory, so it waits for nobody
            try:
                async with contextlib.nullcontext() if theirs else self._loading:
                    await self._start(model)
            finally:
                model.queued = False
                await self._notify()
            break
        self._check_open()
        assert model.backend
        return await model.backend.ensure_ready()

    async def _start(self, model: _Model) -> None:
        if model.backend is None:
            backend = self._make(model.entry.config)
            await backend.__aenter__()
            backend.subscribe(partial(self._on_change, model.entry.config.name))
            model.backend = backend
        self._check_open()
        await self._make_room(model)
        model.starting = True
        try:
            with contextlib.suppress(SidecarError):  # raised again where it is waited for
                await model.backend.ensure_ready()
        finally:
            model.starting = False

    async def _make_room(self, model: _Model) -> None:
        while self._taken_beside(model) + model.memory > self._limit:
            others = [m for m in self._models.values() if m is not model and m.resident and m.memory]
            if not others:
                log.warning("%s alone is over the memory limit; loading it anyway", model.entry.config.name)
                return
            await self._evict(min(others, key=lambda m: (m.users > 0, m.used_at)))

    def _taken_beside(self, model: _Model) -> int:
        return sum(m.memory for m in self._models.values() if m is not model and m.resident)

    async def _evict(self, model: _Model) -> None:
        """Stop a model once nobody uses it; meanwhile it takes no new user."""
        model.draining += 1
        try:
            await self._until(lambda: model.users == 0)
            if model.backend:
                await model.backend.stop()
        finally:
            model.draining -= 1
            await self._notify()

    async def _release(self, model: _Model) -> None:
        model.users -= 1
        model.used_at = self._clock()
        await self._notify()

    # ── waiting, expiry ─────────────────────────────────────────────────────────────────────────

    async def _keep(self) -> None:
        """Start what is to be started, then unload what nobody used for its `ttl`."""
        for name, model in self._models.items():
            if model.entry.autostart:
                try:
                    await self.load(name)
                except SidecarError as error:
                    log.warning("%s cannot be started: %s", name, error)
        while True:
            for name, model in self._models.items():
                if (left := self._expiry(model)) is not None and left <= 0:
                    log.info("%s: unloaded after its ttl", name)
                    await self._evict(model)
            waits = [left for model in self._models.values() if (left := self._expiry(model)) is not None]
            self._notes.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, min(waits)) if waits else None):
                    await self._notes.wait()

    def _expiry(self, model: _Model) -> float | None:
        """Seconds until a model's ttl is over, or None while that cannot come."""
        ttl = model.entry.ttl
        if ttl is None or model.users or model.starting or not (model.resident and model.memory):
            return None
        return model.used_at + ttl - self._clock()

    def _on_change(self, name: str, change: Change) -> None:
        self._notes.set()
        if self._told is not None:
            self._told(name, change)

    async def _notify(self) -> None:
        self._notes.set()
        async with self._changed:
            self._changed.notify_all()

    async def _until(self, reached: Callable[[], bool]) -> None:
        """Wait for a condition; raises SidecarStopped once the pool is closed."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._keeper is None or reached())
        self._check_open()

    def _check_open(self) -> None:
        if self._keeper is None:
            raise SidecarStopped("the pool is closed")

    async def _exit_backends(self) -> None:
        """Stop all at once, so that the slowest decides how long it takes; then let go of them."""
        await asyncio.gather(*(m.backend.stop() for m in self._models.values() if m.backend))
        async with self._loading, contextlib.AsyncExitStack() as stack:  # no load is under way any more
            for model in self._models.values():
                if model.backend:
                    stack.push_async_exit(model.backend)

    def _find(self, name: str) -> _Model:
        try:
            return self._models[name]
        except KeyError:
            known = ", ".join(self._models) or "none"
            raise UnknownModel(f"no model named {name!r} is configured (configured: {known})") from None

    def _backend(self, config: SidecarConfig) -> Backend:
        if config.backend_url:
            return ExternalBackend(config)
        if self._server is None:
            raise ValueError("a pool with model files needs a server")
        return Supervisor(config, self._server)
