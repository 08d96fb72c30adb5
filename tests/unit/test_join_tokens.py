"""Join tokens: what survives copying, and what is said when it did not."""

from __future__ import annotations

import base64
import hashlib

import msgpack
import pytest

from mesh.errors import ConfigurationError
from mesh.identity import NodeId
from mesh.join import (
    INVITATION_ID_SIZE,
    Invitation,
    Ticket,
    decode_token,
    encode_token,
    invitation_key,
    issue,
    looks_like_token,
)
from mesh.network import Network

NOW = 1_800_000_000.0
HOME = Network("home", bytes(range(32)))
INVITER = NodeId(bytes([9]) * 32)
INVITATION = issue(HOME, INVITER, ("203.0.113.5:9470", "[2001:db8::1]:9470"), int(NOW) + 3600, b"12345678")


@pytest.mark.parametrize("network", [Network(), Network("home", bytes(32)), Network("ñandú")])
def test_a_token_survives_the_round_trip(network: Network) -> None:
    invitation = issue(network, INVITER, ("192.0.2.1:9470",), int(NOW) + 1, b"12345678")
    assert (invitation.ticket is not None) == network.private
    token = encode_token(invitation)
    assert token.startswith("qmesh1")
    assert token.isalnum()
    assert token.islower()
    assert looks_like_token(token)
    assert decode_token(token) == invitation


def test_a_token_holds_neither_the_secret_nor_what_opens_the_mesh() -> None:
    """The key in it depends on the secret and on the invitation, and is none of the keys of the mesh."""
    assert HOME.secret is not None
    assert INVITATION.ticket is not None
    text = encode_token(INVITATION).removeprefix("qmesh1").upper()
    payload = base64.b32decode(text + "=" * (-len(text) % 8))
    for key in (HOME.secret, HOME.psk, *(HOME.derive(b"qmesh-" + name) for name in (b"whois", b"invite"))):
        assert key is not None
        assert key not in payload
    assert INVITATION.ticket.key in payload
    assert repr(INVITATION.ticket.key) not in repr(INVITATION)
    assert INVITATION.door.psk != HOME.psk
    others = [
        invitation_key(HOME, b"12345679"),
        invitation_key(Network("home", bytes(32)), b"12345678"),
    ]
    assert INVITATION.ticket.key not in others
    assert invitation_key(HOME, b"12345678") == INVITATION.ticket.key
    assert invitation_key(Network(), b"12345678") is None


@pytest.mark.parametrize(
    "inside",
    [bytes(32), [], [bytes(32)], [bytes(32), bytes(8), bytes(31)], [bytes(31), bytes(8), bytes(32)],
     [bytes(32), bytes(INVITATION_ID_SIZE + 1), bytes(32)], ["x" * 32, bytes(8), bytes(32)], 7],
)  # fmt: skip
def test_a_ticket_of_another_form_is_refused(inside: object) -> None:
    """Also the secret itself, which stood in its place once."""
    payload = msgpack.packb(["home", inside, ["192.0.2.1:9470"], int(NOW) + 60])
    checksum = hashlib.blake2b(payload).digest()[:4]
    token = "qmesh1" + base64.b32encode(payload + checksum).decode().rstrip("=").lower()
    with pytest.raises(ConfigurationError, match="not an invitation"):
        decode_token(token)


def test_case_blanks_line_breaks_and_hyphens_do_not_matter() -> None:
    token = encode_token(INVITATION)
    wrapped = "  " + token[:20].upper() + "\n  " + token[20:50] + "-" + token[50:] + " \n"
    assert looks_like_token(wrapped)
    assert decode_token(wrapped) == INVITATION


def test_every_changed_or_lost_character_is_noticed() -> None:
    token = encode_token(INVITATION)
    for position in range(6, len(token)):
        other = "a" if token[position] != "a" else "b"
        for broken in (
            token[:position] + other + token[position + 1 :],
            token[:position] + token[position + 1 :],
        ):
            with pytest.raises(ConfigurationError, match="garbled"):
                decode_token(broken)


def test_an_expired_token_says_so_and_what_to_do() -> None:
    INVITATION.check(NOW)
    with pytest.raises(ConfigurationError, match=r"expired 2\.0 hours ago.*invite"):
        INVITATION.check(NOW + 3 * 3600)


@pytest.mark.parametrize("text", ["", "qmesh2abc", "192.0.2.1:9470", "hello"])
def test_other_texts_are_not_tokens(text: str) -> None:
    assert not looks_like_token(text)
    with pytest.raises(ConfigurationError, match="not a join token"):
        decode_token(text)


@pytest.mark.parametrize("text", ["qmesh1", "qmesh1!!!", "qmesh1aaaa", "qmesh1" + "a" * 5000])
def test_garbage_behind_the_prefix_is_garbled(text: str) -> None:
    with pytest.raises(ConfigurationError, match="garbled"):
        decode_token(text)


def test_a_host_whose_name_starts_like_a_token_is_an_address() -> None:
    assert not looks_like_token("qmesh1.example.org:9470")


@pytest.mark.parametrize("addresses", [(), tuple(f"192.0.2.{i}:1" for i in range(9))])
def test_an_invitation_needs_some_addresses(addresses: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError, match="addresses"):
        encode_token(Invitation("home", addresses, int(NOW), Ticket(INVITER, bytes(8), bytes(32))))
