"""API keys: made once, shown once, kept as hashes in a file that only its owner can read.

The keys are random (256 bits), so that a plain SHA-256 of one cannot be reversed or guessed. While the
file exists a key is needed, also after the last one was revoked. A running gateway sees changes of the
file within a second.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from mesh.errors import ConfigurationError
from node.files import locked, write_private

log = logging.getLogger("qmesh.gateway")

KEYS_FILE = "api-keys.json"
PREFIX = "qm-"
LOOK_AGAIN = 1.0
"""Seconds after which a change of the file is looked for."""
MAX_NAME = 64


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key. Limits are per minute, None for no limit; `created` is in unix seconds."""

    id: str
    name: str
    hash: str
    created: int
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


def digest(secret: str) -> str:
    """What is stored of a key."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


class KeyFile:
    """The file of keys in a data folder. Every method raises ConfigurationError where it is unusable."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / KEYS_FILE

    def exists(self) -> bool:
        """Whether keys are needed."""
        return self.path.exists()

    def read(self) -> list[ApiKey]:
        """All keys, in order of creation."""
        try:
            values = json.loads(self.path.read_text(encoding="utf-8"))
            return [ApiKey(**value) for value in values["keys"]]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigurationError(
                f"the key file {self.path} cannot be read: {error}",
                "Mend it, or move it away and make new keys with `qmesh-node keys add`.",
            ) from error

    def add(
        self, name: str, *, requests_per_minute: int | None = None, tokens_per_minute: int | None = None
    ) -> tuple[ApiKey, str]:
        """Make a key; returns it and the secret, which is stored nowhere."""
        name = name.strip()
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise ConfigurationError(
                f"{name!r} is no name for a key", f"Take 1 to {MAX_NAME} printable characters."
            )
        secret = PREFIX + secrets.token_urlsafe(32)
        with locked(self.path):
            keys = self.read()
            if any(key.name == name for key in keys):
                raise ConfigurationError(
                    f"there is a key named {name!r} already", "Revoke it first, or take another name."
                )
            key = ApiKey(
                secrets.token_hex(4),
                name,
                digest(secret),
                int(time.time()),
                requests_per_minute,
                tokens_per_minute,
            )
            self._write([*keys, key])
        return key, secret

    def revoke(self, name_or_id: str) -> ApiKey:
        """Remove a key for good."""
        with locked(self.path):
            keys = self.read()
            gone = next((key for key in keys if name_or_id in (key.id, key.name)), None)
            if gone is None:
                raise ConfigurationError(f"there is no key {name_or_id!r}", "See `qmesh-node keys ls`.")
            self._write(key for key in keys if key is not gone)
        return gone

    def _write(self, keys: Iterable[ApiKey]) -> None:
        text = json.dumps({"keys": [asdict(key) for key in keys]}, indent=1)
        try:
            write_private(self.path, text)
        except OSError as error:
            raise ConfigurationError(
                f"{self.path} cannot be written: {error.strerror}", "Check the folder's permissions."
            ) from error


class Keys:
    """The keys of a running gateway. `now` is on a monotonic clock, in seconds.

    `required` from the start means: also while the file is missing. Raises ConfigurationError where
    the file is there and unreadable; once running, an unreadable file leaves the known keys in force.
    """

    def __init__(self, file: KeyFile, *, required: bool, now: float) -> None:
        self._file = file
        self._always = required
        self._stamp = self._look()
        self._by_hash = {key.hash: key for key in file.read()}
        self._looked = now

    def required(self, now: float) -> bool:
        """Whether a request needs a key."""
        self._refresh(now)
        return self._always or self._stamp is not None

    def find(self, secret: str, now: float) -> ApiKey | None:
        """The key with this secret."""
        self._refresh(now)
        return self._by_hash.get(digest(secret))

    def _refresh(self, now: float) -> None:
        if now - self._looked < LOOK_AGAIN:
            return
        self._looked = now
        stamp = self._look()
        if stamp == self._stamp:
            return
        try:
            self._by_hash = {key.hash: key for key in self._file.read()}
        except ConfigurationError as error:
            log.error("the API keys were not renewed: %s", error)  # noqa: TRY400 - no fault of ours
        self._stamp = stamp

    def _look(self) -> tuple[int, int] | None:
        try:
            status = self._file.path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino
