"""`qmesh-node run`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from node.cli import options
from node.cli.output import CHAT_REQUEST, data, progress, reporting, text


def run(
    model: Annotated[
        Path | None, typer.Argument(metavar="[MODEL]", help="A GGUF file; the demo model where absent.")
    ] = None,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where peers reach this node. Port 0: any.")
    ] = None,
    join: options.Join = None,
    advertise: Annotated[
        list[str] | None, typer.Option(metavar="HOST:PORT", help="Where peers should look, if elsewhere.")
    ] = None,
    gateway: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where the OpenAI API listens.")
    ] = None,
    no_gateway: Annotated[bool, typer.Option("--no-gateway", help="No OpenAI API.")] = False,
    no_mdns: Annotated[bool, typer.Option("--no-mdns", help="Do not look for peers on the LAN.")] = False,
    network: options.Network = None,
    llama_server: Annotated[
        Path | None, typer.Option(metavar="PATH", help="The llama-server to supervise.")
    ] = None,
    backend_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Use this OpenAI-compatible server instead.")
    ] = None,
    slots: Annotated[int | None, typer.Option(min=1, max=256, help="Answers at the same time.")] = None,
    mode: Annotated[
        str | None,
        typer.Option(metavar="MODE", help="How much of the machine: efficiency, balanced or performance."),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder for everything it writes.")
    ] = None,
    config: options.Config = None,
    log_format: options.LogFormat = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Run a node: serve a model to the mesh until Ctrl-C."""
    with _last_word(as_json=as_json), reporting(as_json=as_json):
        from mesh.errors import ConfigurationError
        from node.config import Loaded

        if gateway is not None and no_gateway:
            raise ConfigurationError(
                "--gateway and --no-gateway contradict each other", "Leave one of them out."
            )
        flags: dict[str, Any] = {
            "models": ({"path": model},) if model is not None else None,
            "listen": listen,
            "join": tuple(join) if join else None,
            "advertise": tuple(advertise) if advertise else None,
            "gateway": gateway,
            "mdns": False if no_mdns else None,
            "network": network,
            "llama_server": llama_server,
            "backend_url": backend_url,
            "slots": slots,
            "mode": mode,
            "data_dir": data_dir,
            "log_format": log_format,
        }
        loaded = Loaded.of(flags, file=config, gateway_off=no_gateway)
        _start(loaded, as_json=as_json, quiet=quiet)


def _start(loaded: Any, *, as_json: bool, quiet: bool) -> None:
    from node.daemon import Node
    from node.logs import set_up

    def show(event: Mapping[str, Any]) -> None:
        if as_json:
            data(event)
        else:
            for line in describe(event):
                text(line) if event["event"] == "ready" else progress(line, quiet=quiet)

    set_up(quiet=quiet or as_json, style=loaded.config.log_format)
    with asyncio.Runner(loop_factory=event_loop_factory()) as runner:

        async def main() -> None:
            await Node(loaded, show).run()

        runner.run(main())
    progress("stopped", quiet=quiet or as_json)


@contextmanager
def _last_word(*, as_json: bool) -> Iterator[None]:
    """However it ends, programs read the same last line."""
    try:
        yield
    finally:
        if as_json:
            data({"event": "stopped"})


def event_loop_factory() -> Any:
    """uvloop where the platform has it."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def describe(event: Mapping[str, Any]) -> list[str]:
    """An event of the node as lines for people."""
    match event["event"]:
        case "starting":
            return [
                f"node     {event['worker_id']}",
                f"machine  {event['machine']}",
                f"server   {event['server']}",
                f"model    {', '.join(event['models'])}",
                f"listen   {event['address']} (peers: {', '.join(event['advertised'])})",
                "starting ...",
            ]
        case "ready":
            address = event["address"]
            lines = [f"ready    {', '.join(event['models'])} at {address}"]
            if event["gateway"]:
                lines += [
                    f"gateway  {event['gateway']}/v1",
                    f"  curl {event['gateway']}/v1/chat/completions {CHAT_REQUEST}",
                ]
            return [*lines, f"try      qmesh-node generate 'Once upon a time' --join {address}"]
        case "unreached":
            return [
                f"warning: {event['address']} (--join) is not reached: {event['error']}",
                "  fix: check the address, and that a node runs there; this one goes on trying",
            ]
        case "model_failed":
            return [f"error: {event['error']}"]
        case "stopping":
            return ["stopping: no new requests, running answers may finish (Ctrl-C again to hurry) ..."]
        case _:
            return []
