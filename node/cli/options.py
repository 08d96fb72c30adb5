"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Join = Annotated[
    list[str] | None,
    typer.Option("--join", metavar="ADDR|TOKEN", help="A node to start from, or a join token. Repeatable."),
]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", metavar="DIR", envvar="QMESH_DATA_DIR", help="The node's folder."),
]
Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Default: qmesh.toml in the folder.")
]
Network = Annotated[str | None, typer.Option("--network", metavar="NAME", help="The mesh's name.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one value per line.")]
LogFormat = Annotated[
    str | None, typer.Option("--log-format", metavar="console|json", help="Of log lines on stderr.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only data and errors.")]
Model = Annotated[
    str | None, typer.Option("--model", "-m", metavar="NAME", help="Default: the most served one.")
]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", "-n", min=1, help="The most tokens to write.")]
Temperature = Annotated[
    float | None, typer.Option("--temperature", min=0.0, help="0 always takes the likeliest.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")]
