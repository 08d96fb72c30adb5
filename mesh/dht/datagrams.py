"""The bytes of a datagram, and the tokens that prove an address. Pure.

A datagram is rpcudp's, with a tag: ``kind (0 request, 1 reply) ‖ message id (20) ‖ msgpack ‖ tag (8)``.
A request's msgpack is ``[method, arguments]``, a reply's an array. The tag is a BLAKE2b-64 keyed with
the mesh: two meshes ignore each other's datagrams, and nobody outside a private mesh can make one.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Any, Final

import msgpack

from mesh.dht.addresses import parse
from mesh.dht.limits import MIN_REQUEST, TOKEN_ROTATION, TOKEN_SIZE
from mesh.errors import AuthenticationError, MalformedMessage
from mesh.limits import MAX_DATAGRAM
from mesh.network import Network
from mesh.records import unpack

REQUEST: Final = 0
REPLY: Final = 1
ID_SIZE: Final = 20
TAG_SIZE: Final = 8
OVERHEAD: Final = 1 + ID_SIZE + TAG_SIZE


class Codec:
    """Makes and reads the datagrams of one mesh."""

    def __init__(self, network: Network) -> None:
        secret = network.derive(b"qmesh-datagram") or b""
        self._key = hashlib.blake2b(network.prologue, digest_size=32, key=secret).digest()

    def encode(self, kind: int, message_id: bytes, payload: list[Any]) -> bytes:
        """A whole datagram."""
        packed: bytes = msgpack.packb(payload)
        data = bytes([kind]) + message_id + packed
        return data + self._tag(data)

    def decode(self, data: bytes) -> tuple[int, bytes, list[Any]]:
        """(kind, message id, payload). Raises MalformedMessage, AuthenticationError."""
        if not MIN_REQUEST <= len(data) <= MAX_DATAGRAM:
            raise MalformedMessage("a datagram of a wrong size")
        if not hmac.compare_digest(self._tag(data[:-TAG_SIZE]), data[-TAG_SIZE:]):
            raise AuthenticationError("a datagram of another mesh")
        payload = unpack(data[1 + ID_SIZE : -TAG_SIZE])
        if data[0] not in (REQUEST, REPLY) or not isinstance(payload, list):
            raise MalformedMessage("not a request or reply")
        return data[0], data[1 : 1 + ID_SIZE], payload

    def _tag(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, digest_size=TAG_SIZE, key=self._key).digest()


class Tokens:
    """Tokens as in BEP 5: whoever shows one has received a reply at its address."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def issue(self, host: str, now: float) -> bytes:
        """The token for a host at `now` (monotonic seconds)."""
        return self._make(host, int(now / TOKEN_ROTATION))

    def valid(self, token: bytes, host: str, now: float) -> bool:
        """Whether the token was issued to this host in this rotation or the last."""
        epoch = int(now / TOKEN_ROTATION)
        return len(token) == TOKEN_SIZE and token in (self._make(host, epoch), self._make(host, epoch - 1))

    def _make(self, host: str, epoch: int) -> bytes:
        data = parse(host).packed + epoch.to_bytes(8, signed=True)
        return hashlib.blake2b(data, digest_size=TOKEN_SIZE, key=self._secret).digest()
