"""What the encrypted wire costs: two processes on one machine, over loopback TCP.

    python benchmarks/wire.py [--json] [--seconds 2]

Handshakes per second, small messages per second, bulk MB/s in both directions, 1,000 streams at once on
one connection, and the memory of an idle connection and of an idle stream (growth of the serving
process's unshared memory, which leaves out what the kernel keeps for a socket).
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
    elif stream.method == "memory":
        await stream.end({"uss": psutil.Process().memory_full_info().uss})


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

    async def memory(self, connection: Connection) -> int:
        """Unshared bytes of the process."""
        async with await connection.open("memory", {}) as stream:
            await stream.read()
            assert stream.trailer is not None
            return int(stream.trailer["uss"])


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


async def measure(seconds: float) -> dict[str, float]:
    """Every figure, by name."""
    figures: dict[str, float] = {"handshake, one side, µs": pure_handshakes(seconds / 2)}
    async with server() as other:
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            connections = await asyncio.gather(*(other.connect() for _ in range(8)))
            await asyncio.gather(*(connection.close() for connection in connections))
            count += len(connections)
        figures["connections opened and closed/s"] = count / (time.perf_counter() - start)

        connection = await other.connect()
        figures["PING round trip, µs"] = await round_trip(connection, 500)
        for streams in (1, 8):
            messages = 20_000 // streams
            start = time.perf_counter()
            opened = [await connection.open("tokens", {"count": messages}) for _ in range(streams)]
            sizes = await asyncio.gather(*(drain(stream) for stream in opened))
            assert set(sizes) == {messages * len(TOKEN)}
            figures[f"small messages/s, {streams} streams"] = (
                messages * streams / (time.perf_counter() - start)
            )
        chunks = int(seconds * 3000)
        start = time.perf_counter()
        async with await connection.open("download", {"chunks": chunks}) as stream:
            size = await drain(stream)
        assert size == chunks * len(CHUNK)
        figures["bulk download, MB/s"] = size / (time.perf_counter() - start) / 1e6
        start = time.perf_counter()
        async with await connection.open("upload", {}, end=False) as stream:
            for _ in range(chunks):
                await stream.send(CHUNK)
            await stream.end()
            await stream.read(30)
        figures["bulk upload, MB/s"] = size / (time.perf_counter() - start) / 1e6

        start = time.perf_counter()
        opened = [await connection.open("tokens", {"count": 20}) for _ in range(1000)]
        sizes = await asyncio.gather(*(drain(stream) for stream in opened))
        assert set(sizes) == {20 * len(TOKEN)}
        figures["1,000 streams at once × 20 messages, messages/s"] = 20_000 / (time.perf_counter() - start)
        await connection.close()

    async with server() as other:  # a fresh process, so that nothing freed hides the growth
        connection = await other.connect()
        before = await other.memory(connection)
        idle = [await other.connect() for _ in range(500)]
        figures["idle connection, KiB"] = (await other.memory(connection) - before) / len(idle) / 1024
        before = await other.memory(connection)
        held = [await connection.open("hold", {}, end=False) for _ in range(1000)]
        for stream in held:
            await stream.head(5)
        figures["idle stream with its handler, KiB"] = (await other.memory(connection) - before) / 1000 / 1024
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
