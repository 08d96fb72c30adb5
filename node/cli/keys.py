"""`qmesh-node keys`: who may use the gateway."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from node.cli import options
from node.cli.output import data, progress, reporting, table, text

if TYPE_CHECKING:
    from node.gateway.keys import ApiKey, KeyFile

app = typer.Typer(help="API keys of the gateway.", no_args_is_help=True)


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    requests: Annotated[
        int | None, typer.Option("--requests-per-minute", min=1, help="Default: no limit.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens-per-minute", min=1, help="Default: no limit.")
    ] = None,
    data_dir: options.DataDir = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """Make a key and print it, once. From then on the gateway asks for one."""
    with reporting(as_json=as_json):
        key, secret = _file(data_dir, config).add(
            name, requests_per_minute=requests, tokens_per_minute=tokens
        )
        if as_json:
            data({**_public(key), "key": secret})
        else:
            text(secret)
            progress(f"this is the only time that the key of {key.name!r} (id {key.id}) is shown")


@app.command()
def ls(
    data_dir: options.DataDir = None, config: options.Config = None, as_json: options.Json = False
) -> None:
    """The keys; what is stored of them cannot be used as one."""
    with reporting(as_json=as_json):
        file = _file(data_dir, config)
        keys = file.read()
        if as_json:
            for key in keys:
                data(_public(key))
            return
        rows = [
            [
                key.id,
                key.name,
                datetime.fromtimestamp(key.created).astimezone().isoformat(sep=" ", timespec="minutes"),
                _limit(key.requests_per_minute),
                _limit(key.tokens_per_minute),
            ]
            for key in keys
        ]
        table(["ID", "NAME", "CREATED", "REQUESTS/MIN", "TOKENS/MIN"], rows)
        if not rows:
            progress("no keys: nobody can use the gateway" if file.exists() else "no keys: none is needed")


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(metavar="NAME|ID", help="The key.")],
    data_dir: options.DataDir = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """Make a key useless, also for a gateway that runs."""
    with reporting(as_json=as_json):
        file = _file(data_dir, config)
        gone = file.revoke(key)
        if as_json:
            data(_public(gone))
        else:
            progress(f"revoked {gone.name!r} (id {gone.id})")
        if not file.read():
            progress(f"no key is left: nobody can use the gateway; delete {file.path} to open it again")


def _file(data_dir: Path | None, config: Path | None) -> KeyFile:
    from node.cli.entry import folder_of
    from node.gateway.keys import KeyFile

    return KeyFile(folder_of(data_dir, config))


def _public(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "created": key.created,
        "requests_per_minute": key.requests_per_minute,
        "tokens_per_minute": key.tokens_per_minute,
    }


def _limit(value: int | None) -> str:
    return "-" if value is None else str(value)
