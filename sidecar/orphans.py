"""Knows our server again after the node was killed, so that only it is ended and nobody else's process.

A record (pid, start time, nonce, and the node's own pid and start time) lies beside the log while a
server runs. At the next start a recorded process is killed when all of these hold: the pid exists, its
start time is the recorded one (pids are reused), its environment holds our nonce where we may read it,
and the node that started it is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import psutil

NONCE_VARIABLE = "QMESH_SIDECAR_NONCE"
_CLOCK_SLACK = 2.0
"""Seconds by which a start time may seem to move: it is derived from the wall clock, which is adjusted."""


def write_record(path: Path, pid: int, nonce: str) -> None:
    """Remember a running server. Raises OSError."""
    us = psutil.Process()
    record = {
        "pid": pid,
        "started": psutil.Process(pid).create_time(),
        "nonce": nonce,
        "node": us.pid,
        "node_started": us.create_time(),
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record))
    temporary.replace(path)


def remove_record(path: Path) -> None:
    """Forget a server that is gone; a record that stays does no harm."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def reap(path: Path, timeout: float = 5.0) -> int | None:
    """End the server that `path` records if it is our orphan; returns its pid when one was killed."""
    try:
        record = json.loads(path.read_text())
        pid, started, nonce = int(record["pid"]), float(record["started"]), str(record["nonce"])
        node, node_started = int(record["node"]), float(record["node_started"])
    except (OSError, ValueError, KeyError, TypeError):
        remove_record(path)
        return None
    if _alive(node, node_started) is not None:
        return None  # its node lives and looks after it
    orphan = _alive(pid, started)
    killed = None
    if orphan is not None and _has_nonce(orphan, nonce):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, 9)
        with contextlib.suppress(psutil.TimeoutExpired):
            orphan.wait(timeout)
        killed = pid
    remove_record(path)
    return killed


def _alive(pid: int, started: float) -> psutil.Process | None:
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < _CLOCK_SLACK
        same = same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return process if same else None


def _has_nonce(process: psutil.Process, nonce: str) -> bool:
    try:
        return process.environ().get(NONCE_VARIABLE) == nonce
    except psutil.AccessDenied:
        return True  # pid and start time already agree
    except psutil.NoSuchProcess:
        return False
