"""What the node says of itself: load, health, status, and the records it announces."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Any

from mesh.identity import NodeId
from mesh.records import WorkerRecord
from node.__about__ import USER_AGENT, VERSION
from node.announcer import Describe
from node.gpu import find_reader
from node.monitor import Monitor
from node.served import ServedModel

if TYPE_CHECKING:
    from mesh.lan import Lan


class NodeState:
    """The models and the machine of one node, as others see them."""

    def __init__(self, worker_id: NodeId, network: str, addresses: tuple[str, ...]) -> None:
        self.worker_id = worker_id
        self.network = network
        self.addresses = addresses
        self.models: dict[str, ServedModel] = {}
        self.lan: Lan | None = None
        """What looks for peers on the LAN, if anything does."""
        self._monitor = Monitor()
        self._read_gpus = find_reader()
        self._started = time.monotonic()

    async def sample(self) -> None:
        """Look at the machine."""
        pids = [os.getpid(), *(pid for model in self.models.values() if (pid := model.pid) is not None)]
        gpus = await asyncio.to_thread(self._read_gpus, pids) if self._read_gpus is not None else []
        working = any(model.gate.admission.busy for model in self.models.values())
        self._monitor.update(pids, gpus, working=working)

    def load(self) -> dict[str, int]:
        """The live load that PONG and END carry, over all models."""
        gates = [model.gate.admission for model in self.models.values()]
        return {
            "slots": sum(gate.slots for gate in gates),
            "busy": sum(gate.busy for gate in gates),
            "queue": sum(gate.waiting for gate in gates),
            "health": self.health(),
        }

    def health(self) -> int:
        """The health of the best model."""
        return max((self._health(model) for model in self.models.values()), default=0)

    def status(self) -> dict[str, Any]:
        """The answer to `status`: for people and for other programs."""
        now, sample = time.monotonic(), self._monitor.sample
        return {
            "worker_id": self.worker_id.hex(),
            "version": VERSION,
            "network": self.network,
            "uptime": round(now - self._started, 1),
            "addresses": list(self.addresses),
            "mdns": "off" if self.lan is None else self.lan.problem or "on",
            "health": self.health(),
            "load": self.load(),
            "models": [model.describe(sample, now) for model in self.models.values()],
            "system": {
                "cpu": round(sample.cpu, 3),
                "foreign_cpu": round(sample.foreign_cpu, 3),
                "memory_available": round(sample.memory_available, 3),
                "gpus": [
                    {"name": gpu.name, "busy": round(gpu.busy, 3), "memory_free": gpu.memory_free}
                    for gpu in sample.gpus
                ],
            },
        }

    def describers(self) -> dict[str, Describe]:
        """For each model the function that makes its record as it is now."""
        return {name: self._describer(model) for name, model in self.models.items()}

    def _describer(self, model: ServedModel) -> Describe:
        def describe(seq: int, expires: int) -> WorkerRecord:
            return WorkerRecord(
                node_id=self.worker_id,
                seq=seq,
                expires=expires,
                addresses=self.addresses,
                model=model.name,
                digest=model.digest,
                health=self._health(model),
                slots=model.gate.admission.slots,
                context=model.context,
                generation_speed=round(model.generation_speed, 1),
                prompt_speed=round(model.prompt_speed, 1),
                flags=frozenset(),
                software=USER_AGENT,
            )

        return describe

    def _health(self, model: ServedModel) -> int:
        return model.health(self._monitor.sample, time.monotonic()).score
