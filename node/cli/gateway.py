"""`qmesh-node gateway`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer

from node.cli import options
from node.cli.output import data, progress, reporting, text


def gateway(
    join: options.Join = None,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where the OpenAI API listens.")
    ] = None,
    default_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="For requests that name no model.")
    ] = None,
    alias: Annotated[
        list[str] | None, typer.Option(metavar="NAME=MODEL", help="Another name for a model. Repeatable.")
    ] = None,
    tls_certificate: Annotated[
        Path | None, typer.Option(metavar="PEM", help="Serve HTTPS with this certificate.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="PEM", help="The certificate's key.")] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="Web pages that may use it. Repeatable.")
    ] = None,
    wait_seconds: Annotated[
        float | None, typer.Option(min=0, help="How long a request waits for a worker.")
    ] = None,
    network: options.Network = None,
    data_dir: options.DataDir = None,
    config: options.Config = None,
    log_format: options.LogFormat = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Serve the OpenAI API of a mesh on a machine that serves no model, until Ctrl-C."""
    with reporting(as_json=as_json):
        from node.cli.run import event_loop_factory
        from node.config import Loaded
        from node.gateway.alone import run_alone, with_flags
        from node.logs import set_up

        flags: dict[str, Any] = {
            "join": tuple(join) if join else None,
            "gateway": listen,
            "network": network,
            "data_dir": data_dir,
            "log_format": log_format,
        }
        loaded = Loaded.of(flags, file=config)
        settings = with_flags(
            loaded.config.api,
            {
                "default_model": default_model,
                "aliases": dict(_pair(text) for text in alias) if alias else None,
                "tls_certificate": tls_certificate,
                "tls_key": tls_key,
                "cors_origins": tuple(cors_origin) if cors_origin else None,
                "wait_seconds": wait_seconds,
            },
        )

        def ready(url: str) -> None:
            if as_json:
                data({"event": "ready", "gateway": url})
            else:
                text(f"gateway  {url}/v1")

        set_up(quiet=quiet or as_json, style=loaded.config.log_format)
        with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
            runner.run(run_alone(loaded, settings, ready))
        if as_json:
            data({"event": "stopped"})
        else:
            progress("stopped", quiet=quiet)


def _pair(text: str) -> tuple[str, str]:
    from mesh.errors import ConfigurationError

    name, equals, model = text.partition("=")
    if not (name and equals and model):
        raise ConfigurationError(f"--alias {text!r} is no alias", "Write it as NAME=MODEL.")
    return name, model
