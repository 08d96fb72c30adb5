from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from noise.connection import Keypair, NoiseConnection

from mesh.errors import AuthenticationError
from mesh.noise import CipherState, Handshake

VECTORS = Path(__file__).resolve().parents[2].parent / "shared/vectors/noise_25519_chachapoly_subset.json"
PATTERNS = ("Noise_IK_25519_ChaChaPoly_BLAKE2b", "Noise_IKpsk1_25519_ChaChaPoly_BLAKE2b")
STATIC = (bytes([1]) * 32, bytes([2]) * 32)
EPHEMERAL = (bytes([3]) * 32, bytes([4]) * 32)
PSK = bytes([5]) * 32
PROLOGUE = b"qmesh/1\x00test"


def sides(psk: bytes | None = None, prologue: bytes = PROLOGUE) -> tuple[Handshake, Handshake]:
    responder = Handshake(
        initiator=False, prologue=PROLOGUE, static=STATIC[1], ephemeral=EPHEMERAL[1], psk=psk
    )
    initiator = Handshake(
        initiator=True,
        prologue=prologue,
        static=STATIC[0],
        ephemeral=EPHEMERAL[0],
        remote_static=responder._static_public,
        psk=psk,
    )
    return initiator, responder


@pytest.mark.parametrize("pattern", PATTERNS)
def test_official_vectors(pattern: str) -> None:
    if not VECTORS.exists():
        pytest.fail(f"the official vectors are missing: {VECTORS}")
    vectors = json.loads(VECTORS.read_text())["vectors"]
    vector = next(one for one in vectors if one["protocol_name"] == pattern)

    def field(name: str) -> bytes:
        return bytes.fromhex(vector[name])

    psk = bytes.fromhex(vector["init_psks"][0]) if "psk" in pattern else None
    initiator = Handshake(
        initiator=True,
        prologue=field("init_prologue"),
        static=field("init_static"),
        ephemeral=field("init_ephemeral"),
        remote_static=field("init_remote_static"),
        psk=psk,
    )
    responder = Handshake(
        initiator=False,
        prologue=field("resp_prologue"),
        static=field("resp_static"),
        ephemeral=field("resp_ephemeral"),
        psk=psk,
    )
    messages = [(bytes.fromhex(m["payload"]), bytes.fromhex(m["ciphertext"])) for m in vector["messages"]]
    for (payload, ciphertext), writer, reader in zip(
        messages, (initiator, responder), (responder, initiator), strict=False
    ):
        assert writer.write(payload) == ciphertext
        assert reader.read(ciphertext) == payload
    assert initiator.handshake_hash == responder.handshake_hash == field("handshake_hash")
    ours, theirs = initiator.split(), responder.split()
    for index, (payload, ciphertext) in enumerate(messages[2:]):
        send, receive = (ours[0], theirs[1]) if index % 2 == 0 else (theirs[0], ours[1])
        assert send.encrypt(payload) == ciphertext
        assert receive.decrypt(ciphertext) == payload
    assert len(messages) > 4


def peer(pattern: str, *, initiator: bool) -> Any:
    """The noiseprotocol package in one of the roles."""
    noise = NoiseConnection.from_name(pattern.encode())
    if "psk" in pattern:
        noise.set_psks(PSK)
    noise.set_prologue(PROLOGUE)
    noise.set_keypair_from_private_bytes(Keypair.STATIC, STATIC[0 if initiator else 1])
    if initiator:
        noise.set_as_initiator()
        noise.set_keypair_from_public_bytes(Keypair.REMOTE_STATIC, sides()[1]._static_public)
    else:
        noise.set_as_responder()
    noise.start_handshake()
    return noise


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("we_call", [True, False])
def test_both_ways_against_the_noiseprotocol_package(pattern: str, we_call: bool) -> None:
    ours = sides(PSK if "psk" in pattern else None)[0 if we_call else 1]
    other = peer(pattern, initiator=not we_call)
    if we_call:
        assert other.read_message(ours.write(b"one")) == b"one"
        assert ours.read(bytes(other.write_message(b"two"))) == b"two"
    else:
        assert ours.read(bytes(other.write_message(b"one"))) == b"one"
        assert other.read_message(ours.write(b"two")) == b"two"
    assert ours.handshake_hash == other.get_handshake_hash()
    send, receive = ours.split()
    for round_ in range(3):
        assert other.decrypt(send.encrypt(b"ping %d" % round_)) == b"ping %d" % round_
        assert receive.decrypt(bytes(other.encrypt(b"pong %d" % round_))) == b"pong %d" % round_
    send.rekey()
    other.rekey_inbound_cipher()
    assert other.decrypt(send.encrypt(b"after rekeying")) == b"after rekeying"


