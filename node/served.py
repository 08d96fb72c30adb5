"""One model as the node serves it: its supervised server, its slots, and what was measured of it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

from node.config import ModelSettings, NodeConfig
from node.digest import SIZE, model_digest
from node.gate import Gate
from node.health import Health, HealthInputs, health
from node.monitor import Sample
from sidecar.changes import Backend, Change
from sidecar.client import SidecarClient
from sidecar.errors import SidecarError
from sidecar.modes import SHARES
from sidecar.pool import ModelPool
from sidecar.states import State

log = logging.getLogger("qmesh.node")

CRASH_MEMORY = 600.0
SMOOTHING = 0.2
SETTLE_POLL = 0.01
QUIET = 1.2
"""Seconds of silence after which a server has noticed that nobody waits for a whole answer any more: llama.cpp
looks at its connections when no result came, of whichever request, for a second (`HTTP_POLLING_SECONDS`). To ask
for `/slots` a moment too early costs another one."""
SETTLE = 30.0
"""Seconds after which a slot is given away although the server still works on a cancelled request."""


class ServedModel:
    """A model, from its file or URL to its answers, within the node's pool of models."""

    def __init__(self, settings: ModelSettings, name: str, node: NodeConfig, pool: ModelPool) -> None:
        self.name = name
        self.settings = settings
        self.digest = bytes(SIZE)
        self.generation_speed = 0.0
        self.prompt_speed = 0.0
        self.gate = Gate(settings.slots or node.slots or SHARES[node.mode].slots)
        self._on_demand = not settings.autostart
        """Whether a request may load it: not before its first load by autostart."""
        self._pool = pool
        self._folder = node.data_dir
        self._crashes: deque[float] = deque(maxlen=64)
        self._processing = 0
        """Slots at work when the server was last looked at."""
        self._looked = 0.0
        self._quiet = asyncio.Lock()

    @property
    def backend(self) -> Backend | None:
        """Its server, None while it was never needed."""
        return self._pool.backend(self.name)

    @property
    def state(self) -> State:
        """The state of its server."""
        return self.backend.state if self.backend else State.STOPPED

    @property
    def loaded(self) -> bool:
        """Whether it can answer now."""
        return self.backend is not None and self.backend.client is not None

    @property
    def ready(self) -> bool:
        """Whether a request would be answered: it is loaded, or can be loaded for it."""
        return self.loaded or (self.state is State.STOPPED and self._on_demand)

    @property
    def failed(self) -> bool:
        """Whether it will not become ready by itself."""
        return self.state is State.FAILED

    @property
    def recovering(self) -> bool:
        """Whether its server broke and is being started again."""
        return not self.loaded and self.backend is not None and self.backend.last_error is not None

    @property
    def context(self) -> int:
        """Tokens of context per slot; 0 while unknown."""
        return self.backend.info.context if self.backend and self.backend.info else 0

    @property
    def pid(self) -> int | None:
        """The process of its server."""
        return self.backend.pid if self.backend else None

    async def load(self, timeout: float | None = None) -> None:
        """Load it. Raises SidecarError where it cannot be, OSError where the file cannot be read."""
        await self.identify()
        await self._pool.load(self.name, timeout)
        self._on_demand = True

    async def unload(self, timeout: float | None = None) -> None:
        """Unload it once nobody uses it. Raises SidecarError."""
        await self._pool.unload(self.name, timeout)

    async def identify(self) -> None:
        """Learn the digest of its file. Raises OSError."""
        if self.settings.path is not None:
            self.digest = await asyncio.to_thread(model_digest, self.settings.path, self._folder)

    def use(self, timeout: float | None) -> AbstractAsyncContextManager[SidecarClient]:
        """Have its server for a request; loads it if need be. Raises SidecarError."""
        return self._pool.use(self.name, timeout)

    def changed(self, change: Change) -> None:
        """Its server's state changed."""
        if change.state in (State.BACKING_OFF, State.FAILED):
            self._crashes.append(time.monotonic())
        if self.backend is not None and self.backend.info is not None:
            self.gate.resize(self.backend.info.slots)

    def health(self, machine: Sample, now: float) -> Health:
        """How well it can answer now. `now` is on the clock of `time.monotonic()`."""
        while self._crashes and self._crashes[0] < now - CRASH_MEMORY:
            self._crashes.popleft()
        admission = self.gate.admission
        return health(
            HealthInputs(
                ready=self.ready,
                loaded=self.loaded,
                slots=admission.slots,
                busy=admission.busy,
                queue=admission.waiting,
                queue_limit=admission.queue_limit,
                foreign_cpu=machine.foreign_cpu,
                foreign_gpu=0.0 if self.settings.gpu_layers == 0 else machine.foreign_gpu,
                memory_available=machine.memory_available,
                recent_crashes=len(self._crashes),
            )
        )

    def measured(self, timings: Mapping[str, Any]) -> None:
        """Learn the speeds from the server's own timings of one answer."""
        self.generation_speed = _smooth(self.generation_speed, timings.get("predicted_per_second"))
        prompt = timings.get("prompt_n")
        if isinstance(prompt, int) and prompt >= 16:  # fewer tokens measure the overhead, not the speed
            self.prompt_speed = _smooth(self.prompt_speed, timings.get("prompt_per_second"))

    async def settled(self, *, streaming: bool) -> None:
        """Wait until the server works on no more requests than the node has given it: a cancelled
        request occupies its slot a little longer. Bounded; returns early when the server is gone, and
        where it does not tell (a server of somebody else).
        """
        since = time.monotonic()
        until = since + SETTLE
        while self.backend and (client := self.backend.client) and time.monotonic() < until:
            try:
                if streaming:
                    await asyncio.sleep(SETTLE_POLL)
                    await self._look(client)
                else:
                    client.quiet_until = max(client.quiet_until, since + QUIET)
                    since = await self._look_quietly(client, since)
            except SidecarError:
                return
            if self._processing < self.gate.admission.busy:
                return

    async def _look(self, client: SidecarClient) -> None:
        slots = await client.call("GET", "/slots", timeout=SETTLE)
        self._processing = sum(bool(slot.get("is_processing")) for slot in slots)
        self._looked = time.monotonic()

    async def _look_quietly(self, client: SidecarClient, since: float) -> float:
        """Look once QUIET has passed since then, and since anybody looked: the server notices the end of a
        connection on which it has sent nothing only when nothing happens for a second, and being looked at
        is something. One look serves all who wait; returns when it was.
        """
        due = since + QUIET
        async with self._quiet:
            while self._looked < due and (wait := max(since, self._looked) + QUIET - time.monotonic()) > 0:  # noqa: ASYNC110 - the server tells nobody
                await asyncio.sleep(wait)
            if self._looked < due:
                await self._look(client)
        return self._looked

    def describe(self, machine: Sample, now: float) -> dict[str, Any]:
        """The model's part of `status`."""
        score = self.health(machine, now)
        admission = self.gate.admission
        error = self.backend.last_error if self.backend else None
        return {
            "name": self.name,
            "state": self.state.value,
            "digest": self.digest.hex(),
            "context": self.context,
            "slots": admission.slots,
            "busy": admission.busy,
            "queue": admission.waiting,
            "health": score.score,
            "health_parts": {name: round(part, 3) for name, part in score.parts.items()},
            "generation_speed": round(self.generation_speed, 1),
            "prompt_speed": round(self.prompt_speed, 1),
            "restarts": self.backend.restarts if self.backend else 0,
            "memory": self._pool.status(self.name).memory,
            "expires_in": self._pool.status(self.name).expires_in,
            "error": error.message if error else None,
        }


def _smooth(old: float, sample: object) -> float:
    if not isinstance(sample, int | float) or sample <= 0:
        return old
    return float(sample) if not old else old + SMOOTHING * (sample - old)
