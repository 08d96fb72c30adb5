"""IP addresses as the DHT needs them: normal form, subnets, scopes and the compact form in datagrams."""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address

from mesh.errors import MalformedMessage
from mesh.records import KEY_SIZE

Address = tuple[str, int]
"""(numeric host, UDP port)"""
Neighbour = tuple[bytes, Address]
"""(20-byte DHT id, address)"""

_CACHE = 8192
_SIZES = {4: 7, 6: 19}
"""Bytes of a compact address by its IP version."""


@lru_cache(_CACHE)
def parse(host: str) -> IPv4Address | IPv6Address:
    """The address without zone and without the IPv4-mapped form. Raises ValueError."""
    address = ip_address(host.partition("%")[0])
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


@lru_cache(_CACHE)
def normal(host: str) -> str:
    """One text for one address: ``::ffff:1.2.3.4`` is ``1.2.3.4``. Raises ValueError."""
    return str(parse(host))


@lru_cache(_CACHE)
def subnet(host: str) -> bytes:
    """The /24 or /64 that a host is in, as bytes."""
    address = parse(host)
    return address.packed[: 3 if address.version == 4 else 8]


@lru_cache(_CACHE)
def scope(host: str) -> int:
    """0 this machine, 1 its LAN (private or link-local), 2 the world; 3 no place to send to."""
    address = parse(host)
    if address.is_multicast or address.is_unspecified or address.packed == b"\xff\xff\xff\xff":
        return 3
    if address.is_loopback:
        return 0
    return 1 if address.is_private or address.is_link_local else 2


def may_introduce(teller: str, told: str) -> bool:
    """Whether a contact at `told` is credible from `teller`.

    A peer from outside must not make us send to our own machine or LAN.
    """
    return scope(teller) <= scope(told) < 3


def pack_neighbour(contact_id: bytes, address: Address) -> bytes:
    """The compact form in replies: id (20) ‖ address as `pack_address`."""
    return contact_id + pack_address(address)


def unpack_neighbours(data: bytes) -> list[Neighbour]:
    """The neighbours in a reply, packed one after another. Raises MalformedMessage."""
    neighbours: list[Neighbour] = []
    position = 0
    while position < len(data):
        start = position + KEY_SIZE
        end = start + _SIZES.get(data[start] if start < len(data) else 0, 0)
        neighbours.append((data[position:start], unpack_address(data[start:end])))
        position = end
    return neighbours


def pack_address(address: Address) -> bytes:
    """4 or 6 ‖ address (4 or 16) ‖ port (2)."""
    host = parse(address[0])
    return bytes([host.version]) + host.packed + address[1].to_bytes(2)


@lru_cache(_CACHE)
def unpack_address(data: bytes) -> Address:
    """The inverse of `pack_address`. Raises MalformedMessage."""
    if not data or _SIZES.get(data[0]) != len(data):
        raise MalformedMessage("not a compact address")
    port = int.from_bytes(data[-2:])
    if port == 0:
        raise MalformedMessage("an address without a port")
    return normal(str(ip_address(data[1:-2]))), port
