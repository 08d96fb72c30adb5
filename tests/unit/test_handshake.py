from __future__ import annotations

from typing import Any

import msgpack
import pytest

from mesh.errors import AuthenticationError, FrameTooLarge, MalformedMessage, VersionMismatch
from mesh.frames import prefix_length
from mesh.handshake import Agreed, Initiator, Responder, open_whois_reply, take_message, whois_reply
from mesh.identity import NodeId
from mesh.limits import INITIAL_CREDIT, MAX_HANDSHAKE_MESSAGE, MAX_STREAMS
from mesh.network import Network
from mesh.noise import Handshake
from tests.wire_support import ALICE, BOB, OPEN, PRIVATE

NOW = 1_700_000_000_000


def initiator(network: Network = OPEN, peer: NodeId = BOB.id) -> Initiator:
    return Initiator(ALICE, network, peer, ephemeral=bytes([6]) * 32, user_agent="caller/1")


def responder(network: Network = OPEN) -> Responder:
    return Responder(BOB, network, ephemeral=bytes([7]) * 32, user_agent="called/2")


def body(message: bytes) -> bytes:
    assert int.from_bytes(message[:2], "big") == len(message) - 2
    return message[2:]


@pytest.mark.parametrize("network", [OPEN, PRIVATE], ids=["open", "private"])
def test_both_sides_agree(network: Network) -> None:
    caller, called = initiator(network), responder(network)
    peer = called.message_1(body(caller.message_1(NOW)))
    assert peer == ALICE.id
    reply, at_called = called.message_2(peer, NOW + 1500)
    called.check_version()
    at_caller = caller.message_2(body(reply), NOW)
    assert at_caller.peer_id == BOB.id
    assert (at_caller.peer_agent, at_called.peer_agent) == ("called/2", "caller/1")
    assert (at_caller.clock_skew, at_called.clock_skew) == (1.5, -1.5)
    assert (at_caller.max_streams, at_caller.window) == (MAX_STREAMS, INITIAL_CREDIT)
    assert at_called.receive.decrypt(at_caller.send.encrypt(b"there")) == b"there"
    assert at_caller.receive.decrypt(at_called.send.encrypt(b"back")) == b"back"


def forge_message_1(payload: bytes) -> bytes:
    noise = Handshake(
        initiator=True,
        prologue=OPEN.prologue,
        static=ALICE.transport_secret,
        ephemeral=bytes([6]) * 32,
        remote_static=BOB.transport_public,
    )
    return noise.write(payload)


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        (b"", MalformedMessage),
        (b"\xc1", MalformedMessage),
        (msgpack.packb([1]), MalformedMessage),
        (msgpack.packb({"v": 1}), MalformedMessage),
        (msgpack.packb({"v": 1, "id": "text"}), MalformedMessage),
        (msgpack.packb({"v": 1, "id": bytes(31)}), AuthenticationError),
        (msgpack.packb({"v": 1, "id": bytes([255]) * 32}), AuthenticationError),
        (msgpack.packb({"v": 1, "id": BOB.id}), AuthenticationError),
        (msgpack.packb({"v": 1, "id": ALICE.id}) + b"\x00", MalformedMessage),
    ],
)
def test_payloads_of_message_1_that_are_refused(payload: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        responder().message_1(forge_message_1(payload))


@pytest.mark.parametrize("version", [None, 0, 2, "1"])
def test_another_version_is_told_to_both(version: object) -> None:
    called = responder()
    peer = called.message_1(forge_message_1(msgpack.packb({"v": version, "id": ALICE.id})))
    called.message_2(peer, NOW)
    with pytest.raises(VersionMismatch):
        called.check_version()
    with pytest.raises(VersionMismatch):
        answered({"v": version})


def answered(payload: dict[str, Any]) -> Agreed:
    """What the initiator makes of a responder's payload."""
    caller = initiator()
    noise = Handshake(
        initiator=False, prologue=OPEN.prologue, static=BOB.transport_secret, ephemeral=bytes([7]) * 32
    )
    noise.read(body(caller.message_1(NOW)))
    return caller.message_2(noise.write(msgpack.packb(payload)), NOW)


def test_missing_and_odd_fields_of_message_2() -> None:
    agreed = answered({"v": 1, "ua": 7, "t": "soon", "future": [1, 2]})
    assert (agreed.peer_agent, agreed.clock_skew) == ("", None)
    assert (agreed.max_streams, agreed.window) == (MAX_STREAMS, INITIAL_CREDIT)
    assert answered({"v": 1, "max_streams": 3, "window": 10}).max_streams == 3
    for field in ({"window": -1}, {"window": 1 << 40}, {"max_streams": "many"}, {"max_streams": True}):
        with pytest.raises(MalformedMessage):
            answered({"v": 1, **field})


def test_another_network_or_node_does_not_answer() -> None:
    for caller in (
        initiator(PRIVATE),
        initiator(Network("other")),
        initiator(OPEN, ALICE.id),
    ):
        with pytest.raises(AuthenticationError):
            responder().message_1(body(caller.message_1(NOW)))
    with pytest.raises(AuthenticationError):
        responder(PRIVATE).message_1(body(initiator().message_1(NOW)))
    with pytest.raises(AuthenticationError, match="not a node id"):
        initiator(OPEN, NodeId(bytes(31)))


def test_asking_for_the_id() -> None:
    reply = body(whois_reply(OPEN, BOB.id, bytes(24)))
    assert reply == BOB.id
    assert open_whois_reply(OPEN, reply) == BOB.id
    sealed = body(whois_reply(PRIVATE, BOB.id, bytes(24)))
    assert len(sealed) == 72
    assert sealed.find(BOB.id) < 0
    assert open_whois_reply(PRIVATE, sealed) == BOB.id
    for network, wrong in (
        (OPEN, sealed),
        (PRIVATE, reply),
        (Network("ours", bytes(32)), sealed),
        (Network("theirs", PRIVATE.secret), sealed),
        (PRIVATE, b""),
        (OPEN, b""),
    ):
        with pytest.raises(AuthenticationError):
            open_whois_reply(network, wrong)


def test_handshake_messages_are_cut_out_and_bounded() -> None:
    buffer = bytearray()
    assert take_message(buffer) is None
    buffer += b"\x00"
    assert take_message(buffer) is None
    buffer += b"\x03ab"
    assert take_message(buffer) is None
    buffer += b"c\x00\x00rest"
    assert take_message(buffer) == b"abc"
    assert take_message(buffer) == b""
    assert buffer == b"rest"
    with pytest.raises(FrameTooLarge):
        take_message(bytearray((MAX_HANDSHAKE_MESSAGE + 1).to_bytes(2, "big")))
    longest = bytes(MAX_HANDSHAKE_MESSAGE)
    assert take_message(bytearray(prefix_length(longest))) == longest
