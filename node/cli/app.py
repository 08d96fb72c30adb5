"""All commands of `qmesh-node`."""

from __future__ import annotations

import typer

from node.cli import cluster, diagnose, gateway, generate, inspect, keys, manage, membership, run, runtime

app = typer.Typer(
    name="qmesh-node",
    help="A peer-to-peer network of LLM workers on llama.cpp.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(run.run)
app.command()(gateway.gateway)
app.command()(generate.generate)
app.command()(generate.chat)
app.command()(inspect.status)
app.command()(inspect.peers)
app.command()(inspect.models)
app.command()(manage.ps)
app.command()(manage.load)
app.command()(manage.unload)
app.command()(membership.invite)
app.command()(membership.join)
app.command()(membership.leave)
app.command()(diagnose.ping)
app.command()(diagnose.netcheck)
app.command()(diagnose.doctor)
app.command()(inspect.identity)
app.command()(inspect.version)
app.add_typer(cluster.app, name="cluster")
app.add_typer(keys.app, name="keys")
app.add_typer(runtime.app, name="runtime")


def main() -> None:
    """Entry point of `qmesh-node`."""
    app()
