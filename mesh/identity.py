"""Who a node is: an Ed25519 key pair, and the X25519 pair derived from it for the wire.

A node id is the Ed25519 public key (32 bytes; as text 64 lowercase hex digits). Its transport key is
the birationally equivalent X25519 key (libsodium's `crypto_sign_ed25519_{pk,sk}_to_curve25519`), so
an id and an address are all that a caller needs to open an authenticated connection.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import NewType

from nacl.bindings import (
    crypto_sign,
    crypto_sign_BYTES,
    crypto_sign_ed25519_pk_to_curve25519,
    crypto_sign_ed25519_sk_to_curve25519,
    crypto_sign_open,
    crypto_sign_seed_keypair,
)
from nacl.exceptions import CryptoError

NodeId = NewType("NodeId", bytes)
"""32 bytes of an Ed25519 public key."""

NODE_ID_SIZE = 32
SIGNATURE_SIZE = crypto_sign_BYTES
_HEX_ID = re.compile(r"[0-9a-f]{64}")


class Identity:
    """A node's secret key. `seed` is 32 bytes; without one a fresh key is made.

    Raises ValueError for a seed of another length.
    """

    __slots__ = ("_secret", "id", "seed", "transport_public", "transport_secret")

    def __init__(self, seed: bytes | None = None) -> None:
        seed = secrets.token_bytes(32) if seed is None else seed
        if len(seed) != 32:
            raise ValueError("an identity seed has 32 bytes")
        public, secret = crypto_sign_seed_keypair(seed)
        self.seed = seed
        self.id = NodeId(public)
        self._secret = secret
        self.transport_secret: bytes = crypto_sign_ed25519_sk_to_curve25519(secret)
        self.transport_public: bytes = crypto_sign_ed25519_pk_to_curve25519(public)

    def sign(self, message: bytes) -> bytes:
        """The 64-byte Ed25519 signature (RFC 8032) of `message`; callers separate their domains."""
        return crypto_sign(message, self._secret)[:SIGNATURE_SIZE]

    def __repr__(self) -> str:
        return f"Identity({self.id.hex()[:12]}…)"


def verify(node_id: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` over `message` was made by `node_id`. Never raises for hostile input."""
    if len(signature) != SIGNATURE_SIZE or len(node_id) != NODE_ID_SIZE:
        return False
    try:
        crypto_sign_open(signature + message, node_id)
    except (CryptoError, ValueError):
        return False
    return True


def transport_key(node_id: bytes) -> bytes:
    """The X25519 public key that belongs to a node id.

    Raises ValueError where the bytes are no valid Ed25519 point.
    """
    if len(node_id) != NODE_ID_SIZE:
        raise ValueError("a node id has 32 bytes")
    try:
        return crypto_sign_ed25519_pk_to_curve25519(node_id)
    except CryptoError as error:
        raise ValueError("not a valid Ed25519 public key") from error


def parse_node_id(text: str) -> NodeId:
    """A node id from its 64 hex digits. Raises ValueError with the reason."""
    if not _HEX_ID.fullmatch(text):
        raise ValueError(f"{text!r} is not a node id: 64 lowercase hex digits are needed")
    return NodeId(bytes.fromhex(text))


def short_id(node_id: bytes) -> str:
    """The first 12 hex digits, for people."""
    return node_id.hex()[:12]


def dht_id(node_id: bytes) -> bytes:
    """The 20-byte Kademlia id that a node id is bound to: the first 20 bytes of BLAKE2b(node id)."""
    return hashlib.blake2b(node_id).digest()[:20]
