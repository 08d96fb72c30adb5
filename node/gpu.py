"""The machine's GPUs, as far as they can be read without further rights.

NVIDIA through NVML (the optional package `nvidia-ml-py`), AMD through the files of its Linux driver
(https://docs.kernel.org/gpu/amdgpu/thermal.html), Apple through `ioreg`. Reading may block for some
milliseconds: do it in a thread.
"""

from __future__ import annotations

import contextlib
import importlib
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DRM = Path("/sys/class/drm")
IOREG = ("ioreg", "-r", "-d", "1", "-w", "0", "-c", "IOAccelerator")
IOREG_PATIENCE = 2.0
_APPLE_BUSY = re.compile(r'"Device Utilization %"\s*=\s*(\d+)')


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. Fractions are between 0 and 1."""

    name: str
    busy: float
    """How busy it is, with whosever work."""
    foreign: float | None
    """How busy other programs keep it; None where the driver does not tell whose work it is."""
    memory_free: float | None
    """None where its memory is the machine's."""


Reader = Callable[[Collection[int]], list[Gpu]]
"""Process ids of the node → its GPUs now."""


def find_reader() -> Reader | None:
    """The way to read this machine's GPUs; None where there are none, or none that can be read."""
    with contextlib.suppress(ImportError):
        nvml = importlib.import_module("pynvml")
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlInit()
            return Nvidia(nvml)
    if amd_cards(DRM):
        return lambda _: read_amd(DRM)
    if platform.system() == "Darwin" and shutil.which(IOREG[0]):
        return lambda _: read_apple()
    return None


class Nvidia:
    """Reads NVIDIA GPUs through an initialised `pynvml`."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._seen: dict[int, int] = {}
        """Per GPU the time stamp up to which the shares of processes were read."""

    def __call__(self, own: Collection[int]) -> list[Gpu]:
        """Every GPU that can be read now."""
        gpus = []
        for index in range(self._nvml.nvmlDeviceGetCount()):
            with contextlib.suppress(self._nvml.NVMLError):
                gpus.append(self._read(index, own))
        return gpus

    def _read(self, index: int, own: Collection[int]) -> Gpu:
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        busy = nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        name = nvml.nvmlDeviceGetName(handle)
        return Gpu(
            name.decode() if isinstance(name, bytes) else str(name),
            busy,
            self._foreign(index, handle, busy, own),
            memory.free / memory.total if memory.total else None,
        )

    def _foreign(self, index: int, handle: Any, busy: float, own: Collection[int]) -> float | None:
        """What is left of `busy` without this node's share; None where processes are not told apart."""
        try:
            samples = self._nvml.nvmlDeviceGetProcessUtilization(handle, self._seen.get(index, 0))
        except self._nvml.NVMLError:
            return None
        self._seen[index] = max((sample.timeStamp for sample in samples), default=self._seen.get(index, 0))
        ours: dict[int, float] = {}
        for sample in samples:
            if sample.pid in own:
                ours[sample.pid] = max(ours.get(sample.pid, 0.0), sample.smUtil / 100)
        return min(1.0, max(0.0, busy - sum(ours.values())))


def amd_cards(drm: Path) -> list[Path]:
    """The device folders of cards whose driver tells how busy they are."""
    return sorted(path.parent for path in drm.glob("card[0-9]*/device/gpu_busy_percent"))


def read_amd(drm: Path) -> list[Gpu]:
    """AMD's cards."""
    gpus = []
    for device in amd_cards(drm):
        with contextlib.suppress(OSError, ValueError):
            total = _number(device / "mem_info_vram_total")
            free = 1 - _number(device / "mem_info_vram_used") / total if total else None
            gpus.append(Gpu(device.parent.name, _number(device / "gpu_busy_percent") / 100, None, free))
    return gpus


def read_apple() -> list[Gpu]:
    """Apple's GPU; its memory is the machine's."""
    try:
        answer = subprocess.run(  # noqa: S603 - a program of the system
            IOREG, capture_output=True, text=True, timeout=IOREG_PATIENCE, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_apple(answer.stdout)


def parse_apple(text: str) -> list[Gpu]:
    """The GPUs in what `ioreg` prints."""
    return [Gpu("Apple", min(1.0, int(busy) / 100), None, None) for busy in _APPLE_BUSY.findall(text)]


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))
