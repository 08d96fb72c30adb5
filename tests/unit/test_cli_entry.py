"""How the commands find the mesh: what was asked for, else the node that runs here, else what it would start from."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mesh.errors import ConfigurationError
from mesh.identity import Identity
from mesh.network import Network
from node.cli.entry import folder_of, own_network, settings, way_in
from node.config import CONFIG_FILE
from node.folder import RUNTIME_FILE
from node.membership import Membership, keep

SEED, OTHER, HERE = "10.0.0.1:9470", "10.0.0.2:9470", "127.0.0.1:9470"
KITCHEN = Network("kitchen", bytes(32))


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("QMESH_") and not name.startswith("QMESH_TEST_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("QMESH_DATA_DIR", str(tmp_path))


def run_here(folder: Path) -> str:
    """What a node that runs in the folder publishes; returns its id."""
    worker_id = Identity().id.hex()
    facts = {
        "pid": os.getpid(), "worker_id": worker_id, "address": HERE,
        "network": KITCHEN.name, "secret": bytes(32).hex(),
    }  # fmt: skip
    (folder / RUNTIME_FILE).write_text(json.dumps(facts))
    return worker_id


async def test_what_is_asked_for_goes_before_the_node_that_runs_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here(tmp_path)
    named = tmp_path / "named.toml"
    named.write_text(f"join = ['{OTHER}']\nnetwork = 'file'\n")
    assert await way_in(settings(None, join=[SEED])) == {"join": (SEED,), "network": Network()}
    assert await way_in(settings(None, named)) == {"join": (OTHER,), "network": Network("file")}
    both = settings(None, named, join=[SEED], network="flag")
    assert await way_in(both) == {"join": (SEED,), "network": Network("flag")}
    monkeypatch.setenv("QMESH_CONFIG", str(named))
    assert (await way_in(settings(None)))["join"] == (OTHER,)
    monkeypatch.setenv("QMESH_JOIN", SEED)
    monkeypatch.setenv("QMESH_NETWORK", "variable")
    assert await way_in(settings(None)) == {"join": (SEED,), "network": Network("variable")}


async def test_the_node_that_runs_here_goes_before_what_it_starts_from(tmp_path: Path) -> None:
    worker_id = run_here(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(f"join = ['{SEED}']\n")
    keep(tmp_path, Membership(KITCHEN, (OTHER,)))
    here = await way_in(settings(None))
    assert (here["join"], here["network"]) == (f"{worker_id}@{HERE}", KITCHEN)
    assert isinstance(here["identity"], Identity)
    assert await own_network(settings(None)) == KITCHEN
    assert await own_network(settings(None, network="flag")) == Network("flag")
    (tmp_path / RUNTIME_FILE).unlink()
    assert await way_in(settings(None)) == {"join": (SEED, OTHER), "network": KITCHEN}
    (tmp_path / CONFIG_FILE).unlink()
    assert await way_in(settings(None)) == {"join": (OTHER,), "network": KITCHEN}
    (tmp_path / "mesh.json").unlink()
    with pytest.raises(ConfigurationError, match="no node is running"):
        await way_in(settings(None))


def test_the_folder_may_stand_in_a_named_file(tmp_path: Path) -> None:
    named = tmp_path / "named.toml"
    named.write_text(f"data_dir = '{tmp_path / 'other'}'\n")
    assert folder_of(None) == tmp_path
    assert folder_of(tmp_path / "flag", named) == tmp_path / "flag"
