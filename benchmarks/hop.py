"""What one hop costs: llama.cpp direct, behind nginx (plaintext), behind the encrypted mesh, behind LiteLLM.

    python -m benchmarks.hop [--rounds 7] [--tokens 128]

One real llama.cpp with the demo model under one real node; all paths lead to that same server, and are
taken in turn within each round, so that only ratios of one run mean anything. nginx and LiteLLM are
measured where they are installed. The load comes from one uvloop process; on every path it opens what a
usual client opens (HTTP: a fresh connection per request; mesh: streams on one connection) and counts
`data:` events in the bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil
import uvloop

from client_sdk import MeshClient
from node.cluster import Cluster, Member

SLOTS = 16
LEVELS = (1, 8, 64)
PROMPT = "Once upon a time"
MODEL = "qmesh-demo"
NGINX = """
worker_processes 1; daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 1024; }}
http {{
  access_log off; client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  server {{ listen 127.0.0.1:{port}; location / {{
    proxy_pass {upstream}; proxy_http_version 1.1; proxy_buffering off; proxy_set_header Connection ""; }} }}
}}
"""

Ask = Callable[[int], Awaitable[tuple[float, int]]]
"""Tokens to write → (seconds to the first event, events)."""


@dataclass
class Hop:
    """A way to the server, and what was measured on it."""

    name: str
    ask: Ask
    pids: list[int] = field(default_factory=list)
    """The hop's processes."""
    first: list[float] = field(default_factory=list)
    rates: dict[int, list[float]] = field(default_factory=dict)
    cpu: list[float] = field(default_factory=list)
    """The hop's CPU seconds per event."""
    failed: str | None = None


def body(tokens: int) -> dict[str, object]:
    """The same request on every path."""
    return {
        "prompt": PROMPT,
        "n_predict": tokens,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "cache_prompt": True,
    }


def http(session: aiohttp.ClientSession, url: str, extra: dict[str, object]) -> Ask:
    """A request over HTTP on a connection of its own."""

    async def ask(tokens: int) -> tuple[float, int]:
        began, first, events = time.perf_counter(), 0.0, 0
        async with session.post(url, json={**body(tokens), **extra}) as response:
            response.raise_for_status()
            async for data in response.content.iter_any():
                if not events:
                    first = time.perf_counter() - began
                events += data.count(b"data: ")
        return first, events

    return ask


def mesh_path(mesh: MeshClient) -> Ask:
    """The same request over the encrypted mesh."""

    async def ask(tokens: int) -> tuple[float, int]:
        began, first, events = time.perf_counter(), 0.0, 0
        async with mesh.request("/completion", body(tokens), model=MODEL) as answer:
            async for data in answer:
                if not events:
                    first = time.perf_counter() - began
                events += data.count(b"data: ")
        return first, events

    return ask


async def measure(path: Hop, level: int, tokens: int, *, keep: bool) -> None:
    """One turn: `level` requests at once."""
    before = sum(_cpu(pid) for pid in path.pids)
    began = time.perf_counter()
    results = await asyncio.gather(*(path.ask(tokens) for _ in range(level)))
    took = time.perf_counter() - began
    events = sum(count for _, count in results)
    if keep:
        path.rates.setdefault(level, []).append(events / took)
        if path.pids:
            path.cpu.append((sum(_cpu(pid) for pid in path.pids) - before) / events)


async def measure_first(path: Hop, *, keep: bool) -> None:
    """First-token times of requests for one token, one after the other."""
    for _ in range(20):
        first, _ = await path.ask(1)
        if keep:
            path.first.append(first)


