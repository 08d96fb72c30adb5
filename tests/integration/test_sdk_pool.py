"""The client's connections and questions are shared, and given up without harm to others."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from client_sdk import MeshClient, Timeouts
from client_sdk.pool import Pool
from mesh.address import parse_address
from mesh.errors import AuthenticationError, ConnectFailed, ConnectionClosed, DeadlineExceeded
from mesh.identity import Identity
from mesh.noise import CipherState
from mesh.transport import Stream, serve
from tests.sdk_support import MODEL, OPEN, node, record, says
from tests.support import seconds


async def unexpected(stream: Stream) -> None:
    raise AssertionError(stream.method)


@asynccontextmanager
async def pool(timeout: float = 5.0) -> AsyncIterator[Pool]:
    one = Pool(Identity(), OPEN, connect_timeout=seconds(timeout))
    try:
        yield one
    finally:
        async with asyncio.timeout(seconds(5)):
            await one.close()
        assert len(one) == 0


async def test_many_who_want_a_peer_share_one_connection() -> None:
    peer = Identity()
    listener = await serve("127.0.0.1", 0, identity=peer, network=OPEN, on_stream=unexpected)
    async with pool() as one:
        got = await asyncio.gather(*(one.get(peer.id, [listener.address]) for _ in range(20)))
        assert len(set(map(id, got))) == 1
        assert await one.enter(listener.address) is got[0], "the entry is a peer that is known"
        assert len(one) == 1
        assert len(listener.connections) == 1
    await listener.close(0)


@pytest.mark.parametrize("steps", range(5))
async def test_one_who_gives_up_does_not_take_it_from_the_others(steps: int) -> None:
    peer = Identity()
    listener = await serve("127.0.0.1", 0, identity=peer, network=OPEN, on_stream=unexpected)
    async with pool() as one:
        impatient = asyncio.create_task(one.get(peer.id, [listener.address]))
        patient = asyncio.create_task(one.get(peer.id, [listener.address]))
        for _ in range(steps):
            await asyncio.sleep(0)
        impatient.cancel()
        assert not (await patient).closed
        assert impatient.cancelled() or impatient.done()
    await listener.close(0)


@pytest.mark.parametrize("steps", range(8))
async def test_closing_while_connecting_leaves_nothing(steps: int) -> None:
    peer = Identity()
    listener = await serve("127.0.0.1", 0, identity=peer, network=OPEN, on_stream=unexpected)
    one = Pool(Identity(), OPEN, connect_timeout=seconds(5))
    asking = [
        asyncio.create_task(one.get(peer.id, [listener.address])),
        asyncio.create_task(one.enter(listener.address)),
    ]
    for _ in range(steps):
        await asyncio.sleep(0)
    async with asyncio.timeout(seconds(5)):
        await one.close()
        await asyncio.wait(asking)
        assert len(one) == 0
        for task in asking:
            assert task.cancelled() or task.exception() is not None or task.result().closed
        with pytest.raises(ConnectionClosed):
            await one.get(peer.id, [listener.address])
        with pytest.raises(ConnectionClosed):
            await one.enter(listener.address)
        await listener.close(0)


async def test_only_the_own_node_is_reached_without_a_socket() -> None:
    own, other = Identity(), Identity()
    listener = await serve("127.0.0.1", 0, identity=own, network=OPEN, on_stream=unexpected)
    one = Pool(own, OPEN, connect_timeout=seconds(5), own_node=listener.connect_within)
    async with node(other, {}) as address:
        within = await one.get(own.id, [])
        assert within.remote_address == ("", 0)
        assert await one.enter(listener.address, own.id) is within
        assert (await one.get(own.id, [listener.address])) is within
        direct = await one.get(other.id, [parse_address(address)])
        assert direct.remote_address == parse_address(address)
        assert type(direct.state.inbox._cipher) is CipherState, "encrypted"
        await one.close()
    await listener.close(0)
    assert within.closed
    one = Pool(own, OPEN, connect_timeout=seconds(5), own_node=listener.connect_within)
    with pytest.raises(ConnectFailed, match="shutting down"):
        await one.get(own.id, [listener.address])
    await one.close()


async def test_nobody_can_pose_as_a_peer() -> None:
    async with node(Identity(), {}) as address, pool() as one:
        with pytest.raises(AuthenticationError):
            await one.get(Identity().id, [parse_address(address)])


async def test_a_peer_without_addresses_or_without_an_answer() -> None:
    async with pool(0.1) as one:
        with pytest.raises(ConnectFailed, match="no address"):
            await one.get(Identity().id, [])
        with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(DeadlineExceeded):
            await one.get(Identity().id, [silent.getsockname()])


async def test_a_lost_connection_is_made_anew() -> None:
    peer = Identity()
    async with pool() as one:
        async with node(peer, {}) as address:
            first = await one.get(peer.id, [parse_address(address)])
        async with asyncio.timeout(seconds(5)):
            await first.wait_closed()
        async with node(peer, {}) as address:
            second = await one.get(peer.id, [parse_address(address)])
            assert second is not first
            assert not second.closed


async def test_an_entry_is_trusted_at_its_first_use_and_nobody_else_there_later() -> None:
    first = Identity()
    async with node(first, {"models": says({"models": {"a": 1}})}) as address:
        mesh = MeshClient(address, timeouts=Timeouts(find=seconds(2)))
        assert [model.name for model in await mesh.models()] == ["a"]
    port = parse_address(address)[1]
    async with node(Identity(), {"models": says({"models": {"forged": 1}})}, port):
        with pytest.raises(ConnectFailed, match="refused the handshake"):
            await mesh.models()
    async with node(first, {"models": says({"models": {"b": 1}})}, port):
        assert [model.name for model in await mesh.models()] == ["b"]
    await mesh.close()


async def test_a_dead_entry_node_does_not_make_the_client_wait() -> None:
    with socket.create_server(("127.0.0.1", 0)) as black_hole:
        port = black_hole.getsockname()[1]
        async with node(Identity(), {"models": says({"models": {"a": 1}})}) as address:
            began = time.monotonic()
            async with MeshClient([f"127.0.0.1:{port}", address], timeouts=Timeouts(connect=60)) as mesh:
                assert [model.name for model in await mesh.models()] == ["a"]
                assert [model.name for model in await mesh.models()] == ["a"]
            assert time.monotonic() - began < seconds(3)
        black_hole.settimeout(seconds(5))
        caller, _ = black_hole.accept()
        with caller:
            caller.settimeout(seconds(5))
            while caller.recv(4096):  # what it had said, then the end
                pass
        black_hole.setblocking(False)
        with pytest.raises(BlockingIOError):
            black_hole.accept()  # the second question went straight to the node that had answered


async def test_a_slow_entry_node_is_left_for_one_that_answers() -> None:
    left = asyncio.Event()

    async def hang(stream: Stream) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    async with (
        node(Identity(), {"models": hang}) as slow,
        node(Identity(), {"models": says({"models": {"a": 1}})}) as live,
        MeshClient([slow, live], timeouts=Timeouts(find=60)) as mesh,
        asyncio.timeout(seconds(5)),
    ):
        assert [model.name for model in await mesh.models()] == ["a"]
        await left.wait()


async def test_a_useless_answer_is_given_where_nobody_has_a_better_one() -> None:
    async with (
        node(Identity(), {"models": says({"models": {}})}) as empty,
        MeshClient([empty, "127.0.0.1:1"], timeouts=Timeouts(find=seconds(2))) as mesh,
    ):
        assert await mesh.models() == []


async def test_identical_questions_are_asked_once_and_remembered() -> None:
    asked: list[str] = []
    worker = Identity()
    soon = int(time.time()) + 2

    async def find(stream: Stream) -> None:
        asked.append(str(stream.meta["model"]))
        await stream.end(
            {"records": [record(worker, "127.0.0.1:1"), record(Identity(), "b:1", expires=soon)]}
        )

    async with node(Identity(), {"find": find}) as address, MeshClient(address) as mesh:
        directory = mesh._directory
        answers = await asyncio.gather(*(directory.workers(MODEL) for _ in range(10)))
        assert asked == [MODEL]
        assert {len(answer) for answer in answers} == {2}
        await directory.workers(MODEL)
        assert asked == [MODEL]
        await directory.workers(MODEL, fresh=True)
        assert asked == [MODEL] * 2
        await asyncio.sleep(soon - time.time())
        (left,) = await directory.workers(MODEL)
        assert left.node_id == worker.id
        assert asked == [MODEL] * 2, "what expires is left out of what is remembered"


async def test_one_who_gives_up_a_question_does_not_take_the_answer_from_the_others() -> None:
    release = asyncio.Event()

    async def find(stream: Stream) -> None:
        await release.wait()
        await stream.end({"records": [record(Identity(), "127.0.0.1:1")]})

    async with node(Identity(), {"find": find}) as address, MeshClient(address) as mesh:
        impatient, patient = (asyncio.create_task(mesh._directory.workers(MODEL)) for _ in range(2))
        await asyncio.sleep(0.01)
        impatient.cancel()
        release.set()
        assert len(await patient) == 1
