"""Real connections over loopback TCP, under asyncio's own loop and under uvloop."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from mesh.admission import AdmissionPolicy
from mesh.errors import (
    AuthenticationError,
    BadRequest,
    ConnectFailed,
    ConnectionClosed,
    ContextExceeded,
    DeadlineExceeded,
    ErrorCode,
    InternalError,
    Overloaded,
    ProtocolError,
    QMeshError,
    ShuttingDown,
    Unauthorized,
)
from mesh.identity import Identity
from mesh.limits import MAX_CONNECTIONS_PER_PEER
from mesh.network import Network
from mesh.transport import Connection, Listener, Stream, connect, connect_any, serve
from tests.support import seconds
from tests.wire_support import ALICE, BOB, OPEN, PRIVATE, echo, listening

Scenario = Callable[[], Coroutine[Any, Any, None]]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, None]], None]:
    """Runs a scenario to its end under one of the event loops, and asserts that no task is left."""

    async def watched(scenario: Coroutine[Any, Any, None]) -> None:
        async with asyncio.timeout(seconds(20)):
            await scenario
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if left:
            _, left = await asyncio.wait(left, timeout=seconds(2))
        assert not left

    def run_scenario(scenario: Coroutine[Any, Any, None]) -> None:
        if request.param == "uvloop":
            uvloop.run(watched(scenario), debug=True)
        else:
            asyncio.run(watched(scenario), debug=True)

    return run_scenario


async def dial(listener: Listener, network: Network = OPEN, **options: Any) -> Connection:
    return await connect(
        *listener.address, **{"identity": ALICE, "network": network, "peer_id": BOB.id, **options}
    )


async def read_all(stream: Stream) -> bytes:
    return await stream.read_all(1 << 30, seconds(10))


async def within(listener: Listener) -> Connection:
    return listener.connect_within()


Run = Callable[[Coroutine[Any, Any, None]], None]
Call = Callable[[Listener], Coroutine[Any, Any, Connection]]
both_ways = pytest.mark.parametrize("call", [dial, within])


@pytest.mark.parametrize("network", [OPEN, PRIVATE], ids=["open", "private"])
@pytest.mark.parametrize("known", [True, False], ids=["known id", "asked id"])
def test_a_request_is_answered(run: Run, network: Network, known: bool) -> None:
    async def scenario() -> None:
        async with listening(network=network, load=lambda: {"busy": 2}) as listener:
            connection = await dial(listener, network, peer_id=BOB.id if known else None)
            assert connection.peer_id == BOB.id
            assert connection.peer_agent.startswith("qmesh/")
            assert connection.remote_address == listener.address
            assert connection.clock_skew is not None
            assert abs(connection.clock_skew) < 5
            async with await connection.open("echo", {"n": 1}, b"hello") as stream:
                assert await stream.head(seconds(5)) == {"method": "echo", "n": 1}
                assert await stream.read(seconds(5)) == b"hello"
                assert await stream.read(seconds(5)) is None
                assert stream.trailer == {"size": 5}
            assert 0 <= await connection.ping(seconds(5)) < 5
            assert connection.load == {"busy": 2}
            assert connection.rtt is not None
            assert connection.open_streams == 0
            await connection.close()
            await connection.close()
            assert connection.closed
            with pytest.raises(ConnectionClosed, match="closed here"):
                await connection.open("echo", {})
            with pytest.raises(ConnectionClosed):
                await connection.ping(1)

    run(scenario())


def test_a_nodes_own_client_needs_no_socket(run: Run) -> None:
    async def scenario() -> None:
        nobody = AdmissionPolicy(allow=frozenset(), max_connections=0, max_connections_per_peer=0)
        async with listening(policy=nobody, load=lambda: {"busy": 2}) as listener:
            connection = listener.connect_within()
            assert connection.peer_id == BOB.id
            assert connection.remote_address == ("", 0)
            async with await connection.open("echo", {"n": 1}, b"hello") as stream:
                assert await stream.head(seconds(5)) == {"method": "echo", "n": 1}
                assert await read_all(stream) == b"hello"
                assert stream.trailer == {"size": 5}
            assert 0 <= await connection.ping(seconds(5)) < 5
            assert connection.load == {"busy": 2}
            (served,) = listener.connections
            assert served.peer_id == BOB.id
            await connection.close()
            await served.wait_closed()
            assert not listener.connections

    run(scenario())


@both_ways
def test_large_bodies_stream_both_ways_on_many_streams(run: Run, call: Call) -> None:
    async def scenario() -> None:
        async with listening() as listener:
            connection = await call(listener)
            body = bytes(range(256)) * 4096  # 1 MiB

            async def one() -> None:
                async with await connection.open("echo", {}, end=False) as stream:
                    async with asyncio.TaskGroup() as group:
                        reading = group.create_task(read_all(stream))
                        for start in range(0, len(body), 100_000):
                            await stream.send(body[start : start + 100_000])
                        await stream.end()
                    assert reading.result() == body

            async with asyncio.TaskGroup() as group:
                for _ in range(8):
                    group.create_task(one())
            connection.state.validate()
            await connection.close()

    run(scenario())


@both_ways
def test_a_thousand_streams_at_once(run: Run, call: Call) -> None:
    async def scenario() -> None:
        async with listening() as listener:
            connection = await call(listener)
            streams = [await connection.open("echo", {"n": n}, b"%d" % n) for n in range(1000)]
            assert connection.open_streams == 1000
            for n, stream in enumerate(streams):
                assert await read_all(stream) == b"%d" % n
            assert connection.open_streams == 0
            await connection.close()

    run(scenario())


@both_ways
def test_errors_of_a_handler_arrive_by_name(run: Run, call: Call) -> None:
    async def handler(stream: Stream) -> None:
        errors: dict[str, Exception] = {
            "full": Overloaded("queue is full", retry_after=1.5),
            "long": ContextExceeded("8000 tokens"),
            "wire": ConnectionClosed("secret text of another connection"),
            "late": DeadlineExceeded("secret"),
        }
        await stream.send(b"begun")
        raise errors[stream.method]

    async def scenario() -> None:
        async with listening(handler) as listener:
            connection = await call(listener)
            for method, kind, text in (
                ("full", Overloaded, "queue is full"),
                ("long", ContextExceeded, "8000 tokens"),
                ("wire", InternalError, "the request failed at the worker"),
            ):
                stream = await connection.open(method, {})
                with pytest.raises(kind, match=text) as caught:
                    await read_all(stream)
                if isinstance(caught.value, Overloaded):
                    assert caught.value.retry_after == 1.5
                with pytest.raises(kind):
                    await stream.head()
            await connection.close()

    run(scenario())


def test_an_end_with_an_error_code_delivers_the_body_first(run: Run) -> None:
    async def handler(stream: Stream) -> None:
        await stream.send(b"half an answer")
        await stream.end({"code": int(ErrorCode.OVERLOADED), "message": "gone", "retry_after_ms": 250})

    async def scenario() -> None:
        async with listening(handler) as listener:
            connection = await dial(listener)
            stream = await connection.open("half", {})
            assert await stream.read(seconds(5)) == b"half an answer"
            with pytest.raises(Overloaded, match="gone") as caught:
                await stream.read(seconds(5))
            assert caught.value.retry_after == 0.25
            await connection.close()

    run(scenario())


def test_a_bug_in_a_handler_ends_the_request_and_surfaces(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def handler(stream: Stream) -> None:
        raise ZeroDivisionError("a bug")

    async def scenario() -> None:
        async with listening(handler) as listener:
            connection = await dial(listener)
            stream = await connection.open("infer", {})
            with pytest.raises(InternalError) as caught:
                await read_all(stream)
            assert "a bug" not in str(caught.value)
            with pytest.raises(ZeroDivisionError):
                await listener.wait_closed()
            await connection.close()

    run(scenario())
    assert "a bug" in caplog.text


def test_a_bug_in_a_handler_of_the_caller_ends_its_connection(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(stream: Stream) -> None:
        raise ZeroDivisionError("a bug")

    async def scenario() -> None:
        async with listening() as listener:
            connection = await dial(listener, on_stream=broken)
            await connection.ping(seconds(5))
            (back,) = listener.connections
            with pytest.raises(QMeshError):
                await read_all(await back.open("call", {}))
            with pytest.raises(ZeroDivisionError):
                await connection.wait_closed()

    run(scenario())
    assert "a bug" in caplog.text


def test_one_reader_and_one_writer_at_a_time(run: Run) -> None:
    async def handler(stream: Stream) -> None:
        await asyncio.sleep(3600)

    async def scenario() -> None:
        async with listening(handler) as listener:
            connection = await dial(listener)
            stream = await connection.open("wait", {}, end=False)
            waiting = [asyncio.create_task(stream.read()), asyncio.create_task(stream.send(bytes(1 << 20)))]
            await connection.ping(seconds(5))
            with pytest.raises(RuntimeError):
                await stream.head()
            with pytest.raises(RuntimeError):
                await stream.send(b"x")
            stream.reset(ErrorCode.CANCELLED)
            for result in await asyncio.gather(*waiting, return_exceptions=True):
                assert isinstance(result, QMeshError)
            await connection.close()

    run(scenario())


def test_running_bodies_are_gathered_and_nothing_else_waits(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a gathering time as long as the test: only a head and more of a body may wait, for what is next."""
    monkeypatch.setattr("mesh.transport.connection.GATHER", seconds(60))

    async def scenario() -> None:
        go = asyncio.Queue[None]()

        async def handler(stream: Stream) -> None:
            await stream.send_head({})
            for piece in (b"first", b"more", b"and more", b"the rest"):
                await go.get()
                await stream.send(piece)
            await stream.end()

        async with listening(handler) as listener:
            connection = await dial(listener)
            async with await connection.open("infer", {}) as stream:
                with pytest.raises(DeadlineExceeded):
                    await stream.head(0.1)
                go.put_nowait(None)
                await stream.head(seconds(5))
                assert await stream.read(seconds(5)) == b"first"
                go.put_nowait(None)
                with pytest.raises(DeadlineExceeded):
                    await stream.read(0.1)
                go.put_nowait(None)
                await connection.ping(seconds(5))
                assert await stream.read(seconds(5)) == b"moreand more"
                go.put_nowait(None)
                assert await stream.read(seconds(5)) == b"the rest"
                assert await stream.read(seconds(5)) is None
            await connection.close()

    run(scenario())


