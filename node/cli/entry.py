"""How commands find their node and their mesh: the settings as for `run`, and what runs in the data folder."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from client_sdk import MeshClient, SyncMeshClient
from mesh.address import Address, parse_address
from mesh.entry import parse_entry
from mesh.errors import ConfigurationError
from mesh.keystore import load_identity
from mesh.network import Network
from mesh.transport import connect
from node.cli.output import ExitCode
from node.config import CONFIG_FILE, Loaded
from node.folder import running_node
from node.membership import Membership, resolve

STATUS_TIMEOUT = 10.0
LOAD_TIMEOUT = 600.0


def settings(
    data_dir: Path | None,
    config: Path | None = None,
    *,
    join: list[str] | None = None,
    network: str | None = None,
    **flags: Any,
) -> Loaded:
    """The settings that `run` would have with these flags. Raises ConfigurationError."""
    given = {"data_dir": data_dir, "join": tuple(join) if join else None, "network": network, **flags}
    return Loaded.of(given, file=config)


def folder_of(data_dir: Path | None, config: Path | None = None) -> Path:
    """The data folder that the settings name. Raises ConfigurationError."""
    return settings(data_dir, config).config.data_dir


def local_node(folder: Path, instead: str = "its folder with --data-dir") -> Mapping[str, Any]:
    """The published facts of the node that runs in the folder. Raises ConfigurationError, which tells
    `instead` of starting one what to name.
    """
    facts = running_node(folder)
    if facts is None:
        raise ConfigurationError(
            f"no node is running in {folder}",
            f"Start one with `qmesh-node run`, or name {instead}.",
            exit_code=ExitCode.UNREACHABLE,
        )
    return facts


def local_network(facts: Mapping[str, Any]) -> Network:
    """The mesh of a running node, from what it has published."""
    secret = facts.get("secret")
    return Network(facts["network"], bytes.fromhex(secret) if secret else None)


async def configured_mesh(loaded: Loaded) -> Membership:
    """The mesh that the settings lead to, and nodes to start from. Raises as `resolve` does."""
    config = loaded.config
    network = config.network if loaded.explicit("network") else None
    return await resolve(config.data_dir, join=config.join, network=network)


async def own_network(loaded: Loaded) -> Network:
    """The mesh that was asked for, else that of the node that runs here. Raises as `configured_mesh` does."""
    asked = _asked(loaded, "join") or _asked(loaded, "network")
    facts = None if asked else running_node(loaded.config.data_dir)
    return (await configured_mesh(loaded)).network if facts is None else local_network(facts)


async def mesh_client(loaded: Loaded) -> MeshClient:
    """A client of the mesh that the settings lead to. Raises as `configured_mesh` does."""
    return MeshClient(**await way_in(loaded))


def blocking_client(loaded: Loaded) -> SyncMeshClient:
    """As `mesh_client`, for commands that read from the terminal: a wait for a line cannot be cancelled,
    so Ctrl-C must reach the main thread in it.
    """
    return SyncMeshClient(**asyncio.run(way_in(loaded)))


async def way_in(loaded: Loaded) -> dict[str, Any]:
    """What was asked for; else the node that runs here; else the nodes that one here would start from."""
    folder = loaded.config.data_dir
    facts = None if _asked(loaded, "join") else running_node(folder)
    if facts is not None:
        return {
            "join": f"{facts['worker_id']}@{facts['address']}",
            "network": local_network(facts),
            "identity": load_identity(folder),
        }
    mesh = await configured_mesh(loaded)
    if not mesh.addresses:
        local_node(folder, "another machine's with --join HOST:PORT")  # says that there is none
    return {"join": mesh.addresses, "network": mesh.network}


def _asked(loaded: Loaded, key: str) -> bool:
    """Whether a setting is meant for this command. Those in the folder's own file are the node's."""
    return loaded.explicit(key) and loaded.origin[key] != str(loaded.config.data_dir / CONFIG_FILE)


async def find_peer(peer: str, folder: Path) -> Address:
    """Where a peer listens: its address as given, or that of the known peer whose id begins so.

    Raises ConfigurationError.
    """
    if ":" in peer or "." in peer:
        return parse_entry(peer, time.time()).addresses[0]
    contacts = (await ask_local(folder, "status")).get("contacts") or {"peers": []}
    matches = [one for one in contacts["peers"] if one["id"].startswith(peer.lower())]
    if len(matches) != 1:
        raise ConfigurationError(
            f"{len(matches)} known peers have an id that begins with {peer!r}",
            "See `qmesh-node peers`, or give HOST:PORT.",
        )
    return parse_address(matches[0]["address"])


async def ask_local(
    folder: Path,
    method: str,
    meta: Mapping[str, Any] | None = None,
    timeout: float = STATUS_TIMEOUT,
) -> Mapping[str, Any]:
    """One question to the node that runs in the folder, asked with its own identity. `timeout` in seconds."""
    facts = local_node(folder)
    identity = load_identity(folder)
    connection = await connect(
        *parse_address(facts["address"]),
        identity=identity,
        network=local_network(facts),
        peer_id=identity.id,
        timeout=STATUS_TIMEOUT,
    )
    try:
        async with await connection.open(method, meta or {}) as stream:
            while await stream.read(timeout=timeout) is not None:
                pass
            return stream.trailer or {}
    finally:
        await connection.close()
