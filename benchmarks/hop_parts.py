"""Where the time of a streamed chunk goes: each step of its way through a worker's node and into a client.

    python -m benchmarks.hop_parts [--rounds 20]

Processor time in microseconds a chunk, in one process with warm caches: the median of the rounds. The hop
as a whole is measured by `benchmarks.hop`; what it takes above the sum of these steps is the kernel's share
in waking two processes, and what other programs push out of the processor's caches in between.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import statistics
import time
from collections.abc import Callable, Mapping

import uvloop

from mesh.connection import ConnectionState
from mesh.frames import Data, Head, Open
from mesh.noise import CipherState
from node.tail import Tail
from sidecar.http1 import Exchange

CHUNK = (
    b'data: {"index":0,"content":" the","tokens":[262],"stop":false,"id_slot":-1,"tokens_predicted":12}\n\n'
)
HTTP_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
HTTP_CHUNK = b"%x\r\n%s\r\n" % (len(CHUNK), CHUNK)
CHUNKS = 500
GATHERED = (1, 4, 16)
"""Chunks that are ready together and share a frame."""


def parse() -> Callable[[], None]:
    """llama.cpp's bytes → the body, handed to a sink, as `Exchange.pump` does."""
    exchange = Exchange(asyncio.get_running_loop())
    exchange.data_received(HTTP_HEAD)
    pumping = exchange.pump(lambda data: True)
    pumping.send(None)

    def step() -> None:
        exchange.data_received(HTTP_CHUNK)

    return step


def pair() -> tuple[ConnectionState, ConnectionState, int]:
    """A caller's and a worker's end with one open stream."""
    caller, worker = (
        ConnectionState(
            initiator=initiator,
            send=CipherState(bytes([initiator]) * 32),
            receive=CipherState(bytes([not initiator]) * 32),
            now=0.0,
            load=dict,
        )
        for initiator in (True, False)
    )
    sid = caller.open("infer", {}, b"{}")
    assert type(worker.receive(b"".join(caller.outbox.pull(1 << 20)), 0.0)[0]) is Open
    worker.send_head(sid, {})
    assert type(caller.receive(b"".join(worker.outbox.pull(1 << 20)), 0.0)[0]) is Head
    return caller, worker, sid


def queue(worker: ConnectionState, sid: int) -> Callable[[], None]:
    """Keep the end of the answer for its timings, and queue the bytes."""
    tail = Tail()

    def step() -> None:
        tail.feed(CHUNK)
        worker.send_data(sid, CHUNK)

    return step


def per_chunk(step: Callable[[], None]) -> float:
    """Processor time of a step in microseconds."""
    began = time.process_time()
    for _ in range(CHUNKS):
        step()
    return (time.process_time() - began) / CHUNKS * 1e6


def measure_states(gathered: int) -> dict[str, float]:
    """The steps between the two sockets."""
    caller, worker, sid = pair()
    put = queue(worker, sid)
    times = dict.fromkeys(("queue", "frame and seal", "open and decode"), 0.0)
    for _ in range(CHUNKS // gathered):
        marks = [time.perf_counter()]
        for _ in range(gathered):
            put()
        marks.append(time.perf_counter())
        wire = worker.outbox.pull(1 << 20)
        marks.append(time.perf_counter())
        data = b"".join(wire)
        marks.append(time.perf_counter())
        events = caller.receive(data, 0.0)
        marks.append(time.perf_counter())
        assert type(events[0]) is Data
        size = sum(len(event.data) for event in events if isinstance(event, Data))
        assert size == gathered * len(CHUNK)
        caller.consumed(sid, size)
        worker.receive(b"".join(caller.outbox.pull(1 << 20)), 0.0)
        for name, at in (("queue", 0), ("frame and seal", 1), ("open and decode", 3)):
            times[name] += marks[at + 1] - marks[at]
    return {name: total / (CHUNKS // gathered * gathered) * 1e6 for name, total in times.items()}


async def socket_write_and_read() -> float:
    """One write and one read on loopback TCP in the event loop, with the kernel's work for both."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    read = asyncio.Event()

    class Reader(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            read.set()

    writer, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
    reader, _ = await loop.create_connection(Reader, sock=theirs)
    began = time.process_time()
    for _ in range(CHUNKS):
        writer.write(CHUNK)
        await read.wait()
        read.clear()
    took = (time.process_time() - began) / CHUNKS * 1e6
    writer.close()
    reader.close()
    return took


async def measure(rounds: int) -> dict[str, float]:
    """Every step, `rounds` times after one that is not counted: the medians."""
    seen: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        results = {"parse HTTP": per_chunk(parse()), "socket write + read": await socket_write_and_read()}
        for gathered in GATHERED:
            results |= {
                f"{name}, {gathered} a frame": took for name, took in measure_states(gathered).items()
            }
        if number:
            for name, took in results.items():
                seen.setdefault(name, []).append(took)
    return {name: statistics.median(values) for name, values in seen.items()}


def report(steps: Mapping[str, float]) -> None:
    """The table."""
    print("us a chunk, median")
    for name, took in steps.items():
        print(f"{name:32}{took:8.2f}")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    report(uvloop.run(measure(arguments.rounds)))


if __name__ == "__main__":
    main()
