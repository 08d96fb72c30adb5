"""Mutated and invented input for the wire: only documented errors, nothing that grows.

A bounded run belongs to `make test`. QMESH_FUZZ_ROUNDS sets the number of inputs per target (`make fuzz`
asks for a million), QMESH_FUZZ_SEED repeats a run.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import tracemalloc
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import count, product
from typing import Any
from unittest.mock import AsyncMock

import msgpack
import pytest

from mesh.connection import ConnectionState
from mesh.errors import FrameTooLarge, ProtocolError
from mesh.events import Failed
from mesh.frames import (
    Credit,
    Data,
    End,
    GoAway,
    Head,
    Message,
    Open,
    Ping,
    Pong,
    Reset,
    Unknown,
    decode,
    encode,
    prefix_length,
)
from mesh.handshake import (
    WHOIS_REQUEST,
    Initiator,
    Responder,
    announce_invitation,
    open_whois_reply,
    take_message,
)
from mesh.join import issue
from mesh.limits import MAX_CREDIT, MAX_PLAINTEXT, MAX_STREAMS
from mesh.network import Network
from mesh.noise import CipherState, Handshake
from mesh.transport import serve
from tests.support import seconds
from tests.wire_support import ALICE, BOB, OPEN, PRIVATE, no_load

INPUTS = int(os.environ.get("QMESH_FUZZ_ROUNDS", "3000"))
SEED = int(os.environ.get("QMESH_FUZZ_SEED", "0")) or random.SystemRandom().getrandbits(32)
INVITATION_ID = bytes(range(8))
GUESTS = issue(PRIVATE, BOB.id, (), 0, INVITATION_ID).door
INTERESTING = (0, 1, 7, 8, 9, 127, 128, 255, 256, 65_535, 65_536, 1 << 20, MAX_CREDIT, (1 << 31) - 1, 1 << 31)


@pytest.fixture
def rng() -> random.Random:
    print(f"QMESH_FUZZ_SEED={SEED}")
    return random.Random(SEED)


def mutated(rng: random.Random, data: bytes) -> bytes:
    """A few flips, cuts, repeats and insertions."""
    mutable = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(mutable) + 1)
        match rng.randrange(6):
            case 0 if at < len(mutable):
                mutable[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(mutable):
                mutable[at] = rng.choice((0, 0x7F, 0x80, 0x90, 0xC0, 0xC1, 0xC6, 0xDD, 0xDF, 0xFF))
            case 2:
                del mutable[at : at + rng.randint(1, 8)]
            case 3:
                mutable[at:at] = rng.randbytes(rng.randint(1, 8))
            case 4:
                mutable[at:at] = mutable[at : at + rng.randint(1, 40)]
            case _:
                del mutable[at:]
    return bytes(mutable)


def value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(9 if depth < 4 else 6)
    simple: list[Callable[[], Any]] = [
        lambda: None,
        lambda: rng.choice((True, False)),
        lambda: rng.choice(INTERESTING) * rng.choice((1, 1, -1)),
        rng.random,
        lambda: "é" * rng.choice((0, 1, 5, 300)),
        lambda: bytes(rng.choice((0, 1, 33, 17_000))),
        lambda: [value(rng, depth + 1) for _ in range(rng.randrange(4))],
        lambda: {str(n): value(rng, depth + 1) for n in range(rng.randrange(4))},
        lambda: {n: value(rng, depth + 1) for n in range(rng.randrange(3))},
    ]
    return simple[kind]()


def message(rng: random.Random, sid: int) -> Message:
    """A well-formed message that may be out of place."""
    n = rng.choice(INTERESTING[:-1])
    messages: list[Message] = [
        Open(sid, "method", {"k": "v"}),
        Data(sid, bytes(min(n, 16_384))),
        Data(sid, b"x"),
        End(sid, {}),
        Head(sid, {}),
        Reset(sid, n % 300, "why", rng.choice((None, n))),
        Credit(sid, max(1, n)),
        Ping(n),
        Pong(n, {"busy": 1}),
        GoAway(sid, 9, "bye"),
    ]
    return rng.choice(messages)


def plaintext(rng: random.Random, highest: int) -> bytes:
    """Some messages: most of them plausible, some mutated, some invented."""
    parts = []
    for _ in range(rng.randint(1, 4)):
        sid = rng.choice((1, 2, 3, highest, highest + 2, rng.choice(INTERESTING[1:-1])))
        match rng.randrange(8):
            case 0:
                parts.append(mutated(rng, encode(message(rng, sid))))
            case 1:
                parts.append(
                    msgpack.packb([rng.randrange(12), *(value(rng) for _ in range(rng.randrange(5)))])
                )
            case _:
                parts.append(encode(message(rng, sid)))
    return b"".join(parts)[:MAX_PLAINTEXT] or b"\xc0"


def test_decoding_raises_only_protocol_errors(rng: random.Random) -> None:
    decoded = 0
    for _ in range(INPUTS):
        data = plaintext(rng, 1) if rng.random() < 0.8 else rng.randbytes(rng.randint(0, 200))
        try:
            for one in decode(mutated(rng, data) if rng.random() < 0.5 else data):
                decoded += 1
                if not isinstance(one, Unknown):
                    encode(one)
        except ProtocolError:
            pass
    assert decoded > INPUTS // 20, "the inputs reach beyond the first check"


def test_a_connection_survives_every_message(rng: random.Random) -> None:
    """Authentic peers that say anything: the state stays valid, and failing is final."""
    tracemalloc.start()
    try:
        runs = failures = 0
        size_before = 0
        inputs = 0
        while inputs < INPUTS:
            peer = CipherState(bytes(32))
            end = ConnectionState(
                initiator=rng.random() < 0.5,
                send=CipherState(bytes(32)),
                receive=CipherState(bytes(32)),
                now=0.0,
                load=no_load,
                max_streams=rng.choice((2, MAX_STREAMS)),
            )
            for n in range(rng.randrange(4)):
                end.open("method", {}, bytes(n * 40_000), end=rng.random() < 0.5)
            now = 0.0
            for _ in range(rng.randint(1, 30)):
                inputs += 1
                now += rng.random() * 20
                highest = max(end.streams, default=1)
                ciphertext = peer.encrypt(plaintext(rng, highest))
                events = end.receive(prefix_length(ciphertext), now)
                if rng.random() < 0.3:
                    events += end.tick(now)
                for sid in list(end.streams)[:3]:
                    if rng.random() < 0.2:
                        unread = end.streams[sid].unread
                        end.consumed(sid, unread)
                    if rng.random() < 0.1:
                        end.reset(sid, 7)
                if rng.random() < 0.7:
                    end.outbox.pull(1 << 18)
                end.validate()
                if any(isinstance(event, Failed) for event in events):
                    failures += 1
                    assert end.receive(prefix_length(peer.encrypt(b"\x92\x05\x01")), now) == []
                    break
            runs += 1
            if runs == 50:
                gc.collect()
                size_before = tracemalloc.get_traced_memory()[0]
        assert 0 < failures < runs
        del end, peer, events  # an error among the events holds on to the connection that failed with it
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - size_before < 2 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("network", [OPEN, PRIVATE, GUESTS], ids=["open", "private", "guests"])
def test_a_responder_refuses_mutated_handshakes(rng: random.Random, network: Any) -> None:
    caller = Initiator(ALICE, network, BOB.id, ephemeral=bytes([6]) * 32, user_agent="fuzz")
    genuine = caller.message_1(0)
    for _ in range(INPUTS // 20):
        buffer = bytearray(mutated(rng, genuine) if rng.random() < 0.9 else rng.randbytes(300))
        responder = Responder(BOB, network, ephemeral=bytes([7]) * 32, user_agent="fuzz")
        try:
            received = take_message(buffer)
            if received and received != genuine[2:]:
                responder.message_1(received)
                pytest.fail(f"a changed message 1 authenticated: {received.hex()}")
        except ProtocolError:
            pass


def test_authentic_handshakes_with_odd_payloads(rng: random.Random) -> None:
    """Peers that hold keys but speak nonsense, in both roles."""
    for _ in range(INPUTS // 40):
        payload = {"v": 1, "id": ALICE.id, "ua": "x", "t": 1, "max_streams": 5, "window": 5}
        for _ in range(rng.randrange(3)):
            payload[rng.choice(list(payload))] = value(rng)
        packed = msgpack.packb(payload)[:900]
        packed = mutated(rng, packed) if rng.random() < 0.5 else packed
        noise = Handshake(
            initiator=True,
            prologue=OPEN.prologue,
            static=ALICE.transport_secret,
            ephemeral=bytes([6]) * 32,
            remote_static=BOB.transport_public,
        )
        responder = Responder(BOB, OPEN, ephemeral=bytes([7]) * 32, user_agent="fuzz")
        try:
            responder.message_2(responder.message_1(noise.write(packed)), 0)
            responder.check_version()
        except ProtocolError:
            pass
        initiator = Initiator(ALICE, OPEN, BOB.id, ephemeral=bytes([6]) * 32, user_agent="fuzz")
        noise = Handshake(
            initiator=False, prologue=OPEN.prologue, static=BOB.transport_secret, ephemeral=bytes([7]) * 32
        )
        noise.read(initiator.message_1(0)[2:])
        with suppress(ProtocolError):
            initiator.message_2(noise.write(packed), 0)


def test_answers_to_the_question_for_the_id(rng: random.Random) -> None:
    for _ in range(INPUTS // 4):
        answer = rng.randbytes(rng.choice((0, 31, 32, 71, 72, 73)))
        for network in (OPEN, PRIVATE):
            with suppress(ProtocolError):
                assert len(open_whois_reply(network, answer)) == 32


def opened(data: bytes, firsts: Mapping[Network, bytes]) -> tuple[bool, bool]:
    """Whether a node of PRIVATE tells its id to whoever sends this, and whether it answers a message 1."""
    buffer, asked, network = bytearray(data), False, PRIVATE
    with suppress(FrameTooLarge):
        for number in count():
            message = take_message(buffer)
            if message is None:
                break
            if number or len(message) not in {0, 8}:
                return asked, prefix_length(message) == firsts.get(network)
            asked = not message
            if message:
                network = GUESTS if message == INVITATION_ID else Network("nobody's")
    return asked, False


async def test_whatever_strangers_open_with(rng: random.Random) -> None:
    """Questions, invitations and messages 1 in any order, over sockets: message 2 comes only for a message 1
    with the key of the network, or of the invitation that was named at first.
    """
    unreached = AsyncMock(side_effect=AssertionError("a stranger opened a stream"))
    listener = await serve(
        "127.0.0.1", 0, identity=BOB, network=PRIVATE, on_stream=unreached,
        invited=lambda one: one == INVITATION_ID,
    )  # fmt: skip
    firsts = {
        network: Initiator(ALICE, network, BOB.id, ephemeral=bytes([6]) * 32, user_agent="fuzz").message_1(0)
        for network in (PRIVATE, GUESTS, OPEN)
    }
    genuine = (WHOIS_REQUEST, announce_invitation(INVITATION_ID), *firsts.values())
    inputs = [b"".join(pair) for pair in product(genuine, repeat=2)]
    for _ in range(min(INPUTS // 20, 5000)):  # each takes a port for a minute
        invented = (
            announce_invitation(rng.randbytes(8)),
            prefix_length(rng.randbytes(rng.randint(1, 200))),
            mutated(rng, rng.choice(genuine)),
        )
        inputs.append(b"".join(rng.choice((*genuine, *invented)) for _ in range(rng.randint(1, 3))))
    seen = set()
    try:
        for sent in inputs:
            reader, writer = await asyncio.open_connection(*listener.address)
            writer.write(sent)
            writer.write_eof()
            async with asyncio.timeout(seconds(10)):
                answer = await reader.read()
            writer.close()
            asked = answer[:2] == b"\x00\x48"
            welcome = len(answer) > asked * (2 + 72)
            assert (asked, welcome) == opened(sent, firsts), sent.hex()
            seen.add((asked, welcome))
    finally:
        await listener.close()
    assert len(seen) == 4, "the inputs reach every kind of answer"
    unreached.assert_not_called()
