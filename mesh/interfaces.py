"""The addresses of this machine that mean something to other machines."""

from __future__ import annotations

import re
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address

import psutil

_VIRTUAL = re.compile(
    r"docker|br-[0-9a-f]{12}$|veth|virbr|vmnet|vboxnet|cni|flannel|cali|lxc|lxd|podman", re.ASCII
)
"""Interfaces between this machine and its own containers: their addresses are the same on many machines."""


def local_addresses() -> list[str]:
    """The addresses at which other machines may reach this one, the preferred first.

    Without loopback, link-local addresses, interfaces that are down, and bridges of container engines.
    Private IPv4, private IPv6, public IPv4 and public IPv6 take turns, so that whoever takes the first
    few has some of each.
    """
    groups: dict[tuple[bool, int], list[str]] = {}
    for address in _usable():
        groups.setdefault((not address.is_private, address.version), []).append(str(address))
    ranked = [(rank, key, text) for key, texts in groups.items() for rank, text in enumerate(texts)]
    return [text for *_, text in sorted(ranked)]


def _usable() -> list[IPv4Address | IPv6Address]:
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    found = [
        ip_address(item.address.partition("%")[0])
        for name, addresses in psutil.net_if_addrs().items()
        if name in up and not _VIRTUAL.match(name)
        for item in addresses
        if item.family in (socket.AF_INET, socket.AF_INET6)
    ]
    useless = ("is_loopback", "is_link_local", "is_unspecified", "is_multicast")
    return [
        address for address in dict.fromkeys(found) if not any(getattr(address, name) for name in useless)
    ]
