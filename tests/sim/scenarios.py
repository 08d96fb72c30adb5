"""What a mesh must survive, at any size: each scenario returns what it measured."""

from __future__ import annotations

import asyncio
import heapq
import math
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from statistics import mean, median
from typing import Any

import psutil

from mesh.dht.addresses import pack_neighbour
from mesh.dht.announcing import Announcing
from mesh.dht.crawl import Crawl
from mesh.dht.datagrams import Codec
from mesh.dht.rpc import Request
from mesh.dht.shards import Depth
from mesh.identity import Identity, dht_id
from mesh.limits import ANNOUNCE_INTERVAL
from mesh.records import SignedRecord, model_key
from tests.sim.population import OPEN, PORT, Member, Population
from tests.sim.world import World


@dataclass
class Lookups:
    """What happened to some lookups."""

    tried: int = 0
    found: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def success(self) -> float:
        return self.found / self.tried

    def summary(self) -> dict[str, Any]:
        return {
            "lookups": self.tried,
            "success": round(self.success, 4),
            "p50_s": round(median(self.seconds), 3),
            "p99_s": round(sorted(self.seconds)[int(len(self.seconds) * 0.99)], 3),
        }


class Announcer:
    """Announces a member's models as a worker does: every minute with jitter, until it is killed."""

    def __init__(self, population: Population) -> None:
        self.population = population
        self.tasks: dict[Member, asyncio.Task[None]] = {}

    def begin(self, member: Member, model: str, *, spread: float = ANNOUNCE_INTERVAL) -> None:
        wait = self.population.rng.uniform(0, spread)
        self.tasks[member] = asyncio.create_task(self._announce(member, model, wait))

    async def _announce(self, member: Member, model: str, wait: float) -> None:
        while True:
            await asyncio.sleep(wait)
            await member.announce(model)
            wait = ANNOUNCE_INTERVAL * self.population.rng.uniform(0.85, 1.15)

    async def end(self, *members: Member) -> None:
        for member in members or list(self.tasks):
            task = self.tasks.pop(member, None)
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
                if not task.cancelled():
                    task.result()


async def timed_lookup(
    world: World, member: Member, model: str, lookups: Lookups, want: int = 16
) -> list[SignedRecord]:
    """One lookup by a member that does not announce the model itself."""
    start = world.loop.time()
    found = await member.dht.lookup(model, want)
    lookups.tried += 1
    lookups.found += bool(found)
    lookups.seconds.append(world.loop.time() - start)
    return found


async def churn(
    world: World, nodes: int, *, minutes: float, life: float = 1800.0, announcing: float = 1.0
) -> dict[str, Any]:
    """Nodes live for `life` seconds on average and are replaced; a share of them announces a model.

    There is one model for every ten nodes that announce. Traffic is measured for a minute without lookups.
    """
    population = Population(world)
    await population.grow(nodes, seeds=0)
    population.wire()
    announcer = Announcer(population)
    workers = population.members[: round(nodes * announcing)]
    serves = {member: f"model-{number // 10}" for number, member in enumerate(workers)}
    for member, model in serves.items():
        announcer.begin(member, model)
    await asyncio.sleep(1.5 * ANNOUNCE_INTERVAL)
    traffic = Traffic(population)
    per_node: dict[str, Any] = {}
    lookups = Lookups()
    quiet = world.loop.time() + 60
    end = quiet + 60 * minutes
    next_death = world.loop.time()
    while world.loop.time() < end:
        while next_death < world.loop.time():
            next_death += population.rng.expovariate(nodes / life)
            victim = population.rng.choice(population.members)
            await announcer.end(victim)
            await population.kill(victim)
            [born] = await population.grow(1)
            model = serves.pop(victim, "")
            if model:
                serves[born] = model
                announcer.begin(born, model, spread=1.0)
        if world.loop.time() < quiet:
            await asyncio.sleep(1)
            continue
        per_node = per_node or traffic.per_node()
        models = list(serves.values())
        pairs = [(population.rng.choice(population.members), population.rng.choice(models)) for _ in range(5)]
        await asyncio.gather(
            *(
                timed_lookup(world, asker, model, lookups)
                for asker, model in pairs
                if serves.get(asker) != model
            )
        )
        await asyncio.sleep(0.1)
    await announcer.end()
    await population.stop()
    return {"nodes": nodes, "announcing": announcing, **lookups.summary(), **per_node}


