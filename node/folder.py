"""The node's folder on disk: who holds it, and what a running node tells the other commands.

::

    <data dir>/lock            held by the running node (flock / msvcrt through filelock)
    <data dir>/node.json       written while a node runs: pid, worker id, address, gateway, network
    <data dir>/mesh.json       the mesh that this machine belongs to (node.membership)
    <data dir>/joined/         the meshes that join tokens led to (node.membership)
    <data dir>/invitations.json  the invitations that this node accepts (node.invitations)
    <data dir>/identity.key    the node's identity (mesh.keystore)
    <data dir>/logs/           the servers' output and the node's log
    <data dir>/peers.msgpack   the DHT's routing table
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from mesh.errors import ConfigurationError
from node.files import write_private

RUNTIME_FILE = "node.json"
LOCK_FILE = "lock"
MOST_NODES = 64
EXIT_IN_USE = 5


class DataFolder:
    """A data folder held by this process until `close`."""

    def __init__(self, path: Path) -> None:
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(path / LOCK_FILE, blocking=False)
            self._lock.acquire()
        except Timeout:
            raise ConfigurationError(
                f"another node is running in {path}",
                "Stop it (`qmesh-node stop`), or give this one a folder of its own with --data-dir.",
                exit_code=EXIT_IN_USE,
            ) from None
        except OSError as error:
            raise ConfigurationError(
                f"the data folder {path} cannot be used: {error.strerror}", "Choose another with --data-dir."
            ) from error
        self.path = path

    @classmethod
    def hold(cls, path: Path, *, or_next: bool) -> DataFolder:
        """Hold the folder; with `or_next` its first free neighbour (`qmesh-2`, `qmesh-3` …) instead.

        Raises ConfigurationError.
        """
        for number in range(1, MOST_NODES + 1):
            candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
            try:
                return cls(candidate)
            except ConfigurationError as error:
                if not or_next or error.exit_code != EXIT_IN_USE:
                    raise
        raise ConfigurationError(
            f"{MOST_NODES} nodes run here already", "Stop one of them.", exit_code=EXIT_IN_USE
        )

    def publish(self, facts: dict[str, Any]) -> None:
        """Tell this user's other commands about the running node."""
        write_private(self.path / RUNTIME_FILE, json.dumps(facts))

    def close(self) -> None:
        """Let the folder go. Idempotent."""
        if self._lock.is_locked:
            (self.path / RUNTIME_FILE).unlink(missing_ok=True)
            self._lock.release()


def running_node(path: Path) -> dict[str, Any] | None:
    """What the node that runs in this folder has published; None where none runs."""
    try:
        facts: dict[str, Any] = json.loads((path / RUNTIME_FILE).read_text(encoding="utf-8"))
        running = psutil.pid_exists(facts["pid"]) and facts["pid"] > 0
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return facts if running else None
