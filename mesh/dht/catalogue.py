"""Our part of the catalogue: one record per node that lists models of its own, on one key for the mesh.

A key holds 64 records, so not every node can list: each model is to have a few listings, the fewer the
fuller the key. Who lists a model goes on unless enough nodes of lower ids do; who does not looks now and
then, the more rarely the more workers there are to look, and steps in where listings are missing. While
that key is crowded, models are listed in the same way in one of 16 shards too, by the hash of their name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass

from mesh.dht.environment import Environment
from mesh.dht.limits import (
    CATALOGUE_CROWDED,
    CATALOGUE_INTERVAL,
    CATALOGUE_LOOKS,
    MAX_CATALOGUE_INTERVAL,
    WITHDRAWN_LIFETIME,
)
from mesh.dht.lookups import Lookups
from mesh.errors import ConfigurationError
from mesh.identity import Identity
from mesh.limits import MAX_RECORDS_PER_KEY, RECORD_TTL
from mesh.network import Network
from mesh.records import CATALOGUE_SHARDS, catalogue_key, catalogue_shard, sign_catalogue


@dataclass(frozen=True, slots=True)
class Published:
    """What became of a record: how many took it, how many the key has now."""

    replicas: int
    count: int


Publish = Callable[[bytes, bytes], Awaitable[Published]]


class Catalogue:
    """Lists one node's models. `publish` stores a record under a key."""

    def __init__(
        self,
        publish: Publish,
        lookups: Lookups,
        identity: Identity,
        network: Network,
        environment: Environment,
    ) -> None:
        def page(shard: int | None) -> _Page:
            return _Page(shard, publish, lookups, identity, network, environment)

        self._main = page(None)
        self._shards = [page(shard) for shard in range(CATALOGUE_SHARDS)]

    def own(self, key: bytes) -> Iterable[bytes]:
        """Our own record under a key."""
        return [page.blob for page in (self._main, *self._shards) if page.key == key and page.blob]

    async def update(self, models: dict[str, int]) -> None:
        """List `models` (name → workers on the mesh) where that is needed, if they changed or it is time."""
        crowded = self._main.crowded
        await asyncio.gather(self._main.update(models), *self._shard_updates(models))
        if self._main.crowded and not crowded:
            await asyncio.gather(*self._shard_updates(models))

    def _shard_updates(self, models: dict[str, int]) -> Iterator[Awaitable[None]]:
        parts: list[dict[str, int]] = [{} for _ in self._shards]
        if self._main.crowded:
            for name, workers in models.items():
                parts[catalogue_shard(name)][name] = workers
        for page, part in zip(self._shards, parts, strict=True):
            if part or page.in_use:
                yield page.update(part)


class _Page:
    """Our record under one of the catalogue's keys."""

    def __init__(
        self,
        shard: int | None,
        publish: Publish,
        lookups: Lookups,
        identity: Identity,
        network: Network,
        environment: Environment,
    ) -> None:
        self.key = catalogue_key(network, shard)
        self.blob: bytes | None = None
        """What we listed last."""
        self.crowded = False
        """Whether there was little room when we looked last."""
        self._shard = shard
        self._publish = publish
        self._lookups = lookups
        self._identity = identity
        self._network = network
        self._environment = environment
        self._names: frozenset[str] = frozenset()
        self._listed: frozenset[str] = frozenset()
        self._due = 0.0
        self._pause = CATALOGUE_INTERVAL
        self._seq = 0

    @property
    def in_use(self) -> bool:
        """Whether there is something of ours to list or to take back."""
        return bool(self._names or self._listed)

    async def update(self, models: dict[str, int]) -> None:
        """See `Catalogue.update`."""
        now = self._environment.clock()
        new, self._names = models.keys() - self._names, frozenset(models)
        if self._listed - self._names:
            await self._list({name: models[name] for name in self._listed & self._names})
        if not new and now < self._due:
            return
        rng = self._environment.rng
        mine = [
            name for name in models if name in self._listed or rng.random() < CATALOGUE_LOOKS / models[name]
        ]
        self._due = now + self._pause * rng.uniform(0.85, 1.15)
        if not mine:
            return
        found = await self._lookups.listings(self._shard)
        listings = {node_id: dict(listing) for node_id, listing in found.items()}
        self.crowded = len(listings) >= CATALOGUE_CROWDED
        needed = self._needed(mine, listings)
        if needed or self._listed:
            await self._list({name: models[name] for name in needed if name in self._names})
        # There is no use in looking often at a key that has no room.
        useless = self.crowded and not self._listed
        self._pause = min(2 * self._pause, MAX_CATALOGUE_INTERVAL) if useless else CATALOGUE_INTERVAL

    def _needed(self, names: list[str], listings: dict[bytes, dict[str, int]]) -> list[str]:
        """The models that lack listings without ours."""
        own = self._identity.id
        if len(listings) >= MAX_RECORDS_PER_KEY and own not in listings:
            return []
        enough = _enough(len(listings))
        needed = []
        for name in names:
            listers = [node_id for node_id, listing in listings.items() if name in listing and node_id != own]
            # Of too many listers those with the highest ids go: were it left to chance, all might.
            rivals = [node_id for node_id in listers if node_id < own] if name in self._listed else listers
            if len(rivals) < enough:
                needed.append(name)
        return needed

    async def _list(self, models: dict[str, int]) -> None:
        self._listed = frozenset(models)
        listing = list(models.items())
        self._environment.rng.shuffle(listing)
        self.blob = self._sign(listing)
        await self._publish(self.key, self.blob)

    def _sign(self, listing: list[tuple[str, int]]) -> bytes:
        now = self._environment.wall()
        self._seq = max(int(now * 1000), self._seq + 1)
        expires = int(now + (RECORD_TTL if listing else WITHDRAWN_LIFETIME))
        while True:
            try:
                return sign_catalogue(listing, self._seq, expires, self._identity, self._network, self._shard)
            except ConfigurationError:
                # More names than fit: some now, others another time.
                listing = listing[:-1]


def _enough(records: int) -> int:
    """How many listings a model is to have when the key holds so many records (of at most 64)."""
    if records < 32:
        return 4
    return 2 if records < 48 else 1
