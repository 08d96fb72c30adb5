"""Which mesh a node belongs to: a name, and for a private mesh a 32-byte secret.

Everything that must differ between two meshes is derived here: the handshake's prologue and
pre-shared key, the DHT's key space, and the key that seals a private mesh's records.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from mesh.errors import ConfigurationError

OPEN_NETWORK = "public"
MAX_NAME = 64


@dataclass(frozen=True, slots=True)
class Network:
    """A mesh's name (1 to 64 bytes of UTF-8) and, where it is private, its 32-byte secret.

    Raises ConfigurationError for a name or secret of another size.
    """

    name: str = OPEN_NETWORK
    secret: bytes | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.name.encode()) <= MAX_NAME:
            raise ConfigurationError(
                f"the network name {self.name[:80]!r} is empty or longer than {MAX_NAME} bytes",
                "Choose a shorter name with --network.",
            )
        if self.secret is not None and len(self.secret) != 32:
            raise ConfigurationError(
                f"a network secret has 32 bytes, this one has {len(self.secret)}",
                "Use the join token that `qmesh-node invite` prints.",
            )

    @property
    def private(self) -> bool:
        """Whether a secret keeps strangers out."""
        return self.secret is not None

    @property
    def prologue(self) -> bytes:
        """The Noise prologue: two meshes of different names never complete a handshake."""
        return b"qmesh/1\x00" + self.name.encode()

    @property
    def psk(self) -> bytes | None:
        """The pre-shared key of IKpsk1: BLAKE2b-256 of the secret, personalised; None in an open mesh."""
        return self.derive(b"qmesh-psk")

    def derive(self, person: bytes) -> bytes | None:
        """A 32-byte key of its own for each purpose (BLAKE2b `person`, at most 16 bytes); None if open."""
        if self.secret is None:
            return None
        return hashlib.blake2b(self.secret, digest_size=32, person=person).digest()

    def __repr__(self) -> str:
        return f"Network({self.name!r}, {'private' if self.private else 'open'})"
