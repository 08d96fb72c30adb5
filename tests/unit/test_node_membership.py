"""Which mesh a machine belongs to: what is kept, what the flags say, and what is refused."""

from __future__ import annotations

import stat
import time
from pathlib import Path

import pytest

from mesh.errors import ConfigurationError, ConnectFailed
from mesh.identity import Identity
from mesh.join import Invitation, encode_token, issue
from mesh.network import Network
from node.invitations import INVITATIONS_FILE, Invitations
from node.membership import (
    JOINED_FOLDER,
    MEMBERSHIP_FILE,
    Membership,
    enter,
    forget,
    found,
    keep,
    kept_membership,
    resolve,
)

GARDEN = Network("garden", b"g" * 32)
NOBODY = Identity(bytes(32))


def invitation(network: Network, *, lasts: int = 60) -> Invitation:
    """One whose inviter does not answer."""
    return issue(network, NOBODY.id, ("127.0.0.1:1",), int(time.time()) + lasts, b"12345678")


async def test_a_founded_mesh_is_private_and_kept_for_its_owner_alone(tmp_path: Path) -> None:
    mine = found("kitchen")
    assert mine.network.private
    assert found("kitchen").network != mine.network  # each has a secret of its own
    keep(tmp_path, mine)
    assert stat.S_IMODE((tmp_path / MEMBERSHIP_FILE).stat().st_mode) == 0o600
    assert kept_membership(tmp_path) == mine
    assert await resolve(tmp_path, join=(), network=None) == mine
    assert forget(tmp_path)
    assert not forget(tmp_path)
    assert kept_membership(tmp_path) is None
    assert await resolve(tmp_path, join=(), network=None) == Membership(Network())


async def test_flags_go_before_what_was_kept(tmp_path: Path) -> None:
    pinned = f"{NOBODY.id.hex()}@10.0.0.1:9470"
    mine = Membership(Network("kitchen", b"k" * 32), (pinned,))
    keep(tmp_path, mine)
    # an address leads into the kept mesh, whose own addresses are tried too
    both = await resolve(tmp_path, join=["10.0.0.3:1"], network=None)
    assert both == Membership(mine.network, ("10.0.0.3:1", pinned))
    assert both.seeds == [("10.0.0.3", 1), ("10.0.0.1", 9470)]
    # a token brings its mesh, and the kept one's addresses are of no use there
    token = encode_token(invitation(Network("park")))
    assert await resolve(tmp_path, join=[token], network=None) == Membership(
        Network("park"), ("127.0.0.1:1",)
    )
    # a name stands for an open mesh
    assert await resolve(tmp_path, join=(), network="public") == Membership(Network())
    expired = encode_token(invitation(Network("park"), lasts=-60))
    with pytest.raises(ConfigurationError, match="expired"):
        await resolve(tmp_path, join=[expired], network=None)


async def test_what_an_invitation_led_to_is_kept_beyond_its_end(tmp_path: Path) -> None:
    over = invitation(GARDEN, lasts=-60)
    with pytest.raises(ConfigurationError, match="expired"):
        await enter(tmp_path, over)
    with pytest.raises(ConnectFailed, match="does not answer"):
        await enter(tmp_path, invitation(GARDEN))
    path = tmp_path / JOINED_FOLDER / f"{b'12345678'.hex()}.json"
    assert not path.exists()
    keep(tmp_path, Membership(GARDEN, over.addresses))
    path.parent.mkdir()
    (tmp_path / MEMBERSHIP_FILE).rename(path)
    assert await enter(tmp_path, over) == Membership(GARDEN, over.addresses)
    assert (await resolve(tmp_path, join=[encode_token(over)], network=None)).network == GARDEN
    assert forget(tmp_path)
    with pytest.raises(ConfigurationError, match="expired"):
        await enter(tmp_path, over)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"network":"a","secret":"zz","addresses":[]}',
        '{"network":"a","secret":null,"addresses":["x"]}',
    ],
)
def test_a_broken_file_is_named_with_its_fix(tmp_path: Path, content: str) -> None:
    (tmp_path / MEMBERSHIP_FILE).write_text(content)
    with pytest.raises(ConfigurationError, match="leave") as caught:
        kept_membership(tmp_path)
    assert MEMBERSHIP_FILE in caught.value.cause


def test_invitations_are_good_until_they_end_or_are_revoked(tmp_path: Path) -> None:
    invitations = Invitations(tmp_path)
    assert invitations.current() == {}
    now = int(time.time())
    first, second, over = (invitations.add(now + lasts) for lasts in (60, 120, -1))
    assert len({first, second, over}) == 3
    assert invitations.current() == {first.hex(): now + 60, second.hex(): now + 120}
    assert [invitations.good(one) for one in (first, second, over, bytes(8))] == [True, True, False, False]
    invitations.revoke(first.hex().upper())
    assert Invitations(tmp_path).current() == {second.hex(): now + 120}
    assert not invitations.good(first)
    for name in (first.hex(), over.hex(), "", "x"):
        with pytest.raises(ConfigurationError, match="--list"):
            invitations.revoke(name)
    with pytest.raises(ConfigurationError, match="--list"):
        Invitations(tmp_path / "nowhere").revoke(first.hex())
    with pytest.raises(ConfigurationError, match="cannot be changed"):
        Invitations(tmp_path / INVITATIONS_FILE).add(now)


@pytest.mark.parametrize("content", ["", "[]", '{"a": "b"}', '{"a": Infinity}', "\x00"])
def test_a_broken_list_of_invitations_admits_nobody(tmp_path: Path, content: str) -> None:
    invitations = Invitations(tmp_path)
    good = invitations.add(int(time.time()) + 60)
    (tmp_path / INVITATIONS_FILE).write_text(content)
    assert not invitations.good(good)
    with pytest.raises(ConfigurationError, match="Delete it"):
        invitations.current()
