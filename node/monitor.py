"""The machine under the node: load and memory, sampled now and then (psutil)."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import psutil

from node.gpu import Gpu

INTERVAL = 5.0
"""Seconds between samples."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Fractions of the whole machine, between 0 and 1."""

    cpu: float = 0.0
    foreign_cpu: float = 0.0
    """The part of `cpu` that other programs use."""
    memory_available: float = 1.0
    foreign_gpu: float = 0.0
    """How busy other programs keep the GPU; of several, the least busy one."""
    gpus: tuple[Gpu, ...] = ()


class Monitor:
    """Samples the machine. Each sample covers the time since the one before."""

    def __init__(self) -> None:
        self.sample = Sample()
        self._processes: dict[int, psutil.Process] = {}
        psutil.cpu_percent(None)

    def update(self, own: Collection[int], gpus: Sequence[Gpu] = (), *, working: bool = False) -> Sample:
        """Take a sample; `own` are the ids of the node's processes, `gpus` was read just now. Where a GPU
        does not tell whose work it does, it is taken for the node's own while that is `working`.
        """
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
            foreign_gpu=min((_foreign(gpu, working=working) for gpu in gpus), default=0.0),
            gpus=tuple(gpus),
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


def _foreign(gpu: Gpu, *, working: bool) -> float:
    if gpu.foreign is not None:
        return gpu.foreign
    return 0.0 if working else gpu.busy


def machine() -> str:
    """The hardware in a few words."""
    memory = psutil.virtual_memory().total / (1 << 30)
    return f"{platform.system()} {platform.machine()}, {psutil.cpu_count() or 1} cores, {memory:.0f} GiB of memory"
