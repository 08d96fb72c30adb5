"""Does a gateway hold 500 streams at once in flat memory?

    python -m benchmarks.gateway_streams [--streams 500] [--rounds 3] [--tokens 200]

Three nodes with slots for all of the streams together, so that all are written at once, slowly; the gateway
of the first node has a third of its answers from its own process and the others over the wire. Each round
asks for all of them together and waits for the end of each; the memory of the nodes' processes (without
llama.cpp's) is looked at before, while every stream is open, and after. Exits 1 where an answer was not
whole, or where the streams were never open together.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil
import uvloop

from node.cluster import Cluster, Member

NODES = 3
SPARE = 1.5
"""More slots than streams, because they are not spread evenly."""
MODEL = Path(__file__).parent.parent / "sidecar" / "assets" / "qmesh-demo.gguf"
LOOK = 0.25
"""Seconds between two looks at the memory."""
LIMIT = 300.0
"""Seconds for one round."""
MB = 1e6


@dataclass
class Round:
    """What became of one round; memory in MB, of all nodes together."""

    before: float
    open: int = 0
    most: int = 0
    whole: int = 0
    tokens: int = 0
    took: float = 0.0
    held: list[float] = field(default_factory=list)
    """Memory while every stream was open."""
    after: float = 0.0


def prepare(folder: Path, streams: int, tokens: int) -> None:
    """Have the nodes' models serve the streams all at once."""
    model = {"path": str(MODEL), "slots": math.ceil(streams * SPARE / NODES), "context": tokens + 64}
    for number in range(NODES):
        home = folder / f"node-{number + 1}"
        home.mkdir()
        lines = [f"{key} = {json.dumps(value)}" for key, value in model.items()]
        (home / "qmesh.toml").write_text("[[models]]\n" + "\n".join(lines), encoding="utf-8")


async def stream(session: aiohttp.ClientSession, url: str, tokens: int, state: Round) -> None:
    """One answer, read to its end."""
    body = {"prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    begun, tail = False, b""
    try:
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            async for data in answer.content.iter_any():
                state.open += not begun
                state.most = max(state.most, state.open)
                begun = True
                state.tokens += data.count(b'"text":')
                tail = (tail + data)[-1024:]
        state.whole += b'"finish_reason":"length"' in tail and tail.endswith(b"data: [DONE]\n\n")
    except aiohttp.ClientError as error:
        print(f"a stream failed: {error}", file=sys.stderr)
    finally:
        state.open -= begun


async def hold(url: str, members: list[Member], streams: int, tokens: int) -> Round:
    """All streams once."""
    state = Round(before=memory(members))

    async def watch() -> None:
        while True:
            await asyncio.sleep(LOOK)
            if state.open == streams:
                state.held.append(memory(members))

    began = time.perf_counter()
    connector = aiohttp.TCPConnector(force_close=True, limit=0)
    async with asyncio.timeout(LIMIT), aiohttp.ClientSession(connector=connector) as session:
        watching = asyncio.create_task(watch())
        async with asyncio.TaskGroup() as group:
            for _ in range(streams):
                group.create_task(stream(session, url, tokens, state))
        watching.cancel()
    state.took = time.perf_counter() - began
    await asyncio.sleep(1.0)  # what was open is closed
    state.after = memory(members)
    return state


def memory(members: list[Member]) -> float:
    """The resident memory of the nodes' own processes, MB."""
    return float(sum(psutil.Process(member.pid).memory_info().rss for member in members) / MB)


async def measure(streams: int, rounds: int, tokens: int) -> bool:
    """Every round, printed as it ends; whether all was well."""
    good = True
    with tempfile.TemporaryDirectory(prefix="qmesh-streams-") as name:
        prepare(Path(name), streams, tokens)
        cluster = Cluster(Path(name), attached=True)
        try:
            members = await cluster.up(NODES, ["--gateway", "127.0.0.1:0"])
            url = str(members[0].ready["gateway"])
            print("memory of the nodes in MB: before; while all are open, first and last third; after")
            for number in range(1, rounds + 1):
                state = await hold(url, members, streams, tokens)
                third = max(1, len(state.held) // 3)
                held = [statistics.median(part) for part in (state.held[:third], state.held[-third:]) if part]
                print(
                    f"round {number}: {state.most} open at once, {state.whole} whole, {state.tokens} events "
                    f"in {state.took:.0f} s: {state.before:.0f}; "
                    f"{', '.join(f'{value:.0f}' for value in held)}; {state.after:.0f}",
                    flush=True,
                )
                good &= state.most == state.whole == streams
        finally:
            await cluster.down()
    return good


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=200)
    arguments = parser.parse_args()
    return 0 if uvloop.run(measure(arguments.streams, arguments.rounds, arguments.tokens)) else 1


if __name__ == "__main__":
    sys.exit(main())
