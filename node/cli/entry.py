"""How commands reach the mesh: through `--join`, else through the node that runs here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from client_sdk import MeshClient
from mesh.address import parse_address
from mesh.errors import ConfigurationError
from mesh.keystore import load_identity
from mesh.network import Network
from mesh.transport import connect
from node.cli.output import ExitCode
from node.config import default_data_dir
from node.folder import running_node

STATUS_TIMEOUT = 10.0
LOAD_TIMEOUT = 600.0


def local_node(data_dir: Path | None) -> tuple[Path, dict[str, Any]]:
    """The folder and the published facts of the node that runs here. Raises ConfigurationError."""
    folder = (data_dir or default_data_dir()).expanduser()
    facts = running_node(folder)
    if facts is None:
        raise ConfigurationError(
            f"no node is running in {folder}",
            "Start one with `qmesh-node run`, or name another machine's with --join HOST:PORT.",
            exit_code=ExitCode.UNREACHABLE,
        )
    return folder, facts


def mesh_client(join: list[str] | None, network: str | None, data_dir: Path | None) -> MeshClient:
    """A client of the mesh that the options lead to. Raises ConfigurationError."""
    if join:
        return MeshClient(join, network=network or Network())
    folder, facts = local_node(data_dir)
    return MeshClient(
        f"{facts['worker_id']}@{facts['address']}", network=facts["network"], identity=load_identity(folder)
    )


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
        network=Network(facts["network"]),
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
