"""`HOST:PORT` as text and as a pair; IPv6 hosts stand in brackets. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

Address = tuple[str, int]
"""A host (name or number) and a port."""


def parse_address(text: str) -> Address:
    """The pair. Raises ValueError with the reason."""
    host, colon, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not bare or (":" in bare and bare == host):
        raise ValueError(f"{text[:80]!r} is not HOST:PORT (IPv6 hosts in brackets)")
    if not _resolvable(bare):
        raise ValueError(f"{text[:80]!r} is not HOST:PORT: no host can have that name")
    if not port.isascii() or not port.isdigit() or len(port) > 5 or int(port) > 65535:
        raise ValueError(f"{text[:80]!r} has no port between 0 and 65535")
    return bare, int(port)


def usable_addresses(texts: Iterable[str]) -> list[Address]:
    """Those addresses of a record that are understood here; other forms are other versions'."""
    found = []
    for text in texts:
        with suppress(ValueError):
            found.append(parse_address(text))
    return found


def format_address(host: str, port: int) -> str:
    """The inverse of `parse_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _resolvable(host: str) -> bool:
    """Whether a name may be handed to the resolver, which raises UnicodeError for some."""
    if len(host) > 253 or not host.isprintable() or any(character in " @[]/" for character in host):
        return False
    try:
        host.encode("idna")
    except UnicodeError:
        return False
    return True
