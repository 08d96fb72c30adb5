"""The contacts that survive a restart: a msgpack file ``{"v": 1, "contacts": [[host, port], …]}``."""

from __future__ import annotations

import logging
from pathlib import Path

import msgpack

from mesh.dht.addresses import Address, normal
from mesh.dht.limits import MAX_REMEMBERED_CONTACTS

log = logging.getLogger(__name__)

_VERSION = 1
_MAX_FILE = 64 << 10


def save_contacts(path: Path, addresses: list[Address]) -> None:
    """Replace the file at once or not at all; a failure is logged, since nothing depends on it."""
    if not addresses:
        return
    data = msgpack.packb({"v": _VERSION, "contacts": addresses})
    temporary = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        log.warning("the contacts could not be saved to %s: %s", path, error)


def load_contacts(path: Path) -> list[Address]:
    """The contacts of last time; a missing or broken file is an empty list."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        log.warning("the contacts could not be read from %s: %s", path, error)
        return []
    try:
        return _parse(data)
    except (ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException) as error:
        log.warning("the contacts in %s are not readable (%s): starting without", path, error)
        return []


def _parse(data: bytes) -> list[Address]:
    if len(data) > _MAX_FILE:
        raise ValueError("too large")
    state = msgpack.unpackb(data)
    if state["v"] != _VERSION:
        raise ValueError("another version")
    contacts = state["contacts"][:MAX_REMEMBERED_CONTACTS]
    return [(normal(host), int(port)) for host, port in contacts if 0 < int(port) < 65536]
