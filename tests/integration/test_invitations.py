"""Guests at the door of a private mesh, over real sockets: who gets the secret, and what all others see."""

from __future__ import annotations

import asyncio
import secrets
import time
from contextlib import AbstractAsyncContextManager

import pytest

from client_sdk import MeshClient
from mesh.admission import AdmissionPolicy
from mesh.errors import (
    AuthenticationError,
    ConfigurationError,
    ConnectFailed,
    ConnectionClosed,
    MalformedMessage,
    Unauthorized,
)
from mesh.frames import prefix_length
from mesh.handshake import Initiator, announce_invitation
from mesh.identity import Identity
from mesh.join import INVITATION_ID_SIZE, Invitation, encode_token, issue
from mesh.network import Network
from mesh.transport import Connection, Listener, Stream, connect, connect_any, redeem, serve
from tests.support import seconds
from tests.wire_support import ALICE, BOB, OPEN, PRIVATE, listening

ID = b"12345678"


async def unreachable(stream: Stream) -> None:
    raise AssertionError(f"a guest reached {stream.method}")


def door(
    *good: bytes, network: Network = PRIVATE, policy: AdmissionPolicy | None = None
) -> AbstractAsyncContextManager[Listener]:
    return listening(unreachable, network, policy, load=lambda: {"busy": 1}, invited=lambda one: one in good)


def invitation(
    listener: Listener, *, network: Network = PRIVATE, lasts: float = 60, invitation_id: bytes = ID
) -> Invitation:
    host, port = listener.address
    expires = int(time.time() + lasts)
    return issue(network, BOB.id, (f"{host}:{port}",), expires, invitation_id)


async def as_guest(listener: Listener, one: Invitation, *, key: bytes | None = None) -> Connection:
    """A connection with nothing but an invitation."""
    assert one.ticket is not None
    return await connect_any(
        [listener.address], identity=ALICE, network=Network(one.name, key or one.ticket.key),
        peer_id=BOB.id, invitation_id=one.ticket.id,
    )  # fmt: skip


async def gone(listener: Listener) -> None:
    async with asyncio.timeout(seconds(5)):
        while listener.connections or listener.admission.half_open:  # noqa: ASYNC110 - has no event
            await asyncio.sleep(0.01)


async def test_one_invitation_admits_several_machines_and_leaves_no_connection() -> None:
    async with door(ID) as listener:
        one = invitation(listener)
        assert await asyncio.gather(*(redeem(one, Identity()) for _ in range(5))) == [PRIVATE] * 5
        await gone(listener)
        # the secret opens the mesh
        connection = await connect(*listener.address, identity=ALICE, network=PRIVATE)
        await connection.ping(seconds(5))
        assert connection.load == {"busy": 1}
        await connection.close()


async def test_an_invitation_opens_nothing_but_joining() -> None:
    async with door(ID) as listener:
        guest = await as_guest(listener, invitation(listener))
        await guest.ping(seconds(5))
        assert guest.load == {}
        assert listener.admission.half_open == 1, "a guest is never more than half-open"
        for method in ("find", "status", "models", "infer", "dial_back", "load"):
            with pytest.raises(Unauthorized):
                async with await guest.open(method, {"model": "m"}) as stream:
                    await stream.read(seconds(5))
        await guest.close()
        # its key is no key of the mesh
        ticket = invitation(listener).ticket
        assert ticket is not None
        for network in (Network(PRIVATE.name, ticket.key), Network(PRIVATE.name, secrets.token_bytes(32))):
            with pytest.raises(AuthenticationError):
                await connect(*listener.address, identity=ALICE, network=network, peer_id=BOB.id)
            with pytest.raises(AuthenticationError):
                await connect(*listener.address, identity=ALICE, network=network)


async def test_a_guest_that_stays_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.transport.listen.HANDSHAKE_TIMEOUT", 0.3)
    async with door(ID) as listener:
        guest = await as_guest(listener, invitation(listener))
        async with asyncio.timeout(seconds(5)):
            await guest.wait_closed()
        await gone(listener)


async def test_guests_take_no_place_from_members() -> None:
    async with door(ID, policy=AdmissionPolicy(max_half_open=2)) as listener:
        guests = [await as_guest(listener, invitation(listener)) for _ in range(3)]
        async with asyncio.timeout(seconds(5)):
            await guests[0].wait_closed()  # the oldest had to make room
        assert listener.admission.half_open == 2
        member = await connect(*listener.address, identity=ALICE, network=PRIVATE)
        await member.ping(seconds(5))
        assert listener.admission.established == 1
        for one in (member, *guests):
            await one.close()


