"""Printing: data on stdout, progress and errors on stderr, JSON for programs, exit codes."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import typer


class ExitCode(IntEnum):
    """What the exit status of every command means."""

    OK = 0
    BUG = 1
    """A fault of QMesh itself; please report it."""
    USAGE = 2
    """A flag, setting or configuration file is wrong."""
    IDENTITY = 3
    """The identity file is unreadable, malformed or readable by others."""
    MODEL = 4
    """The model is missing or broken, or its server refuses it."""
    IN_USE = 5
    """Another node holds the data folder."""
    PORT = 6
    """The address given to --listen or --gateway cannot be had."""
    SERVER = 7
    """No usable llama.cpp server."""
    UNREACHABLE = 8
    """No node could be reached."""
    NO_WORKER = 9
    """The mesh has no worker for the model."""
    FAILED = 10
    """Workers were found, but no answer came through."""
    REFUSED = 11
    """The request itself was refused (too long for the context, for example)."""
    INTERRUPTED = 130
    """Ctrl-C."""


CHAT_REQUEST = (
    """-H 'Content-Type: application/json' -d '{"messages":[{"role":"user","content":"Hello!"}]}'"""
)
"""What to give curl behind the URL of a gateway's chat."""


def data(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """One JSON value on a line of stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def text(line: str = "", *, end: str = "\n") -> None:
    """Text that was asked for, on stdout."""
    sys.stdout.write(line + end)
    sys.stdout.flush()


def progress(line: str, *, quiet: bool = False) -> None:
    """What is going on, on stderr."""
    if not quiet:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """A table on stdout; NO_COLOR and narrow terminals are respected."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title, box=None, pad_edge=False, title_justify="left", header_style="bold")
    for column in columns:
        shown.add_column(column)
    for row in rows:
        shown.add_row(*row)
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(shown)


@contextmanager
def reporting(*, as_json: bool = False) -> Iterator[None]:
    """Turn what went wrong into one message with cause and fix, and the documented exit code."""
    from mesh.errors import QMeshError
    from sidecar.errors import SidecarError

    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        raise typer.Exit(int(ExitCode.INTERRUPTED)) from None
    except BrokenPipeError:
        # The reader of our output left, as `head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(int(ExitCode.OK)) from None
    except Exception as raised:
        error = _single(raised)
        if isinstance(error, QMeshError | SidecarError):
            cause, fix, code = explain(error)
            if as_json:
                data({"event": "error", "error": cause, "fix": fix, "exit_code": int(code)})
            progress(f"error: {cause}" + (f"\n  fix: {fix}" if fix else "") + f"\n  (exit code {int(code)})")
            raise typer.Exit(int(code)) from None
        if os.environ.get("QMESH_DEBUG"):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        progress(
            f"error: a fault of QMesh itself: {type(error).__name__}: {error} ({last.name}, line {last.lineno})\n"
            "  fix: run it again with QMESH_DEBUG=1 and report what it prints\n  (exit code 1)"
        )
        raise typer.Exit(int(ExitCode.BUG)) from None


def _single(error: BaseException) -> BaseException:
    """What a group of one exception holds; any other exception itself."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def explain(error: BaseException) -> tuple[str, str, int]:
    """Cause, fix and exit code of an error."""
    from mesh import errors as mesh

    if isinstance(error, mesh.ConfigurationError):
        return error.cause, error.fix, error.exit_code
    if isinstance(error, mesh.NoWorkers):
        return str(error), "See `qmesh-node models` for what there is.", ExitCode.NO_WORKER
    if isinstance(error, mesh.GenerationError):
        return (
            str(error),
            "Try again; `qmesh-node status` on the worker shows its last error.",
            ExitCode.FAILED,
        )
    if isinstance(error, mesh.Overloaded):
        return str(error), "Try again later, or start more workers.", ExitCode.FAILED
    if isinstance(error, mesh.AuthenticationError):
        return (
            str(error),
            "Check the network's name and secret: both sides need the same.",
            ExitCode.UNREACHABLE,
        )
    if isinstance(error, mesh.TransportError | mesh.ProtocolError):
        return str(error), "Check the address, and that the node is running there.", ExitCode.UNREACHABLE
    if isinstance(error, mesh.RemoteError):
        return str(error), "Change the request.", ExitCode.REFUSED
    return str(error), "", ExitCode.SERVER