@both_ways
def test_leaving_a_stream_cancels_its_handler(run: Run, call: Call) -> None:
    async def scenario() -> None:
        ended = asyncio.Event()

        async def handler(stream: Stream) -> None:
            await stream.send_head({})
            try:
                while True:
                    await stream.send(b"token " * 100)
                    await asyncio.sleep(0)
            finally:
                ended.set()

        async with listening(handler) as listener:
            connection = await call(listener)
            async with await connection.open("infer", {}) as stream:
                await stream.read(seconds(5))
            assert stream.closed
            await ended.wait()
            with pytest.raises(QMeshError):
                await stream.read(1)
            with pytest.raises(QMeshError):
                await stream.send(b"x")
            assert connection.open_streams == 0
            await connection.close()

    run(scenario())


@both_ways
def test_a_lost_connection_cancels_handlers_and_fails_streams(run: Run, call: Call) -> None:
    async def scenario() -> None:
        begun, ended = asyncio.Event(), asyncio.Event()

        async def handler(stream: Stream) -> None:
            begun.set()
            try:
                await stream.read()
            finally:
                ended.set()

        async with listening(handler) as listener:
            connection = await call(listener)
            stream = await connection.open("infer", {}, end=False)
            await begun.wait()
            (served,) = listener.connections
            connection.abort()
            with pytest.raises(ConnectionClosed):
                await stream.read()
            await ended.wait()
            await served.wait_closed()
            second = await call(listener)
            stream = await second.open("infer", {}, end=False)
            pinging = asyncio.create_task(second.ping(seconds(20)))
            (served,) = listener.connections
            served.abort()
            with pytest.raises(ConnectionClosed):
                await stream.head(seconds(5))
            with pytest.raises(ConnectionClosed):
                await stream.send(b"x")
            await asyncio.wait([pinging])
            assert pinging.exception() is None or isinstance(pinging.exception(), ConnectionClosed)
            await second.wait_closed()

    run(scenario())


