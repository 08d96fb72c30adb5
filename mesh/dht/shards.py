"""How deep a model's workers are spread, so that no key grows hot. Pure.

A key holds at most 64 records and its 20 holders would melt under a popular model. So the workers of
one model form a prefix tree over the bits of BLAKE2b(node id): a worker announces at depth d under the
key of its first d bits. At `SPLIT_AT` records a shard's workers go one deeper; when a shard and its
sibling have `MERGE_AT` or fewer between them, both come back. Records at depth d say so in a flag
(``depth:d``), and a few of them are also left at each shallower depth as signposts, so that a newcomer
who asks at depth 0 learns where to go.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from mesh.records import MAX_DEPTH, WorkerRecord

SPLIT_AT = 48
"""Below the cap of a key, so that a store is refused only in a rush."""
MERGE_AT = 24
SETTLE = 300.0
"""Seconds after a move or a start before merging is considered: longer than a record lives."""
_SIGNPOST_SHARE = 0.25
_FLAG = "depth:"


@dataclass(slots=True)
class Depth:
    """Where one of our models announces; `since` in monotonic seconds, `count` workers in its shard."""

    depth: int
    since: float
    count: int = 1

    def should_split(self) -> bool:
        """Whether the shard is full."""
        return self.count >= SPLIT_AT and self.depth < MAX_DEPTH

    def may_merge(self, now: float) -> bool:
        """Whether it is worth asking how full the sibling is."""
        return self.depth > 0 and self.count <= MERGE_AT // 2 and now - self.since > SETTLE

    def move(self, depth: int, now: float) -> None:
        """Announce elsewhere from now on."""
        self.depth, self.since, self.count = depth, now, 1

    def workers(self) -> int:
        """About how many workers the model has on the whole mesh."""
        return self.count << self.depth

    def signposts(self) -> list[tuple[int, float]]:
        """(shallower depth, probability of leaving a record there with this announcement).

        With records that live for three announcements 18 to 36 stay alive on each.
        """
        return [(depth, _SIGNPOST_SHARE / (1 << self.depth - depth)) for depth in range(self.depth)]


def depth_flags(record: WorkerRecord, depth: int) -> frozenset[str]:
    """The record's flags with its depth; none at depth 0."""
    flags = frozenset(flag for flag in record.flags if not flag.startswith(_FLAG))
    return flags | {f"{_FLAG}{depth}"} if depth else flags


def flagged_depth(records: Iterable[WorkerRecord]) -> int:
    """The depth that most records speak of; the median, since some may lie."""
    return round(statistics.median([_depth_of(record) for record in records] or [0]))


def _depth_of(record: WorkerRecord) -> int:
    for flag in record.flags:
        number = flag.removeprefix(_FLAG)
        if number is not flag and number.isascii() and number.isdigit():
            return min(int(number), MAX_DEPTH)
    return 0


def sibling(prefix: bytes, depth: int) -> bytes:
    """The prefix whose last of `depth` bits is the other one."""
    flipped = bytearray(prefix)
    flipped[(depth - 1) // 8] ^= 0x80 >> (depth - 1) % 8
    return bytes(flipped)
