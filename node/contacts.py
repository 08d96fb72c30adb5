"""The peers that a node knows, as `status`, `peers` and `doctor` tell of them."""

from __future__ import annotations

from typing import Any

from mesh.address import format_address
from mesh.dht import Dht, PeerInfo
from mesh.dht.addresses import scope

MOST_SKEW = 30.0
"""Seconds of difference between two clocks beyond which records look expired or forged."""
_PATHS = ("loopback", "LAN", "internet")


def contacts(dht: Dht) -> dict[str, Any]:
    """The peers that a node knows, and the addresses that it was told of but cannot reach."""
    return {
        "peers": [describe(peer) for peer in dht.peers],
        "unreached": {format_address(*address): reason for address, reason in dht.unreached.items()},
    }


def describe(peer: PeerInfo) -> dict[str, Any]:
    """One peer: times in seconds; `problem` is what is wrong with it, or None."""
    return {
        "id": peer.id.hex(),
        "address": format_address(peer.host, peer.port),
        "found": peer.found,
        "path": _PATHS[scope(peer.host)],
        "last_seen": round(peer.last_seen, 1),
        "rtt": peer.rtt,
        "clock": round(peer.clock_offset, 1),
        "failures": peer.failures,
        "problem": _problem(peer),
    }


def _problem(peer: PeerInfo) -> str | None:
    if peer.failures:
        return f"left {peer.failures} request{'s' * (peer.failures > 1)} unanswered"
    if abs(peer.clock_offset) > MOST_SKEW:
        return f"its clock is {skew(peer.clock_offset)} this machine's"
    return None


def skew(offset: float) -> str:
    """A difference of clocks in words: `3600 s ahead of`."""
    return f"{abs(offset):.0f} s {'ahead of' if offset > 0 else 'behind'}"
