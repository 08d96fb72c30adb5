"""Many simulated nodes: started, killed and wired together, with the workers they announce."""

from __future__ import annotations

import bisect
import random
from collections.abc import Iterable

from mesh.dht import Dht
from mesh.dht.limits import BUCKET_SIZE
from mesh.dht.table import Contact
from mesh.identity import Identity, dht_id
from mesh.limits import RECORD_TTL
from mesh.network import Network
from mesh.records import WorkerRecord
from tests.sim.world import Address, World

OPEN = Network()
PORT = 9470


class Member:
    """One node of a population."""

    def __init__(
        self, world: World, network: Network, rng: random.Random, *, host: str | None = None
    ) -> None:
        self.world = world
        self.identity = Identity(rng.randbytes(32))
        self.address: Address = (host or world.new_host(), PORT)
        self.dht = Dht(self.identity, network, clock=world.loop.time, wall=world.wall, rng=rng)
        self.seq = 0

    async def start(self, seeds: Iterable[Address] = ()) -> None:
        await self.dht.start(*self.address)
        self.dht.join(seeds)

    def record(self, model: str, *, health: int = 90) -> WorkerRecord:
        now = self.world.wall()
        self.seq = max(int(now * 1000), self.seq + 1)
        return WorkerRecord(
            node_id=self.identity.id,
            seq=self.seq,
            expires=int(now + RECORD_TTL),
            addresses=(f"{self.address[0]}:{PORT}",),
            model=model,
            digest=bytes(16),
            health=health,
            slots=4,
            context=4096,
            generation_speed=30.0,
            prompt_speed=300.0,
            flags=frozenset(),
            software="qmesh/sim",
        )

    async def announce(self, model: str) -> int:
        return await self.dht.announce(self.record(model))

    @property
    def protocol(self):  # type: ignore[no-untyped-def]  # test-only access to the parts
        return self.dht._parts.protocol

    @property
    def table(self):  # type: ignore[no-untyped-def]
        return self.protocol.router


class Population:
    """The members of one mesh. All randomness comes from the world's seed."""

    def __init__(self, world: World, network: Network = OPEN) -> None:
        self.world = world
        self.network = network
        self.rng = random.Random(world.rng.random())
        self.members: list[Member] = []

    def new_member(self) -> Member:
        return Member(self.world, self.network, random.Random(self.rng.random()))

    async def grow(self, count: int, seeds: int = 3) -> list[Member]:
        """Start members that join through up to `seeds` of those who are there."""
        new = []
        for _ in range(count):
            member = self.new_member()
            known = self.rng.sample(self.members, min(seeds, len(self.members)))
            await member.start([other.address for other in known])
            self.members.append(member)
            new.append(member)
        return new

    async def kill(self, member: Member) -> None:
        """Gone without a word."""
        self.members.remove(member)
        member.protocol.transport.close()
        await member.dht.stop()

    async def stop(self) -> None:
        for member in self.members:
            await member.dht.stop()
        self.members.clear()

    def wire(self) -> None:
        """Fill all tables as a long life would have: random contacts for each bucket."""
        everybody = sorted(self.members, key=lambda m: dht_id(m.identity.id))
        ids = [int.from_bytes(dht_id(m.identity.id)) for m in everybody]
        now = self.world.loop.time()
        for member, own in zip(everybody, ids, strict=True):
            for bits in range(160):
                # The ids that share exactly `bits` first bits with ours.
                size = 1 << (159 - bits)
                low = (own ^ size) & ~(size - 1)
                start, end = bisect.bisect_left(ids, low), bisect.bisect_left(ids, low + size)
                chosen = range(start, end)
                for index in self.rng.sample(chosen, min(BUCKET_SIZE, len(chosen))):
                    other = everybody[index]
                    seen = now - self.rng.uniform(0, 300)
                    member.table.add(Contact(other.identity.id, other.address, "dht", seen))
                if bisect.bisect_left(ids, own & ~(size - 1)) + 1 >= bisect.bisect_left(
                    ids, (own | (size - 1)) + 1
                ):
                    break
