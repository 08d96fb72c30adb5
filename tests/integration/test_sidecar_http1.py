"""The HTTP client against answers written byte by byte: every framing, every cut, every bad server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from sidecar.errors import (
    BackendError,
    BackendUnreachable,
    InvalidRequest,
    SidecarError,
    SidecarStopped,
    SidecarTimeout,
)
from sidecar.http1 import HIGH_WATER, MAX_HEAD_BYTES
from sidecar.transport import HttpClient
from tests.support import seconds

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], object]

CHUNKED = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"8;ext=1\r\ndata: a\n\r\n1\r\n\n\r\nA\r\ndata: \xc3\xa9b\n\r\n1\r\n\n\r\n0\r\nTrailer: x\r\n\r\n"
)
LENGTH = b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\ndata: a\n\ndata: \xc3\xa9b\n\n"
UNTIL_CLOSE = b"HTTP/1.0 200 OK\r\n\r\ndata: a\n\ndata: \xc3\xa9b\n\n"
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n" + LENGTH
BODY = "data: a\n\ndata: éb\n\n".encode()


class Server:
    """Answers each connection with the next script; keeps what it was sent."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self.scripts: list[Script] = []
        self.closed = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
            result = script(reader, writer)
            if asyncio.iscoroutine(result):
                await result
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            self.closed.set()


@asynccontextmanager
async def answering(*scripts: Script) -> AsyncIterator[tuple[Server, HttpClient]]:
    server = Server()
    server.scripts = list(scripts)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    async with listener, HttpClient(f"http://127.0.0.1:{port}", "key") as client:
        yield server, client


def sends(data: bytes) -> Script:
    return lambda _reader, writer: writer.write(data)


def sends_cut(data: bytes, at: int) -> Script:
    async def script(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data[:at])
        await writer.drain()
        await asyncio.sleep(0.001)
        writer.write(data[at:])

    return script


@pytest.mark.parametrize("answer", [CHUNKED, LENGTH, UNTIL_CLOSE, INTERIM])
async def test_every_framing_wherever_it_is_cut(answer: bytes) -> None:
    for cut in range(1, len(answer), 5):
        async with answering(sends_cut(answer, cut)) as (_, client):
            async with await client.request("GET", "/x", timeout=seconds(5)) as response:
                assert response.status == 200
                assert await response.read() == BODY
            assert client.in_flight == 0


async def test_what_is_sent() -> None:
    async with answering(sends(LENGTH)) as (server, client):
        headers = {"Accept": "text/event-stream", "X-Conversation-Id": "1", "Host": "evil", "Cookie": "c"}
        await (await client.request("POST", "/v1/x?y=1", {"a": "é"}, headers)).read()
        await (await client.request("GET", "/health", api_key="other")).read()
    first, second = server.requests
    assert first.startswith(b"POST /v1/x?y=1 HTTP/1.1\r\nhost: 127.0.0.1:")
    assert set(first.split(b"\r\n")[2:-2]) == {
        b"connection: close",
        b"accept: text/event-stream",
        b"content-type: application/json",
        b"content-length: 10",
        b"authorization: Bearer key",
    }
    assert b"authorization: Bearer other" in second
    assert b"content-length" not in second


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/x HTTP/1.1\r\nX-Evil: 1", {}),
        ("/a b", {}),
        ("/é", {}),
        ("no-slash", {}),
        ("", {}),
        ("/x\n", {}),
        ("/x", {"Accept": "a\r\nX-Evil: 1"}),
        ("/x", {"Content-Type": "a\nb"}),
    ],
)
async def test_a_request_that_would_smuggle_is_refused(path: str, headers: dict[str, str]) -> None:
    async with answering(sends(LENGTH)) as (server, client):
        with pytest.raises(InvalidRequest):
            await client.request("GET", path, headers=headers)
    assert server.requests == []


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200",
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n",
    ],
    ids=["nothing", "cut head", "no HTTP", "endless headers"],
)
async def test_no_usable_head_is_tried_twice_then_an_error(answer: bytes) -> None:
    async with answering(sends(answer)) as (server, client):
        with pytest.raises(BackendUnreachable) as caught:
            await client.request("GET", "/x", timeout=seconds(5))
        assert not caught.value.started
        assert len(server.requests) == 2


async def test_a_fresh_connection_helps_once() -> None:
    async with answering(sends(b""), sends(LENGTH)) as (server, client):
        assert await (await client.request("POST", "/x", {"a": 1})).read() == BODY
        assert len(server.requests) == 2


@pytest.mark.parametrize("answer", [CHUNKED[:-20], LENGTH[:-3], CHUNKED.replace(b"A\r\n", b"ZZ\r\n")])
async def test_a_body_that_breaks_off_is_an_error_after_what_came(answer: bytes) -> None:
    async with answering(sends(answer)) as (server, client):
        response, got = await client.request("GET", "/x"), b""
        with pytest.raises(BackendUnreachable) as caught:
            async for data in response:
                got += data
        assert caught.value.started
        assert BODY.startswith(got)
        assert len(server.requests) == 1


async def test_nobody_listens() -> None:
    async with answering(sends(LENGTH)) as (_, client):
        pass
    async with HttpClient(client.base_url) as late:
        with pytest.raises(BackendUnreachable, match="no connection"):
            await late.request("GET", "/x")


