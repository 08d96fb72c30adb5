"""Nodes that lie, and datagrams that hold anything."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import psutil

from mesh.dht.addresses import pack_neighbour
from mesh.dht.datagrams import Codec
from mesh.dht.rpc import Request
from mesh.identity import Identity
from mesh.records import model_key
from tests.sim.load import Lookups, timed_lookup
from tests.sim.population import PORT, Member, Population
from tests.sim.world import World


def make_liar(member: Member, rng: random.Random) -> None:
    """From now on the member tells of nodes that do not exist or are liars too, and of false records."""
    kind = rng.choice(("silence", "false nodes", "false records", "junk"))
    if kind == "silence":
        member.protocol.datagram_received = lambda data, addr: None
        return
    rogue = Identity(rng.randbytes(32))

    def false_nodes(target: bytes) -> bytes:
        packed = b""
        for _ in range(20):
            near = target[:6] + rng.randbytes(14)
            packed += pack_neighbour(near, (f"99.{rng.randrange(256)}.{rng.randrange(256)}.1", PORT))
        return packed

    def answer(method: str, request: Request) -> Any:
        if method == "ping" or not request.arguments:
            return honest(method, request)
        if kind == "junk":
            return rng.choice([[], [5], [None, {}], [[1]], ["x" * 50], [b"\xff" * 27, -1, "no"]])
        if method == "store":
            return [0, 1]
        if method == "find_node" or kind == "false nodes":
            return [false_nodes(request.arguments[0]), 0, []][: 1 if method == "find_node" else 3]
        fake = [rogue.sign(rng.randbytes(40)) * 4 for _ in range(2)]
        return [b"", 64, fake]

    honest = member.protocol.answer
    member.protocol.answer = answer


async def liars(world: World, nodes: int, *, share: float = 0.3, lookups: int = 200) -> dict[str, Any]:
    """A share of the nodes lies or is silent; honest ones announce and look up."""
    population = Population(world)
    await population.grow(nodes, seeds=0)
    population.wire()
    chosen = set(population.rng.sample(population.members, int(share * nodes)))
    for member in population.members:
        if member in chosen:
            make_liar(member, population.rng)
    honest = [member for member in population.members if member not in chosen]
    results = Lookups()

    async def announce_and_find(number: int) -> None:
        worker, asker = population.rng.sample(honest, 2)
        await worker.announce(f"m{number}")
        await timed_lookup(world, asker, f"m{number}", results)

    for batch in range(lookups // 10):
        await asyncio.gather(*(announce_and_find(10 * batch + number) for number in range(10)))
    await population.stop()
    return {"nodes": nodes, "liars": share, **results.summary()}


async def hostile(world: World, nodes: int, *, datagrams: int) -> dict[str, Any]:
    """A node gets datagrams that hold anything, from anywhere: junk, mutants, well-tagged nonsense."""
    population = Population(world)
    await population.grow(nodes)
    await asyncio.sleep(30)
    victim = population.members[0]
    rng = population.rng
    codec = Codec(population.network)
    genuine: list[bytes] = []
    deliver = victim.protocol.datagram_received

    def tap(data: bytes, addr: Any) -> None:
        genuine.append(data)
        deliver(data, addr)

    victim.protocol.datagram_received = tap
    friend = population.members[1]
    for member in population.members:
        await member.announce("m0")
        await member.dht.lookup("m0")
    victim.protocol.datagram_received = deliver
    key = model_key(population.network, "m0")
    blob = next(victim.protocol.storage.sample(key, b"", 0, world.wall()))
    began_rss = rss()
    for number in range(datagrams):
        host = f"{rng.randrange(1, 224)}.{rng.randrange(256)}.{rng.randrange(256)}.{rng.randrange(256)}"
        source = rng.choice([(host, rng.randrange(65536)), friend.address])
        if number % 1000 == 0:
            await asyncio.sleep(0.01)
        match rng.randrange(4):
            case 0:
                data = rng.randbytes(rng.choice((0, 1, 28, 29, 60, 400, 1200, 1201, 60000)))
            case 1:
                mutant = bytearray(rng.choice(genuine))
                for _ in range(rng.randrange(4)):
                    mutant[rng.randrange(len(mutant))] = rng.randrange(256)
                body = bytes(mutant)[:-8]
                data = body + codec._tag(body)
            case 2:
                data = codec.encode(rng.choice((0, 1)), rng.randbytes(20), anything(rng, 3))
            case _:
                token = rng.choice(
                    (victim.protocol._issued.issue(source[0], world.loop.time()), b"", rng.randbytes(8))
                )
                asker = rng.choice((rng.randbytes(32), b"", friend.identity.id, victim.identity.id))
                request: list[Any] = rng.choice(
                    (
                        ["ping", [asker, token, rng.randbytes(16)]],
                        ["find_node", [asker, token, rng.randbytes(20), bytes(300)]],
                        ["find_value", [asker, token, key, rng.randbytes(8), rng.randrange(99), bytes(300)]],
                        ["store", [asker, token, key, blob]],
                        ["store", [asker, token, rng.randbytes(20), rng.randbytes(300)]],
                        ["stun", [asker, token]],
                    )
                )
                if rng.random() < 0.5:
                    request[1][rng.randrange(len(request[1]))] = anything(rng, 2)
                data = codec.encode(0, rng.randbytes(20), request)
        victim.protocol.datagram_received(data, source)
    await asyncio.sleep(5)
    protocol = victim.protocol
    sizes = {
        "records": protocol.storage.records,
        "contacts": len(protocol.router),
        "pending": len(protocol._pending),
        "tokens": len(protocol._tokens.items()),
        "silent": len(protocol._silent.items()),
        "verifying": len(protocol._verifying),
    }
    lookups = Lookups()
    await timed_lookup(world, population.members[-1], "m0", lookups)
    await timed_lookup(world, victim, "m0", lookups)
    answered = protocol.traffic.datagrams_out
    await population.stop()
    return {
        "sent": datagrams,
        "answered": answered,
        "still_works": lookups.success == 1,
        **sizes,
        "grown_MB": rss() - began_rss,
    }


def anything(rng: random.Random, depth: int) -> Any:
    """A random msgpack value."""
    kind = rng.randrange(9 if depth else 7)
    if kind >= 7:
        return [anything(rng, depth - 1) for _ in range(rng.randrange(5))]
    simple = (
        None,
        True,
        rng.randrange(-(2**63), 2**64),
        rng.random(),
        "text",
        rng.randbytes(20),
        rng.randbytes(32),
    )
    return simple[kind]


def rss() -> int:
    """Resident memory of this process in MB."""
    return psutil.Process().memory_info().rss >> 20
