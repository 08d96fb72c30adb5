"""Which mesh a machine belongs to: what is kept, what the flags say, and what is refused."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from mesh.errors import ConfigurationError
from mesh.join import Invitation, encode_token
from mesh.network import Network
from node.membership import MEMBERSHIP_FILE, Membership, forget, found, keep, kept_membership, resolve

NOW = 1_000_000.0


def test_a_founded_mesh_is_private_and_kept_for_its_owner_alone(tmp_path: Path) -> None:
    mine = found("kitchen")
    assert mine.network.private
    assert found("kitchen").network != mine.network  # each has a secret of its own
    keep(tmp_path, mine)
    assert stat.S_IMODE((tmp_path / MEMBERSHIP_FILE).stat().st_mode) == 0o600
    assert kept_membership(tmp_path) == mine
    assert resolve(tmp_path, join=(), network=None, now=NOW) == (mine.network, [])
    assert forget(tmp_path)
    assert not forget(tmp_path)
    assert kept_membership(tmp_path) is None
    assert resolve(tmp_path, join=(), network=None, now=NOW) == (Network(), [])


def test_flags_go_before_what_was_kept(tmp_path: Path) -> None:
    mine = Membership(Network("kitchen", b"k" * 32), ("10.0.0.1:9470",))
    keep(tmp_path, mine)
    kept = ("10.0.0.1", 9470)
    other = Network("garden", b"g" * 32)
    token = encode_token(Invitation(other, ("10.0.0.2:9470",), int(NOW) + 60))
    # an address leads into the kept mesh, whose own addresses are tried too
    assert resolve(tmp_path, join=["10.0.0.3:1"], network=None, now=NOW) == (
        mine.network,
        [("10.0.0.3", 1), kept],
    )
    # a token brings its mesh, and the kept one's addresses are of no use there
    assert resolve(tmp_path, join=[token], network=None, now=NOW) == (other, [("10.0.0.2", 9470)])
    # a name stands for an open mesh
    assert resolve(tmp_path, join=(), network="public", now=NOW) == (Network(), [])
    with pytest.raises(ConfigurationError, match="expired"):
        resolve(tmp_path, join=[token], network=None, now=NOW + 3600)


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