@both_ways
def test_waits_have_deadlines(run: Run, call: Call) -> None:
    async def handler(stream: Stream) -> None:
        await stream.read()
        await asyncio.sleep(3600)

    async def scenario() -> None:
        async with listening(handler) as listener:
            connection = await call(listener)
            async with await connection.open("infer", {}) as stream:
                with pytest.raises(DeadlineExceeded):
                    await stream.head(0.01)
                with pytest.raises(DeadlineExceeded):
                    await stream.read(0.01)
            await connection.close()

    run(scenario())


def test_the_peer_opens_streams_too(run: Run) -> None:
    async def scenario() -> None:
        async with listening() as listener:
            connection = await dial(listener, on_stream=echo)
            await connection.ping(seconds(5))
            (back,) = listener.connections
            assert back.peer_id == ALICE.id
            async with await back.open("echo", {}, b"from the listener") as stream:
                assert await read_all(stream) == b"from the listener"
            plain = await dial(listener)
            await plain.ping(seconds(5))
            (back,) = listener.connections - {back}
            with pytest.raises(BadRequest):
                await read_all(await back.open("echo", {}))
            await connection.close()
            await plain.close()

    run(scenario())


@both_ways
def test_a_refused_upload_ends_with_the_answer(run: Run, call: Call) -> None:
    async def handler(stream: Stream) -> None:
        await stream.end({"refused": "too large"})

    async def scenario() -> None:
        async with listening(handler) as listener:
            connection = await call(listener)
            stream = await connection.open("upload", {}, bytes(10 << 20))
            assert await stream.read(seconds(5)) is None
            assert stream.trailer == {"refused": "too large"}
            while not stream.closed:
                await connection.ping(seconds(5))
            assert connection.open_streams == 0
            await connection.close()

    run(scenario())


