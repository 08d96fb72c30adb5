"""What a peer can make the other side hold, and for how long."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from mesh.errors import DeadlineExceeded, FlowControl
from mesh.frames import Credit, Open, Ping
from mesh.limits import INITIAL_CREDIT, SEND_BUFFER
from mesh.transport import Connection, Handler, Listener, Stream, connect, serve
from tests import wire_attacks
from tests.support import seconds
from tests.wire_support import ALICE, BOB, OPEN, PRIVATE

CHUNK = bytes(range(256)) * 64


@asynccontextmanager
async def connected(handler: Handler) -> AsyncIterator[tuple[Connection, Listener]]:
    listener = await serve("127.0.0.1", 0, identity=BOB, network=OPEN, on_stream=handler)
    connection = await connect(*listener.address, identity=ALICE, network=OPEN, peer_id=BOB.id)
    try:
        yield connection, listener
    finally:
        await connection.close()
        await listener.close()


def only(listener: Listener) -> Connection:
    (connection,) = listener.connections
    return connection


async def test_an_upload_waits_for_its_reader() -> None:
    begun, go = asyncio.Event(), asyncio.Event()

    async def handler(stream: Stream) -> None:
        begun.set()
        await go.wait()
        body = await stream.read_all(100 << 20, seconds(5))
        await stream.end({"size": len(body), "right": body == CHUNK * 1024})

    async with connected(handler) as (connection, listener):
        stream = await connection.open("upload", {}, end=False)

        async def upload() -> None:
            for _ in range(1024):  # 16 MiB
                await stream.send(CHUNK)
            await stream.end()

        uploading = asyncio.create_task(upload())
        await begun.wait()
        for _ in range(20):
            await connection.ping(seconds(5))
            assert connection.state.streams[1].queued <= SEND_BUFFER + len(CHUNK)
            assert only(listener).state.streams[1].unread <= INITIAL_CREDIT
        assert only(listener).state.streams[1].unread == INITIAL_CREDIT
        assert not uploading.done()
        go.set()
        await uploading
        assert await stream.read(seconds(5)) is None
        assert stream.trailer == {"size": 16 << 20, "right": True}


async def test_an_answer_waits_for_its_reader() -> None:
    async def handler(stream: Stream) -> None:
        for _ in range(1024):
            await stream.send(CHUNK)

    async with connected(handler) as (connection, listener):
        slow = await connection.open("download", {})
        await slow.head(seconds(5))
        for _ in range(20):
            await connection.ping(seconds(5))
            assert connection.state.streams[1].unread <= INITIAL_CREDIT
            assert only(listener).state.streams[1].queued <= SEND_BUFFER + len(CHUNK)
        async with await connection.open("download", {}) as quick:
            assert await quick.read_all(100 << 20, seconds(5)) == CHUNK * 1024
        assert await slow.read_all(100 << 20, seconds(5)) == CHUNK * 1024


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines of seconds become tenths."""
    monkeypatch.setattr("mesh.connection.CREDIT_DEADLINE", 0.3)
    monkeypatch.setattr("mesh.liveness.PING_AFTER_IDLE", 0.1)
    monkeypatch.setattr("mesh.liveness.DEAD_AFTER_IDLE", seconds(0.8))
    monkeypatch.setattr("mesh.transport.connection.DEAD_AFTER_IDLE", seconds(0.8))


@pytest.mark.usefixtures("hurried")
async def test_a_reader_that_gives_no_credit_is_reset_and_its_handler_told() -> None:
    told: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    async def handler(stream: Stream) -> None:
        try:
            while True:
                await stream.send(CHUNK)
        except BaseException as error:
            told.set_result(error)
            raise

    async with connected(handler) as (connection, listener):
        stream = await connection.open("download", {})
        assert isinstance(await asyncio.wait_for(told, seconds(5)), FlowControl | asyncio.CancelledError)
        await connection.ping(seconds(5))
        with pytest.raises(FlowControl):
            await stream.read_all(100 << 20)
        assert only(listener).open_streams == 0
        assert not connection.closed


@pytest.mark.usefixtures("hurried")
async def test_an_idle_connection_lives_by_its_pings() -> None:
    async with connected(_nothing) as (connection, listener):
        await asyncio.sleep(seconds(1.2))  # the passing of time is what is tested
        assert not connection.closed
        assert not only(listener).closed
        assert connection.rtt is not None


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("stopped", ["reading", "everything"])
async def test_a_peer_that_stops_is_given_up(monkeypatch: pytest.MonkeyPatch, stopped: str) -> None:
    """A peer that does not read fills the socket; a silent one is missed after its PING."""

    async def handler(stream: Stream) -> None:
        while True:
            await stream.send(CHUNK)

    listener = await serve("127.0.0.1", 0, identity=BOB, network=PRIVATE, on_stream=handler)
    monkeypatch.setattr(wire_attacks.Target, "port", listener.address[1])
    async with wire_attacks.shaken_hands() as peer:
        await peer.send(*(Open(2 * n + 1, "download", {}) for n in range(100)))
        await peer.send(*(Credit(2 * n + 1, 1 << 20) for n in range(100)))
        while not listener.connections or only(listener).open_streams < 100:  # noqa: ASYNC110  (no event)
            await asyncio.sleep(0.01)
        there = only(listener)
        async with asyncio.timeout(seconds(10)):
            while not there.closed:
                if stopped == "reading":
                    await peer.send(Ping(1))
                await asyncio.sleep(0.02)
                queued = sum(stream.queued for stream in there.state.streams.values())
                assert queued <= 100 * (SEND_BUFFER + len(CHUNK))
        reason = "did not read" if stopped == "reading" else "silent|did not read"
        assert isinstance(there.error, DeadlineExceeded)
        assert re.search(reason, there.close_reason)
        await there.wait_closed()
    await listener.close()
    assert not listener.connections


async def _nothing(stream: Stream) -> None:
    """Answers with an empty END."""
