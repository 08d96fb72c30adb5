"""Where the node's log lines go: warnings to stderr, everything of ours to a rotated file as JSON.

A line may carry `facts` (`log.info("…", extra={"facts": {…}})`): they become fields. Neither lines nor
facts hold what was asked or answered.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Literal

from typing_extensions import override

Style = Literal["console", "json"]

OURS = ("qmesh", "mesh", "node", "sidecar", "client_sdk")
FILE_BYTES = 10 << 20
FILES = 5
_JSON = json.JSONEncoder(default=str)
"""Writes ASCII: a file name need not be valid text."""
_LINE = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


class ConsoleFormatter(logging.Formatter):
    """One line for people, facts behind it as `key=value`."""

    def __init__(self) -> None:
        super().__init__(_LINE)

    @override
    def formatMessage(self, record: logging.LogRecord) -> str:
        facts = getattr(record, "facts", None) or {}
        shown = "".join(f" {key}={value}" for key, value in facts.items() if value is not None)
        return super().formatMessage(record) + shown


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, then the facts."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **(getattr(record, "facts", None) or {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _JSON.encode(line)


class LogFile(RotatingFileHandler):
    """Rotated by size. Its parent looks at the disk and formats each line twice to decide that."""

    @override
    def shouldRollover(self, record: logging.LogRecord) -> bool:
        return self.stream is not None and self.stream.tell() >= self.maxBytes


def set_up(*, quiet: bool, style: Style = "console") -> None:
    """Log to stderr: warnings, with QMESH_DEBUG everything of ours; `quiet` leaves only errors."""
    debug = bool(os.environ.get("QMESH_DEBUG"))
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else ConsoleFormatter())
    handler.setLevel(logging.DEBUG if debug else logging.ERROR if quiet else logging.WARNING)
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    for name in OURS:
        logging.getLogger(name).setLevel(logging.DEBUG if debug else logging.INFO)
    # These name every unanswered datagram; the DHT counts them itself.
    for name in ("kademlia", "rpcudp"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


@contextmanager
def log_file(folder: Path, name: str) -> Iterator[None]:
    """While the block runs, the log also goes to `logs/<name>` under the folder, rotated.

    Raises OSError where it cannot be written.
    """
    path = folder / "logs" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = LogFile(path, maxBytes=FILE_BYTES, backupCount=FILES, encoding="ascii")
    handler.setFormatter(JsonFormatter())
    handler.setLevel(logging.INFO)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
