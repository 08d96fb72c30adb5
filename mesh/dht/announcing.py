"""Announcing our models: signed anew each time, at the depth that keeps no key hot, and in the catalogue."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from statistics import median

from mesh.dht import limits
from mesh.dht.catalogue import Catalogue, Published
from mesh.dht.crawl import Answer
from mesh.dht.environment import Environment
from mesh.dht.lookups import Lookups
from mesh.dht.protocol import MeshProtocol
from mesh.dht.rpc import Role
from mesh.dht.shards import MERGE_AT, Depth, depth_flags, sibling
from mesh.dht.store import Outcome
from mesh.identity import Identity
from mesh.network import Network
from mesh.records import (
    WorkerRecord,
    model_key,
    shard_prefix,
    sign_record,
)


@dataclass(frozen=True, slots=True)
class _Shown:
    """A record that is still out there, and who holds it."""

    blob: bytes
    expires: int
    holders: list[Answer]


@dataclass(slots=True)
class _Announced:
    """One of our models: where it is announced now, and every key that still shows it."""

    depth: Depth
    shown: dict[bytes, _Shown] = field(default_factory=dict)
    """By key."""
    listed_until: float = 0.0
    """When its last record expires, in unix seconds; 0 while it is not healthy."""


class Announcing:
    """The announcing side of one node."""

    def __init__(
        self,
        protocol: MeshProtocol,
        lookups: Lookups,
        identity: Identity,
        network: Network,
        environment: Environment,
    ) -> None:
        self._protocol = protocol
        self._lookups = lookups
        self._identity = identity
        self._network = network
        self._clock = environment.clock
        self._wall = environment.wall
        self._rng = environment.rng
        self._own: dict[str, _Announced] = {}
        self._catalogue = Catalogue(self._publish, lookups, identity, network, environment)

    def own(self, key: bytes) -> Iterable[bytes]:
        """Our own records under a key."""
        yield from self._catalogue.own(key)
        for announced in self._own.values():
            if key in announced.shown:
                yield announced.shown[key].blob

    async def announce(self, record: WorkerRecord) -> int:
        """See `Dht.announce`."""
        # What does not fit is refused before anything is asked of the network.
        sign_record(record, self._identity, self._network, model_key(self._network, record.model))
        own = self._own.get(record.model)
        if own is None:
            until = self._clock() + limits.LOOKUP_DEADLINE
            depth, _ = await self._lookups.walk(record.model, self._identity.id, 1, until)
            own = self._own.setdefault(record.model, _Announced(Depth(depth, self._clock())))
        own.listed_until = record.expires if record.health > 0 else 0.0
        replicas = await self._announce_at_depth(own, record)
        await self._catalogue.update(self._healthy())
        return replicas

    async def withdraw(self, record: WorkerRecord) -> None:
        """See `Dht.withdraw`."""
        own = self._own.pop(record.model, None)
        if own is None:
            return
        now = self._wall()
        last = replace(
            record,
            health=0,
            seq=max(int(now * 1000), record.seq + 1),
            expires=int(now + limits.WITHDRAWN_LIFETIME),
        )
        # Straight to those who hold the records: there is no time for another walk.
        stores = []
        for key, shown in own.shown.items():
            if shown.expires > now:
                blob = sign_record(last, self._identity, self._network, key)
                self._keep(key, blob, shown.holders)
                stores.append(self._lookups.ask_all(shown.holders, "store", [key, blob]))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limits.WITHDRAW_DEADLINE):
                await asyncio.gather(*stores, self._catalogue.update(self._healthy()))

    def _healthy(self) -> dict[str, int]:
        now = self._wall()
        return {name: own.depth.workers() for name, own in self._own.items() if own.listed_until > now}

    async def _announce_at_depth(self, own: _Announced, record: WorkerRecord) -> int:
        depth = own.depth
        replicas = await self._announce_in_shard(own, record, depth.depth)
        while depth.should_split():
            # On the way down looking is enough: a store would mislead others as long as it lives.
            while depth.should_split():
                depth.move(depth.depth + 1, self._clock())
                depth.count = max(1, await self._count(record, depth.depth))
            replicas = await self._announce_in_shard(own, record, depth.depth)
        if depth.may_merge(self._clock()):
            beside = await self._count(record, depth.depth, beside=True)
            if depth.count + beside <= MERGE_AT:
                depth.move(depth.depth - 1, self._clock())
                replicas = await self._announce_in_shard(own, record, depth.depth)
        for shallower, probability in depth.signposts():
            if self._rng.random() < probability:
                await self._announce_in_shard(own, record, shallower)
        return replicas

    async def _count(self, record: WorkerRecord, depth: int, *, beside: bool = False) -> int:
        """How many records the worker's shard of a depth has, or the one beside it."""
        prefix = shard_prefix(record.node_id, depth)
        if beside:
            prefix = sibling(prefix, depth)
        return await self._lookups.count(model_key(self._network, record.model, depth, prefix))

    async def _announce_in_shard(self, own: _Announced, record: WorkerRecord, depth: int) -> int:
        """Publish at one depth; at the worker's own depth the shard's size is learnt."""
        flagged = replace(record, flags=depth_flags(record, own.depth.depth))
        key = model_key(self._network, record.model, depth, shard_prefix(record.node_id, depth))
        blob = sign_record(flagged, self._identity, self._network, key)
        now = self._wall()
        own.shown = {k: shown for k, shown in own.shown.items() if shown.expires > now}
        before = own.shown.get(key)
        own.shown[key] = _Shown(blob, record.expires, before.holders if before else [])
        holders = await self._lookups.nearest(key)
        # Noted before they are told: should we be interrupted, withdrawing reaches them all the same.
        own.shown[key] = _Shown(blob, record.expires, holders)
        published = await self._store(key, blob, holders)
        if depth == own.depth.depth and published.count:
            own.depth.count = published.count
        return published.replicas

    async def _publish(self, key: bytes, blob: bytes) -> Published:
        return await self._store(key, blob, await self._lookups.nearest(key))

    async def _store(self, key: bytes, blob: bytes, holders: list[Answer]) -> Published:
        self._keep(key, blob, holders)
        replies = await self._lookups.ask_all(holders, "store", [key, blob])
        replicas, counts = 0, []
        for reply in replies:
            match reply:
                case [_, _, int(outcome), int(count), *_]:
                    replicas += outcome == Outcome.STORED
                    counts.append(count)
        return Published(replicas, round(median(counts)) if counts else 0)

    def _keep(self, key: bytes, blob: bytes, holders: list[Answer]) -> None:
        """Hold our own record for others too, if we are as near to the key as its holders (nearest first).

        Farther away we would tell askers on their way that there is no worker but us.
        """
        number, own = int.from_bytes(key), self._protocol.source_node.long_id
        near = (
            len(holders) < limits.BUCKET_SIZE
            or own ^ number < int.from_bytes(holders[-1].contact_id) ^ number
        )
        if near and self._protocol.role is not Role.CLIENT:
            self._protocol.storage.put(key, blob, None, self._wall())
