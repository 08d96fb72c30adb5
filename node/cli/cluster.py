"""`qmesh-node cluster`: test clusters of real nodes on this machine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from node.cli import options
from node.cli.output import CHAT_REQUEST, data, progress, reporting, table

app = typer.Typer(help="Local test clusters of real nodes.", no_args_is_help=True)

Folder = Annotated[
    Path | None,
    typer.Option("--data-dir", metavar="DIR", help="The cluster's folder; a per-user one by default."),
]


def _folder(given: Path | None) -> Path:
    from node.config import default_data_dir

    default = default_data_dir()
    return (given or default.with_name(f"{default.name}-cluster")).expanduser()


@app.command()
def up(
    count: Annotated[int, typer.Option("-n", "--nodes", min=1, max=64, help="How many nodes.")] = 3,
    model: Annotated[
        Path | None, typer.Option("--model", metavar="GGUF", help="Default: the demo model.")
    ] = None,
    slots: Annotated[
        int | None, typer.Option(min=1, max=256, help="Answers at the same time, per node.")
    ] = None,
    kill_every: Annotated[
        float | None,
        typer.Option(
            "--kill-every",
            metavar="SECONDS",
            min=0.1,
            help="Stay, kill a random node (SIGKILL) every so often and start it again; Ctrl-C ends the cluster.",
        ),
    ] = None,
    data_dir: Folder = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Start nodes on free ports of 127.0.0.1; returns when all can answer."""
    with reporting(as_json=as_json):
        from node.cluster import Cluster, Member

        extra = [*(() if slots is None else ("--slots", str(slots)))]
        if model is not None:
            extra.append(str(model))

        def tell(member: Member) -> None:
            if as_json:
                data(member.ready)
            else:
                models = ", ".join(member.ready["models"])
                progress(
                    f"node {member.number}: {member.worker_id[:12]} at {member.address}, "
                    f"{member.ready['gateway']}/v1, {models}",
                    quiet=quiet,
                )

        def tell_fate(member: Member, fate: str) -> None:
            if as_json:
                data({**member.ready, "event": fate, "number": member.number})
            else:
                progress(f"node {member.number}: {fate}", quiet=quiet)

        async def work() -> None:
            await cluster.up(count, extra, tell)
            if not as_json:
                first = cluster.members[0]
                progress(
                    f"try: qmesh-node generate 'Once upon a time' --join {first.address}\n"
                    f"  or: curl {first.ready['gateway']}/v1/chat/completions {CHAT_REQUEST}",
                    quiet=quiet,
                )
            if kill_every is not None:
                try:
                    await cluster.kill_every(kill_every, tell_fate)
                finally:
                    await cluster.down()

        cluster = Cluster(_folder(data_dir), attached=kill_every is not None)
        asyncio.run(work())


@app.command()
def down(data_dir: Folder = None, as_json: options.Json = False, quiet: options.Quiet = False) -> None:
    """End every node of the cluster."""
    with reporting(as_json=as_json):
        from node.cluster import Cluster

        ended = asyncio.run(Cluster(_folder(data_dir), attached=False).down())
        if as_json:
            data({"ended": ended})
        else:
            progress(f"{ended} nodes ended", quiet=quiet)


@app.command()
def status(data_dir: Folder = None, as_json: options.Json = False) -> None:
    """The nodes of the cluster, and which of them run."""
    with reporting(as_json=as_json):
        from node.cluster import Cluster

        members = Cluster(_folder(data_dir), attached=False).members
        if as_json:
            for member in members:
                data(
                    {
                        **member.ready,
                        "number": member.number,
                        "pid": member.pid,
                        "running": member.process() is not None,
                    }
                )
            return
        rows = [
            [
                f"{member.number}",
                member.worker_id[:12],
                member.address,
                f"{member.pid}",
                "running" if member.process() else "gone",
            ]
            for member in members
        ]
        table(["NODE", "WORKER", "ADDRESS", "PID", "STATE"], rows)
        if not members:
            progress("no cluster; start one with `qmesh-node cluster up`")
