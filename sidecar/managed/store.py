"""The managed llama.cpp servers of this user: one folder each, one in use, the one before kept.

::

    <root>/lock                  held while something is installed, built or selected
    <root>/active.json           {"current": name, "previous": name or null}
    <root>/<name>/install.json   what it is and where its binary lies
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import platformdirs
from filelock import AsyncFileLock, Timeout

from sidecar.errors import RuntimeFailure

LOCK_TIMEOUT = 3600.0


@dataclass(frozen=True, slots=True)
class Install:
    """One installed server. `binary` is relative to its folder."""

    name: str
    source: str
    binary: str
    version: str
    accelerator: str = "cpu"
    sha256: str = ""
    devices: list[str] = field(default_factory=list)


def default_root() -> Path:
    """The per-user folder for managed servers, by the platform's convention."""
    return platformdirs.user_data_path("qmesh", appauthor=False) / "runtime"


class Store:
    """The folder of managed servers. Reading never fails for a missing or broken entry: it is skipped."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or default_root()

    def installs(self) -> list[Install]:
        """All that is installed, by name."""
        found = (self.load(path.parent.name) for path in sorted(self.root.glob("*/install.json")))
        return [install for install in found if install]

    def load(self, name: str) -> Install | None:
        """One install, or None when it is missing or incomplete."""
        try:
            install = Install(**json.loads((self.root / name / "install.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return install if self.binary(install).is_file() else None

    def binary(self, install: Install) -> Path:
        """The path of an install's llama-server."""
        return self.root / install.name / install.binary

    def current(self) -> Install | None:
        """The install in use, or None."""
        return self._named("current")

    def previous(self) -> Install | None:
        """The install that `rollback` would bring back, or None."""
        return self._named("previous")

    def use(self, name: str) -> Install:
        """Select an install. Raises RuntimeFailure when there is none of that name."""
        install = self.load(name)
        if install is None:
            known = ", ".join(i.name for i in self.installs()) or "none"
            raise RuntimeFailure(f"no server named {name!r} is installed (installed: {known})")
        active = self._active()
        if active.get("current") != name:
            active = {"current": name, "previous": active.get("current")}
            _write(self.root / "active.json", active)
        return install

    def rollback(self) -> Install:
        """Select the install that was in use before. Raises RuntimeFailure when there is none."""
        previous = self.previous()
        if previous is None:
            raise RuntimeFailure("there is no earlier server to go back to")
        return self.use(previous.name)

    def folder_for(self, name: str) -> Path:
        """An empty place to prepare an install in; `keep` moves it to its name."""
        place = self.root / f".new-{name}"
        shutil.rmtree(place, ignore_errors=True)
        self.root.mkdir(parents=True, exist_ok=True)
        return place

    def keep(self, place: Path, install: Install) -> Install:
        """Move a prepared install to its name; it is complete or absent, never half there."""
        _write(place / "install.json", asdict(install))
        final = self.root / install.name
        shutil.rmtree(final, ignore_errors=True)
        place.rename(final)
        return install

    @asynccontextmanager
    async def locked(self, timeout: float = LOCK_TIMEOUT) -> AsyncIterator[None]:
        """Hold the store against other processes; raises RuntimeFailure after `timeout` seconds."""
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            async with AsyncFileLock(self.root / "lock", timeout=timeout):
                yield
        except Timeout:
            raise RuntimeFailure(f"another install has held the lock for {timeout:g} s") from None

    def _named(self, key: str) -> Install | None:
        name = self._active().get(key)
        return self.load(name) if name else None

    def _active(self) -> dict[str, str | None]:
        with contextlib.suppress(OSError, ValueError):
            active = json.loads((self.root / "active.json").read_text())
            if isinstance(active, dict):
                return active
        return {}


def _write(path: Path, content: object) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(path)
