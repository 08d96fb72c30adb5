"""`ps`, `load`, `unload`: the models of the node that runs here."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from node.cli import options
from node.cli.output import data, reporting, table

Name = Annotated[str, typer.Argument(metavar="MODEL", help="The model's name, as `ps` shows it.")]


def ps(
    data_dir: options.DataDir = None, config: options.Config = None, as_json: options.Json = False
) -> None:
    """The models of the node here, and which of them are loaded."""
    with reporting(as_json=as_json):
        from node.cli.entry import ask_local, folder_of

        _show(asyncio.run(ask_local(folder_of(data_dir, config), "status")), as_json=as_json)


def load(
    model: Name,
    data_dir: options.DataDir = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """Load a model now, also one whose server had failed; others make room if need be."""
    with reporting(as_json=as_json):
        _tell("load", model, data_dir, config, as_json=as_json)


def unload(
    model: Name,
    data_dir: options.DataDir = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """Unload a model once nobody uses it; the next request for it loads it again."""
    with reporting(as_json=as_json):
        _tell("unload", model, data_dir, config, as_json=as_json)


def _tell(method: str, model: str, data_dir: Path | None, config: Path | None, *, as_json: bool) -> None:
    from node.cli.entry import LOAD_TIMEOUT, ask_local, folder_of

    told = ask_local(folder_of(data_dir, config), method, {"model": model}, LOAD_TIMEOUT)
    _show(asyncio.run(told), as_json=as_json)


def _show(status: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        for model in status["models"]:
            data(model)
        return
    rows = [
        [
            model["name"],
            model["state"],
            f"{model['busy']}/{model['slots']}",
            f"{model['queue']}",
            f"{model['memory'] / (1 << 20):.0f} MiB",
            "-" if model["expires_in"] is None else f"{model['expires_in']:.0f} s",
        ]
        for model in status["models"]
    ]
    table(["MODEL", "STATE", "BUSY", "WAITING", "MEMORY", "UNLOADS IN"], rows)
