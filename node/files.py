"""Files that only their owner may read, and that several commands may change."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from mesh.errors import ConfigurationError

LOCK_TIMEOUT = 10.0


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Change a file while no other command does. Raises ConfigurationError where its folder cannot be used."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"), timeout=LOCK_TIMEOUT)
        lock.acquire()
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be changed: {error.strerror or 'another command holds it'}",
            "Check the folder's permissions, or choose another with --data-dir.",
        ) from error
    try:
        yield
    finally:
        lock.release()


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, in one step. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(
        os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
    ) as file:
        file.write(text)
    fresh.replace(path)