@pytest.mark.parametrize("url", ["http://127.0.0.1:none", "http://127.0.0.1:99999", "http://"])
async def test_a_strange_address_is_an_error(url: str) -> None:
    async with HttpClient(url) as client:
        with pytest.raises(BackendUnreachable, match="no connection"):
            await client.request("GET", "/x", timeout=seconds(5))


# --- pumping: the body goes to a function instead of a reader


@pytest.mark.parametrize("room", [True, False], ids=["always room", "room for one piece"])
@pytest.mark.parametrize("answer", [CHUNKED, LENGTH, UNTIL_CLOSE, INTERIM])
async def test_every_framing_can_be_pumped(answer: bytes, room: bool) -> None:
    for cut in range(1, len(answer), 5):
        got: list[bytes] = []

        def sink(data: bytes, got: list[bytes] = got) -> bool:
            got.append(data)
            return room

        async with answering(sends_cut(answer, cut)) as (_, client):
            async with await client.request("GET", "/x", timeout=seconds(5)) as response:
                async with asyncio.timeout(seconds(5)):
                    while not await response.pump(sink):
                        pass
            assert b"".join(got) == BODY


async def test_a_sink_without_room_makes_the_server_wait() -> None:
    total, sent = 32 * HIGH_WATER, 0

    async def floods(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        while sent < total:
            writer.write(bytes(HIGH_WATER))
            sent += HIGH_WATER
            await writer.drain()

    async with answering(floods) as (_, client), await client.request("GET", "/x") as response:
        got = 0

        def sink(data: bytes) -> bool:
            nonlocal got
            got += len(data)
            return False

        assert not await response.pump(sink)
        before = -1
        while before != sent:  # until it stands still
            before = sent
            await asyncio.sleep(0.1)
        assert sent < total
        async with asyncio.timeout(seconds(10)):
            while not await response.pump(sink):
                pass
        assert got == total


@pytest.mark.parametrize("at_once", [True, False], ids=["with what is there", "with what comes"])
async def test_what_a_sink_raises_ends_the_pumping(at_once: bool) -> None:
    go = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED[:-30] if at_once else CHUNKED.partition(b"8;ext")[0])
        await go.wait()
        writer.write(CHUNKED.partition(b"\r\n\r\n")[2][:20])
        await reader.read()

    def sink(_data: bytes) -> bool:
        raise LookupError("full")

    async with answering(script) as (server, client):
        async with await client.request("GET", "/x") as response:
            asyncio.get_running_loop().call_soon(go.set)
            with pytest.raises(LookupError, match="full"):
                await asyncio.wait_for(response.pump(sink), seconds(5))
        await asyncio.wait_for(server.closed.wait(), seconds(5))


async def test_a_body_that_breaks_off_is_an_error_for_the_pump() -> None:
    got: list[bytes] = []

    def sink(data: bytes) -> bool:
        got.append(data)
        return True

    async with answering(sends(CHUNKED[:-20])) as (_, client), await client.request("GET", "/x") as response:
        with pytest.raises(BackendUnreachable) as caught:
            await response.pump(sink)
    assert caught.value.started
    assert BODY.startswith(b"".join(got))


async def never(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def test_deadlines() -> None:
    async def stalls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED[:100])
        await reader.read()

    async with answering(never) as (server, client):
        with pytest.raises(SidecarTimeout, match="no answer"):
            await client.request("GET", "/x", timeout=0.05)
        assert client.in_flight == 0
        await asyncio.wait_for(server.closed.wait(), seconds(5))
    async with answering(stalls) as (server, client):
        response = await client.request("GET", "/x", idle_timeout=0.05)
        with pytest.raises(SidecarTimeout, match="nothing for"):
            await response.read()
        await asyncio.wait_for(server.closed.wait(), seconds(5))


async def test_closing_the_client_ends_every_wait() -> None:
    async def starts(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED[:100])
        await reader.read()

    async def read(client: HttpClient) -> None:
        await (await client.request("GET", "/x")).read()

    async with answering(starts, never) as (_, client):
        tasks = [asyncio.create_task(read(client)) for _ in range(3)]
        await asyncio.sleep(0.05)
        await client.aclose()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [SidecarStopped] * 3
        assert client.in_flight == 0
        with pytest.raises(SidecarStopped):
            await client.request("GET", "/x")


async def test_a_slow_reader_makes_the_server_wait_not_our_memory_grow() -> None:
    total = 32 << 20
    written = 0

    async def floods(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % total)
        while written < total:
            writer.write(b"x" * 65536)
            written += 65536
            await writer.drain()

    async with answering(floods) as (_, client):
        response = await client.request("GET", "/x")
        await asyncio.sleep(0.2)
        assert written < HIGH_WATER + (12 << 20)  # ours, and what the kernel holds
        assert len(await response.read()) == total


async def test_answers_have_a_limit_and_must_be_json() -> None:
    async with answering(sends(LENGTH)) as (_, client):
        with pytest.raises(SidecarError, match="over 10 bytes"):
            await (await client.request("GET", "/x")).read(limit=10)
        with pytest.raises(BackendError, match="not JSON"):
            await client.call("GET", "/x")
        with pytest.raises(BackendError, match="not JSON"):
            async for _ in client.stream_events("/x", {}):
                pass
