"""Chunks per second of `sidecar.client` against a bare socket reader, on the same llama.cpp in one run.

    python -m benchmarks.sidecar_client [--rounds N] [--tokens N] [--json]

Both read the raw bytes of streamed /completion answers and count events; neither parses one. The two
are interleaved and the median of the rounds' ratios counts, since timings of a shared machine drift.
Goal: 0.9 or more at one stream and at eight.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import uvloop

from sidecar.client import SidecarClient
from sidecar.config import SidecarConfig
from sidecar.modes import Mode
from sidecar.process import Supervisor
from sidecar.runtime import find_server

DEMO = Path(__file__).parent.parent / "sidecar" / "assets" / "qmesh-demo.gguf"
GOAL = 0.9


@dataclass(frozen=True)
class Sample:
    """One reading of some streams: events, seconds, CPU seconds of this process."""

    events: int
    seconds: float
    cpu: float

    @property
    def rate(self) -> float:
        """Events per second."""
        return self.events / self.seconds


Reader = Callable[[SidecarClient, bytes], Awaitable[int]]


async def bare(client: SidecarClient, body: bytes) -> int:
    """A socket, a request, and recv until the end: the least that any client can do."""
    loop = asyncio.get_running_loop()
    host, port = client.base_url.removeprefix("http://").split(":")
    head = (
        f"POST /completion HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {client.api_key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    events, done = 0, loop.create_future()

    class Counter(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            nonlocal events
            events += data.count(b"data: ")

        def connection_lost(self, _error: Exception | None) -> None:
            done.set_result(None)

    transport, _ = await loop.create_connection(Counter, host, int(port))
    transport.write(head.encode() + body)
    await done
    return events


async def ours(client: SidecarClient, body: bytes) -> int:
    """The raw path of the node: bytes as they come."""
    events = 0
    async with await client.request("POST", "/completion", body) as response:
        async for data in response:
            events += data.count(b"data: ")
    return events


async def measure(read: Reader, client: SidecarClient, body: bytes, streams: int, repeats: int) -> Sample:
    """Read `repeats` answers in each of `streams` tasks."""
    start, cpu = time.perf_counter(), time.process_time()

    async def one() -> int:
        return sum([await read(client, body) for _ in range(repeats)])

    events = sum(await asyncio.gather(*(one() for _ in range(streams))))
    return Sample(events, time.perf_counter() - start, time.process_time() - cpu)


async def main() -> None:
    """Run the rounds and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    prompt = {"prompt": "Once upon a time", "n_predict": args.tokens, "ignore_eos": True, "stream": True}
    body = json.dumps(prompt).encode()
    with tempfile.TemporaryDirectory() as folder:
        config = SidecarConfig(model=DEMO, slots=8, log_dir=Path(folder), mode=Mode.PERFORMANCE)
        async with Supervisor(config, find_server()) as supervisor:
            client = await supervisor.ensure_ready(60)
            await measure(ours, client, body, 1, 2)  # warm
            for streams, repeats in ((1, 4), (8, 1)):
                rounds = [
                    (
                        await measure(bare, client, body, streams, repeats),
                        await measure(ours, client, body, streams, repeats),
                    )
                    for _ in range(args.rounds)
                ]
                report(streams, rounds, as_json=args.json)


def report(streams: int, rounds: list[tuple[Sample, Sample]], *, as_json: bool) -> None:
    """Print the medians of the rounds at one number of streams."""
    ratios = sorted(mine.rate / base.rate for base, mine in rounds)
    result = {
        "streams": streams,
        "bare_chunks_per_s": round(statistics.median(base.rate for base, _ in rounds)),
        "client_chunks_per_s": round(statistics.median(mine.rate for _, mine in rounds)),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(ratios[0], 3),
        "ratio_max": round(ratios[-1], 3),
        "bare_cpu_us_per_chunk": round(1e6 * statistics.median(b.cpu / b.events for b, _ in rounds), 1),
        "client_cpu_us_per_chunk": round(1e6 * statistics.median(m.cpu / m.events for _, m in rounds), 1),
        "goal": GOAL,
    }
    if as_json:
        print(json.dumps(result))
        return
    print(
        f"{streams} stream(s): bare {result['bare_chunks_per_s']:,} chunks/s, client "
        f"{result['client_chunks_per_s']:,} chunks/s, ratio {result['ratio']} "
        f"({result['ratio_min']} to {result['ratio_max']}), CPU per chunk {result['bare_cpu_us_per_chunk']} and "
        f"{result['client_cpu_us_per_chunk']} µs; goal {GOAL}: {'met' if result['ratio'] >= GOAL else 'NOT met'}"
    )


if __name__ == "__main__":
    uvloop.run(main())
