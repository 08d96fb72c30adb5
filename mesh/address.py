"""`HOST:PORT` as text and as a pair; IPv6 hosts stand in brackets. Pure."""

from __future__ import annotations

Address = tuple[str, int]
"""A host (name or number) and a port."""


def parse_address(text: str) -> Address:
    """The pair. Raises ValueError with the reason."""
    host, colon, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not bare or (":" in bare and bare == host):
        raise ValueError(f"{text!r} is not HOST:PORT (IPv6 hosts in brackets)")
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{text!r} has no port between 0 and 65535")
    return bare, int(port)


def format_address(host: str, port: int) -> str:
    """The inverse of `parse_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
