"""The DHT over real UDP on the loopback."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest

from mesh.dht import Dht, Duplicate, Role, limits, probe
from mesh.dht.datagrams import Codec
from mesh.dht.lookups import Lookups
from mesh.dht.store import Outcome
from mesh.errors import ConfigurationError, DeadlineExceeded
from mesh.identity import Identity
from mesh.network import Network
from mesh.records import WorkerRecord, model_key, sign_record
from tests.support import seconds

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


async def until(condition: Callable[[], bool], patience: float = 10.0) -> None:
    async with asyncio.timeout(seconds(patience)):
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
    async with mesh(3) as nodes, running(Dht(None, OPEN), nodes[0][0]) as client:
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


class Stranger:
    """A raw socket that speaks the DHT's format and counts bytes."""

    def __init__(self, network: Network = OPEN) -> None:
        self.codec = Codec(network)
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind(("127.0.0.1", 0))
        self.sock.setblocking(False)
        self.id = Identity().id

    async def ask(
        self, to: tuple[str, int], method: str, *arguments: Any, token: bytes = b"", pad: int = 0
    ) -> Any:
        """(reply or None, bytes sent, bytes received within 0.15 s)."""
        payload = [self.id, token, *arguments]
        if pad:
            payload.append(bytes(pad))
        data = self.codec.encode(0, os.urandom(20), [method, payload])
        self.sock.sendto(data, to)
        received = []
        await asyncio.sleep(0.15)
        with contextlib.suppress(BlockingIOError):
            while True:
                received.append(self.sock.recv(65536))
        replies = [self.codec.decode(item)[2] for item in received if item[0] == 1]
        return (replies[0] if replies else None), len(data), sum(map(len, received))

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


async def test_a_stranger_gets_at_most_three_times_what_it_sent() -> None:
    async with mesh(8) as nodes:
        await until(lambda: all(len(dht.peers) == 7 for dht, _ in nodes))
        for dht, identity in nodes:
            await dht.announce(make_record(identity))
        target = nodes[0][0].address
        key = model_key(OPEN, "demo")
        requests: list[tuple[str, tuple[Any, ...], int]] = [
            ("ping", (b"n" * 16,), 0),
            ("find_node", (key,), 0),
            ("find_value", (key, b"", 0), 0),
            ("find_value", (key, b"", 0), 120),
            ("find_value", (key, b"", 0), 350),
            ("find_value", (key, b"", 0), 1000),
            ("store", (key, b"x" * 300), 0),
            ("no such method", (), 0),
        ]
        for method, arguments, pad in requests:
            with Stranger() as stranger:
                _, sent, received = await stranger.ask(target, method, *arguments, pad=pad)
                assert received <= min(3 * sent, 1200), (method, pad)
        with Stranger() as stranger:
            reply, _, _ = await stranger.ask(target, "find_value", key, b"", 0, pad=350)
            assert reply[3] == 8
            assert len(reply[4]) >= 2
            reply, sent, received = await stranger.ask(target, "find_value", key, b"", 0, token=reply[1])
            assert len(reply[4]) >= 2, "with a token a small request gets a whole reply"
            assert 3 * sent < received <= 1200 + 200, "the reply, and a ping to see who asks"


async def test_stores_are_taken_only_with_a_token_and_when_valid() -> None:
    async with mesh(1) as [(dht, _)]:
        identity = Identity()
        key = model_key(OPEN, "demo")

        def blob(**changes: Any) -> bytes:
            return sign_record(replace(make_record(identity), **changes), identity, OPEN, key)

        now = int(time.time())
        with Stranger() as stranger:
            good = blob(seq=5)
            reply, _, _ = await stranger.ask(dht.address, "store", key, good)
            assert reply[2:] == [Outcome.BAD_TOKEN, 0]
            token = reply[1]
            for bad in (
                good[:-1] + bytes([good[-1] ^ 1]),
                blob(expires=now - 1),
                blob(expires=now + 1000),
                sign_record(make_record(identity), identity, OPEN, model_key(OPEN, "other")),
            ):
                reply, _, _ = await stranger.ask(dht.address, "store", key, bad, token=token)
                assert reply[2:] == [Outcome.REFUSED, 0]
            assert await dht.lookup("demo") == []
            reply, _, _ = await stranger.ask(dht.address, "store", key, good, token=token)
            assert reply[2:] == [Outcome.STORED, 1]
            reply, _, _ = await stranger.ask(dht.address, "store", key, blob(seq=4), token=token)
            assert reply[2:] == [Outcome.REFUSED, 1]
            [found] = await dht.lookup("demo")
            assert found.record.seq == 5
            oversize, _, _ = await stranger.ask(dht.address, "store", key, bytes(1300), token=token)
            assert oversize is None