async def answer_to(listener: Listener, sent: bytes) -> bytes:
    """All that a node says to these bytes before it closes, which must not look like an error."""
    reader, writer = await asyncio.open_connection(*listener.address)
    writer.write(sent)
    try:
        async with asyncio.timeout(seconds(5)):
            return await reader.read()
    finally:
        writer.close()


def opening(one: Invitation, key: bytes) -> bytes:
    """What a guest sends at once."""
    assert one.ticket is not None
    caller = Initiator(
        ALICE, Network(one.name, key), BOB.id, ephemeral=secrets.token_bytes(32), user_agent="guest"
    )
    return announce_invitation(one.ticket.id) + caller.message_1(time.time_ns() // 1_000_000)


async def test_a_bad_invitation_looks_like_no_mesh() -> None:
    """Unknown, expired and revoked ones with their right keys, good ones with wrong keys, other meshes:
    the connection is closed without a word.
    """
    async with door(ID) as listener, door() as closed, door(ID, network=OPEN) as public:
        one = invitation(listener)
        assert one.ticket is not None
        key = one.ticket.key
        other = Network(PRIVATE.name, bytes(32))
        foreign = invitation(listener, network=other).ticket
        assert foreign is not None
        good = await answer_to(listener, opening(one, key) + prefix_length(b"no frame at all"))
        assert len(good) > 96
        for at, sent in (
            (closed, opening(one, key)),
            (public, opening(one, key)),
            (listener, opening(one, secrets.token_bytes(32))),
            (listener, opening(one, foreign.key)),
            (listener, opening(invitation(listener, invitation_id=b"87654321"), key)),
            (listener, opening(one, PRIVATE.psk or b"")),
            (listener, announce_invitation(ID) + opening(one, key)),
            (listener, announce_invitation(ID) + b"\x00\x00"),
            (listener, opening(one, key)[10:]),
        ):
            assert await answer_to(at, sent) == b""
        for size in (*range(1, INVITATION_ID_SIZE), *range(INVITATION_ID_SIZE + 1, 100)):
            assert await answer_to(listener, prefix_length(bytes(size))) == b""
        await gone(listener)


async def test_the_inviters_clock_decides_and_the_newcomer_is_told_what_to_do() -> None:
    async with door() as listener:
        # expired or revoked there, while this machine's clock is slow
        with pytest.raises(ConfigurationError, match="does not accept it") as refused:
            await redeem(invitation(listener), ALICE)
        for word in ("clock of that node", "revoked", "qmesh-node invite"):
            assert word in refused.value.fix
    async with door(ID) as listener:
        # good there, but this machine's clock is fast: no secret goes around either
        with pytest.raises(ConfigurationError, match="expired") as refused:
            await redeem(invitation(listener, lasts=-3600), ALICE)
        assert "set this machine's clock" in refused.value.fix
        one = invitation(listener)
    with pytest.raises(ConnectFailed, match=r"made the join token.*does not answer"):
        await redeem(one, ALICE)


async def test_whom_the_inviter_does_not_serve_it_does_not_admit() -> None:
    async with door(ID, policy=AdmissionPolicy(deny=frozenset({ALICE.id}))) as listener:
        with pytest.raises((ConfigurationError, ConnectionClosed), match="does not serve you"):
            await redeem(invitation(listener), ALICE)
        assert await redeem(invitation(listener), Identity()) == PRIVATE


@pytest.mark.parametrize("secret", [None, "x" * 32, bytes(31), bytes(33)])
async def test_an_inviter_that_tells_no_secret(monkeypatch: pytest.MonkeyPatch, secret: object) -> None:
    async def lie(stream: Stream) -> None:
        await stream.end({"secret": secret})

    monkeypatch.setattr("mesh.transport.listen.admitting", lambda *_: lie)
    async with door(ID) as listener:
        with pytest.raises(MalformedMessage, match="no secret"):
            await redeem(invitation(listener), ALICE)


async def test_a_program_with_a_token_is_admitted_by_its_first_request() -> None:
    asked: list[str] = []

    async def answer(stream: Stream) -> None:
        asked.append(stream.method)
        await stream.end({"models": {"m": 1}})

    listener = await serve(
        "127.0.0.1", 0, identity=BOB, network=PRIVATE, on_stream=answer, invited=lambda one: one == ID
    )
    try:
        async with MeshClient(encode_token(invitation(listener))) as mesh:
            assert not mesh.network.private
            assert [one.name for one in await mesh.models()] == ["m"]
            assert mesh.network == PRIVATE
        async with MeshClient(encode_token(invitation(listener, invitation_id=b"87654321"))) as mesh:
            with pytest.raises(ConnectFailed, match="does not accept"):
                await mesh.models()
    finally:
        await listener.close()
    assert asked == ["models"]