class Traffic:
    """Bytes and contacts per node from now on."""

    def __init__(self, population: Population) -> None:
        self.population = population
        self.since = population.world.loop.time()
        self.before = {
            m: (m.protocol.transport.sent, m.protocol.transport.received) for m in population.members
        }

    def per_node(self) -> dict[str, Any]:
        members = [m for m in self.population.members if m in self.before]
        seconds = self.population.world.loop.time() - self.since
        ports = [(m.protocol.transport, *self.before[m]) for m in members]
        sent = [(port.sent - before) / seconds for port, before, _ in ports]
        received = [(port.received - before) / seconds for port, _, before in ports]
        return {
            "sent_B_per_s": round(mean(sent)),
            "received_B_per_s": round(mean(received)),
            "sent_B_per_s_max": round(max(sent)),
            "contacts": round(mean(len(m.table) for m in members)),
            "records_held": round(mean(m.protocol.storage.records for m in members), 1),
        }


async def routing(world: World, nodes: int, *, lookups: int = 200) -> dict[str, Any]:
    """Hops and requests of a walk to the nearest nodes, and whether it finds them."""
    population = Population(world)
    await population.grow(nodes, seeds=0)
    population.wire()
    ids = [dht_id(m.identity.id) for m in population.members]
    hops, requests, exact, seconds = [], [], [], []

    async def walk() -> None:
        target = population.rng.randbytes(20)
        member = population.rng.choice(population.members)
        start = [(c.id, c.address) for c in member.table.closest(target)]
        crawl = Crawl(member.protocol, target, start)
        began = world.loop.time()
        answers = await crawl.run()
        seconds.append(world.loop.time() - began)
        number = int.from_bytes(target)
        own = dht_id(member.identity.id)
        nearest = heapq.nsmallest(20, (i for i in ids if i != own), key=lambda i: int.from_bytes(i) ^ number)
        exact.append(len(set(nearest) & {a.contact_id for a in answers}) / len(nearest))
        hops.append(crawl.hops)
        requests.append(crawl.requests)

    for _ in range(lookups // 20):
        await asyncio.gather(*(walk() for _ in range(20)))
    await population.stop()
    return {
        "nodes": nodes,
        "hops": round(mean(hops), 1),
        "requests": round(mean(requests), 1),
        "nearest_20_found": round(mean(exact), 4),
        "p50_s": round(median(seconds), 3),
        "p50_round_trips": round(median(seconds) / (sum(world.latency)), 1),
    }


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


async def halves(world: World, nodes: int, *, patience: float = 120.0) -> dict[str, Any]:
    """Two meshes grow apart; one node of one is told of one node of the other."""
    population = Population(world)
    first = await population.grow(1) + await population.grow(nodes // 2 - 1)
    left = list(population.members)
    population.members = []
    second = await population.grow(1) + await population.grow(nodes // 2 - 1)
    right = list(population.members)
    population.members = left + right
    await asyncio.sleep(30)
    assert not any(m.address in {o.address for o in right} for f in first for m in f.table)
    second[0].dht.join([first[-1].address])
    met = world.loop.time()
    announcer = Announcer(population)
    announcer.begin(first[0], "left")
    announcer.begin(second[1], "right")
    merged = await until(
        world,
        patience,
        lambda: all_find(population, first[1:], "right", 10),
        lambda: all_find(population, second[2:], "left", 10),
    )
    await announcer.end()
    await population.stop()
    return {"nodes": nodes, "merged_after_s": round(merged - met, 1)}


async def all_find(population: Population, members: list[Member], model: str, sample: int) -> bool:
    """Whether a sample of the members finds a model."""
    chosen = population.rng.sample(members, min(sample, len(members)))
    return all(await asyncio.gather(*(member.dht.lookup(model, 1) for member in chosen)))


async def until(world: World, patience: float, *conditions: Callable[[], Awaitable[bool]]) -> float:
    """The virtual time at which all conditions hold. Raises TimeoutError after `patience` seconds."""
    async with asyncio.timeout(patience):
        for condition in conditions:
            while not await condition():  # noqa: ASYNC110  # virtual time, and no event to wait for
                await asyncio.sleep(1.0)
    return world.loop.time()


async def bootstrap_lost(world: World, nodes: int, *, patience: float = 60.0) -> dict[str, Any]:
    """All bootstrap nodes die and come back with nothing but their addresses and keys."""
    population = Population(world)
    seeds = await population.grow(3, seeds=2)
    addresses = [member.address for member in seeds]
    for _ in range(nodes - 3):
        member = population.new_member()
        await member.start(addresses)
        population.members.append(member)
    await asyncio.sleep(60)
    for member in seeds:
        await population.kill(member)
    await asyncio.sleep(30)
    lookups = Lookups()
    worker = population.members[0]
    await worker.announce("kept")
    await timed_lookup(world, population.members[-1], "kept", lookups)
    assert lookups.found, "the mesh does not depend on its bootstrap nodes"
    back = []
    for address in addresses:
        member = Member(world, OPEN, random.Random(population.rng.random()), host=address[0])
        await member.start()
        back.append(member)
        population.members.append(member)
    began = world.loop.time()
    healed = await until(world, patience, lambda: all_find(population, back, "kept", 3))
    newcomer = population.new_member()
    await newcomer.start(addresses)
    population.members.append(newcomer)
    await until(world, patience, lambda: all_find(population, [newcomer], "kept", 1))
    await population.stop()
    return {"nodes": nodes, "healed_after_s": round(healed - began, 1)}


async def partition(world: World, nodes: int, *, minutes: float = 10.0) -> dict[str, Any]:
    """The network is cut in two for longer than a record's life, then heals."""
    population = Population(world)
    await population.grow(1)
    await population.grow(nodes - 1)
    await asyncio.sleep(60)
    sides = {member.address[0]: number % 2 for number, member in enumerate(population.members)}
    left = [m for m in population.members if sides[m.address[0]] == 0]
    right = [m for m in population.members if sides[m.address[0]] == 1]
    announcer = Announcer(population)
    announcer.begin(left[0], "left")
    announcer.begin(right[0], "right")
    world.reaches = lambda a, b: sides[a] == sides[b]
    await asyncio.sleep(60 * minutes)
    assert await all_find(population, left, "left", 5)
    assert not await left[1].dht.lookup("right")
    world.reaches = None
    began = world.loop.time()
    healed = await until(
        world,
        120,
        lambda: all_find(population, left, "right", 10),
        lambda: all_find(population, right, "left", 10),
    )
    await announcer.end()
    await population.stop()
    return {"nodes": nodes, "healed_after_s": round(healed - began, 1)}


async def popular(world: World, nodes: int, *, workers: int, samples: int, settle: float) -> dict[str, Any]:
    """One model with more workers than a key holds, and a minute of samples of one by clients.

    All start within the first third of `settle` seconds. Where there are more `workers` than `nodes`,
    a node announces for several identities.
    """
    population = Population(world)
    await population.grow(nodes, seeds=0)
    population.wire()
    hands = [Hand(population.members[number % nodes], population) for number in range(workers)]
    running = [asyncio.create_task(hand.announce_for_ever("hot", settle / 3)) for hand in hands]
    await asyncio.sleep(settle)
    stores = StoreRate(population)
    lookups = Lookups()
    met: Counter[bytes] = Counter()

    async def sample(wait: float) -> None:
        await asyncio.sleep(wait)
        found = await timed_lookup(world, population.rng.choice(population.members), "hot", lookups, 1)
        if found:
            met[population.rng.choice(found).record.node_id] += 1

    await asyncio.gather(*(sample(ANNOUNCE_INTERVAL * number / samples) for number in range(samples)))
    rates = stores.per_key()
    fullest = max(
        member.protocol.storage.count(key, world.wall())
        for member in population.members
        for key in member.protocol.storage._keys
    )
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    depths = Counter(hand.depth.depth for hand in hands)
    settling = sorted(hand.depth.since - hand.began for hand in hands)
    await population.stop()
    return {
        "nodes": nodes,
        "workers": workers,
        **lookups.summary(),
        "depths": dict(sorted(depths.items())),
        "at_depth_after_s_p50": round(median(settling), 1),
        "at_depth_after_s_p99": round(settling[int(len(settling) * 0.99)], 1),
        "fullest_key": fullest,
        "stores_per_s_and_key_max": round(max(rates), 2),
        "workers_met": len(met),
        "uniform_p": round(uniform_p([hand.identity.id for hand in hands], met), 4),
    }


class Hand:
    """One worker of a node that announces for several."""

    def __init__(self, member: Member, population: Population) -> None:
        parts = member.dht._parts
        environment = parts.protocol.environment
        self.identity = Identity(population.rng.randbytes(32))
        self.announcing = Announcing(
            parts.protocol, parts.lookups, self.identity, population.network, environment
        )
        self.began = 0.0
        self._member = member
        self._rng = population.rng

    @property
    def depth(self) -> Depth:
        """Where it announces."""
        [announced] = self.announcing._own.values()
        return announced.depth

    async def announce(self, model: str) -> None:
        await self.announcing.announce(replace(self._member.record(model), node_id=self.identity.id))

    async def announce_for_ever(self, model: str, spread: float) -> None:
        wait = self._rng.uniform(0, spread)
        self.began = self._member.world.loop.time() + wait
        while True:
            await asyncio.sleep(wait)
            await self.announce(model)
            wait = ANNOUNCE_INTERVAL * self._rng.uniform(0.85, 1.15)


class StoreRate:
    """Counts the stores that each holder gets for each key."""

    def __init__(self, population: Population) -> None:
        self._world = population.world
        self._since = self._world.loop.time()
        self._counts: Counter[tuple[int, bytes]] = Counter()
        for number, member in enumerate(population.members):
            self._watch(number, member)

    def _watch(self, number: int, member: Member) -> None:
        storage = member.protocol.storage
        put = storage.put

        def counted(key: bytes, blob: bytes, source: str | None, now: float) -> Any:
            if source is not None:
                self._counts[number, key] += 1
            return put(key, blob, source, now)

        storage.put = counted

    def per_key(self) -> list[float]:
        seconds = self._world.loop.time() - self._since
        return [count / seconds for count in self._counts.values()]


def uniform_p(workers: list[bytes], met: Counter[bytes]) -> float:
    """The p-value of a chi-square test that every worker is met with the same chance.

    Workers are grouped by the first bits of their DHT id, as shards are, so that each group is
    expected often enough. Wilson and Hilferty's approximation of the distribution.
    """
    samples = met.total()
    bits = max(2, min(8, int(math.log2(samples / 10))))
    group = {worker: dht_id(worker)[0] >> (8 - bits) for worker in workers}
    sizes = Counter(group.values())
    seen = Counter(group[worker] for worker in met.elements())
    expected = {g: samples * size / len(workers) for g, size in sizes.items()}
    chi = sum((seen[g] - e) ** 2 / e for g, e in expected.items())
    freedom = len(expected) - 1
    spread = 2 / (9 * freedom)
    z = ((chi / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return 0.5 * math.erfc(z / math.sqrt(2))


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
