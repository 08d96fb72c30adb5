"""The machine under the node: load and memory, sampled now and then (psutil)."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Collection
from dataclasses import dataclass

import psutil

INTERVAL = 5.0
"""Seconds between samples."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Fractions of the whole machine, between 0 and 1."""

    cpu: float = 0.0
    foreign_cpu: float = 0.0
    """The part of `cpu` that other programs use."""
    memory_available: float = 1.0


class Monitor:
    """Samples the machine. Each sample covers the time since the one before."""

    def __init__(self) -> None:
        self.sample = Sample()
        self._processes: dict[int, psutil.Process] = {}
        psutil.cpu_percent(None)

    def update(self, own: Collection[int]) -> Sample:
        """Take a sample; `own` are the ids of the node's processes."""
        cores = psutil.cpu_count() or 1
        cpu = psutil.cpu_percent(None) / 100
        ours = sum(self._cpu(pid) for pid in own) / (100 * cores)
        for pid in set(self._processes) - set(own):
            del self._processes[pid]
        memory = psutil.virtual_memory()
        self.sample = Sample(
            cpu=min(1.0, cpu),
            foreign_cpu=min(1.0, max(0.0, cpu - ours)),
            memory_available=memory.available / memory.total,
        )
        return self.sample

    def _cpu(self, pid: int) -> float:
        with contextlib.suppress(psutil.Error):
            process = self._processes.get(pid)
            if process is None:
                process = self._processes[pid] = psutil.Process(pid)
            return process.cpu_percent(None)
        self._processes.pop(pid, None)
        return 0.0


def machine() -> str:
    """The hardware in a few words."""
    memory = psutil.virtual_memory().total / (1 << 30)
    return f"{platform.system()} {platform.machine()}, {psutil.cpu_count() or 1} cores, {memory:.0f} GiB of memory"
