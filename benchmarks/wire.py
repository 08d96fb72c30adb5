"""What the encrypted wire costs: two processes on one machine, over loopback TCP.

    python benchmarks/wire.py [--json] [--seconds 2]

Handshakes per second, small messages per second, bulk MB/s in both directions, 1,000 streams at once on
one connection, and the memory of an idle connection and of an idle stream (growth of the serving
process's unshared memory, which leaves out what the kernel keeps for a socket). Next to each rate stands
the processor time that it took on the busier side, which other programs of the machine hardly change.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mesh.admission import AdmissionPolicy
from mesh.handshake import Initiator, Responder, take_message
from mesh.identity import Identity, parse_node_id
from mesh.network import Network
from mesh.noise import KEY_SIZE
from mesh.transport import Connection, Stream, connect, serve

NETWORK = Network("benchmark", bytes(range(32)))
CHUNK = bytes(65_536)
TOKEN = b'data: {"choices":[{"text":" token"}]}\n\n' * 3


async def handler(stream: Stream) -> None:
    """Serves the benchmark's methods."""
    meta = stream.meta
    if stream.method == "download":
        await stream.send_head({})
        for _ in range(meta["chunks"]):
            await stream.send(CHUNK)
    elif stream.method == "upload":
        size = 0
        while (data := await stream.read()) is not None:
            size += len(data)
        await stream.end({"size": size})
    elif stream.method == "tokens":
        await stream.send_head({})
        for _ in range(meta["count"]):
            await stream.send(TOKEN)
            await asyncio.sleep(0)  # each token is ready in a turn of the loop of its own
    elif stream.method == "hold":
        await stream.send_head({})
        await stream.read()
    elif stream.method == "usage":
        await stream.end({"uss": psutil.Process().memory_full_info().uss, "cpu": time.process_time()})


