"""How commands reach the mesh: through `--join`, else through the node that runs here."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from client_sdk import MeshClient, SyncMeshClient
from mesh.address import Address, parse_address
from mesh.entry import parse_entry
from mesh.errors import ConfigurationError
from mesh.identity import Identity
from mesh.keystore import load_identity
from mesh.network import Network
from mesh.transport import connect
from node.cli.output import ExitCode
from node.config import default_data_dir
from node.folder import running_node
from node.membership import resolve

STATUS_TIMEOUT = 10.0
LOAD_TIMEOUT = 600.0


def local_node(data_dir: Path | None) -> tuple[Path, dict[str, Any]]:
    """The folder and the published facts of the node that runs here. Raises ConfigurationError."""
    folder = _folder(data_dir)
    facts = running_node(folder)
    if facts is None:
        raise ConfigurationError(
            f"no node is running in {folder}",
            "Start one with `qmesh-node run`, or name another machine's with --join HOST:PORT.",
            exit_code=ExitCode.UNREACHABLE,
        )
    return folder, facts


def own_network(data_dir: Path | None, name: str | None = None) -> Network:
    """The mesh that this machine belongs to, or the open one called `name`. Raises ConfigurationError."""
    return resolve(_folder(data_dir), join=(), network=name, now=time.time())[0]


def own_identity(data_dir: Path | None) -> Identity:
    """The identity of the node in the folder. Raises ConfigurationError."""
    return load_identity(_folder(data_dir))


def local_network(data_dir: Path | None) -> Network:
    """The mesh that the node which runs here is in. Raises ConfigurationError."""
    return _network(local_node(data_dir)[1])


def mesh_client(join: list[str] | None, network: str | None, data_dir: Path | None) -> MeshClient:
    """A client of the mesh that the options lead to. Raises ConfigurationError."""
    return MeshClient(**_way_in(join, network, data_dir))


def blocking_client(join: list[str] | None, network: str | None, data_dir: Path | None) -> SyncMeshClient:
    """As `mesh_client`, for commands that read from the terminal: a wait for a line cannot be cancelled,
    so Ctrl-C must reach the main thread in it. Raises ConfigurationError.
    """
    return SyncMeshClient(**_way_in(join, network, data_dir))


def _way_in(join: list[str] | None, network: str | None, data_dir: Path | None) -> dict[str, Any]:
    if join:
        return {"join": join, "network": own_network(data_dir, network)}
    folder, facts = local_node(data_dir)
    return {
        "join": f"{facts['worker_id']}@{facts['address']}",
        "network": _network(facts),
        "identity": load_identity(folder),
    }


async def find_peer(peer: str, data_dir: Path | None) -> Address:
    """Where a peer listens: its address as given, or that of the known peer whose id begins so.

    Raises ConfigurationError.
    """
    if ":" in peer or "." in peer:
        return parse_entry(peer, time.time()).addresses[0]
    contacts = (await ask_local(data_dir, "status")).get("contacts") or {"peers": []}
    matches = [one for one in contacts["peers"] if one["id"].startswith(peer.lower())]
    if len(matches) != 1:
        raise ConfigurationError(
            f"{len(matches)} known peers have an id that begins with {peer!r}",
            "See `qmesh-node peers`, or give HOST:PORT.",
        )
    return parse_address(matches[0]["address"])


def _folder(data_dir: Path | None) -> Path:
    return (data_dir or default_data_dir()).expanduser()


def _network(facts: Mapping[str, Any]) -> Network:
    """The mesh of a running node, from what it has published."""
    secret = facts.get("secret")
    return Network(facts["network"], bytes.fromhex(secret) if secret else None)


async def ask_local(
    data_dir: Path | None,
    method: str,
    meta: Mapping[str, Any] | None = None,
    timeout: float = STATUS_TIMEOUT,
) -> Mapping[str, Any]:
    """One question to the node that runs here, asked with its own identity. `timeout` in seconds."""
    folder, facts = local_node(data_dir)
    identity = load_identity(folder)
    connection = await connect(
        *parse_address(facts["address"]),
        identity=identity,
        network=_network(facts),
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
