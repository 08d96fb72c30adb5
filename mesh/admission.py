"""Which strangers a listener lets in, and how many. Pure.

A visitor (any hashable object: one socket) is half-open from its arrival until a frame of it
authenticates; a replayed handshake never gets there, so it never counts as its victim's connection.
When all half-open places are taken, the oldest visitor of the network that has the most must leave:
an honest handshake is over in a round trip, so a flood displaces mostly itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from mesh.errors import ErrorCode
from mesh.identity import NodeId
from mesh.limits import (
    MAX_CONNECTIONS,
    MAX_CONNECTIONS_PER_PEER,
    MAX_HALF_OPEN,
    MAX_HALF_OPEN_PER_NETWORK,
)

IPNetwork = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class AdmissionPolicy:
    """Lists and caps. `allow` None lets every peer in that `deny` does not name.

    `deny_networks` are refused before a byte is read.
    """

    allow: frozenset[NodeId] | None = None
    deny: frozenset[NodeId] = frozenset()
    deny_networks: tuple[IPNetwork, ...] = ()
    max_half_open: int = MAX_HALF_OPEN
    max_half_open_per_network: int = MAX_HALF_OPEN_PER_NETWORK
    max_connections: int = MAX_CONNECTIONS
    max_connections_per_peer: int = MAX_CONNECTIONS_PER_PEER


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why somebody is not let in, as it may be told."""

    code: ErrorCode
    message: str


def network_of(host: str) -> IPNetwork | None:
    """The /24 (IPv4, also mapped into IPv6) or /64 that an address counts under; None for loopback."""
    address = _address(host)
    if address.is_loopback:
        return None
    if isinstance(address, IPv4Address):
        return IPv4Network((int(address) & ~0xFF, 24))
    return IPv6Network((int(address) >> 64 << 64, 64))


def _address(host: str) -> IPv4Address | IPv6Address:
    address = ip_address(host.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


class Admission:
    """The visitors of one listener."""

    def __init__(self, policy: AdmissionPolicy) -> None:
        self.policy = policy
        self._half_open: dict[Hashable, IPNetwork | None] = {}  # oldest first
        self._networks: Counter[IPNetwork | None] = Counter()
        self._proven: dict[Hashable, NodeId] = {}
        self._peers: Counter[NodeId] = Counter()

    @property
    def half_open(self) -> int:
        """Visitors that have not shown an authentic frame yet."""
        return len(self._half_open)

    @property
    def established(self) -> int:
        """Visitors that have."""
        return len(self._proven)

    def arrived(self, visitor: Hashable, host: str) -> tuple[Refusal | None, Hashable | None]:
        """A socket was accepted: a refusal, or None and the visitor that has to leave for it, if any.

        The one that has to leave is no longer counted. Raises ValueError if `host` is no IP address.
        """
        policy = self.policy
        address = _address(host)
        if any(address in network for network in policy.deny_networks):
            return Refusal(ErrorCode.UNAUTHORIZED, "this address is not served"), None
        if len(self._half_open) + len(self._proven) >= policy.max_connections:
            return Refusal(ErrorCode.OVERLOADED, "too many connections"), None
        network = network_of(host)
        if network is not None and self._networks[network] >= policy.max_half_open_per_network:
            return Refusal(ErrorCode.OVERLOADED, "too many handshakes from this network"), None
        leaving = None
        if len(self._half_open) >= policy.max_half_open:
            busiest = self._networks.most_common(1)[0][0]
            leaving = next(other for other, where in self._half_open.items() if where == busiest)
            self.left(leaving)
        self._half_open[visitor] = network
        self._networks[network] += 1
        return None, leaving

    def introduced(self, peer_id: NodeId) -> Refusal | None:
        """The handshake says who it is."""
        policy = self.policy
        if peer_id in policy.deny or (policy.allow is not None and peer_id not in policy.allow):
            return Refusal(ErrorCode.UNAUTHORIZED, "this node does not serve you")
        return None

    def proven(self, visitor: Hashable, peer_id: NodeId) -> Refusal | None:
        """A frame of the visitor authenticated: it is no longer half-open."""
        if self._peers[peer_id] >= self.policy.max_connections_per_peer:
            return Refusal(
                ErrorCode.OVERLOADED, f"more than {self.policy.max_connections_per_peer} connections"
            )
        self._forget_half_open(visitor)
        self._proven[visitor] = peer_id
        self._peers[peer_id] += 1
        return None

    def left(self, visitor: Hashable) -> None:
        """The socket is gone. Idempotent."""
        self._forget_half_open(visitor)
        peer_id = self._proven.pop(visitor, None)
        if peer_id is not None:
            self._peers[peer_id] -= 1
            if not self._peers[peer_id]:
                del self._peers[peer_id]

    def _forget_half_open(self, visitor: Hashable) -> None:
        if visitor in self._half_open:
            network = self._half_open.pop(visitor)
            self._networks[network] -= 1
            if not self._networks[network]:
                del self._networks[network]

    def validate(self) -> None:
        """Raises AssertionError where an invariant does not hold. For tests, after every step."""
        policy = self.policy
        if self._networks != Counter(self._half_open.values()) or self._peers != Counter(
            self._proven.values()
        ):
            raise AssertionError("the counters count the visitors")
        if len(self._half_open) > policy.max_half_open:
            raise AssertionError("more half-open visitors than allowed")
        if len(self._half_open) + len(self._proven) > policy.max_connections:
            raise AssertionError("more visitors than allowed")
        if any(count > policy.max_connections_per_peer for count in self._peers.values()):
            raise AssertionError("a peer has more connections than allowed")
        if any(where and n > policy.max_half_open_per_network for where, n in self._networks.items()):
            raise AssertionError("a network has more half-open visitors than allowed")
