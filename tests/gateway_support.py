"""Real nodes with real models for the gateway's tests, and ways to look behind them."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from node.cluster import Cluster, Member
from node.gateway.server import Gateway, mesh_client
from node.gateway.settings import GatewaySettings
from tests.sidecar_support import DEMO
from tests.support import seconds

DATA = Path(__file__).parent / "data" / "gateway"
CHAT = "qmesh-demo"
EMBED = "embed"
RANK = "rank"
TOOLS = "tools"
SOLO = "solo"
"""The demo model under a name that only one node serves."""
MESSAGES = [{"role": "user", "content": "Tell me a story about a fox."}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}
CALLED = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
"""What a model that calls a tool writes. Continuing from it, a real server answers with the call."""
TO_LISTEN = ("--gateway", "127.0.0.1:0")


def with_models(home: Path, models: list[dict[str, Any]]) -> None:
    """Have the node with this data folder serve these models."""
    home.mkdir(parents=True)
    blocks = []
    for model in models:
        lines = [f"{key} = {json.dumps(value)}" for key, value in {"path": str(DEMO), **model}.items()]
        blocks.append("[[models]]\n" + "\n".join(lines))
    (home / "qmesh.toml").write_text("\n\n".join(blocks), encoding="utf-8")


@contextmanager
def cluster(folder: Path, count: int, *extra: str) -> Iterator[list[Member]]:
    """Nodes with gateways, each a process of its own, which end with the block."""
    nodes = Cluster(folder, attached=True)
    try:
        yield asyncio.run(nodes.up(count, [*TO_LISTEN, *extra]))
    finally:
        asyncio.run(nodes.down())


@dataclass(frozen=True, slots=True)
class Direct:
    """A llama.cpp server of a node, reached without the mesh."""

    url: str
    key: str


def behind(member: Member, model: str) -> Direct:
    """The server of a node's model: its port from its arguments, its key from its environment."""
    process = member.process()
    assert process is not None
    for child in process.children(recursive=True):
        arguments = child.cmdline()
        if "--alias" in arguments and arguments[arguments.index("--alias") + 1] == model:
            port = arguments[arguments.index("--port") + 1]
            return Direct(f"http://127.0.0.1:{port}", child.environ()["LLAMA_API_KEY"])
    raise AssertionError(f"{member.worker_id} serves no {model}")


@asynccontextmanager
async def gateway_to(join: str, folder: Path, **settings: Any) -> AsyncIterator[Gateway]:
    """A gateway of this process, into the mesh of a node."""
    client = mesh_client(join, "public", None)
    async with Gateway(
        "127.0.0.1:0", client, folder, settings=GatewaySettings.model_validate(settings)
    ) as gateway:
        yield gateway


class RunningNode:
    """A node in a process of its own, from before it is ready."""

    def __init__(self, process: asyncio.subprocess.Process, folder: Path) -> None:
        self._process = process
        self._folder = folder
        self.pid = process.pid

    async def published(self) -> dict[str, Any]:
        """What it tells other commands, as soon as its gateway listens."""
        path = self._folder / "node.json"
        async with asyncio.timeout(seconds(15)):
            while not path.exists():  # noqa: ASYNC110 - there is no event
                await asyncio.sleep(0.02)
        facts: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return facts

    async def ready(self) -> dict[str, Any]:
        """Its `ready` event."""
        assert self._process.stdout is not None
        async with asyncio.timeout(seconds(30)):
            async for line in self._process.stdout:
                event: dict[str, Any] = json.loads(line)
                if event["event"] == "ready":
                    return event
        raise AssertionError(f"the node did not become ready:\n{self.errors()}")

    async def exit_code(self) -> int:
        """Its exit status, once it has ended."""
        async with asyncio.timeout(seconds(20)):
            await self._process.communicate()
        assert self._process.returncode is not None
        return self._process.returncode

    def errors(self) -> str:
        """What it wrote to stderr."""
        return (self._folder / "stderr.log").read_text("utf-8")


@asynccontextmanager
async def running_node(folder: Path, models: list[dict[str, Any]], *extra: str) -> AsyncIterator[RunningNode]:
    """Start `qmesh-node run` with these models; it is ended with the block."""
    with_models(folder, models)
    command = [sys.executable, "-P", "-m", "node", "run", "--json", "--no-mdns", "--data-dir", str(folder)]
    with (folder / "stderr.log").open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            *[*command, "--listen", "127.0.0.1:0", *TO_LISTEN, *extra],
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
        )
    node = RunningNode(process, folder)
    try:
        yield node
    finally:
        if process.returncode is None:
            process.terminate()
        await node.exit_code()


async def metric(session: aiohttp.ClientSession, url: str, name: str, **labels: str) -> float:
    """One value of a gateway's metrics; 0 while it has none."""
    async with session.get(f"{url}/metrics") as answer:
        text = await answer.text()
    for line in text.splitlines():
        if re.match(rf"{name}[{{ ]", line) and all(
            f'{key}="{value}"' in line for key, value in labels.items()
        ):
            return float(line.rpartition(" ")[2])
    return 0.0


async def until(test: Callable[[], Any], timeout: float = 10.0) -> None:
    """Wait until an asynchronous question is answered with something true."""
    async with asyncio.timeout(seconds(timeout)):
        while not await test():  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.02)


VOLATILE = frozenset({"id", "created", "created_at", "completed_at", "timings", "item_id", "id_slot"})
"""Ids, times and timings: what differs between two answers to one request."""


def comparable(value: Any) -> Any:
    """An answer without what differs between two answers to one request."""
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items() if key not in VOLATILE}
    if isinstance(value, list):
        return [comparable(item) for item in value]
    return value


def comparable_bytes(body: bytes) -> bytes:
    """The same for the bytes of a body or of a stream; everything else stays byte for byte."""
    lines = []
    for line in body.split(b"\n"):
        prefix, payload = (b"data: ", line[6:]) if line.startswith(b"data: ") else (b"", line)
        if payload.startswith((b"{", b"[")) and payload != b"[DONE]":
            payload = orjson.dumps(comparable(orjson.loads(payload)))
        lines.append(prefix + payload)
    return b"\n".join(lines)
