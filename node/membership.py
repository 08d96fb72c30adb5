"""Which mesh this machine belongs to: kept in the data folder by `join`, used by `run` and the other commands.

`mesh.json` (mode 0600: it may hold a secret) has the network's name, its secret in hex or null, and
addresses to start from.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mesh.address import Address, parse_address
from mesh.entry import parse_entry
from mesh.errors import ConfigurationError
from mesh.network import Network
from node.files import write_private

MEMBERSHIP_FILE = "mesh.json"


@dataclass(frozen=True, slots=True)
class Membership:
    """A mesh, and `host:port` addresses of nodes to start from."""

    network: Network
    addresses: tuple[str, ...] = ()

    @property
    def seeds(self) -> list[Address]:
        """The addresses as pairs."""
        return [parse_address(text) for text in self.addresses]


def kept_membership(folder: Path) -> Membership | None:
    """What `join` kept in the folder, None where it kept nothing. Raises ConfigurationError."""
    path = folder / MEMBERSHIP_FILE
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        secret = None if kept["secret"] is None else bytes.fromhex(kept["secret"])
        membership = Membership(Network(kept["network"], secret), tuple(kept["addresses"]))
        _ = membership.seeds
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"{path} cannot be used: {error}", "Run `qmesh-node leave` and join again with a token."
        ) from error
    return membership


def keep(folder: Path, membership: Membership) -> None:
    """Belong to this mesh from now on."""
    content = {
        "network": membership.network.name,
        "secret": membership.network.secret.hex() if membership.network.secret else None,
        "addresses": list(membership.addresses),
    }
    write_private(folder / MEMBERSHIP_FILE, json.dumps(content))


def forget(folder: Path) -> bool:
    """Belong to the open mesh again. False where nothing was kept."""
    path = folder / MEMBERSHIP_FILE
    existed = path.exists()
    path.unlink(missing_ok=True)
    return existed


def found(name: str) -> Membership:
    """A new private mesh with a fresh secret."""
    return Membership(Network(name, secrets.token_bytes(32)))


def resolve(
    folder: Path, *, join: Iterable[str], network: str | None, now: float
) -> tuple[Network, list[Address]]:
    """The mesh and the nodes to start from: what the flags say, else what `join` kept, else the open mesh.

    A token among `join` brings its mesh along; addresses lead into the mesh that `network` names, else
    into the kept one. Raises ConfigurationError.
    """
    kept = kept_membership(folder)
    chosen = Network(network) if network is not None else kept.network if kept else Network()
    seeds: list[Address] = []
    for text in join:
        entry = parse_entry(text, now)
        chosen = entry.network or chosen
        seeds += entry.addresses
    if kept is not None and kept.network == chosen:
        seeds += [seed for seed in kept.seeds if seed not in seeds]
    return chosen, seeds
