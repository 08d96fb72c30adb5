"""Which mesh this machine belongs to: kept in the data folder by `join`, used by `run` and the other commands.

`mesh.json` (mode 0600: it may hold a secret) has the network's name, its secret in hex or null, and
addresses to start from. `joined/ID.json` has the same of the mesh that a private mesh's token (with that
invitation id) led to: a token may stand in a setting for good, and is redeemed only once.
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mesh.address import Address, format_address, parse_address
from mesh.entry import Entry, parse_entry
from mesh.errors import ConfigurationError
from mesh.join import Invitation
from mesh.keystore import load_identity
from mesh.network import Network
from mesh.transport import redeem
from node.files import write_private

MEMBERSHIP_FILE = "mesh.json"
JOINED_FOLDER = "joined"


@dataclass(frozen=True, slots=True)
class Membership:
    """A mesh, and nodes to start from, each as `HOST:PORT` or `ID@HOST:PORT`."""

    network: Network
    addresses: tuple[str, ...] = ()

    @property
    def seeds(self) -> list[Address]:
        """The addresses as pairs."""
        return [parse_address(text.rpartition("@")[2]) for text in self.addresses]


def kept_membership(folder: Path) -> Membership | None:
    """What `join` kept in the folder, None where it kept nothing. Raises ConfigurationError."""
    return _read(folder / MEMBERSHIP_FILE)


def keep(folder: Path, membership: Membership) -> None:
    """Belong to this mesh from now on."""
    _write(folder / MEMBERSHIP_FILE, membership)


def forget(folder: Path) -> bool:
    """Belong to the open mesh again, and keep no secret. False where nothing was kept."""
    paths = (folder / MEMBERSHIP_FILE, folder / JOINED_FOLDER)
    existed = any(path.exists() for path in paths)
    paths[0].unlink(missing_ok=True)
    if paths[1].exists():
        shutil.rmtree(paths[1])
    return existed


def found(name: str) -> Membership:
    """A new private mesh with a fresh secret."""
    return Membership(Network(name, secrets.token_bytes(32)))


async def enter(folder: Path, invitation: Invitation) -> Membership:
    """Where an invitation leads, with the identity of the node in the folder.

    Raises ConfigurationError where it is over or not accepted, and a TransportError where the inviter does
    not answer.
    """
    if invitation.ticket is None:
        invitation.check(time.time())
        return Membership(invitation.door, invitation.addresses)
    path = folder / JOINED_FOLDER / f"{invitation.ticket.id.hex()}.json"
    entered = _read(path)
    if entered is None:
        network = await redeem(invitation, load_identity(folder))
        entered = Membership(network, invitation.addresses)
        _write(path, entered)
    return entered


async def resolve(folder: Path, *, join: Iterable[str], network: str | None) -> Membership:
    """The mesh and the nodes to start from: what the flags say, else what `join` kept, else the open mesh.

    A token among `join` brings its mesh along, and is redeemed where it has not been; addresses lead into
    the mesh that `network` names, else into the kept one. Raises as `enter` does.
    """
    kept = kept_membership(folder)
    chosen = Network(network) if network is not None else kept.network if kept else Network()
    ways: list[str] = []
    for text in join:
        entry = parse_entry(text, time.time())
        if entry.invitation is not None:
            chosen = (await enter(folder, entry.invitation)).network
        chosen = entry.network or chosen
        ways += _ways(entry)
    if kept is not None and kept.network == chosen:
        ways += [text for text in kept.addresses if text not in ways]
    return Membership(chosen, tuple(ways))


def _ways(entry: Entry) -> list[str]:
    pin = "" if entry.peer is None else f"{entry.peer.hex()}@"
    return [f"{pin}{format_address(*address)}" for address in entry.addresses]


def _read(path: Path) -> Membership | None:
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


def _write(path: Path, membership: Membership) -> None:
    content = {
        "network": membership.network.name,
        "secret": membership.network.secret.hex() if membership.network.secret else None,
        "addresses": list(membership.addresses),
    }
    write_private(path, json.dumps(content))
