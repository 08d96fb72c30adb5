"""GPUs as drivers describe them: NVML, the files of amdgpu, the words of ioreg."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from node.gpu import Gpu, Nvidia, amd_cards, parse_apple, read_amd
from node.monitor import Monitor


class NVMLError(Exception):
    pass


class FakeNvml:
    """As `pynvml`: one GPU that is 90 % busy, 30 % of it with process 7; a second one that fails."""

    NVMLError = NVMLError

    def __init__(self, *, tells_processes: bool) -> None:
        self.tells_processes = tells_processes
        self.since: list[int] = []

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802 - NVML's name
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if index:
            raise NVMLError
        return index

    def nvmlDeviceGetName(self, handle: int) -> bytes:  # noqa: N802
        return b"GPU"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(total=100, free=25)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(gpu=90)

    def nvmlDeviceGetProcessUtilization(self, handle: int, since: int) -> list[Any]:  # noqa: N802
        if not self.tells_processes:
            raise NVMLError
        self.since.append(since)
        return [
            SimpleNamespace(pid=7, smUtil=30, timeStamp=1000),
            SimpleNamespace(pid=7, smUtil=20, timeStamp=900),
            SimpleNamespace(pid=8, smUtil=60, timeStamp=1000),
        ]


def test_nvidia_tells_own_work_from_that_of_others() -> None:
    nvml = FakeNvml(tells_processes=True)
    read = Nvidia(nvml)
    (gpu,) = read({7})
    assert (gpu.name, gpu.busy, gpu.memory_free) == ("GPU", 0.9, 0.25)
    assert gpu.foreign == pytest.approx(0.6)
    assert read(set())[0].foreign == pytest.approx(0.9)
    assert nvml.since == [0, 1000], "each reading goes on where the last one ended"


def test_nvidia_without_processes_does_not_know_whose_work_it_is() -> None:
    (gpu,) = Nvidia(FakeNvml(tells_processes=False))({7})
    assert gpu.foreign is None


def test_amd_from_the_files_of_its_driver(tmp_path: Path) -> None:
    device = tmp_path / "card0" / "device"
    device.mkdir(parents=True)
    (tmp_path / "card1" / "device").mkdir(parents=True)  # another driver's
    for name, value in (("gpu_busy_percent", 40), ("mem_info_vram_total", 200), ("mem_info_vram_used", 50)):
        (device / name).write_text(f"{value}\n")
    assert amd_cards(tmp_path) == [device]
    assert read_amd(tmp_path) == [Gpu("card0", 0.4, None, 0.75)]
    (device / "gpu_busy_percent").write_text("none\n")
    assert read_amd(tmp_path) == []


def test_apple_from_what_ioreg_prints() -> None:
    text = '"PerformanceStatistics" = {"Tiler Utilization %"=2,"Device Utilization %"=37,"Alloc"=9}'
    assert parse_apple(text) == [Gpu("Apple", 0.37, None, None)]
    assert parse_apple("") == []


def test_work_of_unknown_origin_is_the_nodes_own_while_it_works() -> None:
    monitor, gpu = Monitor(), Gpu("x", 0.8, None, None)
    assert monitor.update([], [gpu], working=True).foreign_gpu == 0
    assert monitor.update([], [gpu], working=False).foreign_gpu == 0.8
    assert monitor.update([], [gpu, Gpu("y", 1.0, 0.1, None)], working=False).foreign_gpu == 0.1
    assert monitor.update([], [], working=False).foreign_gpu == 0
