"""The output pump: nothing blocks the writer, disk and memory stay bounded."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from sidecar.output import OutputPump, RotatingFile
from tests.support import seconds


def written(tmp_path: Path, chunks: list[bytes], **limits: int) -> tuple[OutputPump, Path]:
    path = tmp_path / "logs" / "server.log"
    pump = OutputPump(RotatingFile(path, **limits))
    writer = os.dup(pump.write_fd)
    pump.start()
    for chunk in chunks:
        os.write(writer, chunk)
    os.close(writer)
    pump.finish(seconds(5))
    return pump, path


def test_lines_reach_the_file_and_the_tail(tmp_path: Path) -> None:
    pump, path = written(tmp_path, [b"one\ntw", b"o\n\nthree \xff\n"])
    assert path.read_bytes() == b"one\ntwo\n\nthree \xff\n"
    assert pump.tail() == ["one", "two", "three �"]
    assert pump.tail(1) == ["three �"]
    assert pump.total == len(path.read_bytes())
    assert path.stat().st_mode & 0o077 == 0  # logs are the owner's


def test_rotation_bounds_the_disk_and_keeps_the_newest(tmp_path: Path) -> None:
    lines = [b"%06d\n" % i * 100 for i in range(1000)]
    pump, path = written(tmp_path, lines, file_bytes=100_000, files=5)
    files = sorted(path.parent.iterdir())
    assert len(files) == 5
    assert all(file.stat().st_size <= 100_000 for file in files)
    assert path.read_bytes().endswith(b"000999\n")
    assert pump.tail()[-1] == "000999"
    assert pump.total == 700_000


def test_a_restarted_server_appends(tmp_path: Path) -> None:
    written(tmp_path, [b"first\n"])
    _, path = written(tmp_path, [b"second\n"])
    assert path.read_bytes() == b"first\nsecond\n"


def test_a_full_disk_does_not_stop_the_draining(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: RotatingFile, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RotatingFile, "write", full)
    pump, _ = written(tmp_path, [b"x" * 60_000 + b"\n"] * 20)  # far more than a pipe holds
    assert pump.total == 20 * 60_001


def test_finish_does_not_wait_for_a_writer_that_stays(tmp_path: Path) -> None:
    pump = OutputPump(RotatingFile(tmp_path / "server.log"))
    keeper = os.dup(pump.write_fd)
    pump.start()
    pump.finish(0.05)
    os.close(keeper)
    assert not any(thread.name == "sidecar-output" for thread in threading.enumerate())


def test_no_file_descriptor_stays_open(tmp_path: Path) -> None:
    def count() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    before = count()
    for _ in range(3):
        written(tmp_path, [b"x\n"])
    pump = OutputPump(RotatingFile(tmp_path / "server.log"))
    pump.abandon()
    assert count() == before
