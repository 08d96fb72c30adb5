"""What an idle node costs, against the goals: memory, processor time, and how soon it listens.

    python -m benchmarks.idle [--seconds 60] [--lan]

Starts `qmesh-node run` as a user does, in an empty home, and leaves it alone. Its llama.cpp is a process
of its own and not counted. With `--lan` it listens on every interface and looks for peers by mDNS; without
it stays on the loopback. Exits 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

MEMORY_GOAL = 80.0
"""MB resident."""
CPU_GOAL = 0.5
"""Per cent of a core."""
LISTEN_GOAL = 1.0
"""Seconds from the start of the process."""
HELP_GOAL = 0.4
"""Seconds for `qmesh-node --help`."""
REPEATS = 5
SETTLE = 5.0
"""Seconds after "ready" that still belong to the start."""
PROGRAM = str(Path(sys.executable).with_name("qmesh-node"))


@dataclass(frozen=True)
class Figure:
    """One measurement and its goal."""

    name: str
    value: float
    goal: float
    unit: str

    @property
    def met(self) -> bool:
        """Whether it is within the goal."""
        return self.value <= self.goal


def free_port() -> int:
    """A port that is free for TCP and UDP now."""
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        port = int(tcp.getsockname()[1])
        udp.bind(("127.0.0.1", port))
        return port


@contextmanager
def node(home: Path, port: int, *, lan: bool) -> Iterator[subprocess.Popen[str]]:
    """A node of a user with an empty home."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("QMESH_")}
    environ |= {"HOME": str(home), "XDG_DATA_HOME": str(home)}
    where = ["--listen", f"0.0.0.0:{port}"] if lan else ["--listen", f"127.0.0.1:{port}", "--no-mdns"]
    with subprocess.Popen(
        [PROGRAM, "run", "--quiet", *where, "--gateway", "127.0.0.1:0"],
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def until_listening(port: int) -> None:
    """Wait until somebody accepts connections there."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.005)
    raise TimeoutError(f"nobody listens on port {port}")


def start_up() -> float:
    """Seconds from the start of a node to its first accepted connection; the median."""
    took = []
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory() as home:
            port = free_port()
            began = time.monotonic()
            with node(Path(home), port, lan=False):
                until_listening(port)
                took.append(time.monotonic() - began)
    return sorted(took)[REPEATS // 2]


def show_help() -> float:
    """Seconds for `--help`; the median."""
    took = []
    for _ in range(REPEATS):
        began = time.monotonic()
        subprocess.run([PROGRAM, "--help"], check=True, stdout=subprocess.DEVNULL, timeout=30)
        took.append(time.monotonic() - began)
    return sorted(took)[REPEATS // 2]


def rest(seconds: float, *, lan: bool) -> tuple[float, float]:
    """(MB resident, per cent of a core) of a node that has nothing to do for so long."""
    with tempfile.TemporaryDirectory() as home, node(Path(home), free_port(), lan=lan) as process:
        assert process.stdout is not None
        if not any(line.startswith("ready") for line in process.stdout):
            raise RuntimeError("the node did not start")
        time.sleep(SETTLE)
        watched = psutil.Process(process.pid)
        before, began = watched.cpu_times(), time.monotonic()
        time.sleep(seconds)
        after, took = watched.cpu_times(), time.monotonic() - began
        used = after.user + after.system - before.user - before.system
        return watched.memory_info().rss / 1e6, 100 * used / took


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--lan", action="store_true")
    arguments = parser.parse_args()
    memory, cpu = rest(arguments.seconds, lan=arguments.lan)
    figures = [
        Figure("resident memory", memory, MEMORY_GOAL, "MB"),
        Figure(f"processor over {arguments.seconds:g} s", cpu, CPU_GOAL, "% of a core"),
        Figure("start to listening", start_up(), LISTEN_GOAL, "s"),
        Figure("qmesh-node --help", show_help(), HELP_GOAL, "s"),
    ]
    print(f"{'':24}{'measured':>10}{'goal':>8}")
    for one in figures:
        print(f"{one.name:24}{one.value:10.2f}{one.goal:8g}  {one.unit}{'' if one.met else '  MISSED'}")
    return not all(one.met for one in figures)


if __name__ == "__main__":
    sys.exit(main())
