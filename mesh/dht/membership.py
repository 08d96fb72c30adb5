"""Getting into the DHT and staying there: seeds, remembered contacts, upkeep of the table."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from dataclasses import dataclass
from pathlib import Path

from mesh.dht import limits
from mesh.dht.addresses import Address, normal
from mesh.dht.crawl import Crawl
from mesh.dht.environment import Environment
from mesh.dht.protocol import MeshProtocol
from mesh.dht.state import load_contacts, save_contacts
from mesh.dht.table import Contact
from mesh.records import KEY_SIZE

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Seed:
    host: str
    port: int
    found: str
    next_try: float = 0.0
    failures: int = 0
    reason: str = "not tried yet"
    contact_id: bytes | None = None
    """Who answered there last."""


class Membership:
    """The upkeep of one node. `run` is its only task; everything else returns at once."""

    def __init__(
        self,
        protocol: MeshProtocol,
        state_path: Path | None,
        environment: Environment,
    ) -> None:
        self._protocol = protocol
        self._table = protocol.router
        self._state_path = state_path
        self._clock = environment.clock
        self._wall = environment.wall
        self._rng = environment.rng
        self._seeds: dict[tuple[str, int], _Seed] = {}
        self._remembered = load_contacts(state_path) if state_path is not None else []
        """Who is to be tried when nobody answers: contacts of last time and of now."""
        self._wake = asyncio.Event()
        self._attempted = asyncio.Event()
        self._backoff = limits.FIRST_BACKOFF
        self._next_rescue = 0.0
        now = self._clock()
        self._next_check = now + limits.CHECK_INTERVAL
        self._next_save = now + limits.SAVE_INTERVAL
        self._next_explore = float("inf")
        self._explore_pause = limits.FIRST_EXPLORE

    def add_seed(self, host: str, port: int, found: str) -> None:
        """An address to try now and for ever; of `MAX_SEEDS` one that mDNS found and is gone makes room."""
        if (host, port) in self._seeds:
            return
        if len(self._seeds) >= limits.MAX_SEEDS:
            gone = [key for key, seed in self._seeds.items() if seed.found == "lan" and seed.failures]
            if not gone:
                log.warning("%s:%d is left out: there are %d addresses to join", host, port, limits.MAX_SEEDS)
                return
            del self._seeds[max(gone, key=lambda key: self._seeds[key].failures)]
        self._seeds[host, port] = _Seed(host, port, found)
        if self._table.isolated:
            self._attempted.clear()
        self._wake.set()

    def unreached(self) -> dict[tuple[str, int], str]:
        """The seeds that did not answer last time, and why."""
        return {key: seed.reason for key, seed in self._seeds.items() if seed.contact_id is None}

    async def attempted(self) -> None:
        """Until the first attempt to join is over, whether it worked or not."""
        if self._seeds or self._remembered:
            await self._attempted.wait()

    def save(self) -> None:
        """Write the contacts down for the next start."""
        if self._state_path is not None:
            good = sorted((c for c in self._table if not c.failures), key=lambda c: -c.last_seen)
            save_contacts(self._state_path, [c.address for c in good[: limits.MAX_REMEMBERED_CONTACTS]])

    async def run(self) -> None:
        """Until cancelled: join, rejoin, check contacts, forget what expired."""
        try:
            while True:
                self._wake.clear()
                await self._tend()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(limits.LEAST_PAUSE, self._next_event() - self._clock())):
                        await self._wake.wait()
        finally:
            # Nobody waits for an attempt that will not be made.
            self._attempted.set()

    async def _tend(self) -> None:
        await self._try_seeds()
        await self._rescue()
        self._attempted.set()
        await self._check()
        if self._clock() >= self._next_explore:
            await self._explore()
        if self._clock() >= self._next_save:
            self.save()
            self._next_save = self._clock() + limits.SAVE_INTERVAL

    def _next_event(self) -> float:
        times = [self._next_check, self._next_explore, *(seed.next_try for seed in self._seeds.values())]
        if self._table.isolated and self._remembered:
            times.append(self._next_rescue)
        return min(times)

    # Joining

    async def _try_seeds(self) -> None:
        now = self._clock()
        due = [seed for seed in self._seeds.values() if seed.next_try <= now]
        if not due:
            return
        newly_met = await asyncio.gather(*(self._try(seed) for seed in due))
        if any(newly_met):
            await self._enter()

    async def _try(self, seed: _Seed) -> bool:
        """Ping a seed; whether somebody answered who did not answer there before."""
        contact = None
        address = await self._resolve(seed)
        if address is not None:
            contact = await self._protocol.meet(address, seed.found)
            if contact is None:
                seed.reason = self._why_silent(address)
        # Seeds are asked the more rarely the more nodes there are to ask them.
        pause = max(limits.SEED_INTERVAL, float(len(self._table)))
        if contact is None:
            seed.failures += 1
            pause = min(pause, limits.FIRST_BACKOFF * 2 ** min(seed.failures, 20))
        else:
            seed.failures = 0
        seed.next_try = self._clock() + pause * self._rng.uniform(0.75, 1.25)
        before, seed.contact_id = seed.contact_id, None if contact is None else contact.id
        return contact is not None and contact.id != before

    def _why_silent(self, address: Address) -> str:
        reason = f"no answer from {address[0]}:{address[1]} over UDP"
        if self._table.isolated and self._protocol.socket_error is not None:
            return f"{reason}; the system refuses to send: {self._protocol.socket_error}"
        return reason

    async def _resolve(self, seed: _Seed) -> Address | None:
        with contextlib.suppress(ValueError):
            address = (normal(seed.host), seed.port)
            if not self._protocol.reachable(address):
                seed.reason = (
                    f"this node's socket has no way to {seed.host}: it is bound to the other IP version"
                )
                return None
            return address
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(limits.RESOLVE_DEADLINE):
                found = await loop.getaddrinfo(seed.host, seed.port, type=socket.SOCK_DGRAM)
        except (OSError, TimeoutError) as error:
            seed.reason = f"the name {seed.host} cannot be resolved: {error or 'no answer in time'}"
            return None
        addresses = [(normal(str(info[4][0])), seed.port) for info in found]
        usable = [address for address in addresses if self._protocol.reachable(address)]
        if not usable:
            seed.reason = f"{seed.host} has no address of the IP version that this node's socket is bound to"
            return None
        return usable[seed.failures % len(usable)]

    async def _rescue(self) -> None:
        """Nobody answers: try everybody who ever did, some at a time."""
        now = self._clock()
        if not self._table.isolated:
            self._backoff = limits.FIRST_BACKOFF
            now_known = [contact.address for contact in self._table if not contact.failures]
            both = dict.fromkeys([*now_known, *self._remembered])
            self._remembered = list(both)[: limits.MAX_REMEMBERED_CONTACTS]
            return
        if now < self._next_rescue:
            return
        some = self._rng.sample(self._remembered, min(len(self._remembered), limits.RESCUES_AT_ONCE))
        contacts = await asyncio.gather(*(self._protocol.meet(a, "remembered") for a in some))
        if any(contact is not None for contact in contacts):
            await self._enter()
        self._next_rescue = self._clock() + self._backoff * self._rng.uniform(0.75, 1.25)
        self._backoff = min(limits.MAX_BACKOFF, self._backoff * 2)

    async def _enter(self) -> None:
        """Meet the neighbours of our own id, then somebody in every bucket."""
        self._explore_pause = limits.FIRST_EXPLORE
        await self._explore()
        self._attempted.set()
        for bucket in list(self._table.buckets):
            if not bucket.has_in_range(self._protocol.source_node):
                await self._crawl(self._random_id(bucket.range))

    async def _explore(self) -> None:
        """Meet new neighbours and somebody of one bucket; ever more rarely.

        Nodes that start together find little the first time.
        """
        await self._crawl(self._protocol.source_node.id)
        await self._crawl(self._random_id(self._rng.choice(self._table.buckets).range))
        self._next_explore = self._clock() + self._explore_pause * self._rng.uniform(0.75, 1.25)
        self._explore_pause = min(limits.MAX_EXPLORE_PAUSE, 2 * self._explore_pause)

    async def _crawl(self, target: bytes) -> None:
        start = [(contact.id, contact.address) for contact in self._table.closest(target)]
        await Crawl(self._protocol, target, start).run()

    def _random_id(self, bounds: tuple[int, int]) -> bytes:
        low, high = bounds
        return self._rng.randrange(low, min(high, (1 << 8 * KEY_SIZE) - 1) + 1).to_bytes(KEY_SIZE)

    # Upkeep

    async def _check(self) -> None:
        now = self._clock()
        if now < self._next_check:
            return
        self._next_check = now + limits.CHECK_INTERVAL * self._rng.uniform(0.75, 1.25)
        self._protocol.storage.sweep(self._wall())
        stale: list[Contact] = self._table.stalest(limits.CHECKS_AT_ONCE, now - limits.STALE_CONTACT)
        await asyncio.gather(*(self._protocol.meet(contact.address, "dht") for contact in stale))
