"""`ping`, `netcheck`, `doctor`: why it does not work."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from node.cli import options
from node.cli.output import ExitCode, data, explain, progress, reporting, text

if TYPE_CHECKING:
    from node.diagnose import Check, Reach

MOST_UNREACHED = 8
"""Addresses that the running node cannot reach and `doctor` tries."""


def ping(
    peer: Annotated[str, typer.Argument(metavar="PEER", help="HOST:PORT, or the beginning of a peer's id.")],
    network: options.Network = None,
    data_dir: options.DataDir = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """Reach a node over TCP and UDP: round trips, clock, and why not if not."""
    with reporting(as_json=as_json):
        from mesh.keystore import load_identity
        from node.cli.entry import find_peer, own_network, settings
        from node.diagnose import judge, reach

        loaded = settings(data_dir, config, network=network)
        folder = loaded.config.data_dir

        async def main() -> Reach:
            address, mesh = await find_peer(peer, folder), await own_network(loaded)
            return await reach(address, load_identity(folder), mesh)

        found = asyncio.run(main())
        checks = judge(found)
        if as_json:
            data({**asdict(found), "checks": [asdict(check) for check in checks]})
        else:
            _show(checks)
        if not all(check.ok for check in checks):
            raise typer.Exit(int(ExitCode.UNREACHABLE))


def netcheck(
    data_dir: options.DataDir = None, config: options.Config = None, as_json: options.Json = False
) -> None:
    """What the node here looks like from outside: its addresses, and whether peers can dial back."""
    with reporting(as_json=as_json):
        from node.cli.entry import ask_local, folder_of
        from node.diagnose import unreachable

        status = asyncio.run(ask_local(folder_of(data_dir, config), "status"))
        found = {"advertised": status["addresses"], **status["reachability"]}
        if as_json:
            data(found)
            return
        words = {True: "yes", False: "no", None: "unknown: no peer could be asked yet"}
        text(f"advertised  {', '.join(found['advertised'])}")
        text(f"seen as     {found['seen'] or 'unknown'}{', behind NAT' * found['behind_nat']}")
        text(f"reachable   {words[found['reachable']]}")
        text(f"DHT         {found['role']}, keeps {found['held']} records")
        for report in found["reports"]:
            text(f"peer {report['peer'][:12]}: TCP {report['tcp'] or 'ok'}; UDP {report['udp'] or 'ok'}")
        if found["reachable"] is False:
            finding, fix = unreachable(found)
            progress(f"{finding}\nfix: {fix}")


def doctor(
    join: options.Join = None,
    listen: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where `run` is to listen.")] = None,
    llama_server: Annotated[
        Path | None, typer.Option(metavar="PATH", help="The llama-server that `run` is to use.")
    ] = None,
    network: options.Network = None,
    data_dir: options.DataDir = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """Check this machine and the nodes it should reach; says cause and fix for whatever is wrong."""
    with reporting(as_json=as_json):
        from mesh.address import Address
        from mesh.errors import QMeshError
        from mesh.keystore import load_identity
        from mesh.network import Network
        from node.cli.entry import ask_local, configured_mesh, local_network, settings
        from node.diagnose import Check, check_running, check_targets, local_checks, within_reach
        from node.folder import running_node

        loaded = settings(
            data_dir, config, join=join, network=network, listen=listen, llama_server=llama_server
        )
        folder = loaded.config.data_dir
        folder.mkdir(parents=True, exist_ok=True)
        running = running_node(folder)
        checks = local_checks(
            folder,
            listen=loaded.config.listen if loaded.explicit("listen") else None,
            running=running is not None,
            llama_server=loaded.config.llama_server,
        )
        mesh, targets = Network(loaded.config.network), list[Address]()
        try:
            configured = asyncio.run(configured_mesh(loaded))
            mesh, targets = configured.network, configured.seeds
        except QMeshError as error:
            cause, fix, _ = explain(error)
            checks.append(Check("mesh", False, cause, fix))
        if running is not None:
            status = dict(asyncio.run(ask_local(folder, "status")))
            checks += check_running(status)
            mesh = local_network(running) if not join else mesh
            unreached = within_reach(status["contacts"]["unreached"])
            targets += [one for one in unreached if one not in targets][:MOST_UNREACHED]
        if targets and checks[0].ok:
            checks += asyncio.run(check_targets(targets, load_identity(folder), mesh))
        if as_json:
            for check in checks:
                data(asdict(check))
        else:
            _show(checks)
        if not all(check.ok for check in checks):
            raise typer.Exit(int(ExitCode.UNREACHABLE))


def _show(checks: list[Check]) -> None:
    for check in checks:
        text(f"{'ok  ' if check.ok else 'BAD '} {check.name}: {check.finding}")
        if check.fix:
            progress(f"     fix: {check.fix}")
