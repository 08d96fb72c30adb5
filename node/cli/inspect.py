"""`status`, `peers`, `models`, `identity`, `version`: what there is."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated, Any

import typer

from node.cli import options
from node.cli.output import data, progress, reporting, table, text


def status(
    data_dir: options.DataDir = None, config: options.Config = None, as_json: options.Json = False
) -> None:
    """The node that runs here: models, slots, load, health and its parts."""
    with reporting(as_json=as_json):
        from node.cli.entry import ask_local, folder_of

        answer = dict(asyncio.run(ask_local(folder_of(data_dir, config), "status")))
        answer.pop("contacts", None)
        if as_json:
            data(answer)
            return
        load, system = answer["load"], answer["system"]
        text(f"node     {answer['worker_id']}")
        text(f"version  {answer['version']}, up {answer['uptime']:.0f} s, network {answer['network']}")
        text(f"listen   {', '.join(answer['addresses'])}, {answer['peers']} peers")
        text(
            f"machine  CPU {system['cpu']:.0%} (others {system['foreign_cpu']:.0%}), "
            f"{system['memory_available']:.0%} of memory available"
        )
        text(f"load     {load['busy']}/{load['slots']} slots busy, {load['queue']} waiting")
        rows = [
            [
                model["name"],
                model["state"],
                f"{model['health']}",
                " ".join(f"{name}={part:g}" for name, part in model["health_parts"].items()),
                f"{model['busy']}/{model['slots']}",
                f"{model['context']}",
                f"{model['generation_speed']:g}",
                f"{model['restarts']}",
            ]
            for model in answer["models"]
        ]
        table(["MODEL", "STATE", "HEALTH", "PARTS", "BUSY", "CONTEXT", "TOKENS/S", "RESTARTS"], rows)
        for model in answer["models"]:
            if model["error"]:
                progress(f"{model['name']}: {model['error']}")


def peers(
    data_dir: options.DataDir = None, config: options.Config = None, as_json: options.Json = False
) -> None:
    """The nodes that the node here knows: how each was found, the way to it, and what is wrong with it."""
    with reporting(as_json=as_json):
        from node.cli.entry import ask_local, folder_of

        answer = asyncio.run(ask_local(folder_of(data_dir, config), "status"))
        contacts = answer.get("contacts") or {"peers": [], "unreached": {}}
        if as_json:
            data(contacts)
            return
        rows = [
            [
                peer["id"][:12],
                peer["address"],
                peer["found"],
                peer["path"],
                "-" if peer["rtt"] is None else f"{peer['rtt'] * 1000:.1f} ms",
                f"{peer['last_seen']:.0f} s ago",
                peer["problem"] or "ok",
            ]
            for peer in contacts["peers"]
        ]
        table(["PEER", "ADDRESS", "FOUND", "PATH", "RTT", "SEEN", "STATE"], rows)
        if not rows:
            progress("no peers yet")
        for address, reason in contacts["unreached"].items():
            progress(f"not reached: {address}: {reason}")


def models(
    join: options.Join = None,
    network: options.Network = None,
    data_dir: options.DataDir = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """The models of the mesh and their workers."""
    with reporting(as_json=as_json):
        from mesh.errors import NoWorkers
        from node.cli.entry import mesh_client, settings

        async def main() -> list[dict[str, Any]]:
            async with await mesh_client(settings(data_dir, config, join=join, network=network)) as mesh:
                found: list[dict[str, Any]] = []
                for model in await mesh.models():
                    try:
                        workers = await mesh.workers(model.name)
                    except NoWorkers:
                        continue  # It left between the two questions.
                    found.append({"model": model.name, "workers": [asdict(worker) for worker in workers]})
                return found

        found = asyncio.run(main())
        if as_json:
            for one in found:
                data(one)
            return
        rows = [
            [
                str(one["model"]),
                worker["id"][:12],
                ", ".join(worker["addresses"]),
                f"{worker['health']}",
                f"{worker['slots']}",
                f"{worker['context']}",
                "-" if worker["rtt"] is None else f"{worker['rtt'] * 1000:.1f} ms",
            ]
            for one in found
            for worker in one["workers"]
        ]
        table(["MODEL", "WORKER", "ADDRESSES", "HEALTH", "SLOTS", "CONTEXT", "RTT"], rows)
        if not rows:
            progress("no models yet")


def identity(
    data_dir: options.DataDir = None, config: options.Config = None, as_json: options.Json = False
) -> None:
    """The id of the node here; made on first use."""
    with reporting(as_json=as_json):
        from mesh.keystore import KEY_FILE, load_identity
        from node.cli.entry import folder_of

        folder = folder_of(data_dir, config)
        own = load_identity(folder)
        if as_json:
            data({"worker_id": own.id.hex(), "key_file": str(folder / KEY_FILE)})
        else:
            text(own.id.hex())
            progress(f"key: {folder / KEY_FILE}")


def version(
    as_json: options.Json = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also what it runs on.")] = False,
) -> None:
    """The version of QMesh, and with -v of what it runs on."""
    with reporting(as_json=as_json):
        from node.__about__ import VERSION

        facts = {"qmesh": VERSION}
        if verbose or as_json:
            facts |= _environment()
        if as_json:
            data(facts)
        else:
            for name, value in facts.items():
                text(f"{name} {value}")


def _environment() -> dict[str, str]:
    import platform
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as package_version

    facts = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("aiohttp", "kademlia", "msgpack", "pynacl", "uvloop", "xllamacpp"):
        try:
            facts[package] = package_version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    return facts
