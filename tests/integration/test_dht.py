"""The DHT over real UDP on the loopback."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from mesh.dht import Dht
from mesh.errors import ConfigurationError, DeadlineExceeded
from mesh.identity import Identity
from mesh.network import Network
from mesh.records import WorkerRecord

OPEN = Network()


def make_record(identity: Identity, model: str = "demo", *, health: int = 90, seq: int = 0) -> WorkerRecord:
    now = time.time()
    return WorkerRecord(
        node_id=identity.id,
        seq=seq or int(now * 1000),
        expires=int(now) + 180,
        addresses=("127.0.0.1:9470",),
        model=model,
        digest=b"d" * 16,
        health=health,
        slots=2,
        context=2048,
        generation_speed=30.0,
        prompt_speed=300.0,
        flags=frozenset(),
        software="test",
    )


@asynccontextmanager
async def running(dht: Dht, *seeds: Dht, host: str = "127.0.0.1") -> AsyncIterator[Dht]:
    await dht.start(host, 0)
    try:
        dht.join([seed.address for seed in seeds])
        yield dht
    finally:
        await dht.stop()


@asynccontextmanager
async def mesh(count: int, network: Network = OPEN) -> AsyncIterator[list[tuple[Dht, Identity]]]:
    async with AsyncExitStack() as stack:
        nodes: list[tuple[Dht, Identity]] = []
        for _ in range(count):
            identity = Identity()
            seeds = [nodes[0][0]] if nodes else []
            nodes.append((await stack.enter_async_context(running(Dht(identity, network), *seeds)), identity))
        yield nodes


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # the table has no event of its own
            await asyncio.sleep(0.02)


async def test_a_record_announced_on_one_node_is_found_on_all() -> None:
    async with mesh(5) as nodes:
        await until(lambda: all(len(dht.peers) == 4 for dht, _ in nodes))
        dht, identity = nodes[3]
        record = make_record(identity)
        assert await dht.announce(record) == 4
        for other, _ in nodes:
            [found] = await other.lookup("demo")
            assert found.record == record
        assert await nodes[0][0].lookup("another") == []


async def test_a_lone_node_finds_its_own_record() -> None:
    identity = Identity()
    async with running(Dht(identity, OPEN)) as dht:
        assert await dht.announce(make_record(identity)) == 0
        assert [found.record.node_id for found in await dht.lookup("demo")] == [identity.id]


async def test_a_client_finds_workers_and_enters_no_table() -> None:
    async with mesh(3) as nodes, running(Dht(None, OPEN, client=True), nodes[0][0]) as client:
        await nodes[2][0].announce(make_record(nodes[2][1]))
        assert len(await client.lookup("demo")) == 1
        await until(lambda: len(client.peers) == 3)
        assert all(peer.port != client.address[1] for dht, _ in nodes for peer in dht.peers)
        with pytest.raises(ConfigurationError):
            await client.announce(make_record(Identity()))


async def test_contacts_survive_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "contacts"
    async with mesh(2) as nodes:
        identity = Identity()
        async with running(Dht(identity, OPEN, state_path=path), nodes[0][0]) as dht:
            await until(lambda: len(dht.peers) == 2)
        async with running(Dht(identity, OPEN, state_path=path)) as again:
            await until(lambda: len(again.peers) == 2)
            assert {peer.found for peer in again.peers} <= {"remembered", "dht"}


async def test_a_broken_state_file_is_a_start_without_contacts(tmp_path: Path) -> None:
    path = tmp_path / "contacts"
    for junk in (b"", b"\xc1", b"junk" * 99, b"\x80", b"\x82\xa1v\x01\xa8contacts\xc0"):
        path.write_bytes(junk)
        async with running(Dht(Identity(), OPEN, state_path=path)) as dht:
            assert dht.peers == []


async def test_a_ping_tells_id_distance_and_seen_address() -> None:
    async with mesh(2) as [(first, _), (second, identity)]:
        pong = await first.ping(*second.address)
        assert pong.peer_id == identity.id
        assert 0 < pong.rtt < 1
        assert pong.seen_address == first.address
        assert abs(pong.clock_offset) < 1
        assert first.seen_address == first.address
        silent = ("127.0.0.1", 1)
        with pytest.raises(DeadlineExceeded, match=r"127\.0\.0\.1:1"):
            await first.ping(*silent, timeout=0.1)


async def test_two_meshes_never_mix() -> None:
    async with mesh(2) as nodes, running(Dht(Identity(), Network("other")), nodes[0][0]) as other:
        private = Network("public", b"x" * 32)
        async with running(Dht(Identity(), private), nodes[0][0], other) as third:
            assert await third.lookup("demo") == []
            assert await other.lookup("demo") == []
            assert third.peers == other.peers == []
            assert nodes[0][0].address in third.unreached
