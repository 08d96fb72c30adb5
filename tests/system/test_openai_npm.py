"""OpenAI's JavaScript client against a real mesh; needs Node.js and npm."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from node.cluster import Member
from node.gateway.keys import KeyFile
from tests.gateway_support import CHAT, DATA, EMBED, TOOLS, cluster, gateway_to, with_models
from tests.support import seconds


@pytest.fixture
def node(tmp_path: Path) -> Any:
    """A node with a model to talk to, one for embeddings and one that calls tools."""
    template = (DATA / "tools.jinja").read_text(encoding="utf-8")
    models: list[dict[str, Any]] = [
        {"slots": 2, "context": 16384},
        {"alias": EMBED, "slots": 2, "extra_args": ["--embeddings", "--pooling", "mean"]},
        {"alias": TOOLS, "slots": 1, "extra_args": ["--chat-template", template]},
    ]
    with_models(tmp_path / "mesh" / "node-1", models)
    with cluster(tmp_path / "mesh", 1) as (member,):
        yield member


async def test_openai_npm(node: Member, tmp_path: Path) -> None:
    """Every kind of request, every kind of refusal, and cancelling, in a process of its own."""
    for program in ("node", "npm"):
        assert shutil.which(program), f"{program} is missing: install Node.js 18 or later to run this test"
    shutil.copy(DATA / "openai.mjs", tmp_path)
    await run(tmp_path, "npm", "install", "--no-audit", "--no-fund", "--prefix", str(tmp_path), "openai@6")
    _, key = KeyFile(tmp_path / "keyed").add("npm", requests_per_minute=1)
    async with (
        gateway_to(node.address, tmp_path / "keyed") as keyed,
        gateway_to("127.0.0.1:1", tmp_path / "empty", wait_seconds=0.3) as empty,
    ):
        given = {"url": node.ready["gateway"], "keyed": keyed.url, "key": key, "empty": empty.url}
        given |= {"chat": CHAT, "embed": EMBED, "tools": TOOLS}
        seen = json.loads(await run(tmp_path, "node", "openai.mjs", json.dumps(given)))
    assert seen["chat"] == seen["stream"] != ""
    assert seen["call"]["name"] == "weather"
    assert json.loads(seen["call"]["arguments"]) == {"city": "Oslo"}
    assert seen["schema"] == {"colour": "red"}
    assert seen["vectors"] == 2
    assert seen["responses"]
    assert seen["models"] == sorted([CHAT, EMBED, TOOLS])
    assert seen["missing"] == ["NotFoundError", 404, "model_not_found"]
    assert seen["long"][:2] == ["BadRequestError", 400]
    assert seen["stranger"] == ["AuthenticationError", 401, "invalid_api_key"]
    assert seen["limited"] == [None, ["RateLimitError", 429, "rate_limit_exceeded"]]
    assert seen["unavailable"] == ["InternalServerError", 503, "no_worker"]
    assert (seen["busy"], seen["left"]) == (1, 0)


async def run(folder: Path, *command: str) -> bytes:
    """What a program prints. Fails the test where it fails or takes longer than a minute."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(seconds(60)):
            output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, errors.decode()[-2000:]
    return output
