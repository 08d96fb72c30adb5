"""One model as the node serves it: its supervised server, its slots, and what was measured of it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from node.config import ModelSettings, NodeConfig
from node.digest import SIZE, model_digest
from node.gate import Gate
from node.health import Health, HealthInputs, health
from node.monitor import Sample
from sidecar.client import SidecarClient
from sidecar.config import SidecarConfig
from sidecar.errors import BackendError, SidecarError
from sidecar.lifecycle import SERVING, State
from sidecar.process import Change, Supervisor
from sidecar.runtime import Server

log = logging.getLogger("qmesh.node")

CRASH_MEMORY = 600.0
SMOOTHING = 0.2
SETTLE = 2.0
"""Seconds within which a server has ended a request that was cancelled."""
DEFAULT_SLOTS = 4


class ServedModel:
    """A model, from its file to its answers. `on_change` is called whenever it begins or ceases to
    be able to answer.
    """

    def __init__(
        self, settings: ModelSettings, node: NodeConfig, server: Server, on_change: Callable[[], None]
    ) -> None:
        self.name = settings.name
        self.path = settings.path
        self.digest = bytes(SIZE)
        self.generation_speed = 0.0
        self.prompt_speed = 0.0
        self.server = server
        self.supervisor = Supervisor(
            SidecarConfig(
                model=settings.path,
                alias=self.name,
                context=settings.context,
                slots=settings.slots or node.slots or DEFAULT_SLOTS,
                gpu_layers=settings.gpu_layers,
                extra_args=settings.extra_args,
                log_dir=node.data_dir / "logs",
            ),
            server,
        )
        self.gate = Gate(settings.slots or node.slots or DEFAULT_SLOTS)
        self._folder = node.data_dir
        self._on_change = on_change
        self._crashes: deque[float] = deque(maxlen=64)
        self._active = 0

    @property
    def ready(self) -> bool:
        """Whether it can answer now."""
        return self.supervisor.client is not None and self.supervisor.info is not None

    @property
    def failed(self) -> SidecarError | None:
        """Why it will not become ready by itself, or None while it may."""
        return self.supervisor.last_error if self.supervisor.state is State.FAILED else None

    @property
    def slots(self) -> int:
        """Requests that it answers at the same time."""
        return self.gate.admission.slots

    @property
    def context(self) -> int:
        """Tokens of context per slot; 0 while unknown."""
        return self.supervisor.info.context if self.supervisor.info else 0

    def client(self) -> SidecarClient | None:
        """The server's client while it can answer, else None."""
        return self.supervisor.client

    async def start(self) -> None:
        """Start the server and wait until it can answer.

        Raises SidecarError where it never will; OSError where the file cannot be read.
        """
        self.digest = await asyncio.to_thread(model_digest, self.path, self._folder)
        await self.supervisor.__aenter__()
        self.supervisor.subscribe(self._changed)
        await self.supervisor.ensure_ready()

    async def stop(self) -> None:
        """End the server; its process is gone afterwards. Idempotent."""
        await self.supervisor.__aexit__(None, None, None)

    def health(self, machine: Sample, now: float) -> Health:
        """How well it can answer now. `now` is on the clock of `time.monotonic()`."""
        while self._crashes and self._crashes[0] < now - CRASH_MEMORY:
            self._crashes.popleft()
        admission = self.gate.admission
        return health(
            HealthInputs(
                ready=self.ready,
                slots=admission.slots,
                busy=admission.busy,
                queue=admission.waiting,
                queue_limit=admission.queue_limit,
                foreign_cpu=machine.foreign_cpu,
                memory_available=machine.memory_available,
                recent_crashes=len(self._crashes),
            )
        )

    def measured(self, timings: Mapping[str, Any]) -> None:
        """Learn the speeds from the server's own timings of one answer."""
        self.generation_speed = _smooth(self.generation_speed, timings.get("predicted_per_second"))
        if timings.get("prompt_n", 0) >= 16:  # fewer tokens measure the overhead, not the speed
            self.prompt_speed = _smooth(self.prompt_speed, timings.get("prompt_per_second"))

    async def settled(self) -> None:
        """Wait until the server works on no more requests than the node has given it: a cancelled
        request occupies its slot a little longer. Bounded; returns early when the server is gone.
        """
        until = time.monotonic() + SETTLE
        while (client := self.client()) is not None and time.monotonic() < until:
            try:
                slots = await client.call("GET", "/slots", timeout=SETTLE)
            except (SidecarError, BackendError):
                return
            if sum(bool(slot.get("is_processing")) for slot in slots) < self.gate.admission.busy:
                return
            await asyncio.sleep(0.01)

    def describe(self, machine: Sample, now: float) -> dict[str, Any]:
        """The model's part of `status`."""
        score = self.health(machine, now)
        admission = self.gate.admission
        error = self.supervisor.last_error
        return {
            "name": self.name,
            "state": self.supervisor.state.value,
            "digest": self.digest.hex(),
            "context": self.context,
            "slots": admission.slots,
            "busy": admission.busy,
            "queue": admission.waiting,
            "health": score.score,
            "health_parts": {name: round(part, 3) for name, part in score.parts.items()},
            "generation_speed": round(self.generation_speed, 1),
            "prompt_speed": round(self.prompt_speed, 1),
            "restarts": self.supervisor.restarts,
            "pid": self.supervisor.pid,
            "error": error.message if error else None,
        }

    def _changed(self, change: Change) -> None:
        if change.state in (State.BACKING_OFF, State.FAILED):
            self._crashes.append(time.monotonic())
        if change.state in SERVING and self.supervisor.info is not None:
            self.gate.resize(self.supervisor.info.slots)
        self._on_change()


def _smooth(old: float, sample: object) -> float:
    if not isinstance(sample, int | float) or sample <= 0:
        return old
    return float(sample) if not old else old + SMOOTHING * (sample - old)