def _cpu(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


@asynccontextmanager
async def nginx(upstream: str) -> AsyncIterator[tuple[str, list[int]] | None]:
    """nginx in front of the server, unbuffered; None where it is not installed."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="qmesh-hop-") as folder:
        port = _free_port()
        config = Path(folder) / "nginx.conf"
        config.write_text(NGINX.format(folder=folder, port=port, upstream=upstream))
        process = await asyncio.create_subprocess_exec(program, "-c", str(config), "-p", folder)
        try:
            await _listening(port)
            workers = [child.pid for child in psutil.Process(process.pid).children()]
            yield f"http://127.0.0.1:{port}", workers
        finally:
            process.terminate()
            await process.wait()


@asynccontextmanager
async def litellm(upstream: str, key: str) -> AsyncIterator[tuple[str, list[int]] | None]:
    """The LiteLLM proxy with one worker; None where it is not installed."""
    program = shutil.which("litellm")
    if program is None:
        yield None
        return
    port = _free_port()
    environment = {
        **os.environ,
        "OPENAI_API_KEY": key,
        # It listens on loopback for as long as this runs; without the word it refuses to start.
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
    }
    arguments = ("--model", f"openai/{MODEL}", "--api_base", f"{upstream}/v1", "--port", str(port))
    process = await asyncio.create_subprocess_exec(
        program, *arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        await _listening(port, 60)
        yield f"http://127.0.0.1:{port}", [process.pid]
    finally:
        process.terminate()
        await process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


async def _listening(port: int, timeout: float = 10) -> None:
    async with asyncio.timeout(timeout):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
                continue
            writer.close()
            return


def server_of(node: Member) -> tuple[str, str]:
    """URL and key of the llama.cpp server under a node, from its command line and environment."""
    for child in psutil.Process(node.pid).children(recursive=True):
        arguments = child.cmdline()
        if "--port" in arguments:
            port = arguments[arguments.index("--port") + 1]
            return f"http://127.0.0.1:{port}", child.environ()["LLAMA_API_KEY"]
    raise RuntimeError("the node has no llama.cpp server")


async def compare(rounds: int, tokens: int) -> list[Hop]:
    """Take every path in turn, `rounds` times, after one round that is not counted."""
    with tempfile.TemporaryDirectory(prefix="qmesh-hop-") as folder:
        cluster = Cluster(Path(folder), attached=True)
        try:
            (node,) = await cluster.up(1, ["--no-gateway", "--slots", str(SLOTS)])
            url, key = server_of(node)
            headers = {"Authorization": f"Bearer {key}"}
            connector = aiohttp.TCPConnector(force_close=True, limit=0)
            async with (
                aiohttp.ClientSession(connector=connector, headers=headers, read_bufsize=1 << 18) as session,
                MeshClient(node.address) as mesh,
                nginx(url) as proxy,
                litellm(url, key) as lite,
            ):
                paths = [Hop("direct", http(session, f"{url}/completion", {}))]
                if proxy is not None:
                    paths.append(Hop("nginx", http(session, f"{proxy[0]}/completion", {}), proxy[1]))
                paths.append(Hop("mesh", mesh_path(mesh), [node.pid]))
                if lite is not None:
                    ask = http(session, f"{lite[0]}/v1/completions", {"model": MODEL})
                    paths.append(Hop("litellm", ask, lite[1]))
                for number in range(rounds + 1):
                    for path in paths[number % len(paths) :] + paths[: number % len(paths)]:
                        await take_turn(path, tokens, keep=number > 0)
                    print(f"round {number} of {rounds}", file=sys.stderr)
                return paths
        finally:
            await cluster.down()


async def take_turn(path: Hop, tokens: int, *, keep: bool) -> None:
    """All measurements of one path, once; a path that failed is left out from then on."""
    if path.failed is not None:
        return
    try:
        await measure_first(path, keep=keep)
        for level in LEVELS:
            await measure(path, level, tokens, keep=keep)
    except aiohttp.ClientError as error:
        path.failed = f"{type(error).__name__}: {error}"


def spread(values: list[float], scale: float, digits: int) -> str:
    """Median with the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return f"{middle * scale:.{digits}f} ({low * scale:.{digits}f}-{high * scale:.{digits}f})"


def report(paths: list[Hop], tokens: int) -> None:
    """The table, and the ratios that the goals are about."""
    print(f"\nmedian (quartiles); {tokens} tokens a request; first token: requests for 1 token, one by one\n")
    print(
        f"{'path':9}{'first token ms':>24}"
        + "".join(f"{f'chunks/s at {level}':>26}" for level in LEVELS)
        + f"{'hop CPU us/chunk':>24}"
    )
    for path in paths:
        if path.failed is not None:
            print(f"{path.name:9} failed: {path.failed}")
            continue
        row = f"{path.name:9}{spread(path.first, 1e3, 2):>24}"
        row += "".join(f"{spread(path.rates[level], 1, 0):>26}" for level in LEVELS)
        print(row + (f"{spread(path.cpu, 1e6, 1):>24}" if path.cpu else f"{'-':>24}"))
    known = {path.name: path for path in paths if path.failed is None}
    mesh = known["mesh"]
    print()
    for name, other in known.items():
        if other is mesh:
            continue
        ratios = [
            f"{level}: {statistics.median(mesh.rates[level]) / statistics.median(other.rates[level]):.2f}"
            for level in LEVELS
        ]
        first = statistics.median(mesh.first) / statistics.median(other.first)
        line = f"mesh / {name}: first token {first:.2f}, chunks/s at " + ", ".join(ratios)
        if other.cpu:
            line += f", CPU per chunk {statistics.median(mesh.cpu) / statistics.median(other.cpu):.2f}"
        print(line)
    for name in ("nginx", "litellm"):
        if name not in known:
            print(f"{name}: not measured (not installed or failed)")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    report(uvloop.run(compare(arguments.rounds, arguments.tokens)), arguments.tokens)


if __name__ == "__main__":
    main()
