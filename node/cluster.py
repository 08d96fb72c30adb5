"""Local test clusters: real nodes on this machine, each a process with a folder of its own.

::

    <folder>/cluster.json      the nodes: process ids and when they started
    <folder>/node-1/           a node's data folder; its events are in events.ndjson, its errors in stderr.log
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from mesh.errors import ConfigurationError
from sidecar import launch

STATE_FILE = "cluster.json"
EVENTS_FILE = "events.ndjson"
ERRORS_FILE = "stderr.log"
START_TIMEOUT = 60.0
STOP_TIMEOUT = 25.0
MOST_NODES = 64
POLL = 0.02
EXIT_BUG, EXIT_SERVER = 1, 7
_ANY_PORT = "127.0.0.1:0"
_NODE = (sys.executable, "-P", "-m", "node", "run", "--json", "--no-mdns")
_OTHER_MESH = frozenset({"QMESH_CONFIG", "QMESH_JOIN", "QMESH_NETWORK"})
_GUARD = (sys.executable, "-I", "-S", launch.__file__, "--")
"""Starts a program that dies with this process, however this one ends."""


class ClusterError(ConfigurationError):
    """A node of the cluster did not start: why, as it said itself, with its own fix and exit code."""


@dataclass(slots=True)
class Member:
    """One node of a cluster. `started` is its process's start time, which tells it from a later one."""

    number: int
    pid: int
    started: float
    folder: str
    ready: dict[str, Any] = field(default_factory=dict)
    """The node's `ready` event."""

    @property
    def address(self) -> str:
        """Where its wire listens; empty while it starts."""
        return str(self.ready.get("address", ""))

    @property
    def worker_id(self) -> str:
        """Its node id; empty while it starts."""
        return str(self.ready.get("worker_id", ""))

    def process(self) -> psutil.Process | None:
        """Its process, None once that is gone."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            if process.create_time() == self.started and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None

    def events(self) -> list[dict[str, Any]]:
        """What it has told so far."""
        lines = (Path(self.folder) / EVENTS_FILE).read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def errors(self) -> str:
        """The end of what it wrote to stderr."""
        with contextlib.suppress(OSError):
            lines = (
                (Path(self.folder) / ERRORS_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
            )
            return "\n".join(lines[-12:])
        return ""


class Cluster:
    """Nodes under one folder.

    An `attached` cluster dies with this process, however this one ends; another one stays until `down`,
    which any process may call.
    """

    def __init__(self, folder: Path, *, attached: bool) -> None:
        self.folder = folder
        self.members = self._load()
        self._attached = attached
        self._children: list[subprocess.Popen[bytes]] = []
        self._extra: tuple[str, ...] = ()

    async def up(
        self, count: int, extra: Iterable[str] = (), on_ready: Callable[[Member], None] | None = None
    ) -> list[Member]:
        """Start `count` nodes (`extra`: more arguments for each) and wait until all can answer. The
        others join the first. They listen on free ports of the loopback, the gateways too unless `extra` has
        ``--no-gateway``. Raises ConfigurationError, and ClusterError after ending what had started.
        """
        if not 1 <= count <= MOST_NODES:
            raise ConfigurationError(
                f"a cluster of {count} nodes is not possible", f"Choose 1 to {MOST_NODES}."
            )
        if any(member.process() for member in self.members):
            raise ConfigurationError(
                f"a cluster is running in {self.folder}", "End it with `qmesh-node cluster down`."
            )
        self.members = []
        self._extra = tuple(extra)
        try:
            first = self._spawn(1, extra)
            begun = await _event(first, "starting")
            others = [
                self._spawn(number, [*extra, "--join", str(begun["address"])])
                for number in range(2, count + 1)
            ]
            for member in (first, *others):
                member.ready = await _event(member, "ready")
                if on_ready is not None:
                    on_ready(member)
            self._save()
        except BaseException:
            await self.down()
            raise
        return self.members

    async def restart(self, member: Member) -> Member:
        """Start a dead member again in its folder and at its addresses, joined to one that lives; returns the
        new member. Raises ClusterError.
        """
        await self._ended([member], STOP_TIMEOUT)
        alive = [other for other in self.members if other is not member and other.process()]
        join = ["--join", alive[0].address] if alive else []
        url = member.ready["gateway"]
        gateway = ["--gateway", url.partition("://")[2]] if url else []
        self.members.remove(member)
        fresh = self._spawn(member.number, [*self._extra, "--listen", member.address, *gateway, *join])
        fresh.ready = await _event(fresh, "ready")
        self._save()
        return fresh

    async def kill_every(self, seconds: float, tell: Callable[[Member, str], None]) -> None:
        """Kill a random member (SIGKILL) every so many seconds and start it again, until cancelled. `tell`
        gets each member that was "killed" or is "back". Raises ClusterError.
        """
        while True:
            await asyncio.sleep(seconds)
            member = random.choice(self.members)  # noqa: S311 - no secret
            with contextlib.suppress(psutil.NoSuchProcess):
                if process := member.process():
                    process.kill()
            tell(member, "killed")
            tell(await self.restart(member), "back")

    async def down(self) -> int:
        """End every node, by SIGTERM and at last by SIGKILL; returns how many were running."""
        alive = [process for member in self.members if (process := member.process())]
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        if not await self._ended(self.members, STOP_TIMEOUT):
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            await self._ended(self.members, STOP_TIMEOUT)
        for child in self._children:
            if child.stdin is not None:
                child.stdin.close()
        self._children.clear()
        self.members = []
        (self.folder / STATE_FILE).unlink(missing_ok=True)
        return len(alive)

    def _spawn(self, number: int, extra: Iterable[str]) -> Member:
        folder = self.folder / f"node-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        given = [*extra]
        if "--listen" not in given:
            given += ["--listen", _ANY_PORT]
        if "--gateway" not in given and "--no-gateway" not in given:
            given += ["--gateway", _ANY_PORT]
        command = [*_NODE, "--data-dir", str(folder), *given]
        with (folder / EVENTS_FILE).open("wb") as events, (folder / ERRORS_FILE).open("wb") as errors:
            child = subprocess.Popen(  # noqa: S603 - our own program
                [*_GUARD, *command] if self._attached else command,
                stdin=subprocess.PIPE if self._attached else subprocess.DEVNULL,
                stdout=events,
                stderr=errors,
                env=_environment(),
                start_new_session=True,
            )
        self._children.append(child)
        member = Member(number, child.pid, psutil.Process(child.pid).create_time(), str(folder))
        self.members.append(member)
        self._save()  # so that `down` finds it even if this process is killed now
        return member

    async def _ended(self, members: Collection[Member], timeout: float) -> bool:
        until = time.monotonic() + timeout
        pids = {member.pid for member in members}
        while True:
            reaped = [child.poll() is not None for child in self._children if child.pid in pids]
            if all(reaped) and not any(member.process() for member in members):
                return True
            if time.monotonic() > until:
                return False
            await asyncio.sleep(POLL)

    def _save(self) -> None:
        fresh = self.folder / f"{STATE_FILE}.new"
        fresh.write_text(json.dumps([asdict(member) for member in self.members]), encoding="utf-8")
        fresh.replace(self.folder / STATE_FILE)

    def _load(self) -> list[Member]:
        path = self.folder / STATE_FILE
        try:
            return [Member(**one) for one in json.loads(path.read_text(encoding="utf-8"))]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError) as error:
            raise ConfigurationError(f"{path} cannot be read: {error}", "Delete it.") from error


async def _event(member: Member, name: str) -> dict[str, Any]:
    """Wait for one of a node's events. Raises ClusterError where it ends or takes too long."""
    until = time.monotonic() + START_TIMEOUT
    while True:
        alive = member.process() is not None
        events = {event["event"]: event for event in member.events()}
        if name in events:
            return events[name]
        if not alive:
            raise _failure(member, events.get("error"))
        if time.monotonic() > until:
            raise ClusterError(
                f"node {member.number} took more than {START_TIMEOUT:.0f} s to start:\n{member.errors()}",
                "Try again when this machine has less to do, or with fewer nodes.",
                exit_code=EXIT_SERVER,
            )
        await asyncio.sleep(POLL)


def _failure(member: Member, told: Mapping[str, Any] | None) -> ClusterError:
    """Why a node has ended before it was ready."""
    if told is not None:
        cause = f"node {member.number} did not start: {told['error']}"
        return ClusterError(cause, told["fix"], exit_code=told["exit_code"])
    return ClusterError(
        f"node {member.number} ended without a word:\n{member.errors()}",
        f"See {Path(member.folder) / 'logs'}; somebody may have killed it.",
        exit_code=EXIT_BUG,
    )


def _environment() -> dict[str, str]:
    """This process's, without what names a mesh: a test cluster is one of its own."""
    return {name: value for name, value in os.environ.items() if name not in _OTHER_MESH}
