"""What a node holds for others: for each key the newest valid record of each worker, within caps."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from kademlia.storage import IStorage

from mesh.dht.addresses import scope, subnet
from mesh.dht.limits import MAX_RECORDS, MAX_RECORDS_PER_SUBNET, MAX_RECORDS_PER_SUBNET_AND_KEY
from mesh.errors import ProtocolError
from mesh.limits import MAX_RECORDS_PER_KEY
from mesh.records import open_envelope


class Outcome(IntEnum):
    """The answer to a store, as on the wire."""

    STORED = 0
    FULL = 1
    BAD_TOKEN = 2
    REFUSED = 3


@dataclass(slots=True)
class _Entry:
    blob: bytes
    seq: int
    expires: int
    keep_until: int
    """The latest expiry ever seen: until then the seq is remembered, so that nothing older returns."""
    subnet: bytes | None


class RecordStore(IStorage):  # type: ignore[misc]  # the package has no types
    """Records by key and worker. A cap that is reached refuses the new and evicts nothing.

    `limit_private` extends the caps per subnet to loopback and private addresses.
    """

    def __init__(self, *, limit_private: bool = False) -> None:
        self._keys: dict[bytes, dict[bytes, _Entry]] = {}
        self._subnets: Counter[bytes] = Counter()
        self._limit_private = limit_private
        self.records = 0

    def put(self, key: bytes, blob: bytes, source: str | None, now: float) -> Outcome:
        """Store a record that came from `source` (None: our own) at `now` (unix seconds)."""
        entries = self._keys.get(key, {})
        try:
            record = open_envelope(blob, key, now)
        except ProtocolError:
            return Outcome.REFUSED
        old = entries.get(record.node_id)
        if old is not None:
            # An equal seq with other bytes is refused too: a worker says one thing at a time.
            if record.seq <= old.seq:
                return Outcome.STORED if blob == old.blob else Outcome.REFUSED
            old.blob, old.seq, old.expires = blob, record.seq, record.expires
            old.keep_until = max(old.keep_until, record.expires)
            return Outcome.STORED
        group = self._group(source)
        if not self._has_room(key, group, now):
            return Outcome.FULL
        self._keys.setdefault(key, {})[record.node_id] = _Entry(
            blob, record.seq, record.expires, record.expires, group
        )
        self.records += 1
        if group is not None:
            self._subnets[group] += 1
        return Outcome.STORED

    def count(self, key: bytes, now: float) -> int:
        """How many workers have a live record under the key."""
        return sum(entry.expires > now for entry in self._keys.get(key, {}).values())

    def sample(self, key: bytes, salt: bytes, skip: int, now: float) -> Iterator[bytes]:
        """The key's live records in an order that `salt` shuffles, starting at `skip`, once around.

        Holders of the same records give the same order, so an asker with one salt pages through them.
        """
        live = {node_id: e.blob for node_id, e in self._keys.get(key, {}).items() if e.expires > now}
        order = sorted(live, key=lambda node_id: hashlib.blake2b(node_id, key=salt, digest_size=8).digest())
        start = skip % len(order) if order else 0
        return (live[node_id] for node_id in order[start:] + order[:start])

    def sweep(self, now: float) -> None:
        """Forget what has expired."""
        for key in list(self._keys):
            self._sweep_key(key, now)

    def get(self, key: bytes, default: list[bytes] | None = None) -> list[bytes] | None:
        """The blobs under a key, expired ones included, or `default`."""
        entries = self._keys.get(key)
        return default if entries is None else [entry.blob for entry in entries.values()]

    def __getitem__(self, key: bytes) -> list[bytes]:
        blobs = self.get(key)
        if blobs is None:
            raise KeyError(key)
        return blobs

    def __setitem__(self, key: bytes, value: bytes) -> None:
        raise TypeError("records are stored with put(), which knows their source")

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        """Nothing: the package pushes what it finds here to strangers."""
        return iter(())

    def iter_older_than(self, seconds_old: float) -> Iterator[tuple[bytes, bytes]]:
        """Nothing: only its worker republishes a record."""
        return iter(())

    def __len__(self) -> int:
        return len(self._keys)

    def _group(self, source: str | None) -> bytes | None:
        if source is None or (scope(source) < 2 and not self._limit_private):
            return None
        return subnet(source)

    def _has_room(self, key: bytes, group: bytes | None, now: float) -> bool:
        self._sweep_key(key, now)
        if self.records >= MAX_RECORDS:
            self.sweep(now)
        entries = self._keys.get(key, {})
        if len(entries) >= MAX_RECORDS_PER_KEY or self.records >= MAX_RECORDS:
            return False
        if group is None:
            return True
        same = sum(entry.subnet == group for entry in entries.values())
        return self._subnets[group] < MAX_RECORDS_PER_SUBNET and same < MAX_RECORDS_PER_SUBNET_AND_KEY

    def _sweep_key(self, key: bytes, now: float) -> None:
        entries = self._keys.get(key)
        if entries is None:
            return
        for node_id in [n for n, entry in entries.items() if entry.keep_until <= now]:
            group = entries.pop(node_id).subnet
            self.records -= 1
            if group is not None:
                self._subnets[group] -= 1
                if not self._subnets[group]:
                    del self._subnets[group]
        if not entries:
            del self._keys[key]