@both_ways
def test_closing_a_listener_drains(run: Run, call: Call) -> None:
    async def scenario() -> None:
        release = asyncio.Event()

        async def handler(stream: Stream) -> None:
            await stream.send(b"begun")
            await release.wait()
            await stream.end({"done": True})

        async with listening(handler) as listener:
            connection = await call(listener)
            idle = await call(listener)
            stream = await connection.open("infer", {})
            assert await stream.read(seconds(5)) == b"begun"
            closing = asyncio.create_task(listener.close(seconds(10)))
            await idle.wait_closed()
            assert "shutting down" in idle.close_reason
            with pytest.raises(ConnectFailed):
                await call(listener)
            assert not connection.accepts_streams
            with pytest.raises(ShuttingDown):
                await connection.open("infer", {})
            release.set()
            assert await stream.read(seconds(5)) is None
            assert stream.trailer == {"done": True}
            await closing
            await connection.wait_closed()

    run(scenario())


@both_ways
def test_what_does_not_drain_in_time_is_ended(run: Run, call: Call) -> None:
    async def scenario() -> None:
        async def handler(stream: Stream) -> None:
            await stream.send(b"begun")
            await asyncio.sleep(3600)

        async with listening(handler) as listener:
            connection = await call(listener)
            stream = await connection.open("infer", {})
            assert await stream.read(seconds(5)) == b"begun"
            await listener.close(0.05)
            with pytest.raises(ConnectionClosed, match="shutting down"):
                await stream.read(seconds(5))
            await connection.wait_closed()

    run(scenario())


def test_who_is_not_let_in(run: Run) -> None:
    async def scenario() -> None:
        policy = AdmissionPolicy(deny=frozenset({ALICE.id}))
        async with listening(policy=policy) as listener:
            connection = await dial(listener)
            with pytest.raises(Unauthorized):
                await read_all(await connection.open("echo", {}))
            await connection.wait_closed()
            allowed = await dial(listener, identity=Identity(bytes([9]) * 32))
            assert await read_all(await allowed.open("echo", {}, b"x")) == b"x"
            await allowed.close()

    run(scenario())


def test_connections_per_peer_are_bounded(run: Run) -> None:
    async def scenario() -> None:
        async with listening() as listener:
            connections = [await dial(listener) for _ in range(MAX_CONNECTIONS_PER_PEER)]
            for connection in connections:
                await connection.ping(seconds(5))
            refused = await dial(listener)
            with pytest.raises(Overloaded):
                await read_all(await refused.open("echo", {}))
            await refused.wait_closed()
            await connections[0].close()
            again = await dial(listener)
            assert await read_all(await again.open("echo", {}, b"x")) == b"x"
            for connection in [*connections, again]:
                await connection.close()

    run(scenario())


@pytest.mark.parametrize("known", [True, False], ids=["known id", "asked id"])
@pytest.mark.parametrize(
    "network",
    [OPEN, Network("ours", bytes(32)), Network("other", PRIVATE.secret)],
    ids=["open", "secret", "name"],
)
def test_another_network_cannot_connect(run: Run, network: Network, known: bool) -> None:
    async def scenario() -> None:
        async with listening(network=PRIVATE) as listener:
            with pytest.raises(AuthenticationError):
                await dial(listener, network, peer_id=BOB.id if known else None)

    run(scenario())


def test_another_node_at_the_address_is_noticed(run: Run) -> None:
    async def scenario() -> None:
        async with listening() as listener:
            with pytest.raises(AuthenticationError):
                await dial(listener, peer_id=Identity().id)

    run(scenario())


