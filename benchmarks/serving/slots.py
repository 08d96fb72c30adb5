"""How soon a slot is free when its client goes: leaves the loop, cancels, closes, is killed.

Streams are watched through llama.cpp's `/slots`. Of whole answers it only notices that nobody waits for them
once it was left alone for a second, so that looking would postpone what it looks for: there the moment is the one
in which the process stops computing, and `/slots` is asked once, afterwards. That second begins with whatever
happened last on the server; so that this is not always the benchmark's own look, clients go at some later moment.
"""

from __future__ import annotations

import asyncio
import random
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress

from benchmarks.serving.common import GREEDY, MODEL, Slots
from client_sdk import MeshClient
from node.cluster import Member
from tests.mesh_support import llama_of

TOKENS = 1900
PROMPT = "Once upon a time"
BODY = {"prompt": PROMPT, "n_predict": TOKENS, "ignore_eos": True, "temperature": 0, "n_probs": 100}
"""The probabilities make it slow, so that a whole answer is not ready before it is left."""
STILL = 0.3
IDLE = 0.1
"""A process that used less than this share of so many seconds is taken to have stopped; some is used for probes."""
WAYS = ("leave the loop", "cancel the task", "close the client", "kill the client")

Leave = Callable[[], object]


async def freed_after(members: Sequence[Member], way: str, *, streaming: bool) -> float:
    """Seconds from the client's going to the moment in which every llama.cpp slot is free."""
    async with Slots.of(members) as slots:
        await slots.until(0)
        async with _asking(members[0].address, way, slots, streaming=streaming) as leave:
            began = time.perf_counter()
            left = leave()
            if asyncio.iscoroutine(left):
                await left
            if streaming:
                await slots.until(0)
                return time.perf_counter() - began
            while True:
                ended = await _stopped_computing(members)
                if not await slots.busy():
                    return ended - began


async def _stopped_computing(members: Sequence[Member]) -> float:
    """When the last llama.cpp of these nodes stopped computing."""
    processes = [server.process for member in members for server in llama_of(member.pid)]

    def used() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    seen = deque([(time.perf_counter(), used())])
    while True:
        await asyncio.sleep(0.01)
        seen.append((time.perf_counter(), used()))
        while seen[-1][0] - seen[1][0] >= STILL:
            seen.popleft()
        (since, before), (now, after) = seen[0], seen[-1]
        if now - since >= STILL and after - before < IDLE * STILL:
            return since


@asynccontextmanager
async def _asking(address: str, way: str, slots: Slots, *, streaming: bool) -> AsyncIterator[Leave]:
    """A request that a llama.cpp works on, and the way to leave it."""
    if way == "kill the client":
        async with _process(address, streaming=streaming) as process:
            await _begun(slots, streaming=streaming)
            yield lambda: process.send_signal(signal.SIGKILL)
        return
    async with MeshClient(address) as mesh, AsyncExitStack() as stack:
        if streaming and way == "leave the loop":
            pieces = aiter(mesh.generate_stream(PROMPT, max_tokens=TOKENS, **GREEDY))
            await anext(pieces)
            await slots.until(1)
            yield pieces.aclose
            return
        work = _stream(mesh) if streaming else _whole(mesh)
        task = asyncio.create_task(work)
        stack.push_async_callback(_ended, task)
        await _begun(slots, streaming=streaming)
        yield task.cancel if way != "close the client" else mesh.close


async def _begun(slots: Slots, *, streaming: bool) -> None:
    await slots.until(1)
    if not streaming:
        await asyncio.sleep(random.uniform(0.0, 1.0))


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()  # that the client was closed


async def _stream(mesh: MeshClient) -> None:
    async for _ in mesh.generate_stream(PROMPT, max_tokens=TOKENS, **GREEDY):
        pass


async def _whole(mesh: MeshClient) -> None:
    async with mesh.request("/completion", BODY, model=MODEL) as answer:
        await answer.read()


@asynccontextmanager
async def _process(address: str, *, streaming: bool) -> AsyncIterator[asyncio.subprocess.Process]:
    """A client in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.serving.slots", address, "stream" if streaming else "whole"]
    process = await asyncio.create_subprocess_exec(*command)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _client(address: str, what: str) -> None:
    async with MeshClient(address) as mesh:
        await (_stream(mesh) if what == "stream" else _whole(mesh))


if __name__ == "__main__":
    asyncio.run(_client(*sys.argv[1:]))
