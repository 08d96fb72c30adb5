"""Our part of the catalogue: one record per node that lists its models, on one key for the whole mesh.

A key holds 64 records, so in a large mesh only some nodes list, chosen anew each time by chance: of each
model's workers about `LISTINGS`, and fewer of all where the key is nearly full.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from mesh.dht.crawl import Answer
from mesh.dht.environment import Environment
from mesh.dht.limits import CATALOGUE_INTERVAL, CATALOGUE_LISTINGS, WITHDRAWN_LIFETIME
from mesh.dht.lookups import Lookups
from mesh.dht.shards import MERGE_AT, SPLIT_AT
from mesh.errors import ConfigurationError
from mesh.identity import Identity
from mesh.limits import RECORD_TTL
from mesh.network import Network
from mesh.records import catalogue_key, sign_catalogue

_PROBE = 0.1
_LEAST_SHARE = 1 / 1024


@dataclass(frozen=True, slots=True)
class Published:
    """What became of a record: who was asked to hold it, how many took it, how many the key has now."""

    holders: list[Answer]
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
        self.key = catalogue_key(network)
        self.blob: bytes | None = None
        """What we listed last."""
        self._publish = publish
        self._lookups = lookups
        self._identity = identity
        self._network = network
        self._environment = environment
        self._names: frozenset[str] = frozenset()
        self._due = 0.0
        self._seq = 0
        self._share = 1.0

    async def update(self, models: dict[str, int]) -> None:
        """List `models` (name → workers on the mesh) if they changed or it is time again."""
        now = self._environment.clock()
        names = frozenset(models)
        if names == self._names and (not names or now < self._due):
            return
        gone = self._names - names
        self._names, self._due = names, now + CATALOGUE_INTERVAL
        rng = self._environment.rng
        listed = [
            (name, workers)
            for name, workers in models.items()
            if rng.random() < self._share * CATALOGUE_LISTINGS / workers
        ]
        if listed or (gone and self.blob):
            rng.shuffle(listed)
            self.blob = self._sign(listed)
            count = (await self._publish(self.key, self.blob)).count
        elif rng.random() < _PROBE:
            count = await self._lookups.count(self.key)
        else:
            return
        if count >= SPLIT_AT:
            self._share = max(_LEAST_SHARE, self._share / 2)
        elif count < MERGE_AT:
            self._share = min(1.0, self._share * 4)

    def _sign(self, listed: list[tuple[str, int]]) -> bytes:
        now = self._environment.wall()
        self._seq = max(int(now * 1000), self._seq + 1)
        expires = int(now + (RECORD_TTL if listed else WITHDRAWN_LIFETIME))
        while True:
            try:
                return sign_catalogue(listed, self._seq, expires, self._identity, self._network)
            except ConfigurationError:
                # More names than fit: some now, others another time.
                listed = listed[:-1]