async def test_hostile_answers_neither_raise_nor_hang() -> None:
    answers = [
        5,
        {},
        [],
        [1],
        "x",
        None,
        [b"i" * 32],
        [b"i" * 32, b"", 7, 7, 7],
        [b"i" * 32, b"", b"\xff" * 30],
    ]
    loop = asyncio.get_running_loop()

    async def lie(stranger: Stranger, answer: object) -> None:
        data, address = await loop.sock_recvfrom(stranger.sock, 65536)
        body = b"\x01" + data[1:21] + msgpack.packb(answer)
        stranger.sock.sendto(body + stranger.codec._tag(body), address)

    async with mesh(1) as [(dht, _)]:
        with contextlib.ExitStack() as stack:
            strangers = [stack.enter_context(Stranger()) for _ in answers]
            dht.join([stranger.sock.getsockname() for stranger in strangers])
            lies = [lie(stranger, answer) for stranger, answer in zip(strangers, answers, strict=True)]
            found, *_ = await asyncio.wait_for(asyncio.gather(dht.lookup("demo"), *lies), seconds(5))
            assert found == []
            assert dht.peers == []


async def test_a_lookup_beside_dead_contacts_is_bounded() -> None:
    async with mesh(10) as nodes:
        await until(lambda: all(len(dht.peers) == 9 for dht, _ in nodes))
        await nodes[0][0].announce(make_record(nodes[0][1]))
        for dht, _ in nodes[1:4]:
            await dht.stop()
        began = time.monotonic()
        assert len(await nodes[9][0].lookup("demo")) == 1
        assert time.monotonic() - began < seconds(1.5)


async def test_a_withdrawn_worker_is_gone_at_once() -> None:
    async with mesh(6) as nodes:
        await until(lambda: all(len(dht.peers) == 5 for dht, _ in nodes))
        dht, identity = nodes[1]
        record = make_record(identity)
        await dht.announce(record)
        assert await nodes[4][0].models() == {"demo": 1}
        began = time.monotonic()
        await dht.withdraw(record)
        assert time.monotonic() - began < seconds(2)
        assert [await other.lookup("demo") for other, _ in nodes] == [[]] * 6
        assert await nodes[4][0].models() == {}


async def test_a_worker_that_leaves_while_it_announces_is_gone_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with mesh(4) as nodes:
        await until(lambda: all(len(dht.peers) == 3 for dht, _ in nodes))
        dht, identity = nodes[1]
        sent, never = asyncio.Event(), asyncio.Event()
        ask_all = Lookups.ask_all

        async def slow(*arguments: Any) -> Any:
            await ask_all(*arguments)
            sent.set()
            await never.wait()

        monkeypatch.setattr(Lookups, "ask_all", slow)
        announcing = asyncio.create_task(dht.announce(make_record(identity)))
        await sent.wait()
        announcing.cancel()
        await asyncio.wait([announcing])
        monkeypatch.undo()
        assert len(await nodes[3][0].lookup("demo")) == 1
        await dht.withdraw(make_record(identity))
        assert await nodes[3][0].lookup("demo") == []


async def test_a_newcomer_is_of_use_and_in_no_table_until_it_is_a_holder() -> None:
    async with mesh(2) as nodes:
        identity = Identity()
        newcomer = Dht(identity, OPEN, role=Role.NEWCOMER)
        async with running(newcomer, nodes[0][0]):
            await until(lambda: len(newcomer.peers) == 2)
            assert await newcomer.announce(make_record(identity)) == 2
            assert len(await nodes[1][0].lookup("demo")) == 1
            assert all(peer.id != identity.id for dht, _ in nodes for peer in dht.peers)
            # who joins at it, finds the others through it
            async with running(Dht(Identity(), OPEN), newcomer) as other:
                await until(lambda: len(other.peers) == 3)
            newcomer.role = Role.HOLDER
            await newcomer.lookup("something else")
            await until(lambda: all(identity.id in {peer.id for peer in dht.peers} for dht, _ in nodes))


async def test_a_client_answers_the_pings_of_clients_alone() -> None:
    identity = Identity()
    async with running(Dht(identity, OPEN, role=Role.CLIENT)) as dht:
        assert (await probe(*dht.address, OPEN)).peer_id == identity.id
        async with running(Dht(Identity(), OPEN)) as holder:
            with pytest.raises(DeadlineExceeded):
                await holder.ping(*dht.address, 0.3)
            assert holder.peers == []


async def test_a_name_is_probed_at_all_its_addresses() -> None:
    async with running(Dht(Identity(), OPEN)) as dht:
        assert (await probe("localhost", dht.address[1], OPEN)).rtt > 0
    with pytest.raises(DeadlineExceeded, match="no answer over UDP"):
        await probe("localhost", dht.address[1], OPEN, 0.2)
    with pytest.raises(OSError):
        await probe("no-such-host.invalid", 1, OPEN, 0.2)


