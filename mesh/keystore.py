"""The identity on disk: `identity.key` (the seed as hex, mode 0600) and `worker-id.txt`."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import tempfile
from pathlib import Path

from mesh.errors import ConfigurationError
from mesh.identity import Identity

KEY_FILE = "identity.key"
ID_FILE = "worker-id.txt"
EXIT_IDENTITY = 3


def load_identity(folder: Path) -> Identity:
    """The identity kept in `folder`, made on first use.

    Raises ConfigurationError where the key file is unreadable, malformed, or readable by others
    than its owner.
    """
    path = folder / KEY_FILE
    try:
        _create(path)
        if os.name == "posix":
            mode = stat.S_IMODE(path.stat().st_mode)
            if mode & 0o077:
                raise ConfigurationError(
                    f"{path} can be read by other users (mode {mode:04o})",
                    f"Run `chmod 600 {path}`; if others may have copied it, delete it for a new identity.",
                    exit_code=EXIT_IDENTITY,
                )
        text = path.read_text(encoding="ascii").strip()
    except UnicodeDecodeError:
        text = ""
    except OSError as error:
        raise ConfigurationError(
            f"the identity file {path} cannot be read: {error.strerror}",
            "Make it yours (`chown`), or choose another folder with --data-dir.",
            exit_code=EXIT_IDENTITY,
        ) from error
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise ConfigurationError(
            f"{path} does not hold a key: 64 lowercase hex digits are expected",
            "Restore it from a backup, or delete it to get a new identity.",
            exit_code=EXIT_IDENTITY,
        )
    identity = Identity(bytes.fromhex(text))
    _tell_id(folder / ID_FILE, f"{identity.id.hex()}\n".encode())
    return identity


def _tell_id(path: Path, expected: bytes) -> None:
    try:
        if not path.is_file() or path.read_bytes() != expected:
            path.write_bytes(expected)
    except OSError as error:
        raise ConfigurationError(
            f"the file {path} cannot be written: {error.strerror}",
            "Make its folder yours (`chown`), or choose another with --data-dir.",
            exit_code=EXIT_IDENTITY,
        ) from error


def _create(path: Path) -> None:
    """Write a new key unless one exists; a crash in between leaves no half-written key."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, fresh = tempfile.mkstemp(dir=path.parent, prefix=".key-")  # mode 0600, a name of its own
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(Identity().seed.hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
        # A hard link, not a rename: two first starts at once agree on one key.
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)
    finally:
        Path(fresh).unlink()
