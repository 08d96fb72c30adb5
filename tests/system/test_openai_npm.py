"""OpenAI's JavaScript client against a real mesh; needs Node.js and npm."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from tests.gateway_support import CHAT, DATA, EMBED, cluster, with_models
from tests.support import seconds


def test_openai_npm(tmp_path: Path) -> None:
    """Chat, stream, embeddings, responses, errors and cancelling, in a process of its own."""
    embeddings = {"alias": EMBED, "slots": 2, "extra_args": ["--embeddings", "--pooling", "mean"]}
    with_models(tmp_path / "mesh" / "node-1", [{"slots": 2}, embeddings])
    with cluster(tmp_path / "mesh", 1) as (node,):
        _client(str(node.ready["gateway"]), tmp_path)


def _client(url: str, tmp_path: Path) -> None:
    for program in ("node", "npm"):
        assert shutil.which(program), f"{program} is missing: install Node.js 18 or later to run this test"
    shutil.copy(DATA / "openai.mjs", tmp_path)
    install = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(tmp_path), "openai@6"]
    done = subprocess.run(install, capture_output=True, text=True, timeout=seconds(60), check=False)
    assert done.returncode == 0, f"npm could not install the openai client:\n{done.stderr[-1000:]}"
    run = ["node", "openai.mjs", url, CHAT, EMBED]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=seconds(60), check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout)
    assert seen["chat"] == seen["stream"] != ""
    assert seen["vectors"] == 2
    assert seen["responses"]
    assert seen["missing"] == [404, "model_not_found"]
    assert seen["cancelled"]
