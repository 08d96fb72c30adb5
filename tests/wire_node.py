"""A process with nothing but a listener, for tests that attack it: `python -m tests.wire_node`.

Prints its port, then serves until its input ends.
"""

from __future__ import annotations

import asyncio
import sys

import psutil
import uvloop

from mesh.transport import Listener, Stream, serve
from tests.wire_support import BOB, PRIVATE

listeners: list[Listener] = []


async def handler(stream: Stream) -> None:
    """`tokens` answers like a worker, `flood` never stops, `stats` tells what the process holds."""
    if stream.method == "tokens":
        await stream.send_head({"status": 200})
        for number in range(10):
            await stream.send(b"token %d" % number)
            await asyncio.sleep(0)
    elif stream.method == "flood":
        while True:
            await stream.send(bytes(16_384))
    elif stream.method == "swallow":
        await stream.read_all(1 << 20)
    elif stream.method == "stats":
        (listener,) = listeners
        await stream.end(
            {
                "rss": psutil.Process().memory_info().rss,
                "half_open": listener.admission.half_open,
                "established": listener.admission.established,
                "connections": len(listener.connections),
                "streams": sum(connection.open_streams for connection in listener.connections),
                "tasks": len(asyncio.all_tasks()),
                "files": psutil.Process().num_fds(),
            }
        )


async def main() -> None:
    listener = await serve("127.0.0.1", 0, identity=BOB, network=PRIVATE, on_stream=handler)
    listeners.append(listener)
    print(listener.address[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await listener.close()


if __name__ == "__main__":
    uvloop.run(main())
