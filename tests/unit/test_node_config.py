"""Where a setting comes from, and what is said of a wrong one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mesh.errors import ConfigurationError
from mesh.identity import NodeId
from node.config import DEFAULT_GATEWAY, DEFAULT_LISTEN, Loaded


def load(
    tmp_path: Path,
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    toml: str | None = None,
    **more: Any,
) -> Loaded:
    """A configuration whose folder is `tmp_path`."""
    if toml is not None:
        (tmp_path / "qmesh.toml").write_text(toml, encoding="utf-8")
    environ = {"QMESH_DATA_DIR": str(tmp_path), **(environ or {})}
    return Loaded.of(flags or {}, file=more.pop("file", None), environ=environ, **more)


def refused(*args: Any, **more: Any) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        load(*args, **more)
    assert caught.value.exit_code == 2
    assert caught.value.cause
    assert caught.value.fix
    return caught.value


def test_defaults(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    assert loaded.config.listen == DEFAULT_LISTEN
    assert loaded.config.gateway == DEFAULT_GATEWAY
    assert loaded.config.mdns
    assert loaded.config.models == ()
    assert not loaded.explicit("listen")
    assert loaded.explicit("data_dir")


def test_flags_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    toml = "slots = 1\nnetwork = 'file'\nmdns = false\n"
    environ = {"QMESH_SLOTS": "2", "QMESH_NETWORK": "env"}
    loaded = load(tmp_path, {"slots": 3, "network": None}, environ, toml)
    assert (loaded.config.slots, loaded.config.network, loaded.config.mdns) == (3, "env", False)
    assert loaded.origin["slots"] == "flag"
    assert loaded.origin["network"] == "env"
    assert loaded.origin["mdns"] == str(tmp_path / "qmesh.toml")
    assert loaded.origin["listen"] == "default"


def test_the_folder_of_a_flag_decides_which_file_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "qmesh.toml").write_text("slots = 7\n")
    assert load(tmp_path, {"data_dir": folder}, toml="slots = 1\n").config.slots == 7


def test_a_named_file_is_read_instead_of_the_folders(tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text("slots = 5\n")
    assert load(tmp_path, toml="slots = 1\n", file=other).config.slots == 5
    assert load(tmp_path, environ={"QMESH_CONFIG": str(other)}, toml="slots = 1\n").config.slots == 5


def test_lists_in_the_environment_are_separated_by_commas(tmp_path: Path) -> None:
    config = load(tmp_path, environ={"QMESH_JOIN": "a:1, b:2,", "QMESH_ADVERTISE": "c:3"}).config
    assert config.join == ("a:1", "b:2")
    assert config.advertise == ("c:3",)


@pytest.mark.parametrize("off", ["", "off", "none", "0", "OFF"])
def test_the_gateway_can_be_turned_off_in_the_environment(tmp_path: Path, off: str) -> None:
    assert load(tmp_path, environ={"QMESH_GATEWAY": off}).config.gateway is None


def test_no_gateway_wins_over_everything(tmp_path: Path) -> None:
    assert load(tmp_path, environ={"QMESH_GATEWAY": "127.0.0.1:1"}, gateway_off=True).config.gateway is None


def test_models_of_the_file(tmp_path: Path) -> None:
    toml = "[[models]]\npath = '~/a.gguf'\nslots = 2\n[[models]]\npath = '/m/b.gguf'\nalias = 'bee'\n"
    first, second = load(tmp_path, toml=toml).config.models
    assert first.path == Path.home() / "a.gguf"
    assert (first.name, first.slots) == ("a", 2)
    assert (second.name, second.slots) == ("bee", None)


@pytest.mark.parametrize(
    ("environ", "toml", "words"),
    [
        ({"QMESH_SLOT": "1"}, None, ["QMESH_SLOT", "Did you mean 'QMESH_SLOTS'"]),
        ({"QMESH_XYZZY": "1"}, None, ["QMESH_XYZZY", "Known are"]),
        ({"QMESH_MODELS": "a.gguf"}, None, ["QMESH_MODELS"]),
        ({}, "lisen = 'a:1'\n", ["'lisen'", "qmesh.toml", "Did you mean 'listen'"]),
        ({}, "[[models]]\npath='a'\nslot=3\n", ["'slot'", "qmesh.toml", "Did you mean 'slots'"]),
    ],
)
def test_unknown_settings_are_refused_with_a_hint(
    tmp_path: Path, environ: dict[str, str], toml: str | None, words: list[str]
) -> None:
    text = str(refused(tmp_path, None, environ, toml))
    assert "unknown setting" in text
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("listen = 5\n", ["listen", "5"]),
        ("listen = 'Nowhere'\n", ["listen", "'Nowhere'", "HOST:PORT"]),
        ("listen = '127.0.0.1:70000'\n", ["listen", "65535"]),
        ("gateway = '::1:80'\n", ["gateway", "brackets"]),
        ("slots = 0\n", ["slots", "0", "greater than or equal to 1"]),
        ("slots = 'four'\n", ["slots", "'four'"]),
        ("backend_url = 'ftp://x'\n", ["backend_url", "ftp://x"]),
        ("drain_seconds = -1\n", ["drain_seconds"]),
        ("advertise = ['nowhere']\n", ["advertise", "nowhere", "HOST:PORT"]),
        ("models = 5\n", ["models", "5"]),
        ("[[models]]\nalias = 'x'\n", ["models.0", "path"]),
        ("[[models]]\npath = 'x'\ncontext = 1\n", ["models.0.context"]),
    ],
)
def test_wrong_values_are_refused_with_their_place(tmp_path: Path, toml: str, words: list[str]) -> None:
    text = str(refused(tmp_path, toml=toml))
    assert str(tmp_path / "qmesh.toml") in text
    for word in words:
        assert word in text


def test_a_wrong_value_of_the_environment_is_told_from_one_of_the_file(tmp_path: Path) -> None:
    assert "env" in str(refused(tmp_path, environ={"QMESH_SLOTS": "many"}, toml="slots = 2\n"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"slots = \n", "not valid TOML"),
        (b"\xff\xfe", "cannot be read"),
        (b"a = 1\na = 2\n", "not valid TOML"),
    ],
)
def test_a_garbled_file(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "qmesh.toml").write_bytes(content)
    assert words in str(refused(tmp_path))


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    assert "no configuration file" in str(refused(tmp_path, file=tmp_path / "gone.toml"))
    (tmp_path / "folder").mkdir()
    assert "cannot be read" in str(refused(tmp_path, file=tmp_path / "folder"))


def test_variables_of_the_tests_are_no_settings(tmp_path: Path) -> None:
    load(
        tmp_path,
        environ={"QMESH_TEST_TIMEOUT_FACTOR": "2", "QMESH_TEST_LLAMA_SERVER": "/x", "QMESH_DEBUG": "1"},
    )


def test_peers_are_allowed_and_denied_by_id_and_network(tmp_path: Path) -> None:
    own, friend, foe = (NodeId(bytes([number]) * 32) for number in (1, 2, 3))
    file = tmp_path / "qmesh.toml"
    file.write_text(
        f'[peers]\nallow = ["{friend.hex()}"]\ndeny = ["{foe.hex()}", "192.0.2.7", "2001:db8::/32"]\n'
        "requests_per_minute = 6\n"
    )
    peers = Loaded.of({}, file=file, environ={}).config.peers
    policy = peers.policy(own)
    assert peers.requests_per_minute == 6
    assert policy.allow == frozenset({own, friend})
    assert policy.deny == {foe}
    assert [str(one) for one in policy.deny_networks] == ["192.0.2.7/32", "2001:db8::/32"]
    assert (
        Loaded.of({"data_dir": tmp_path / "none"}, file=None, environ={}).config.peers.policy(own).allow
        is None
    )


@pytest.mark.parametrize(
    "line", ['allow = ["me"]', 'deny = ["1.2.3.4/99"]', "requests_per_minute = 0", "x = 1"]
)
def test_wrong_lists_of_peers_are_refused(tmp_path: Path, line: str) -> None:
    file = tmp_path / "qmesh.toml"
    file.write_text(f"[peers]\n{line}\n")
    with pytest.raises(ConfigurationError):
        Loaded.of({}, file=file, environ={})
