"""No orphan, ever: the launcher, the parent-death pipe, and reaping after a killed node."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sidecar import orphans
from tests.sidecar_support import ROOT, alive, until
from tests.support import seconds

LAUNCH = [sys.executable, "-I", "-S", str(ROOT / "sidecar" / "launch.py")]
SLEEP = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"]

PARENT = """
import subprocess, sys, time
child = subprocess.Popen({command!r}, stdin=subprocess.PIPE, start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def parent_of(request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process that started a program through the launcher, and the launcher's pid."""
    source = PARENT.format(command=[*LAUNCH, *request.param, "--", *SLEEP])
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", source], stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        yield parent, pid
        parent.kill()
        if alive(pid):
            os.killpg(pid, signal.SIGKILL)


@pytest.mark.parametrize("parent_of", [[], ["--guard"]], indirect=True, ids=["kernel", "pipe"])
async def test_the_program_dies_with_its_killed_parent(
    parent_of: tuple[subprocess.Popen[bytes], int],
) -> None:
    parent, pid = parent_of
    await until(lambda: running(pid))
    family = {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
    parent.kill()
    start = time.monotonic()
    await until(lambda: not any(map(alive, family)))
    assert time.monotonic() - start < seconds(2)


def running(pid: int) -> bool:
    """Whether the sleeping program itself runs: in place of the launcher, or as its child."""
    process = psutil.Process(pid)
    return any("time.sleep" in " ".join(p.cmdline()) for p in [process, *process.children()])


def test_a_parent_that_is_gone_already_starts_nothing() -> None:
    done = subprocess.run([*LAUNCH, "--", *SLEEP], stdin=subprocess.DEVNULL, timeout=seconds(10), check=False)
    assert done.returncode == 1


@pytest.mark.parametrize(("program", "code"), [("/nonexistent/x", 127), ("/etc/passwd", 126)])
def test_a_program_that_cannot_run_says_so(program: str, code: int) -> None:
    with subprocess.Popen([*LAUNCH, "--", program], stdin=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.wait(seconds(10)) == code
        assert child.stderr
        assert program in child.stderr.read().decode()


@pytest.mark.parametrize("guard", [[], ["--guard"]], ids=["kernel", "pipe"])
@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("raise SystemExit(7)", 7),
        ("import os; os.kill(os.getpid(), 11)", -11),
        ("import time; time.sleep(9)", -15),
    ],
)
def test_the_exit_status_is_the_programs(guard: list[str], source: str, status: int) -> None:
    program = [sys.executable, "-I", "-S", "-c", "print('up', flush=True); " + source]
    with subprocess.Popen(
        [*LAUNCH, "--nice", "3", *guard, "--", *program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout
        assert child.stdout.readline() == b"up\n"
        if status == -15:
            assert os.getpriority(os.PRIO_PROCESS, child.pid) == 3
            child.terminate()
        assert child.wait(seconds(10)) == status


# ── reaping at start ────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def orphan() -> Iterator[subprocess.Popen[bytes]]:
    """A process that looks like our server, in a session of its own."""
    environment = {**os.environ, orphans.NONCE_VARIABLE: "right"}
    program = [*SLEEP[:-1], "print('up', flush=True); " + SLEEP[-1]]
    pipe = subprocess.PIPE
    with subprocess.Popen(program, env=environment, start_new_session=True, stdout=pipe) as process:
        assert process.stdout
        process.stdout.readline()  # before, the kernel may show an empty environment
        yield process
        process.kill()


def record(path: Path, pid: int, **changes: object) -> None:
    orphans.write_record(path, pid, "right")
    fields = json.loads(path.read_text()) | {"node": 2**22 + 1} | changes  # no such process
    path.write_text(json.dumps(fields))


def test_our_orphan_is_ended(tmp_path: Path, orphan: subprocess.Popen[bytes]) -> None:
    path = tmp_path / "x.pid.json"
    record(path, orphan.pid)
    assert orphans.reap(path, timeout=0.2) == orphan.pid
    assert not alive(orphan.pid)
    assert not path.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"started": 1.0},
        {"nonce": "wrong"},
        {"node": os.getpid(), "node_started": psutil.Process().create_time()},
    ],
    ids=["reused pid", "foreign nonce", "its node lives"],
)
def test_what_is_not_our_orphan_is_left_alone(
    tmp_path: Path, orphan: subprocess.Popen[bytes], changes: dict[str, object]
) -> None:
    path = tmp_path / "x.pid.json"
    record(path, orphan.pid, **changes)
    assert orphans.reap(path, timeout=0.2) is None
    assert orphan.poll() is None


@pytest.mark.parametrize("text", ["", "{", "{}", '{"pid": "x"}', "[]"])
def test_a_broken_record_is_forgotten(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.pid.json"
    path.write_text(text)
    assert orphans.reap(path) is None
    assert not path.exists()
