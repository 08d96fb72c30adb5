"""Many requests through one client process: is its memory flat, and is anything left?

    python -m benchmarks.soak [--requests 20000] [--at-once 16]

Two real nodes with the demo model. Text, chat, whole answers, answers that are left early and refused requests
take turns. Memory is that of the client alone. Exits 1 where it grew by more than GROWTH after the first tenth,
or where a task, a socket, a stream or a reservation is left.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
import tempfile
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import psutil
import uvloop

from client_sdk import MeshClient
from mesh.errors import BadRequest
from node.cluster import Cluster

MODEL = "qmesh-demo"
PROMPT = "Once upon a time"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0}
GROWTH = 4 << 20
"""Bytes; caches of the interpreter's allocator move by about one of these megabytes."""
REPORTS = 10


async def text(mesh: MeshClient, number: int) -> None:
    """A completion."""
    await mesh.generate(f"{PROMPT} {number}", max_tokens=3, **GREEDY)


async def chat(mesh: MeshClient, number: int) -> None:
    """A chat of one turn."""
    await mesh.chat(f"Hello {number}", max_tokens=3, **GREEDY)


async def whole(mesh: MeshClient, number: int) -> None:
    """A raw answer that is not streamed."""
    body = {"prompt": f"{PROMPT} {number}", "n_predict": 3}
    async with mesh.request("/completion", body, model=MODEL) as answer:
        await answer.read()


async def left(mesh: MeshClient, number: int) -> None:
    """An answer that is left after its first token."""
    async with aclosing(aiter(mesh.generate_stream(f"{PROMPT} {number}", max_tokens=64, **GREEDY))) as tokens:
        await anext(tokens)


async def refused(mesh: MeshClient, number: int) -> None:
    """A request that no worker takes."""
    try:
        await mesh.generate(f"{PROMPT} {number}", max_tokens=1, grammar="root ::= (", **GREEDY)
    except BadRequest:
        return
    raise AssertionError("a broken grammar was taken")


KINDS = (text, chat, text, whole, text, left, text, refused)


async def run(requests: int, at_once: int) -> int:
    """All requests; the exit status."""
    me, gained = psutil.Process(), 0
    with tempfile.TemporaryDirectory(prefix="qmesh-soak-") as folder:
        cluster = Cluster(Path(folder), attached=True)
        try:
            members = await cluster.up(2, ["--no-gateway", "--slots", "8"])
            async with MeshClient(members[0].address) as once:  # what the event loop itself opens once
                await text(once, 0)
            gc.collect()
            tasks = len(asyncio.all_tasks())
            files = me.num_fds()
            async with MeshClient([member.address for member in members]) as mesh:
                numbers = iter(range(requests))
                baseline = 0
                began = time.perf_counter()

                async def work() -> None:
                    for number in numbers:
                        await KINDS[number % len(KINDS)](mesh, number)
                        if (number + 1) % (requests // REPORTS) == 0:
                            report(number + 1)

                def report(done: int) -> None:
                    nonlocal baseline, gained
                    gc.collect()
                    memory = me.memory_info().rss
                    baseline = baseline or memory
                    gained = memory - baseline
                    print(
                        f"{done:7,} requests  {done / (time.perf_counter() - began):6.0f}/s  "
                        f"{memory / (1 << 20):6.1f} MiB ({gained / 1024:+.0f} KiB)  "
                        f"tasks {len(asyncio.all_tasks())}  files {me.num_fds()}",
                        flush=True,
                    )

                async with asyncio.TaskGroup() as group:
                    for _ in range(at_once):
                        group.create_task(work())
                reserved = sum(score.in_flight for score in mesh._dispatcher.board._scores.values())
                streams = sum(one.open_streams for one in mesh._pool._connections.values())
            await asyncio.sleep(0.1)
            left_over = {
                "tasks": len(asyncio.all_tasks()) - tasks,
                "files": me.num_fds() - files,
                "reservations": reserved,
                "streams": streams,
            }
        finally:
            await cluster.down()
    print(f"left over: {left_over}; grown by {gained / 1024:.0f} KiB after the first tenth")
    return int(gained > GROWTH or any(left_over.values()))


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--at-once", type=int, default=16)
    arguments = parser.parse_args()
    return int(uvloop.run(run(arguments.requests, arguments.at_once)))


if __name__ == "__main__":
    sys.exit(main())
