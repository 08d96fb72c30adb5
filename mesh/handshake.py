"""The opening of a connection: two Noise messages with a small payload each (docs/protocol.md).

::

    1  initiator -> responder   00 00                             only if it does not know the node id
    2  initiator <- responder   u16 length ‖ node id, sealed in a private mesh
       or, only if it is invited and has no secret yet:
    1  initiator -> responder   00 08 ‖ invitation id             and message 1 right behind it
    3  initiator -> responder   u16 length ‖ Noise message 1 {v, id, ua, t}
    4  initiator <- responder   u16 length ‖ Noise message 2 {v, ua, t, max_streams, window}

Pure: bytes, the time and fresh random bytes come in, bytes come out. No request rides in message 1,
because it could be replayed: a replay reaches message 2 and no further, since whoever replays cannot
read it. For that reason the time `t` is not a condition but a measurement of the peer's clock.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
from nacl.bindings import (
    crypto_aead_xchacha20poly1305_ietf_decrypt,
    crypto_aead_xchacha20poly1305_ietf_encrypt,
)
from nacl.exceptions import CryptoError

from mesh.errors import AuthenticationError, FrameTooLarge, MalformedMessage, VersionMismatch
from mesh.frames import prefix_length
from mesh.identity import NODE_ID_SIZE, Identity, NodeId, transport_key
from mesh.limits import (
    INITIAL_CREDIT,
    MAX_CREDIT,
    MAX_HANDSHAKE_MESSAGE,
    MAX_SID,
    MAX_STREAMS,
    MAX_TEXT,
    PROTOCOL_VERSION,
)
from mesh.network import Network
from mesh.noise import CipherState, Handshake

WHOIS_REQUEST = b"\x00\x00"
WHOIS_NONCE_SIZE = 24
_WHOIS_KEY = b"qmesh-whois"


@dataclass(slots=True)
class Agreed:
    """What both sides know when the handshake is complete.

    `send` and `receive` are this side's cipher states. `max_streams` and `window` are the peer's: how
    many streams it lets this side open, and this side's initial credit on each, in bytes. `clock_skew`
    is the peer's clock minus ours in seconds (with half a round trip in it), None where it sent no time.
    """

    peer_id: NodeId
    peer_agent: str
    send: CipherState
    receive: CipherState
    max_streams: int
    window: int
    clock_skew: float | None


def take_message(buffer: bytearray) -> bytes | None:
    """Remove the first length-prefixed handshake message from `buffer`; None while it is incomplete.

    Raises FrameTooLarge as soon as a length is over MAX_HANDSHAKE_MESSAGE.
    """
    if len(buffer) < 2:
        return None
    size = int.from_bytes(buffer[:2], "big")
    if size > MAX_HANDSHAKE_MESSAGE:
        raise FrameTooLarge(f"a handshake message has at most {MAX_HANDSHAKE_MESSAGE} bytes, not {size}")
    if len(buffer) < 2 + size:
        return None
    message = bytes(buffer[2 : 2 + size])
    del buffer[: 2 + size]
    return message


def whois_reply(network: Network, node_id: NodeId, nonce: bytes) -> bytes:
    """The answer to a WHOIS_REQUEST, with its length. `nonce`: 24 fresh random bytes."""
    key = network.derive(_WHOIS_KEY)
    if key is None:
        return prefix_length(node_id)
    sealed = crypto_aead_xchacha20poly1305_ietf_encrypt(node_id, network.prologue, nonce, key)
    return prefix_length(nonce + sealed)


def open_whois_reply(network: Network, reply: bytes) -> NodeId:
    """The responder's node id. It is a claim until the handshake proves it (trust on first use).

    Raises AuthenticationError.
    """
    key = network.derive(_WHOIS_KEY)
    node_id = reply
    if key is not None:
        nonce, sealed = reply[:WHOIS_NONCE_SIZE], reply[WHOIS_NONCE_SIZE:]
        try:
            node_id = crypto_aead_xchacha20poly1305_ietf_decrypt(sealed, network.prologue, nonce, key)
        except (CryptoError, ValueError) as error:
            raise AuthenticationError(
                "the node is not in this private mesh: another network name or secret"
            ) from error
    if len(node_id) != NODE_ID_SIZE:
        raise AuthenticationError("the node did not tell a node id: it is in another mesh, or no QMesh node")
    return NodeId(node_id)


def announce_invitation(invitation_id: bytes) -> bytes:
    """What an invited caller sends before message 1. No message 1 is as short, so its length tells it."""
    return prefix_length(invitation_id)


class Initiator:
    """The caller's side. `ephemeral`: 32 fresh random bytes. Raises AuthenticationError for a peer id
    that is no valid key.
    """

    __slots__ = ("_identity", "_noise", "_now_ms", "_peer_id", "_user_agent")

    def __init__(
        self, identity: Identity, network: Network, peer_id: NodeId, *, ephemeral: bytes, user_agent: str
    ) -> None:
        try:
            remote = transport_key(peer_id)
        except ValueError as error:
            raise AuthenticationError(f"{peer_id.hex()[:64]} is not a node id") from error
        self._identity = identity
        self._peer_id = peer_id
        self._user_agent = user_agent
        self._noise = Handshake(
            initiator=True, prologue=network.prologue, static=identity.transport_secret, ephemeral=ephemeral,
            remote_static=remote, psk=network.psk,
        )  # fmt: skip

    def message_1(self, now_ms: int) -> bytes:
        """Message 1 with its length; `now_ms` is unix time."""
        payload = {"v": PROTOCOL_VERSION, "id": self._identity.id, "ua": self._user_agent, "t": now_ms}
        return prefix_length(self._noise.write(msgpack.packb(payload)))

    def message_2(self, message: bytes, now_ms: int) -> Agreed:
        """Read message 2. Raises AuthenticationError, MalformedMessage or VersionMismatch."""
        hello = _read_payload(self._noise.read(message))
        _check_version(hello)
        send, receive = self._noise.split()
        return Agreed(
            peer_id=self._peer_id, peer_agent=_agent(hello), send=send, receive=receive,
            max_streams=_count(hello, "max_streams", MAX_STREAMS, MAX_SID),
            window=_count(hello, "window", INITIAL_CREDIT, MAX_CREDIT),
            clock_skew=_clock_skew(hello, now_ms),
        )  # fmt: skip


class Responder:
    """The called side. `ephemeral`: 32 fresh random bytes."""

    __slots__ = ("_hello", "_noise", "_user_agent")

    def __init__(self, identity: Identity, network: Network, *, ephemeral: bytes, user_agent: str) -> None:
        self._user_agent = user_agent
        self._hello: Mapping[str, Any] = {}
        self._noise = Handshake(
            initiator=False, prologue=network.prologue, static=identity.transport_secret, ephemeral=ephemeral,
            psk=network.psk,
        )  # fmt: skip

    def message_1(self, message: bytes) -> NodeId:
        """Read message 1 and return who calls. Raises AuthenticationError or MalformedMessage."""
        self._hello = hello = _read_payload(self._noise.read(message))
        claimed = hello.get("id")
        if type(claimed) is not bytes:
            raise MalformedMessage("message 1 names no node id")
        try:
            expected = transport_key(claimed)
        except ValueError as error:
            raise AuthenticationError("message 1 names an id that is no Ed25519 key") from error
        if not hmac.compare_digest(expected, self._noise.remote_static or b""):
            raise AuthenticationError("the node id of message 1 is not that of the key it was sent with")
        return NodeId(claimed)

    def message_2(self, peer_id: NodeId, now_ms: int, max_streams: int = MAX_STREAMS) -> tuple[bytes, Agreed]:
        """Message 2 with its length, and what was agreed; send it, then call `check_version`."""
        payload = {
            "v": PROTOCOL_VERSION, "ua": self._user_agent, "t": now_ms, "max_streams": max_streams,
            "window": INITIAL_CREDIT,
        }  # fmt: skip
        message = prefix_length(self._noise.write(msgpack.packb(payload)))
        send, receive = self._noise.split()
        return message, Agreed(
            peer_id=peer_id, peer_agent=_agent(self._hello), send=send, receive=receive,
            max_streams=MAX_STREAMS, window=INITIAL_CREDIT, clock_skew=_clock_skew(self._hello, now_ms),
        )  # fmt: skip

    def check_version(self) -> None:
        """Raises VersionMismatch. Called after message 2 was sent, so that the caller learns ours too."""
        _check_version(self._hello)


def _read_payload(payload: bytes) -> Mapping[str, Any]:
    try:
        hello = msgpack.unpackb(payload, max_ext_len=0)
    except (ValueError, msgpack.UnpackException) as error:
        raise MalformedMessage("the payload of a handshake message is a msgpack map") from error
    if type(hello) is not dict:
        raise MalformedMessage("the payload of a handshake message is a msgpack map")
    return hello


def _check_version(hello: Mapping[str, Any]) -> None:
    version = hello.get("v")
    if version != PROTOCOL_VERSION:
        raise VersionMismatch(
            f"the peer speaks version {version!r:.20} of the protocol, this is {PROTOCOL_VERSION}"
        )


def _agent(hello: Mapping[str, Any]) -> str:
    agent = hello.get("ua", "")
    return agent[:MAX_TEXT] if type(agent) is str else ""


def _count(hello: Mapping[str, Any], key: str, default: int, most: int) -> int:
    value = hello.get(key, default)
    if type(value) is not int or not 0 <= value <= most:
        raise MalformedMessage(f"{key} of message 2 is not a number from 0 to {most}")
    return value


def _clock_skew(hello: Mapping[str, Any], now_ms: int) -> float | None:
    told = hello.get("t")
    return (told - now_ms) / 1000 if type(told) is int else None
