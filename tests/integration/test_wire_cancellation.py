"""Cancelling at every await of a connection's life leaves nothing behind on either side."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from mesh.errors import QMeshError
from mesh.handshake import Initiator
from mesh.transport import Connection, Listener, Stream, connect_any, serve
from tests.support import seconds
from tests.wire_support import ALICE, BOB, OPEN

BODY = bytes(range(256)) * 1024
handlers: set[Stream] = set()


async def handler(stream: Stream) -> None:
    """Echoes in small pieces, and counts as running while it does."""
    handlers.add(stream)
    try:
        await stream.send_head({})
        while (data := await stream.read()) is not None:
            await stream.send(data)
            await asyncio.sleep(0)
        await stream.end()
    finally:
        handlers.discard(stream)


@asynccontextmanager
async def listening() -> AsyncIterator[Listener]:
    listener = await serve("127.0.0.1", 0, identity=BOB, network=OPEN, on_stream=handler)
    try:
        yield listener
    finally:
        await listener.close()


async def a_whole_life(listener: Listener) -> None:
    """Connect (two addresses, so that there is a race), open, send and read every chunk, close."""
    connection = await connect_any(
        [("127.0.0.1", 9), listener.address], identity=ALICE, network=OPEN, peer_id=BOB.id
    )
    try:
        await connection.ping(seconds(5))
        async with await connection.open("echo", {}, end=False) as stream:
            for start in range(0, len(BODY), 100_000):
                await stream.send(BODY[start : start + 100_000])
                await stream.read()
            await stream.end()
            await stream.head()
            while await stream.read() is not None:
                pass
    finally:
        await connection.close()


async def cancelled_after(turns: int, work: Coroutine[Any, Any, None]) -> bool:
    """Run for so many turns of the event loop, then cancel. Whether it had ended by itself."""
    task = asyncio.create_task(work)
    for _ in range(turns):
        if task.done():
            break
        await asyncio.sleep(0)
    ended = task.done()
    task.cancel()
    await asyncio.wait([task], timeout=seconds(10))
    if not task.cancelled():
        assert task.done()
        task.result()
    return ended


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(seconds(5)):
        while not condition():  # noqa: ASYNC110  (what it waits for has no event)
            await asyncio.sleep(0.001)


def nothing_left(listener: Listener) -> bool:
    listener.admission.validate()
    return not (
        listener.connections or handlers or listener.admission.half_open or listener.admission.established
    )


def open_files() -> int:
    return len(list(Path("/proc/self/fd").glob("*")))


def alive(kind: type) -> int:
    gc.collect()
    return sum(type(one) is kind for one in gc.get_objects())


async def test_a_caller_cancelled_anywhere_leaves_nothing() -> None:
    async with listening() as listener:
        await a_whole_life(listener)
        await eventually(lambda: nothing_left(listener))
        files, connections = open_files(), alive(Connection)
        for _ in range(4):  # the kernel makes every pass a little different
            turns, ended = 0, False
            while not ended:
                ended = await cancelled_after(turns, a_whole_life(listener))
                await eventually(lambda: nothing_left(listener))
                assert asyncio.all_tasks() == {asyncio.current_task()}
                turns += 1
            assert turns > 30, "it was really cancelled in many places"
        await eventually(lambda: open_files() <= files)
        assert alive(Connection) <= connections
        assert alive(Stream) == alive(Initiator) == 0


async def test_closing_a_listener_cancelled_anywhere_can_be_repeated() -> None:
    turns, ended = 0, False
    while not ended:
        async with listening() as listener:
            client = asyncio.create_task(a_whole_life(listener))
            await eventually(lambda: bool(handlers))
            ended = await cancelled_after(turns, listener.close(seconds(5)))
            await listener.close()
            assert nothing_left(listener)
            await asyncio.wait([client], timeout=seconds(5))
            assert client.done()
            assert client.exception() is None or isinstance(client.exception(), QMeshError)
        turns += 1
        if turns > 40:
            break


async def test_a_handler_cancelled_at_every_await_tells_its_caller() -> None:
    """The peer's RESET, the loss of the connection and the listener's end all reach the handler."""
    async with listening() as listener:
        for how in ("reset", "abort", "close"):
            connection = await connect_any([listener.address], identity=ALICE, network=OPEN, peer_id=BOB.id)
            streams = [await connection.open("echo", {}, end=False) for _ in range(20)]
            for number, stream in enumerate(streams):
                await stream.send(BODY[: number * 10_000])
            await eventually(lambda: len(handlers) == 20)
            if how == "reset":
                async with asyncio.TaskGroup() as group:
                    for stream in streams:
                        group.create_task(stream.__aexit__(None, None, None))
                assert connection.open_streams == 0
            elif how == "abort":
                connection.abort()
            else:
                await connection.close()
            await eventually(lambda: not handlers)
            await connection.close()
            await eventually(lambda: nothing_left(listener))
