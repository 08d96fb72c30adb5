"""The example client that knows only docs/protocol.md, against a real listener."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import pytest

from mesh.errors import ModelNotFound
from mesh.network import Network
from mesh.transport import Stream, serve
from tests.support import seconds
from tests.wire_support import BOB, OPEN, PRIVATE

CLIENT = Path(__file__).resolve().parents[2] / "examples/raw_client.py"
WORDS = [f" word{number}" for number in range(3000)]  # more than one window of events


async def worker(stream: Stream) -> None:
    """Answers a completion as llama-server would, and asks for a PONG in between."""
    if stream.meta["model"] != "qmesh-demo":
        raise ModelNotFound(f"this worker does not serve {stream.meta['model']}")
    assert (stream.method, stream.meta["path"]) == ("infer", "/v1/completions")
    assert b'"prompt": "Once"' in await stream.read_all(1000, seconds(5))
    await stream.send_head({"status": 200, "content_type": "text/event-stream"})
    for word in WORDS:
        await stream.send(b'data: {"choices":[{"text":"%s"}]}\n\n' % word.encode())
    await stream.connection.ping(seconds(5))
    await stream.send(b"data: [DONE]\n\n")
    await stream.end({"usage": {}})


async def ask(network: Network, *arguments: str) -> tuple[int | None, str, str]:
    """Exit status, output and errors of the client."""
    listener = await serve("127.0.0.1", 0, identity=BOB, network=network, on_stream=worker)
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(CLIENT),
            f"127.0.0.1:{listener.address[1]}",
            "Once",
            *arguments,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(seconds(20)):
            output, errors = await process.communicate()
        return process.returncode, output.decode(), errors.decode()
    finally:
        await listener.close()


@pytest.mark.parametrize("network", [OPEN, PRIVATE], ids=["open", "private"])
async def test_it_is_answered(network: Network) -> None:
    arguments = ["--network", network.name, *(["--secret", network.secret.hex()] if network.secret else [])]
    status, output, errors = await ask(network, *arguments)
    assert (status, errors) == (0, "")
    assert output == "".join(WORDS) + "\n"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--model", "other"], "code 3, this worker does not serve other"),
        (["--network", "other"], "closed the connection"),
        (["--secret", "00" * 32], "another mesh"),
    ],
)
async def test_it_says_what_is_wrong(arguments: list[str], error: str) -> None:
    status, output, errors = await ask(OPEN, *arguments)
    assert (status, output) == (1, "")
    assert error in errors
    assert "Traceback" not in errors


def test_it_is_short_and_uses_nothing_of_mesh() -> None:
    source = CLIENT.read_text()
    assert len(source.splitlines()) < 150
    imports = re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE)
    assert not {"mesh", "node", "client_sdk", "sidecar"} & set(imports)