async def answering(reply: bytes | None) -> tuple[asyncio.Server, tuple[str, int]]:
    """A server that is no QMesh node: sends `reply` and closes, or says nothing at all."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if reply is None:
                await reader.read()
            else:
                await reader.read(1)
                writer.write(reply)
        finally:
            writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    return server, server.sockets[0].getsockname()[:2]


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ProtocolError),
        (b"\x00\x40" + bytes(64), AuthenticationError),
        (b"\x00\x05abc", QMeshError),
        (b"", QMeshError),
        (None, DeadlineExceeded),
    ],
    ids=["http", "rubbish", "cut off", "hung up", "silent"],
)
def test_what_is_no_node_gives_a_clear_error(run: Run, reply: bytes | None, error: type[Exception]) -> None:
    async def scenario() -> None:
        server, address = await answering(reply)
        try:
            for peer in (BOB.id, None):
                with pytest.raises(error):
                    await connect(*address, identity=ALICE, network=OPEN, peer_id=peer, timeout=seconds(0.5))
        finally:
            server.close()
            await server.wait_closed()

    run(scenario())


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_the_first_address_that_answers_wins(run: Run) -> None:
    async def scenario() -> None:
        silent, silent_address = await answering(None)
        async with listening() as listener:
            addresses = [("127.0.0.1", free_port()), silent_address, ("localhost", listener.address[1])]
            connection = await connect_any(
                addresses, identity=ALICE, network=OPEN, peer_id=BOB.id, timeout=seconds(5)
            )
            assert connection.remote_address == listener.address
            assert await read_all(await connection.open("echo", {}, b"x")) == b"x"
            await connection.close()
        silent.close()
        await silent.wait_closed()
        with pytest.raises(ConnectFailed, match="port"):
            await connect_any([addresses[0]], identity=ALICE, network=OPEN, peer_id=BOB.id)
        with pytest.raises(ConnectFailed, match="no address"):
            await connect_any([], identity=ALICE, network=OPEN, peer_id=BOB.id)
        with pytest.raises(ConnectFailed):
            await connect("host.invalid", 1, identity=ALICE, network=OPEN, peer_id=BOB.id)

    run(scenario())


def test_ipv6(run: Run) -> None:
    async def scenario() -> None:
        listener = await serve("::1", 0, identity=BOB, network=OPEN, on_stream=echo)
        connection = await dial(listener)
        assert connection.remote_address[0] == "::1"
        assert await read_all(await connection.open("echo", {}, b"x")) == b"x"
        await connection.close()
        await listener.close()

    run(scenario())


def test_a_bound_socket_can_be_given(run: Run) -> None:
    async def scenario() -> None:
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        listener = await serve("", 0, identity=BOB, network=OPEN, on_stream=echo, sock=sock)
        assert listener.address == sock.getsockname()
        connection = await dial(listener)
        await connection.close()
        await listener.close()

    run(scenario())


def test_a_tampering_hand_between_is_noticed_and_sees_nothing(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)

    async def scenario() -> None:
        seen = bytearray()
        tamper = asyncio.Event()

        async with listening() as listener:

            async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                upstream_reader, upstream_writer = await asyncio.open_connection(*listener.address)

                async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
                    while data := await source.read(65_536):
                        seen.extend(data)
                        if tamper.is_set():
                            data = data[:-1] + bytes([data[-1] ^ 1])
                        sink.write(data)
                    sink.close()

                async with asyncio.TaskGroup() as group:
                    group.create_task(pump(reader, upstream_writer))
                    group.create_task(pump(upstream_reader, writer))

            proxy = await asyncio.start_server(between, "127.0.0.1", 0)
            connection = await connect(
                *proxy.sockets[0].getsockname()[:2], identity=ALICE, network=OPEN, peer_id=BOB.id
            )
            stream = await connection.open("echo", {"secret": "prompt"}, b"an answer in clear")
            assert await read_all(stream) == b"an answer in clear"
            assert b"prompt" not in seen
            assert b"answer" not in seen
            assert seen.find(ALICE.id) < 0
            tamper.set()
            stream = await connection.open("echo", {}, b"more")
            with pytest.raises(ConnectionClosed):
                await read_all(stream)
            await connection.wait_closed()
            proxy.close()
            await proxy.wait_closed()

    run(scenario())
    assert "did not authenticate" in caplog.text
