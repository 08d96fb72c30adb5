"""What a person writes to say where a mesh begins: `HOST:PORT`, `ID@HOST:PORT` or a join token. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from mesh.address import Address, parse_address, usable_addresses
from mesh.errors import ConfigurationError
from mesh.identity import NodeId, parse_node_id
from mesh.join import Invitation, decode_token, looks_like_token
from mesh.limits import DEFAULT_PORT
from mesh.network import Network


@dataclass(frozen=True, slots=True)
class Entry:
    """Where to start. With `peer` only that node is accepted; `network` is None where it is not told.

    `invitation` has to be redeemed before a private mesh can be used (`mesh.transport.redeem`), while it
    lasts.
    """

    addresses: tuple[Address, ...]
    peer: NodeId | None = None
    network: Network | None = None
    invitation: Invitation | None = None


def parse_entry(text: str, now: float) -> Entry:
    """Read one `--join` argument; the port may be left out. `now` (unix seconds) is for the tokens of open
    meshes, which expire here; those of private meshes do where they are redeemed. Raises ConfigurationError.
    """
    if looks_like_token(text):
        invitation = decode_token(text)
        addresses = usable_addresses(invitation.addresses)
        if not addresses:
            raise ConfigurationError(
                "the join token names no address that can be used", "Ask for a new one (`qmesh-node invite`)."
            )
        if invitation.ticket is not None:
            return Entry(tuple(addresses), invitation=invitation)
        invitation.check(now)
        return Entry(tuple(addresses), network=Network(invitation.name))
    node_id, at, address = text.strip().rpartition("@")
    try:
        peer = parse_node_id(node_id) if at else None
        if ":" not in address.rpartition("]")[2]:
            address = f"{address}:{DEFAULT_PORT}"
        return Entry((parse_address(address),), peer)
    except ValueError as error:
        raise ConfigurationError(
            f"{text!r} is no place to join: {error}",
            "Write HOST:PORT of a node that runs, for example 192.168.1.20:9470.",
        ) from None
