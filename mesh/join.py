"""Join tokens: all that a newcomer needs, in one line of text that survives chat programs and QR codes.

A token is ``qmesh1`` ‖ base32 (lower case, unpadded) of ``payload ‖ checksum``: the payload is the
msgpack array ``[network name, ticket or nil, [address, …], expires]`` (expires in unix seconds), the
checksum the first 4 bytes of its BLAKE2b. Case, blanks and hyphens do not matter when it is read.

The token of a private mesh does not hold its secret but a ticket ``[inviter's node id, invitation id,
key]``: with it the inviter, and nobody else, hands over the secret (`mesh.transport.admit`), as long as
its own clock and its list of invitations say so. An open mesh has no secret, and its token no ticket. Pure.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from typing import Final

import msgpack

from mesh.errors import ConfigurationError, MalformedMessage
from mesh.identity import NODE_ID_SIZE, NodeId
from mesh.network import Network
from mesh.records import unpack

PREFIX: Final = "qmesh1"
MAX_ADDRESSES: Final = 8
INVITATION_ID_SIZE: Final = 8
_INVITATION_KEY: Final = b"qmesh-invite"
_KEY_SIZE: Final = 32
_MAX_ADDRESS: Final = 255
_CHECKSUM: Final = 4
_MAX_TOKEN: Final = 4096


@dataclass(frozen=True, slots=True)
class Ticket:
    """What opens a private mesh's door: whose door, which invitation, and the 32-byte key of that."""

    inviter: NodeId
    id: bytes
    key: bytes

    def __repr__(self) -> str:
        return f"Ticket({self.id.hex()})"


@dataclass(frozen=True, slots=True)
class Invitation:
    """A mesh's name, a few ``host:port`` addresses of nodes in it, and when the invitation ends (unix s).

    `ticket` is None where the mesh is open. Raises ConfigurationError for a name of the wrong size.
    """

    name: str
    addresses: tuple[str, ...]
    expires: int
    ticket: Ticket | None = None

    def __post_init__(self) -> None:
        Network(self.name)

    @property
    def door(self) -> Network:
        """The network of the handshake: of a private mesh only the antechamber of this invitation."""
        return Network(self.name, self.ticket.key if self.ticket is not None else None)

    def check(self, now: float) -> None:
        """Raises ConfigurationError where the invitation is over at `now` (unix seconds)."""
        if self.expires <= now:
            raise ConfigurationError(
                f"the join token expired {(now - self.expires) / 3600:.1f} hours ago",
                "Ask for a new one (`qmesh-node invite`), or set this machine's clock if that is wrong.",
            )


def issue(
    network: Network, inviter: NodeId, addresses: tuple[str, ...], expires: int, invitation_id: bytes
) -> Invitation:
    """An invitation of a member; `invitation_id`: 8 fresh random bytes, of no use in an open mesh."""
    key = invitation_key(network, invitation_id)
    ticket = None if key is None else Ticket(inviter, invitation_id, key)
    return Invitation(network.name, addresses, expires, ticket)


def invitation_key(network: Network, invitation_id: bytes) -> bytes | None:
    """The key of an invitation into a private network: 32 bytes that tell nothing of its secret."""
    root = network.derive(_INVITATION_KEY)
    return None if root is None else hashlib.blake2b(invitation_id, digest_size=_KEY_SIZE, key=root).digest()


def looks_like_token(text: str) -> bool:
    """Whether a text is meant as a token rather than as an address."""
    return text.strip().lower().startswith(PREFIX) and ":" not in text


def encode_token(invitation: Invitation) -> str:
    """The token of an invitation. Raises ConfigurationError for none or too many addresses."""
    if not 1 <= len(invitation.addresses) <= MAX_ADDRESSES:
        raise ConfigurationError(
            f"an invitation has 1 to {MAX_ADDRESSES} addresses, this one {len(invitation.addresses)}",
            "Name the addresses at which this node can be reached with --advertise.",
        )
    ticket = invitation.ticket
    inside = None if ticket is None else [ticket.inviter, ticket.id, ticket.key]
    payload = msgpack.packb([invitation.name, inside, invitation.addresses, invitation.expires])
    return PREFIX + _text(payload + _checksum(payload))


def decode_token(text: str) -> Invitation:
    """The invitation in a token. Raises ConfigurationError where it is garbled or of another version."""
    compact = re.sub(r"[\s-]+", "", text).lower()
    if not compact.startswith(PREFIX):
        raise ConfigurationError(
            "this is not a join token of this version",
            f"A token starts with {PREFIX}; ask for a new one, or update QMesh if it starts otherwise.",
        )
    try:
        return _invitation(_payload(compact.removeprefix(PREFIX)))
    except MalformedMessage as error:
        raise ConfigurationError(
            f"the join token is garbled: {error}",
            "Copy it again in full, as `qmesh-node invite` printed it.",
        ) from error


def _payload(text: str) -> bytes:
    if len(text) > _MAX_TOKEN:
        raise MalformedMessage("it is too long")
    try:
        data = base64.b32decode(text.upper() + "=" * (-len(text) % 8))
    except ValueError as error:
        raise MalformedMessage("it holds characters that no token has, or some are missing") from error
    payload, checksum = data[:-_CHECKSUM], data[-_CHECKSUM:]
    # Comparing the text too catches a change in the last character's unused bits.
    if not payload or checksum != _checksum(payload) or _text(data) != text:
        raise MalformedMessage("its checksum is wrong, so some characters are missing or changed")
    return payload


def _invitation(payload: bytes) -> Invitation:
    match unpack(payload):
        case [str(name), inside, list(addresses), int(expires), *_] if 1 <= len(
            addresses
        ) <= MAX_ADDRESSES and all(
            isinstance(address, str) and len(address) <= _MAX_ADDRESS for address in addresses
        ):
            return Invitation(name, tuple(addresses), expires, None if inside is None else _ticket(inside))
    raise MalformedMessage("its content is not an invitation")


def _ticket(inside: object) -> Ticket:
    match inside:
        case [bytes(inviter), bytes(invitation_id), bytes(key), *_] if (
            len(inviter) == NODE_ID_SIZE
            and len(invitation_id) == INVITATION_ID_SIZE
            and len(key) == _KEY_SIZE
        ):
            return Ticket(NodeId(inviter), invitation_id, key)
    raise MalformedMessage("its content is not an invitation")


def _text(data: bytes) -> str:
    return base64.b32encode(data).decode().rstrip("=").lower()


def _checksum(payload: bytes) -> bytes:
    return hashlib.blake2b(payload).digest()[:_CHECKSUM]
