"""`qmesh-node generate` and `qmesh-node chat`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from node.cli import options
from node.cli.output import data, progress, reporting, text

if TYPE_CHECKING:
    from client_sdk import Completion, SyncMeshClient, SyncTokenStream

Prompt = Annotated[str, typer.Argument(help="The text to continue; `-` reads it from standard input.")]
System = Annotated[str | None, typer.Option("--system", help="The system message of the conversation.")]


def generate(
    prompt: Prompt,
    join: options.Join = None,
    model: options.Model = None,
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = None,
    seed: options.Seed = None,
    network: options.Network = None,
    data_dir: options.DataDir = None,
    config: options.Config = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Continue a text with the best worker of the mesh, streaming."""
    with reporting(as_json=as_json):
        from node.cli.entry import blocking_client, settings

        if prompt == "-":
            prompt = sys.stdin.read()
        with blocking_client(settings(data_dir, config, join=join, network=network)) as mesh:
            stream = mesh.generate_stream(
                prompt, model=model, max_tokens=max_tokens, temperature=temperature, seed=seed
            )
            summary(show(stream, as_json=as_json, before=prompt), as_json=as_json, quiet=quiet)


def chat(
    message: Annotated[str | None, typer.Argument(help="One question; without it, a conversation.")] = None,
    join: options.Join = None,
    model: options.Model = None,
    system: System = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    seed: options.Seed = None,
    network: options.Network = None,
    data_dir: options.DataDir = None,
    config: options.Config = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Talk with a model of the mesh. An empty line or Ctrl-D ends the conversation."""
    with reporting(as_json=as_json):
        from node.cli.entry import blocking_client, settings

        choices = {"model": model, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        history: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []

        with blocking_client(settings(data_dir, config, join=join, network=network)) as mesh:
            if message is not None:
                _turn(mesh, history, message, choices, as_json=as_json, quiet=quiet)
                return
            while said := _ask(quiet=quiet):
                _turn(mesh, history, said, choices, as_json=as_json, quiet=quiet)


def _turn(
    mesh: SyncMeshClient,
    history: list[dict[str, Any]],
    said: str,
    choices: dict[str, Any],
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    history.append({"role": "user", "content": said})
    answer = show(mesh.chat_stream(history, **choices), as_json=as_json)
    summary(answer, as_json=as_json, quiet=quiet)
    history.append(dict(answer.message or {"role": "assistant", "content": answer.text}))


def _ask(*, quiet: bool) -> str:
    if sys.stdin.isatty() and not quiet:
        sys.stderr.write("\n> ")
        sys.stderr.flush()
    return sys.stdin.readline().strip()


def show(stream: SyncTokenStream, *, as_json: bool, before: str = "") -> Completion:
    """Print an answer as it comes, after the text `before`."""
    first = True
    for token in stream:
        if first and not as_json:
            text(before, end="")
        first = False
        if as_json:
            data({"event": "token", "text": token.text, "worker": token.worker, "spliced": token.spliced})
        else:
            text(token.text, end="")
    if not as_json:
        text()
    return stream.completion()


def summary(answer: Completion, *, as_json: bool, quiet: bool) -> None:
    """Who answered, and how fast."""
    explain = answer.explain
    if as_json:
        data(
            {
                "event": "done",
                "model": answer.model,
                "finish_reason": answer.finish_reason,
                "usage": dict(answer.usage),
                "worker": explain.worker,
                "attempts": [asdict(attempt) for attempt in explain.attempts],
                "splices": explain.splices,
                "explain": asdict(explain),
            }
        )
        return
    speed = f", {explain.speed:.0f} tokens/s" if explain.speed else ""
    first = f", first token after {explain.first_token * 1000:.0f} ms" if explain.first_token else ""
    splices = f", went on from another worker {explain.splices}x" if explain.splices else ""
    progress(
        f"\n[{answer.model} on worker {(explain.worker or '')[:12]} ({explain.path}); "
        f"{answer.usage.get('completion_tokens', 0)} tokens{speed}{first}{splices}]",
        quiet=quiet,
    )
