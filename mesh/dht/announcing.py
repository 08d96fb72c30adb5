"""Announcing our models: signed anew each time, at the depth that keeps no key hot, and in the catalogue."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from statistics import median

from mesh.dht import limits
from mesh.dht.environment import Environment
from mesh.dht.lookups import Lookups
from mesh.dht.protocol import MeshProtocol
from mesh.dht.shards import MERGE_AT, Depth, depth_flags, sibling
from mesh.dht.store import Outcome
from mesh.errors import ConfigurationError
from mesh.identity import Identity
from mesh.limits import RECORD_TTL
from mesh.network import Network
from mesh.records import (
    WorkerRecord,
    catalogue_key,
    model_key,
    shard_prefix,
    sign_catalogue,
    sign_record,
)


@dataclass(slots=True)
class _Announced:
    """One of our models: where it is announced now, and every key that still shows it."""

    depth: Depth
    shown: dict[bytes, tuple[bytes, int]] = field(default_factory=dict)
    """key → (record, its expiry)"""
    healthy: bool = True


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
        self._catalogue = b""
        self._catalogue_names: frozenset[str] = frozenset()
        self._catalogue_due = 0.0
        self._catalogue_seq = 0

    def own(self, key: bytes) -> Iterable[bytes]:
        """Our own records under a key."""
        if self._catalogue and key == catalogue_key(self._network):
            yield self._catalogue
        for announced in self._own.values():
            if key in announced.shown:
                yield announced.shown[key][0]

    async def announce(self, record: WorkerRecord) -> int:
        """See `Dht.announce`."""
        # What does not fit is refused before anything is asked of the network.
        sign_record(record, self._identity, self._network, model_key(self._network, record.model))
        own = self._own.get(record.model)
        if own is None:
            until = self._clock() + limits.LOOKUP_DEADLINE
            depth, _ = await self._lookups.walk(record.model, self._identity.id, 1, until)
            own = self._own.setdefault(record.model, _Announced(Depth(depth, self._clock())))
        own.healthy = record.health > 0
        replicas, _ = await asyncio.gather(self._announce_at_depth(own, record), self._announce_catalogue())
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
        keys = [key for key, (_, expires) in own.shown.items() if expires > now]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limits.WITHDRAW_DEADLINE):
                await asyncio.gather(
                    *(
                        self._publish(key, sign_record(last, self._identity, self._network, key))
                        for key in keys
                    ),
                    self._announce_catalogue(),
                )

    async def _announce_at_depth(self, own: _Announced, record: WorkerRecord) -> int:
        depth = own.depth
        replicas = await self._announce_in_shard(own, record, depth.depth)
        while depth.should_split():
            depth.move(depth.depth + 1, self._clock())
            replicas = await self._announce_in_shard(own, record, depth.depth)
        if depth.may_merge(self._clock()):
            prefix = sibling(shard_prefix(record.node_id, depth.depth), depth.depth)
            beside = await self._lookups.count(model_key(self._network, record.model, depth.depth, prefix))
            if depth.count + beside <= MERGE_AT:
                depth.move(depth.depth - 1, self._clock())
                replicas = await self._announce_in_shard(own, record, depth.depth)
        for shallower, probability in depth.signposts():
            if self._rng.random() < probability:
                await self._announce_in_shard(own, record, shallower)
        return replicas

    async def _announce_in_shard(self, own: _Announced, record: WorkerRecord, depth: int) -> int:
        """Publish at one depth; at the worker's own depth the shard's size is learnt."""
        flagged = replace(record, flags=depth_flags(record, own.depth.depth))
        key = model_key(self._network, record.model, depth, shard_prefix(record.node_id, depth))
        blob = sign_record(flagged, self._identity, self._network, key)
        now = self._wall()
        own.shown = {key: shown for key, shown in own.shown.items() if shown[1] > now}
        own.shown[key] = (blob, record.expires)
        replicas, count = await self._publish(key, blob)
        if depth == own.depth.depth and count:
            own.depth.count = count
        return replicas

    async def _announce_catalogue(self) -> None:
        """List our models, each with a probability that keeps about ten workers listed for each model."""
        live = {name: own.depth.workers() for name, own in self._own.items() if own.healthy}
        names = frozenset(live)
        if names == self._catalogue_names and (not names or self._clock() < self._catalogue_due):
            return
        removed = self._catalogue_names - names
        self._catalogue_names = names
        self._catalogue_due = self._clock() + limits.CATALOGUE_INTERVAL
        now = self._wall()
        listed = [
            (name, workers)
            for name, workers in live.items()
            if self._rng.random() < limits.CATALOGUE_LISTINGS / workers
        ]
        if not listed and not (removed and self._catalogue):
            return
        self._catalogue_seq = max(int(now * 1000), self._catalogue_seq + 1)
        lifetime = RECORD_TTL if listed else limits.WITHDRAWN_LIFETIME
        self._rng.shuffle(listed)
        while True:
            try:
                blob = sign_catalogue(
                    listed, self._catalogue_seq, int(now + lifetime), self._identity, self._network
                )
                break
            except ConfigurationError:
                # More names than fit: some now, others next time.
                listed.pop()
        self._catalogue = blob
        await self._publish(catalogue_key(self._network), blob)

    async def _publish(self, key: bytes, blob: bytes) -> tuple[int, int]:
        """(other nodes that took it, records that they hold under the key; their median)."""
        protocol = self._protocol
        if not protocol.client:
            protocol.storage.put(key, blob, None, self._wall())
        answers = await self._lookups.nearest(key)
        replies = await self._lookups.ask_all(answers, "store", [key, blob])
        replicas, counts = 0, []
        for reply in replies:
            match reply:
                case [_, _, int(outcome), int(count), *_]:
                    replicas += outcome == Outcome.STORED
                    counts.append(count)
        return replicas, round(median(counts)) if counts else 0