@pytest.mark.parametrize("psk", [None, PSK])
def test_every_flipped_bit_of_a_handshake_is_noticed(psk: bytes | None) -> None:
    length = len(sides(psk)[0].write(b"hello"))
    for position in range(length):
        initiator, responder = sides(psk)
        message = bytearray(initiator.write(b"hello"))
        message[position] ^= 1 << position % 8  # also the top bit of a key, which X25519 alone ignores
        with pytest.raises(AuthenticationError):
            responder.read(bytes(message))


@pytest.mark.parametrize(
    "change", ["psk", "prologue", "no psk", "truncated", "low order"], ids=lambda name: name.replace(" ", "-")
)
def test_what_does_not_match_does_not_authenticate(change: str) -> None:
    initiator, responder = sides(PSK)
    if change == "psk":
        initiator = sides(bytes(32))[0]
    elif change == "no psk":
        initiator = sides(None)[0]
    elif change == "prologue":
        initiator = sides(PSK, b"qmesh/1\x00other")[0]
    message = initiator.write(b"hello")
    if change == "truncated":
        message = message[:95]
    elif change == "low order":
        message = bytes(32) + message[32:]
    with pytest.raises(AuthenticationError):
        responder.read(message)


def test_steps_out_of_order_are_a_bug_of_the_caller() -> None:
    initiator, responder = sides()
    with pytest.raises(RuntimeError):
        initiator.split()
    with pytest.raises(RuntimeError):
        responder.write(b"")
    message = initiator.write(b"")
    with pytest.raises(RuntimeError):
        initiator.write(b"")
    responder.read(message)
    initiator.read(responder.write(b""))
    initiator.split()
    with pytest.raises(RuntimeError):
        initiator.split()
    with pytest.raises(ValueError, match="static key"):
        Handshake(initiator=True, prologue=b"", static=STATIC[0], ephemeral=EPHEMERAL[0])


def test_split_drops_the_secrets() -> None:
    initiator, responder = sides(PSK)
    responder.read(initiator.write(b""))
    initiator.read(responder.write(b""))
    initiator.split()
    for name in ("_static", "_ephemeral", "_key", "_psk"):
        assert getattr(initiator, name) is None


def test_replayed_reordered_and_tampered_messages_do_not_decrypt() -> None:
    send, receive = CipherState(PSK), CipherState(PSK)
    first, second = send.encrypt(b"first"), send.encrypt(b"second")
    with pytest.raises(AuthenticationError):
        receive.decrypt(second)
    assert receive.decrypt(first) == b"first"
    with pytest.raises(AuthenticationError):
        receive.decrypt(first)
    with pytest.raises(AuthenticationError):
        receive.decrypt(second[:-1] + bytes([second[-1] ^ 1]))
    assert receive.decrypt(second) == b"second"


def test_nonces_run_out_before_the_reserved_one() -> None:
    cipher = CipherState(PSK)
    cipher.nonce = 2**64 - 2
    cipher.encrypt(b"the last one")
    with pytest.raises(OverflowError):
        cipher.encrypt(b"one too many")
