"""Which GPU this machine has, and which builds of llama.cpp can use it, best first."""

from __future__ import annotations

import platform
import shutil
from enum import StrEnum
from pathlib import Path


class Gpu(StrEnum):
    """The maker decides which accelerator fits."""

    NVIDIA = "nvidia"
    AMD = "amd"
    OTHER = "other"
    APPLE = "apple"
    NONE = "none"


ACCELERATORS = {
    Gpu.NVIDIA: ("cuda", "vulkan", "cpu"),
    Gpu.AMD: ("hip", "vulkan", "cpu"),
    Gpu.OTHER: ("vulkan", "cpu"),
    Gpu.APPLE: ("cpu",),  # Metal is part of every macOS build
    Gpu.NONE: ("cpu",),
}


def find_gpu() -> Gpu:
    """Look at the device files and drivers; starts no program."""
    if platform.system() == "Darwin":
        return Gpu.APPLE if platform.machine() == "arm64" else Gpu.NONE
    if shutil.which("nvidia-smi") or Path("/dev/nvidiactl").exists():
        return Gpu.NVIDIA
    if Path("/dev/kfd").exists():
        return Gpu.AMD
    if any(Path("/dev/dri").glob("renderD*")):
        return Gpu.OTHER
    return Gpu.NONE