async def serve_forever() -> None:
    """The serving process: prints its address, then serves until its input ends."""
    identity = Identity()
    policy = AdmissionPolicy(max_connections=10_000, max_connections_per_peer=10_000)
    listener = await serve(
        "127.0.0.1", 0, identity=identity, network=NETWORK, on_stream=handler, policy=policy
    )
    print(identity.id.hex(), listener.address[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await listener.close()


class Server:
    """The other process."""

    def __init__(self, node_id: str, port: str) -> None:
        self.node_id = parse_node_id(node_id)
        self.port = int(port)

    async def connect(self) -> Connection:
        """A fresh connection."""
        return await connect(
            "127.0.0.1", self.port, identity=Identity(), network=NETWORK, peer_id=self.node_id
        )

    async def usage(self, connection: Connection) -> tuple[float, float]:
        """Unshared KiB and processor seconds of the process."""
        async with await connection.open("usage", {}) as stream:
            await stream.read()
            assert stream.trailer is not None
            return stream.trailer["uss"] / 1024, stream.trailer["cpu"]


@asynccontextmanager
async def server() -> AsyncIterator[Server]:
    """Runs the serving process."""
    process = subprocess.Popen(  # noqa: ASYNC220  (nothing else runs meanwhile)
        [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield Server(*process.stdout.readline().split())
    finally:
        process.stdin.close()
        process.wait(10)


async def drain(stream: Stream) -> int:
    """Reads to the end; the number of bytes."""
    size = 0
    while (data := await stream.read(30)) is not None:
        size += len(data)
    return size


def pure_handshakes(seconds: float) -> float:
    """Both sides of the handshake in memory, in microseconds of one core for one side."""
    caller, called = Identity(), Identity()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        initiator = Initiator(
            caller, NETWORK, called.id, ephemeral=secrets.token_bytes(KEY_SIZE), user_agent="benchmark"
        )
        responder = Responder(
            called, NETWORK, ephemeral=secrets.token_bytes(KEY_SIZE), user_agent="benchmark"
        )
        message = take_message(bytearray(initiator.message_1(0)))
        assert message is not None
        reply, _ = responder.message_2(responder.message_1(message), 0)
        answer = take_message(bytearray(reply))
        assert answer is not None
        initiator.message_2(answer, 0)
        count += 1
    return (time.perf_counter() - start) / count / 2 * 1e6


class Meter:
    """Collects figures: a rate, and the processor time of the busier side for one of what is counted."""

    def __init__(self, other: Server, connection: Connection, figures: dict[str, float]) -> None:
        self.other = other
        self.connection = connection
        self.figures = figures

    @asynccontextmanager
    async def rate(self, name: str, count: float, unit: str, scale: float = 1e6) -> AsyncIterator[None]:
        """Times the block, in which `count` things happen."""
        _, there = await self.other.usage(self.connection)
        here, start = time.process_time(), time.perf_counter()
        yield
        elapsed, used = time.perf_counter() - start, time.process_time() - here
        busier = max(used, (await self.other.usage(self.connection))[1] - there)
        self.figures[name] = count / elapsed
        self.figures[f"  {unit}"] = busier / count * scale


async def measure(seconds: float) -> dict[str, float]:
    """Every figure, by name."""
    figures: dict[str, float] = {"handshake, one side, µs": pure_handshakes(seconds / 2)}
    async with server() as other:
        connection = await other.connect()
        meter = Meter(other, connection, figures)
        rounds = int(seconds * 50)
        async with meter.rate("connections opened and closed/s", rounds * 8, "µs of processor for one"):
            for _ in range(rounds):
                connections = await asyncio.gather(*(other.connect() for _ in range(8)))
                await asyncio.gather(*(one.close() for one in connections))
        figures["PING round trip, µs"] = await round_trip(connection, 500)
        for streams, count in ((1, 10_000), (8, 20_000), (1000, 20_000)):
            async with meter.rate(
                f"small messages/s, {streams} streams at once", count, f"µs of processor for one of {streams}"
            ):
                opened = [
                    await connection.open("tokens", {"count": count // streams}) for _ in range(streams)
                ]
                sizes = await asyncio.gather(*(drain(stream) for stream in opened))
            assert set(sizes) == {count // streams * len(TOKEN)}
        chunks = int(seconds * 2000)
        size = chunks * len(CHUNK)
        async with (
            meter.rate("bulk download, MB/s", size / 1e6, "ms of processor for 1 MB down", 1e3),
            await connection.open("download", {"chunks": chunks}) as stream,
        ):
            assert await drain(stream) == size
        async with (
            meter.rate("bulk upload, MB/s", size / 1e6, "ms of processor for 1 MB up", 1e3),
            await connection.open("upload", {}, end=False) as stream,
        ):
            for _ in range(chunks):
                await stream.send(CHUNK)
            await stream.end()
            await stream.read(30)
        await connection.close()

    async with server() as other:  # a fresh process, so that nothing freed hides the growth
        connection = await other.connect()
        before, _ = await other.usage(connection)
        idle = [await other.connect() for _ in range(500)]
        figures["idle connection, KiB"] = ((await other.usage(connection))[0] - before) / len(idle)
        before, _ = await other.usage(connection)
        held = [await connection.open("hold", {}, end=False) for _ in range(1000)]
        for stream in held:
            await stream.head(5)
        figures["idle stream with its handler, KiB"] = ((await other.usage(connection))[0] - before) / 1000
        await asyncio.gather(*(one.close() for one in [*idle, connection]))
    return figures


async def round_trip(connection: Connection, count: int) -> float:
    """The median of `count` PINGs in microseconds."""
    times = sorted([await connection.ping(5) for _ in range(count)])
    return times[count // 2] * 1e6


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of each measurement")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        uvloop.run(serve_forever())
        return
    figures = uvloop.run(measure(options.seconds))
    if options.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:50} {value:12,.1f}")


if __name__ == "__main__":
    main()