async def test_many_workers_of_one_model_are_all_found() -> None:
    async with mesh(4) as nodes:
        await until(lambda: all(len(dht.peers) == 3 for dht, _ in nodes))
        workers = [(Dht(identity := Identity(), OPEN), identity) for _ in range(30)]
        async with AsyncExitStack() as stack:
            for worker, identity in workers:
                await stack.enter_async_context(running(worker, nodes[0][0]))
                await worker.announce(make_record(identity))
            client = await stack.enter_async_context(running(Dht(None, OPEN), nodes[1][0]))
            found = await client.lookup("demo", 100)
            assert {item.record.node_id for item in found} == {identity.id for _, identity in workers}
            assert 16 <= len(await client.lookup("demo")) <= 30


async def test_lookups_before_and_after_the_mesh_is_reached() -> None:
    async with mesh(2) as nodes:
        await nodes[0][0].announce(make_record(nodes[0][1]))
        async with running(Dht(None, OPEN), nodes[1][0]) as client:
            assert len(await client.lookup("demo")) == 1, "the first lookup waits for the first contact"


async def test_an_unreachable_seed_is_named_and_tried_for_ever() -> None:
    async with mesh(1) as [(dht, _)]:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("127.0.0.1", 0))
        late = sock.getsockname()
        sock.close()
        dht.join([late, ("no-such-host.invalid", 9470)])
        assert await dht.lookup("demo") == []
        assert "no answer" in dht.unreached[late]
        await until(lambda: "resolved" in dht.unreached["no-such-host.invalid", 9470])
        other = Dht(Identity(), OPEN)
        await other.start(*late)
        try:
            await until(lambda: len(dht.peers) == 1, 15)
            assert late not in dht.unreached
        finally:
            await other.stop()


async def test_ipv6_and_ipv4_meet_on_a_dual_stack_socket() -> None:
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", 0))
    port = sock.getsockname()[1]
    dual = Dht(Identity(), OPEN)
    await dual.start("::", port, sock=sock)
    try:
        async with running(Dht(Identity(), OPEN)) as four, running(Dht(Identity(), OPEN), host="::1") as six:
            four.join([("127.0.0.1", port)])
            six.join([("::1", port)])
            await until(lambda: {peer.host for peer in dual.peers} == {"127.0.0.1", "::1"})
            assert four.seen_address == four.address
            assert [peer.host for peer in six.peers] == ["::1"]
    finally:
        await dual.stop()


async def test_stopping_in_the_middle_of_everything_leaves_nothing() -> None:
    async with mesh(3) as nodes:
        dht = Dht(Identity(), OPEN)
        await dht.start("127.0.0.1", 0)
        dht.join([nodes[0][0].address, ("127.0.0.1", 1)])
        looking = asyncio.create_task(dht.lookup("demo"))
        announcing = asyncio.create_task(nodes[1][0].announce(make_record(nodes[1][1])))
        await asyncio.sleep(0)
        announcing.cancel()
        await dht.stop()
        assert await asyncio.wait_for(looking, seconds(8)) == []
        await asyncio.wait([announcing])
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


async def test_a_busy_port_is_an_oserror() -> None:
    async with mesh(1) as [(dht, _)]:
        with pytest.raises(OSError, match="in use"):
            await Dht(Identity(), OPEN).start(*dht.address)


@pytest.mark.parametrize("role", [Role.HOLDER, Role.NEWCOMER])
async def test_a_second_node_with_the_same_identity_is_noticed_by_both(role: Role) -> None:
    async with mesh(4) as nodes:
        await until(lambda: all(len(dht.peers) == 3 for dht, _ in nodes))
        first, identity = nodes[2]
        async with running(Dht(identity, OPEN, role=role), nodes[0][0]) as second:
            noticed = await asyncio.wait_for(
                asyncio.gather(first.duplicate(), second.duplicate()), seconds(10)
            )
            assert tuple(noticed) == (
                Duplicate(second.address, later=False),
                Duplicate(first.address, later=True),
            )


async def test_a_node_that_meets_itself_is_no_duplicate() -> None:
    async with mesh(2) as [(dht, _), (other, _)]:
        dht.join([dht.address])
        await until(lambda: dht.address in dht.unreached and bool(dht.peers))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(dht.duplicate(), 0.5)
        assert [peer.port for peer in dht.peers] == [other.address[1]]


async def test_gone_lan_peers_make_room_for_new_ones() -> None:
    async with mesh(1) as [(dht, _)]:
        dht.join([("127.0.0.1", port) for port in range(1, limits.MAX_SEEDS + 1)], found="lan")
        await until(lambda: all("no answer" in reason for reason in dht.unreached.values()), 15)
        dht.join([("127.0.0.1", 999), ("127.0.0.1", 1000)])
        assert len(dht.unreached) == limits.MAX_SEEDS
        assert {("127.0.0.1", 999), ("127.0.0.1", 1000)} <= dht.unreached.keys()
        dht.join([("127.0.0.1", port) for port in range(2000, 2100)])
        assert len(dht.unreached) == limits.MAX_SEEDS
