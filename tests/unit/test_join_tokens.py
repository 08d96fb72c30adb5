"""Join tokens: what survives copying, and what is said when it did not."""

from __future__ import annotations

import pytest

from mesh.errors import ConfigurationError
from mesh.join import Invitation, decode_token, encode_token, looks_like_token
from mesh.network import Network

NOW = 1_800_000_000.0
INVITATION = Invitation(
    Network("home", bytes(range(32))), ("203.0.113.5:9470", "[2001:db8::1]:9470"), int(NOW) + 3600
)


@pytest.mark.parametrize("network", [Network(), Network("home", bytes(32)), Network("ñandú")])
def test_a_token_survives_the_round_trip(network: Network) -> None:
    invitation = Invitation(network, ("192.0.2.1:9470",), int(NOW) + 1)
    token = encode_token(invitation)
    assert token.startswith("qmesh1")
    assert token.isalnum()
    assert token.islower()
    assert looks_like_token(token)
    assert decode_token(token, NOW) == invitation


def test_case_blanks_line_breaks_and_hyphens_do_not_matter() -> None:
    token = encode_token(INVITATION)
    wrapped = "  " + token[:20].upper() + "\n  " + token[20:50] + "-" + token[50:] + " \n"
    assert looks_like_token(wrapped)
    assert decode_token(wrapped, NOW) == INVITATION


def test_every_changed_or_lost_character_is_noticed() -> None:
    token = encode_token(INVITATION)
    for position in range(6, len(token)):
        other = "a" if token[position] != "a" else "b"
        for broken in (
            token[:position] + other + token[position + 1 :],
            token[:position] + token[position + 1 :],
        ):
            with pytest.raises(ConfigurationError, match="garbled"):
                decode_token(broken, NOW)


def test_an_expired_token_says_so_and_what_to_do() -> None:
    token = encode_token(INVITATION)
    with pytest.raises(ConfigurationError, match=r"expired 2\.0 hours ago.*invite"):
        decode_token(token, NOW + 3 * 3600)


@pytest.mark.parametrize("text", ["", "qmesh2abc", "192.0.2.1:9470", "hello"])
def test_other_texts_are_not_tokens(text: str) -> None:
    assert not looks_like_token(text)
    with pytest.raises(ConfigurationError, match="not a join token"):
        decode_token(text, NOW)


@pytest.mark.parametrize("text", ["qmesh1", "qmesh1!!!", "qmesh1aaaa", "qmesh1" + "a" * 5000])
def test_garbage_behind_the_prefix_is_garbled(text: str) -> None:
    with pytest.raises(ConfigurationError, match="garbled"):
        decode_token(text, NOW)


def test_a_host_whose_name_starts_like_a_token_is_an_address() -> None:
    assert not looks_like_token("qmesh1.example.org:9470")


@pytest.mark.parametrize("addresses", [(), tuple(f"192.0.2.{i}:1" for i in range(9))])
def test_an_invitation_needs_some_addresses(addresses: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError, match="addresses"):
        encode_token(Invitation(Network(), addresses, int(NOW)))
