"""Finding workers and models: walks, pages of large keys, shards of popular models."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

from mesh.dht import limits
from mesh.dht.addresses import Neighbour
from mesh.dht.crawl import Answer, Crawl
from mesh.dht.environment import Environment
from mesh.dht.gather import Gathering
from mesh.dht.protocol import MeshProtocol
from mesh.dht.rpc import Reply
from mesh.dht.shards import SPLIT_AT, flagged_depth
from mesh.limits import MAX_RECORDS_PER_KEY
from mesh.network import Network
from mesh.records import (
    CATALOGUE_SHARDS,
    Listing,
    SignedRecord,
    catalogue_key,
    model_key,
    open_catalogue,
    open_record,
    shard_prefix,
)

T = TypeVar("T")

_FORGET_DEPTH = 0.005
"""By how much each lookup lowers the deepest depth that is remembered of a model."""


class Lookups:
    """The asking side of one node.

    `joined` waits for the first attempt to enter the DHT; `own` gives the records that this node
    announces itself under a key, which it finds even when it is alone.
    """

    def __init__(
        self,
        protocol: MeshProtocol,
        network: Network,
        environment: Environment,
        *,
        joined: Callable[[], Awaitable[None]],
        own: Callable[[bytes], Iterable[bytes]],
    ) -> None:
        self._protocol = protocol
        self._network = network
        self._joined = joined
        self._own = own
        self._clock = environment.clock
        self._wall = environment.wall
        self._rng = environment.rng
        self._hints: dict[str, _Hint] = {}
        self._sharded: list[Listing] = []
        self._shards_until = -math.inf
        self._reading_shards = asyncio.Lock()

    async def lookup(self, model: str, want: int) -> list[SignedRecord]:
        """See `Dht.lookup`."""
        until = self._clock() + limits.LOOKUP_DEADLINE
        found: list[SignedRecord] = []
        for _ in range(limits.MAX_SHARDS_TRIED):
            depth, gathering = await self.walk(model, self._rng.randbytes(32), want, until)
            found = gathering.values() or found
            # A shard is met with the probability 2^-depth, whatever its size. Taking it with one that
            # is proportional to size × 2^depth gives every worker the same chance.
            most = SPLIT_AT * 2 ** self._hint(model).deepest
            if not depth or self._rng.random() * most < gathering.count << depth or self._clock() > until:
                break
        return found

    async def models(self) -> dict[str, int]:
        """See `Dht.models`."""
        listings = list((await self.listings()).values())
        if len(listings) >= limits.CATALOGUE_GROWN:
            listings += await self._sharded_listings()
        estimates: dict[str, list[int]] = {}
        for listing in listings:
            for name, workers in dict(listing).items():
                estimates.setdefault(name, []).append(workers)
        # Where only some workers list a model, they know better how many there are.
        counts = {name: max(len(sizes), round(median(sizes))) for name, sizes in estimates.items()}
        return within_one_answer(counts)

    async def listings(self, shard: int | None = None) -> dict[bytes, Listing]:
        """The catalogue, or a shard of it: what each node lists."""

        def open_blob(blob: bytes) -> tuple[bytes, int, tuple[bytes, Listing]]:
            node_id, seq, listing = open_catalogue(blob, self._network, self._wall(), shard)
            return node_id, seq, (node_id, listing)

        everything = MAX_RECORDS_PER_KEY + 1
        gathering = Gathering(open_blob, lambda found: bool(found[1]), everything, self._rng.randbytes(8))
        until = self._clock() + limits.LOOKUP_DEADLINE
        await self._gather(catalogue_key(self._network, shard), gathering, until)
        return dict(gathering.values())

    async def _sharded_listings(self) -> list[Listing]:
        """What the shards of a large catalogue list. A thousand requests or so: kept for a while."""
        async with self._reading_shards:
            if self._clock() >= self._shards_until:
                shards = await asyncio.gather(*map(self.listings, range(CATALOGUE_SHARDS)))
                self._sharded = [listing for listings in shards for listing in listings.values()]
                self._shards_until = self._clock() + limits.CATALOGUE_FRESH
            return self._sharded

    async def walk(
        self, model: str, point: bytes, want: int, until: float
    ) -> tuple[int, Gathering[SignedRecord]]:
        """(depth, records) of the shard that `point`, any node id or random bytes, falls into."""
        depth = self._hint(model).depth
        tried: dict[int, Gathering[SignedRecord]] = {}
        while depth not in tried:
            gathering = await self._shard(model, depth, point, want, until)
            tried[depth] = gathering
            records = [signed.record for signed in gathering.values()]
            told = flagged_depth(records)
            if records and told <= depth:
                break
            # Nothing here: too deep. Signposts: the workers are deeper.
            depth = told if records else max(0, depth - 1)
        best = max(tried, key=lambda d: (bool(tried[d].values()), d))
        self._remember(model, best)
        return best, tried[best]

    async def count(self, key: bytes) -> int:
        """How many records there are under a key: the median of its holders, since some may lie."""
        crawl = Crawl(self._protocol, key, self._start(key), method="find_value", arguments=lambda: [b"", 0])
        counts = []
        for answer in await crawl.run():
            match answer.reply:
                case [_, _, _, int(count), *_]:
                    counts.append(count)
        return round(median(counts)) if counts else 0

    async def nearest(self, key: bytes) -> list[Answer]:
        """The contacts nearest to a key, which are to hold its records."""
        return await Crawl(self._protocol, key, self._start(key)).run()

    async def ask_all(
        self, answers: Iterable[Answer], method: str, arguments: list[Any]
    ) -> list[Reply | None]:
        """The same request to everybody who answered a walk, all at once."""
        return await asyncio.gather(
            *(
                self._protocol.call(answer.address, method, arguments, contact_id=answer.contact_id)
                for answer in answers
            )
        )

    async def _shard(
        self, model: str, depth: int, point: bytes, want: int, until: float
    ) -> Gathering[SignedRecord]:
        key = model_key(self._network, model, depth, shard_prefix(point, depth))

        def open_blob(blob: bytes) -> tuple[bytes, int, SignedRecord]:
            record = open_record(blob, self._network, key, self._wall())
            return record.node_id, record.seq, SignedRecord(record, blob, key)

        def useful(signed: SignedRecord) -> bool:
            return signed.record.health > 0 and signed.record.model == model

        gathering = Gathering(open_blob, useful, want, self._rng.randbytes(8))
        await self._gather(key, gathering, until)
        return gathering

    async def _gather(self, key: bytes, gathering: Gathering[T], until: float) -> None:
        """Own records, held ones, then the walk and further pages, as far as wanted and time allows."""
        for blob in self._own(key):
            gathering.add(blob)
        held = list(self._protocol.storage.sample(key, b"", 0, self._wall()))
        gathering.hold(held, len(held))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, until - self._clock())):
                await self._joined()
        if gathering.enough:
            return
        answers = await self._crawl(key, gathering, until - self._clock())
        await self._page(key, gathering, answers, until)

    async def _page(self, key: bytes, gathering: Gathering[T], answers: list[Answer], until: float) -> None:
        """Read on at the holders that have the most, where more is wanted than came on the way."""
        readings = sorted(filter(None, map(_Reading.of, answers)), key=lambda reading: -reading.count)
        for number, reading in enumerate(readings[: limits.PARALLEL]):
            # They hold much the same in the same order: each starts elsewhere.
            reading.skip = number * reading.count // limits.PARALLEL
        barren = 0
        for _ in range(limits.MAX_PAGES):
            batch = readings[: limits.PARALLEL]
            if gathering.complete or not batch or barren == limits.MAX_BARREN_PAGES or self._clock() >= until:
                return
            replies = await asyncio.gather(
                *(
                    self._protocol.call(
                        reading.holder.address,
                        "find_value",
                        [key, *gathering.page(reading.skip)],
                        contact_id=reading.holder.contact_id,
                    )
                    for reading in batch
                )
            )
            before = len(gathering)
            for reading, reply in zip(batch, replies, strict=True):
                valid = 0 if reply is None else gathering.take(reply)
                reading.skip += valid
                reading.left -= valid
                if not valid or reading.left <= 0:
                    readings.remove(reading)
            barren = 0 if len(gathering) > before else barren + 1

    async def _crawl(self, key: bytes, gathering: Gathering[T], deadline: float) -> list[Answer]:
        return await Crawl(
            self._protocol,
            key,
            self._start(key),
            method="find_value",
            arguments=gathering.arguments,
            on_answer=lambda answer: bool(gathering.take(answer.reply)) and gathering.enough,
        ).run(deadline)

    def _start(self, key: bytes) -> list[Neighbour]:
        return [(contact.id, contact.address) for contact in self._protocol.router.closest(key)]

    def _hint(self, model: str) -> _Hint:
        return self._hints.get(model, _Hint(0, 0.0))

    def _remember(self, model: str, depth: int) -> None:
        before = self._hints.pop(model, None)
        if depth:
            deepest = float(depth) if before is None else max(depth, before.deepest - _FORGET_DEPTH)
            self._hints[model] = _Hint(depth, deepest)
            if len(self._hints) > limits.MAX_DEPTH_HINTS:
                del self._hints[next(iter(self._hints))]


def within_one_answer(counts: dict[str, int]) -> dict[str, int]:
    """The models with the most workers, as many as one message of the wire holds, sorted by name."""
    room = limits.MAX_MODELS_SIZE
    kept = []
    for name in sorted(counts, key=lambda name: (-counts[name], name)):
        room -= len(name.encode()) + limits.MODEL_SIZE
        if room < 0:
            break
        kept.append(name)
    return {name: counts[name] for name in sorted(kept)}


@dataclass(frozen=True, slots=True)
class _Hint:
    """At which depth a model was found last, and the deepest that it was lately."""

    depth: int
    deepest: float


@dataclass(slots=True)
class _Reading:
    """How far a holder's records are read."""

    holder: Answer
    count: int
    left: int
    skip: int = 0

    @classmethod
    def of(cls, answer: Answer) -> _Reading | None:
        match answer.reply:
            case [_, _, _, int(count), *_] if count > 0:
                count = min(count, MAX_RECORDS_PER_KEY)
                return cls(answer, count, count)
        return None
