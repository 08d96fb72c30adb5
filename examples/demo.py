"""`make demo`: a mesh of three nodes on this machine, and an answer that survives its worker.

Starts three real nodes, each with a real llama.cpp and the built-in demo model; finds them through the
DHT; streams an answer over the encrypted wire; kills the answering node in mid-answer and shows another
one going on; compares with an undisturbed answer; and takes everything down.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from client_sdk import MeshClient, TokenStream
from mesh.errors import QMeshError
from node.cluster import Cluster, Member

PROMPT = "Once upon a time"
TOKENS = 700
"""More than the 64 KiB that a worker may send ahead, so that it cannot have finished before it is killed."""
SHOWN = 110
KILL_AFTER = 10
MODEL = "qmesh-demo"


def say(line: str = "") -> None:
    """A line of the story."""
    print(line, flush=True)


async def main() -> int:
    """Tell the story; the exit status says whether it went as it should."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qmesh-demo-") as folder:
        cluster = Cluster(Path(folder), attached=True)
        try:
            say("1. Three nodes start on this machine, each with its own llama.cpp and the demo model.")
            nodes = await cluster.up(3, ["--no-gateway"], on_ready=_introduce)
            say(f"   all ready after {time.monotonic() - began:.1f} s")
            async with MeshClient(join=nodes[0].address) as mesh:
                return await tell(mesh, nodes)
        finally:
            ended = await cluster.down()
            say(f"\n   {ended} nodes and their llama.cpp servers ended; nothing is left running.")


def _introduce(node: Member) -> None:
    say(f"   node {node.number}  {node.worker_id[:12]}  at {node.address}")


async def tell(mesh: MeshClient, nodes: list[Member]) -> int:
    """Find the workers, answer once in peace and once with a murder."""
    say("\n2. A client knows only the first node's address. The DHT tells it who serves the model:")
    workers = await _all_found(mesh, len(nodes))
    for worker in workers:
        rtt = "-" if worker.rtt is None else f"{worker.rtt * 1000:.1f} ms"
        say(f"   worker {worker.id[:12]}  health {worker.health:3}  slots {worker.slots}  round trip {rtt}")

    say("\n3. The best one answers, streaming through the encrypted connection:")
    options = {"model": MODEL, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    calm = mesh.generate_stream(PROMPT, **options)
    expected = await _stream(calm)
    _facts(calm)

    say("\n4. The same again, but now the node that answers is killed (kill -9) in mid-answer:")
    stream = mesh.generate_stream(PROMPT, **options)
    text = await _murder(stream, {node.worker_id: node.pid for node in nodes})
    _facts(stream)
    for attempt in stream.explain.attempts:
        how = f"lost: {attempt.error}" if attempt.error else "finished the answer"
        say(f"   worker {attempt.worker[:12]} ({attempt.way}): {how}")
    same = text == expected
    say(f"   the text is {'the same as' if same else 'not the same as'} without the murder")
    if stream.explain.splices == 0 or not same:
        say("   that is not how it should have gone")
        return 1

    say("\nTry next:")
    say("   . .venv/bin/activate")
    say("   qmesh-node run                                     # a node of your own; Ctrl-C ends it")
    say("   qmesh-node generate 'Once upon a time'             # in another terminal")
    say("   qmesh-node run --join HOST:9470                    # on your next machine")
    say("   qmesh-node chat                                    # talk with the mesh")
    return 0


async def _all_found(mesh: MeshClient, count: int) -> list:  # type: ignore[type-arg]
    """Wait until the DHT knows every worker."""
    until = time.monotonic() + 10
    while True:
        workers = await mesh.workers(MODEL)
        if len(workers) >= count or time.monotonic() > until:
            return workers
        await asyncio.sleep(0.1)


async def _stream(stream: TokenStream) -> str:
    """Print the beginning of an answer as it comes; returns all of it."""
    print(f"   | {PROMPT}", end="", flush=True)
    text, count = "", 0
    async for token in stream:
        text += token.text
        count += 1
        if count <= SHOWN:
            print(token.text.replace("\n", "\n   | "), end="", flush=True)
    print(" ...")
    return text


async def _murder(stream: TokenStream, pids: dict[str, int]) -> str:
    """Kill the worker after some tokens; print the places around that and the seam; returns the answer."""
    before, after = "", ""
    count = 0
    async for token in stream:
        if token.spliced or after:
            after += token.text
        else:
            before += token.text
        count += 1
        if count == KILL_AFTER:
            os.kill(pids[token.worker], signal.SIGKILL)
            say(
                f"   | {PROMPT}{before} ... (killed here; what it had sent already is read on)".replace(
                    "\n", " "
                )
            )
    say(f"   | ... {before[-160:]}".replace("\n", " "))
    say(f"   | [[ from here on another worker ]] {after[:160]} ...".replace("\n", " "))
    return before + after


def _facts(stream: TokenStream) -> None:
    explain, answer = stream.explain, stream.completion()
    say(
        f"   answered by {(explain.worker or '')[:12]} ({explain.path}): "
        f"{answer.usage.get('completion_tokens', 0)} tokens, {explain.speed or 0:.0f} tokens/s, "
        f"first token after {(explain.first_token or 0) * 1000:.1f} ms"
    )


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main()))
    except QMeshError as error:
        print(f"the demo failed: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
