"""Join tokens: all that a newcomer needs, in one line of text that survives chat programs and QR codes.

A token is ``qmesh1`` ‖ base32 (lower case, unpadded) of ``payload ‖ checksum``: the payload is the
msgpack array ``[network name, secret or nil, [address, …], expires]`` (expires in unix seconds), the
checksum the first 4 bytes of its BLAKE2b. Case, blanks and hyphens do not matter when it is read.

Whoever has the token of a private mesh has its secret: the expiry keeps an old token from being used by
mistake, but only a new secret keeps out somebody who wrote it down. Pure.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from typing import Final

import msgpack

from mesh.errors import ConfigurationError, MalformedMessage
from mesh.network import Network
from mesh.records import unpack

PREFIX: Final = "qmesh1"
MAX_ADDRESSES: Final = 8
_MAX_ADDRESS: Final = 255
_CHECKSUM: Final = 4
_MAX_TOKEN: Final = 4096


@dataclass(frozen=True, slots=True)
class Invitation:
    """A mesh, a few ``host:port`` addresses of nodes in it, and when the invitation ends (unix s)."""

    network: Network
    addresses: tuple[str, ...]
    expires: int


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
    network = invitation.network
    payload = msgpack.packb([network.name, network.secret, invitation.addresses, invitation.expires])
    return PREFIX + _text(payload + _checksum(payload))


def decode_token(text: str, now: float) -> Invitation:
    """The invitation in a token, at `now` (unix seconds).

    Raises ConfigurationError where the token is garbled, of another version, or has expired.
    """
    compact = re.sub(r"[\s-]+", "", text).lower()
    if not compact.startswith(PREFIX):
        raise ConfigurationError(
            "this is not a join token of this version",
            f"A token starts with {PREFIX}; ask for a new one, or update QMesh if it starts otherwise.",
        )
    try:
        payload = _payload(compact.removeprefix(PREFIX))
        invitation = _invitation(payload)
    except MalformedMessage as error:
        raise ConfigurationError(
            f"the join token is garbled: {error}",
            "Copy it again in full, as `qmesh-node invite` printed it.",
        ) from error
    if invitation.expires <= now:
        hours = (now - invitation.expires) / 3600
        raise ConfigurationError(
            f"the join token expired {hours:.1f} hours ago",
            "Ask for a new one (`qmesh-node invite`), or set this machine's clock if that is wrong.",
        )
    return invitation


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
        case [str(name), None | bytes() as secret, list(addresses), int(expires), *_] if 1 <= len(
            addresses
        ) <= MAX_ADDRESSES and all(
            isinstance(address, str) and len(address) <= _MAX_ADDRESS for address in addresses
        ):
            return Invitation(Network(name, secret), tuple(addresses), expires)
    raise MalformedMessage("its content is not an invitation")


def _text(data: bytes) -> str:
    return base64.b32encode(data).decode().rstrip("=").lower()


def _checksum(payload: bytes) -> bytes:
    return hashlib.blake2b(payload).digest()[:_CHECKSUM]
