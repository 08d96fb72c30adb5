"""Nodes that answer a client as a test wants them to."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from client_sdk import MeshClient, Timeouts
from mesh.identity import Identity
from mesh.network import Network
from mesh.records import WorkerRecord, model_key, sign_record
from mesh.transport import Stream, serve

MODEL = "m"
OPEN = Network()

Answer = Callable[[Stream], Any]


@asynccontextmanager
async def node(identity: Identity, answers: Mapping[str, Answer], port: int = 0) -> AsyncIterator[str]:
    """A node that answers methods so; gives its address."""

    async def handle(stream: Stream) -> None:
        await answers[stream.method](stream)

    listener = await serve("127.0.0.1", port, identity=identity, network=OPEN, on_stream=handle)
    try:
        yield f"127.0.0.1:{listener.address[1]}"
    finally:
        await listener.close(0)


@asynccontextmanager
async def client(answers: Mapping[str, Answer], timeouts: Timeouts) -> AsyncIterator[MeshClient]:
    """A client whose only entry node answers so."""
    async with node(Identity(), answers) as address, MeshClient(address, timeouts=timeouts) as mesh:
        yield mesh


@asynccontextmanager
async def client_of(answers: Mapping[str, Answer], timeouts: Timeouts) -> AsyncIterator[MeshClient]:
    """A client whose only worker answers so."""
    worker = Identity()
    async with node(worker, answers) as where:
        found = {"find": says({"records": [record(worker, where)]})}
        async with client(found, timeouts) as mesh:
            yield mesh


def says(meta: Mapping[str, Any]) -> Answer:
    async def answer(stream: Stream) -> None:
        await stream.end(meta)

    return answer


def record(identity: Identity, *addresses: str, **facts: Any) -> list[bytes]:
    """A worker's record as `find` tells it."""
    key = model_key(OPEN, MODEL)
    values: dict[str, Any] = {
        "node_id": identity.id, "seq": int(time.time() * 1000), "expires": int(time.time()) + 60,
        "addresses": addresses, "model": MODEL, "digest": bytes(16), "health": 90, "slots": 2, "context": 2048,
        "generation_speed": 0.0, "prompt_speed": 0.0, "flags": frozenset(), "software": "liar",
    }  # fmt: skip
    return [key, sign_record(WorkerRecord(**(values | facts)), identity, OPEN, key)]
