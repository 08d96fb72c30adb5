"""The routing table: verified contacts in Kademlia's buckets, few from any one subnet."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from kademlia.node import Node
from kademlia.routing import KBucket, RoutingTable

from mesh.dht.addresses import Address, pack_neighbour, scope, subnet
from mesh.dht.limits import BUCKET_SIZE, MAX_CONTACTS_PER_SUBNET, MAX_FAILURES
from mesh.identity import dht_id


class Contact(Node):  # type: ignore[misc]  # the package has no types
    """A peer that proved its id and its address. Times in monotonic seconds, `rtt` in seconds.

    `clock_offset` is how many seconds its clock is ahead of ours, `seen_address` where it sees us.
    """

    id: bytes
    long_id: int

    def __init__(self, node_id: bytes, address: Address, found: str, now: float) -> None:
        super().__init__(dht_id(node_id), *address)
        self.node_id = node_id
        self.address = address
        self.packed = pack_neighbour(self.id, address)
        self.found = found
        self.last_seen = now
        self.rtt: float | None = None
        self.clock_offset = 0.0
        self.seen_address: Address | None = None
        self.failures = 0

    def seen(self, now: float, rtt: float | None = None) -> None:
        """It answered or asked: it lives. `rtt` is smoothed as in RFC 6298."""
        self.last_seen = now
        self.failures = 0
        if rtt is not None:
            self.rtt = rtt if self.rtt is None else self.rtt + (rtt - self.rtt) / 8

    def update(self, latest: Contact) -> None:
        """It proved itself again; how it was found is worth more the more it says."""
        self.clock_offset = latest.clock_offset
        self.seen_address = latest.seen_address
        if latest.found != "dht":
            self.found = latest.found


class Table(RoutingTable):  # type: ignore[misc]  # the package has no types
    """Contacts by distance. Buckets are the package's; who enters and who is near is decided here.

    `limit_private` extends the cap per subnet to loopback and private addresses.
    """

    buckets: list[KBucket]

    def __init__(self, own_id: bytes, *, limit_private: bool = False) -> None:
        super().__init__(None, BUCKET_SIZE, Node(own_id))
        self._limit_private = limit_private
        self._by_id: dict[bytes, Contact] = {}
        self._by_address: dict[Address, Contact] = {}

    def __iter__(self) -> Iterator[Contact]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def isolated(self) -> bool:
        """Whether nobody is known to answer."""
        return all(contact.failures for contact in self)

    def get(self, contact_id: bytes) -> Contact | None:
        """The contact with a DHT id."""
        return self._by_id.get(contact_id)

    def at(self, address: Address) -> Contact | None:
        """The contact at an address."""
        return self._by_address.get(address)

    def wants(self, contact_id: bytes, address: Address) -> bool:
        """Whether a peer that proves itself would be taken in."""
        if contact_id == self.node.id:
            return False
        known = self._by_id.get(contact_id)
        if known is not None:
            return known.address != address and known.failures > 0
        bucket = self._bucket(contact_id)
        has_room = (
            len(bucket) < BUCKET_SIZE
            or bucket.has_in_range(self.node)
            or any(contact.failures for contact in bucket.get_nodes())
        )
        return has_room and self._diverse(bucket, address)

    def add(self, contact: Contact) -> bool:
        """Take a verified contact in where there is room; a failing one makes room."""
        if not self.wants(contact.id, contact.address):
            return False
        for stale in (self._by_id.get(contact.id), self._by_address.get(contact.address)):
            if stale is not None:
                self.remove(stale)
        bucket = self._bucket(contact.id)
        while len(bucket) >= BUCKET_SIZE and bucket.has_in_range(self.node):
            self.split_bucket(self.buckets.index(bucket))
            bucket = self._bucket(contact.id)
        if len(bucket) >= BUCKET_SIZE:
            failing = [other for other in bucket.get_nodes() if other.failures]
            if not failing:
                return False
            self.remove(max(failing, key=lambda other: other.failures))
        bucket.add_node(contact)
        self._by_id[contact.id] = contact
        self._by_address[contact.address] = contact
        return True

    def remove(self, contact: Contact) -> None:
        """Forget a contact."""
        self._bucket(contact.id).remove_node(contact)
        self._by_id.pop(contact.id, None)
        if self._by_address.get(contact.address) is contact:
            del self._by_address[contact.address]

    def failed(self, contact: Contact) -> None:
        """It did not answer: not recommended until it does, and forgotten the second time."""
        contact.failures += 1
        if contact.failures >= MAX_FAILURES:
            self.remove(contact)

    def closest(self, target: bytes, count: int = BUCKET_SIZE) -> list[Contact]:
        """The contacts nearest to an id, the nearest first; failing ones only where no other is left."""
        number = int.from_bytes(target)
        good = [contact for contact in self if not contact.failures] or list(self)
        return sorted(good, key=lambda contact: contact.long_id ^ number)[:count]

    def stalest(self, count: int, before: float) -> list[Contact]:
        """Contacts not heard of since `before`, failing ones first."""
        stale = [contact for contact in self if contact.last_seen < before or contact.failures]
        return heapq.nsmallest(count, stale, key=lambda contact: (not contact.failures, contact.last_seen))

    def _bucket(self, contact_id: bytes) -> KBucket:
        return self.buckets[self.get_bucket_for(Node(contact_id))]

    def _diverse(self, bucket: KBucket, address: Address) -> bool:
        if scope(address[0]) < 2 and not self._limit_private:
            return True
        group = subnet(address[0])
        same = sum(subnet(contact.ip) == group for contact in bucket.get_nodes())
        return same < MAX_CONTACTS_PER_SUBNET
