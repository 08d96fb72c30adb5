"""Collects what holders return for a key: verified, the newest of each worker."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from mesh.dht.rpc import Reply
from mesh.errors import ProtocolError

T = TypeVar("T")

RECORDS_PER_REPLY = 3
"""About as many records of usual size fit into a datagram beside the neighbours."""


class Gathering(Generic[T]):
    """The values under one key. `open_blob` verifies a record: (node id, seq, value) or ProtocolError.

    A value counts towards `want` where `useful` says so.
    """

    def __init__(
        self,
        open_blob: Callable[[bytes], tuple[bytes, int, T]],
        useful: Callable[[T], bool],
        want: int,
        salt: bytes,
    ) -> None:
        self._open = open_blob
        self._useful = useful
        self._want = want
        self._salt = salt
        self._skip = 0
        self._seen: dict[bytes, bool] = {}
        self._newest: dict[bytes, tuple[int, T]] = {}
        self._counts: list[int] = []

    def arguments(self) -> list[Any]:
        """``[salt, skip]``: each holder on the way is asked for another page of the same order."""
        self._skip += RECORDS_PER_REPLY
        return self.page(self._skip)

    def page(self, skip: int) -> list[Any]:
        """``[salt, skip]``"""
        return [self._salt, skip]

    def take(self, reply: Reply) -> int:
        """Take the records of a find_value reply in; how many of them are valid."""
        match reply:
            case [_, _, _, int(count), list(blobs), *_] if count >= 0:
                return self.hold(blobs, count)
        return 0

    def hold(self, blobs: Iterable[object], count: int) -> int:
        """Take in what one holder has, some of its `count` records; how many of them are valid."""
        self._counts.append(count)
        return sum(map(self.add, blobs))

    def add(self, blob: object) -> bool:
        """Take one record in; whether it is valid."""
        if not isinstance(blob, bytes):
            return False
        if blob in self._seen:
            return self._seen[blob]
        self._seen[blob] = False
        try:
            node_id, seq, value = self._open(blob)
        except ProtocolError:
            return False
        self._seen[blob] = True
        known = self._newest.get(node_id)
        if known is None or known[0] < seq:
            self._newest[node_id] = (seq, value)
        return True

    @property
    def count(self) -> int:
        """How many workers the holders say there are; their median, since some may lie."""
        holders = [count for count in self._counts if count]
        return round(statistics.median(holders)) if holders else 0

    @property
    def enough(self) -> bool:
        """Whether as many useful values as wanted are there."""
        return len(self.values()) >= self._want

    @property
    def complete(self) -> bool:
        """Whether there are as many as wanted, or as any holder says there are."""
        return self.enough or len(self._newest) >= max(self._counts, default=0)

    def __len__(self) -> int:
        """Workers known so far, useful or not."""
        return len(self._newest)

    def values(self) -> list[T]:
        """The useful values."""
        return [value for _, value in self._newest.values() if self._useful(value)]
