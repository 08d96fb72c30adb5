"""Stands in for the llama-server binary in llama.cpp's own tests; see `tests.llamacpp.__main__`.

LLAMA_OWN_TESTS holds JSON: `via` is `direct` (run the real server, with our model in the place of the one
that would be downloaded) or `mesh` (run a node that supervises it, with its gateway where the tests expect
the server). The node's process replaces this one, so that the tests' signals reach it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

DROPPED = {"--hf-repo": 1, "--hf-file": 1, "--model-url": 1, "--model": 1, "--offline": 0}
"""Arguments that name a model to download, with the number of their values."""
TAKEN = ("--host", "--port", "--alias", "--ctx-size", "--parallel", "--api-key")
"""Arguments that are the node's or the gateway's own settings."""
NAMES = (
    "test",
    "davinci-002",
    "gpt-3.5-turbo",
    "gpt-3.5-turbo-instruct",
    "gpt-4.1",
    "text-embedding-3-small",
)
"""Models that the tests ask for: a server of one model ignores the name, a gateway is told of another name."""
SLOTS = 4
CONTEXT = 2048


def main() -> None:
    """Replace this process by the server or the node."""
    settings = json.loads(os.environ["LLAMA_OWN_TESTS"])
    values, rest = split(sys.argv[1:])
    if "--embedding" in rest and "--pooling" not in rest:
        rest += ["--pooling", "mean"]  # the models that ours stands in for bring one along
    if settings["via"] == "direct":
        own = [text for name in TAKEN if name in values for text in (name, values[name])]
        os.execv(settings["server"], [settings["server"], "--model", settings["model"], *own, *rest])
    slots = int(values.get("--parallel", SLOTS))
    model = {
        "path": settings["model"],
        "alias": values.get("--alias", "model"),
        "slots": slots,
        "context": max(64, int(values.get("--ctx-size", CONTEXT * slots)) // slots),
        "extra_args": rest,
    }
    folder = Path(tempfile.mkdtemp(dir=settings["folder"]))
    lines = ["drain_seconds = 0.5", "[[models]]", *assignments(model)]
    lines += ["[api.aliases]", *assignments(dict.fromkeys(NAMES, model["alias"]))]
    (folder / "qmesh.toml").write_text("\n".join(lines), encoding="utf-8")
    if "--api-key" in values:
        digest = hashlib.sha256(values["--api-key"].encode()).hexdigest()
        key = {"id": "1", "name": "tests", "hash": digest, "created": 0}
        (folder / "api-keys.json").write_text(json.dumps({"keys": [key]}), encoding="utf-8")
    command = [
        settings["python"],
        "-P",
        "-m",
        "node",
        "run",
        "--json",
        "--no-mdns",
        "--data-dir",
        str(folder),
    ]
    command += ["--listen", "127.0.0.1:0", "--llama-server", settings["server"]]
    command += ["--gateway", f"{values['--host']}:{values['--port']}"]
    os.execv(settings["python"], command)


def assignments(settings: dict[str, Any]) -> list[str]:
    """Settings as TOML writes them."""
    return [f"{json.dumps(key)} = {json.dumps(value)}" for key, value in settings.items()]


def split(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """The node's own settings, and what is for the server alone."""
    values: dict[str, str] = {}
    rest: list[str] = []
    left = iter(arguments)
    for argument in left:
        if argument in TAKEN:
            values[argument] = next(left)
        elif argument in DROPPED:
            for _ in range(DROPPED[argument]):
                next(left)
        elif argument != "--no-slots":  # the node wants to see the slots
            rest.append(argument)
    return values, rest


if __name__ == "__main__":
    main()
