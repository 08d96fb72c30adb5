"""Finds the llama.cpp server to run, and says why it is that one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sidecar.errors import BinaryNotFound
from sidecar.managed.store import Store

OLDEST_BUILD = 4000
"""llama.cpp builds before b4000 lack endpoints or arguments that the supervisor uses."""
_VERSION_TIMEOUT = 20.0
_PACKAGE_ROOT = str(Path(__file__).parent.parent)


@dataclass(frozen=True, slots=True)
class Server:
    """A server program: `argv` to start it (without its options), its version, why it was chosen."""

    kind: Literal["explicit", "path", "managed", "embedded"]
    argv: tuple[str, ...]
    version: str
    reason: str

    def environment(self) -> dict[str, str]:
        """The environment to run it in: ours, and for the embedded one the way to this package."""
        if self.kind != "embedded":
            return dict(os.environ)
        paths = (_PACKAGE_ROOT, os.environ.get("PYTHONPATH"))
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def find_server(explicit: Path | None = None, *, store: Store | None = None) -> Server:
    """Explicit path → compatible llama-server on PATH → managed install → the embedded wheel.

    Runs `--version`, so it blocks for some milliseconds. `store` holds the managed installs (default:
    this user's). Raises BinaryNotFound with what was tried.
    """
    if explicit is not None:
        return Server("explicit", (str(explicit),), check_binary(explicit), "named explicitly")
    tried = []
    on_path = shutil.which("llama-server")
    if on_path:
        try:
            return Server("path", (on_path,), check_binary(Path(on_path)), f"found on PATH at {on_path}")
        except BinaryNotFound as error:
            tried.append(str(error))
    else:
        tried.append("no llama-server on PATH")
    store = store or Store()
    if managed := store.current():
        binary = store.binary(managed)
        try:
            return Server("managed", (str(binary),), check_binary(binary), f"managed install {managed.name}")
        except BinaryNotFound as error:
            tried.append(str(error))
    else:
        tried.append("no managed install")
    if importlib.util.find_spec("xllamacpp"):
        version = f"xllamacpp {importlib.metadata.version('xllamacpp')}"
        argv = (sys.executable, "-P", "-m", "sidecar.embedded")
        return Server("embedded", argv, version, f"embedded in the wheel ({'; '.join(tried)})")
    tried.append("the xllamacpp wheel is not installed")
    fix = "Install it with `pip install 'qmesh[embedded]'`, or run `qmesh-node runtime install`."
    raise BinaryNotFound(f"no llama.cpp server: {'; '.join(tried)}. {fix}")


def check_binary(path: Path) -> str:
    """The version of a llama-server binary; raises BinaryNotFound when it is none, or too old."""
    if not path.is_file():
        raise BinaryNotFound(f"{path} is not a file. Give the path of a llama-server binary.")
    if not os.access(path, os.X_OK):
        raise BinaryNotFound(f"{path} is not executable. Run `chmod +x {path}`.")
    try:
        done = subprocess.run(  # noqa: S603 - the user named this program
            [str(path), "--version"],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=_VERSION_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BinaryNotFound(
            f"{path} cannot be run: {error}. Give the path of a llama-server binary."
        ) from error
    output = done.stdout + done.stderr
    found = re.search(r"^version: *(.+)$", output, re.MULTILINE)
    if done.returncode != 0 or not found:
        last = (output.strip().splitlines() or ["no output"])[-1]
        raise BinaryNotFound(
            f"{path} --version said {last!r} (exit code {done.returncode}): not a llama-server."
        )
    version = found[1].strip()
    build = re.match(r"(\d+) \(", version)
    if build and 0 < int(build[1]) < OLDEST_BUILD:
        raise BinaryNotFound(
            f"{path} is build {build[1]}; at least {OLDEST_BUILD} is needed. Update llama.cpp."
        )
    return version
