"""Real nodes on the lab's machines, and what they know."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Self, TypeVar

import pytest

from mesh.errors import NoWorkers
from mesh.network import Network
from node.cli.entry import ask_local, mesh_client, settings
from node.config import DEMO_MODEL
from node.membership import Membership, keep
from tests.netns.lab import Namespace
from tests.support import seconds

_PYTHON = (sys.executable, "-P")
_DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")
_FAKETIME = [*Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")]
START, COMMAND, CONVERGE = 30.0, 30.0, 30.0
_LOOK_AGAIN = 0.3

T = TypeVar("T")


class Node:
    """One `qmesh-node` with its data folder on one machine. Its model is loaded when somebody asks it."""

    def __init__(self, machine: Namespace, folder: Path, network: Network | None = None) -> None:
        self.machine = machine
        self.folder = folder
        self.id = ""
        self._process: asyncio.subprocess.Process | None = None
        folder.mkdir(parents=True)
        name = folder.name
        model = f'[[models]]\npath = "{DEMO_MODEL}"\nalias = "{name}"\nautostart = false\nslots = 1\n'
        (folder / "qmesh.toml").write_text(model)
        if network is not None:
            keep(folder, Membership(network))

    async def start(
        self, *arguments: str, clock: str | None = None, program: tuple[str, ...] = ("-m", "node")
    ) -> Self:
        """Run it until it is ready; `clock` (`+3600s`) sets its clock wrong, by libfaketime."""
        environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
        if clock is not None:
            environment |= self._faketime(clock)
        with (self.folder / "stderr").open("ab") as stderr:
            self._process = await asyncio.create_subprocess_exec(
                *_DIES_WITH_US, "ip", "netns", "exec", self.machine.name, *_PYTHON, *program, "run", "--json",
                "--no-gateway", "--data-dir", str(self.folder), *arguments,
                stdout=-1, stderr=stderr, env=environment,
            )  # fmt: skip
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(seconds(START)):
                event = {"event": ""}
                while event["event"] != "ready":
                    event = json.loads(await self._process.stdout.readline())
        except (TimeoutError, ValueError):
            pytest.fail(f"{self.folder.name} did not start: {(self.folder / 'stderr').read_text()[-2000:]}")
        self.id = event["worker_id"]
        return self

    @staticmethod
    def _faketime(clock: str) -> dict[str, str]:
        if not _FAKETIME:
            pytest.fail("libfaketime is missing: install the Debian package faketime")
        return {"LD_PRELOAD": str(_FAKETIME[0]), "FAKETIME": clock, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}

    def send(self, number: signal.Signals) -> None:
        """A signal to the process."""
        assert self._process is not None
        self._process.send_signal(number)

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End it and wait. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            process.send_signal(number)
        try:
            async with asyncio.timeout(seconds(10)):
                await process.communicate()
        except TimeoutError:
            process.kill()
            await process.communicate()
            pytest.fail(f"{self.folder.name} did not end")
        finally:
            _forget_clock(process.pid)

    async def command(self, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
        """`qmesh-node … --json` on the node's machine: exit code and what it printed."""
        process = await asyncio.create_subprocess_exec(
            *_DIES_WITH_US, "ip", "netns", "exec", self.machine.name, *_PYTHON, "-m", "node", *arguments,
            "--json", "--data-dir", str(self.folder), stdout=-1, stderr=-1,
        )  # fmt: skip
        try:
            async with asyncio.timeout(seconds(COMMAND)):
                out, _ = await process.communicate()
        except BaseException:
            process.kill()
            await process.wait()
            raise
        assert process.returncode is not None
        return process.returncode, [json.loads(line) for line in out.splitlines()]

    async def doctor(self, *arguments: str) -> dict[str, dict[str, Any]]:
        """The checks of `doctor`, by their names."""
        _, checks = await self.command("doctor", *arguments)
        return {check["name"]: check for check in checks}

    async def status(self) -> Mapping[str, Any]:
        """What it says of itself."""
        return await self.machine.inside(lambda: ask_local(self.folder, "status", timeout=5))

    async def peers(self) -> dict[str, dict[str, Any]]:
        """Its contacts that answer, by id."""
        peers = (await self.status())["contacts"]["peers"]
        return {peer["id"]: peer for peer in peers if not peer["failures"]}

    async def workers(self, model: str) -> set[str]:
        """The ids of a model's workers, as a program on the node's machine finds them."""

        async def main() -> set[str]:
            async with await mesh_client(settings(self.folder)) as mesh:
                try:
                    return {worker.id for worker in await mesh.workers(model)}
                except NoWorkers:
                    return set()

        return await self.machine.inside(main)

    async def knows(self, *others: Node) -> dict[str, dict[str, Any]]:
        """Its peers, once these are among them."""
        wanted = {other.id for other in others}
        return await eventually(self.peers, lambda peers: wanted <= peers.keys())


def _forget_clock(pid: int) -> None:
    """Remove what libfaketime leaves behind when its process is killed."""
    for name in ("faketime_shm_", "sem.faketime_sem_"):
        Path("/dev/shm", f"{name}{pid}").unlink(missing_ok=True)


async def eventually(
    look: Callable[[], Awaitable[T]], good: Callable[[T], object], within: float = CONVERGE
) -> T:
    """What `look` gives once it is `good`; the last that it gave is told where it never is."""
    seen: list[T] = []
    try:
        async with asyncio.timeout(seconds(within)):
            while True:
                seen[:] = [await look()]
                if good(seen[0]):
                    return seen[0]
                await asyncio.sleep(_LOOK_AGAIN)  # other processes have no event to wait for
    except TimeoutError:
        pytest.fail(f"after {within} s it is still {seen}")


class Nodes(AsyncExitStack):
    """Nodes that end with the block."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def add(self, name: str, machine: Namespace, network: Network | None = None) -> Node:
        """A node that is still to be started."""
        node = Node(machine, self._folder / name, network)
        self.push_async_callback(node.stop)
        return node
