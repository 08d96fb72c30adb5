"""Is a continued answer the answer? Kills the worker in mid-answer and compares with an undisturbed run.

    python -m benchmarks.failover [--runs 300] [--seed N]

Three real nodes; each run asks for an answer (plain text, chat or JSON, greedy or sampled with a seed),
does something terrible to the worker at a random moment, and compares the text with that of the same
request on one undisturbed worker. Prints a table; exits 1 where a token was repeated or lost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import uvloop

from client_sdk import MeshClient, Timeouts, TokenStream
from mesh.errors import QMeshError
from node.cluster import Cluster, Member

TOKENS = 600
"""More than the 64 KiB of events that a worker may send ahead, so that it is never done before its end."""
MODEL = "qmesh-demo"
PROMPTS = ("Once upon a time", "The little robot", "One cold morning", "In a small village")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 400},
        "list": {
            "type": "array",
            "items": {"type": "string", "maxLength": 60},
            "minItems": 12,
            "maxItems": 16,
        },
    },
    "required": ["name", "list"],
    "additionalProperties": False,
}
TIMEOUTS = Timeouts(silence=0.5, first_token=10.0, between_tokens=1.0)


@dataclass(frozen=True)
class Kind:
    """A kind of request."""

    name: str
    ask: Callable[[MeshClient, str, int], TokenStream]


KINDS = (
    Kind(
        "text, greedy",
        lambda m, p, s: m.generate_stream(p, max_tokens=TOKENS, temperature=0, ignore_eos=True),
    ),
    Kind(
        "text, seeded",
        lambda m, p, s: m.generate_stream(p, max_tokens=TOKENS, temperature=0.9, seed=s, ignore_eos=True),
    ),
    Kind("chat, greedy", lambda m, p, s: m.chat_stream(p, max_tokens=TOKENS, temperature=0, ignore_eos=True)),
    Kind(
        "chat, seeded",
        lambda m, p, s: m.chat_stream(p, max_tokens=TOKENS, temperature=0.9, seed=s, ignore_eos=True),
    ),
    Kind(
        "chat, JSON",
        lambda m, p, s: m.chat_stream(
            p, temperature=0, response_format={"type": "json_schema", "json_schema": {"schema": SCHEMA}}
        ),
    ),
)


class Terror:
    """The ways to lose a worker."""

    def __init__(self, cluster: Cluster, mesh: MeshClient) -> None:
        self.cluster = cluster
        self.mesh = mesh
        self.dead: list[Member] = []
        self.stopped: list[int] = []

    def strike(self, how: str, worker: str) -> None:
        """Do it to the worker of this id."""
        member = next(one for one in self.cluster.members if one.worker_id == worker)
        if how == "kill -9 node":
            os.kill(member.pid, signal.SIGKILL)
            self.dead.append(member)
        elif how == "kill -9 llama.cpp":
            os.kill(_server(member), signal.SIGKILL)
        elif how == "SIGSTOP llama.cpp":
            self._stop(_server(member))
        elif how == "SIGSTOP node":
            self._stop(member.pid)
        else:
            connection = self.mesh._pool.peek(bytes.fromhex(worker))  # type: ignore[arg-type]
            if connection is not None:
                connection.abort()

    def _stop(self, pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        self.stopped.append(pid)

    async def mend(self) -> None:
        """Make the cluster whole again."""
        for pid in self.stopped:
            os.kill(pid, signal.SIGCONT)
        self.stopped.clear()
        for member in self.dead:
            await self.cluster.restart(member)
        self.dead.clear()
        for member in list(self.cluster.members):
            if not await self._serves(member):
                # Killed too often: its supervisor has given up, as it should.
                os.kill(member.pid, signal.SIGTERM)
                await self.cluster.restart(member)

    async def _serves(self, member: Member) -> bool:
        """Wait until a node can answer; False where its supervisor has given up."""
        async with MeshClient(f"{member.worker_id}@{member.address}") as mesh:
            until = time.monotonic() + 30
            while time.monotonic() < until:
                state = (await mesh.status())["models"][0]["state"]
                if state == "ready":
                    workers = await mesh.workers(MODEL)
                    if any(worker.id == member.worker_id for worker in workers):
                        return True
                if state == "failed":
                    return False
                await asyncio.sleep(0.05)
        return False


WAYS = ("kill -9 node", "kill -9 llama.cpp", "SIGSTOP llama.cpp", "SIGSTOP node", "connection cut")


def _server(member: Member) -> int:
    (child,) = (one for one in psutil.Process(member.pid).children() if "--port" in one.cmdline())
    return child.pid


@dataclass
class Outcome:
    """How one run went."""

    kind: str
    how: str
    verdict: str
    spliced: bool


async def one_run(
    cluster: Cluster, kind: Kind, how: str, rng: random.Random, expected: dict[Any, str]
) -> Outcome:
    """One answer, disturbed at a random token."""
    prompt, seed = rng.choice(PROMPTS), rng.randrange(1, 1000)
    async with MeshClient([member.address for member in cluster.members], timeouts=TIMEOUTS) as mesh:
        key = (kind.name, prompt, seed if "seeded" in kind.name else 0)
        if key not in expected:
            expected[key] = (await kind.ask(mesh, prompt, seed).read()).text
        moment = rng.randrange(1, 120)
        terror = Terror(cluster, mesh)
        stream, text, count = kind.ask(mesh, prompt, seed), "", 0
        try:
            async for token in stream:
                text += token.text
                count += 1
                if count == moment:
                    terror.strike(how, token.worker)
            verdict = "equal" if text == expected[key] else "differs"
            if stream.completion().text != text:
                verdict = "journal and text disagree"
            if kind.name.endswith("JSON") and not _is_json(text):
                verdict = "no JSON"
        except QMeshError as error:
            verdict = f"{type(error).__name__}: {error}"
        finally:
            await terror.mend()
        return Outcome(kind.name, how, verdict, stream.explain.splices > 0)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


async def run(runs: int, seed: int) -> list[Outcome]:
    """All runs, over the kinds and ways in turn."""
    rng = random.Random(seed)
    outcomes: list[Outcome] = []
    expected: dict[Any, str] = {}
    with tempfile.TemporaryDirectory(prefix="qmesh-failover-") as folder:
        cluster = Cluster(Path(folder), attached=True)
        try:
            await cluster.up(3, ["--no-gateway"])
            for number in range(runs):
                # A Latin square: five runs in a row have every kind and every way.
                kind = KINDS[number % len(KINDS)]
                how = WAYS[(number + number // len(KINDS)) % len(WAYS)]
                outcome = await one_run(cluster, kind, how, rng, expected)
                outcomes.append(outcome)
                if outcome.verdict != "equal":
                    print(f"run {number}: {outcome}", file=sys.stderr)
        finally:
            await cluster.down()
    return outcomes


def report(outcomes: list[Outcome]) -> bool:
    """The table; False where an answer was wrong rather than different."""
    print(f"equal/runs (spliced)\n{'request':16}" + "".join(f"{how:>22}" for how in WAYS) + "")
    for kind in KINDS:
        row = f"{kind.name:16}"
        for how in WAYS:
            some = [one for one in outcomes if one.kind == kind.name and one.how == how]
            equal = sum(one.verdict == "equal" for one in some)
            row += f"{f'{equal}/{len(some)} ({sum(one.spliced for one in some)})':>22}"
        print(row)
    verdicts = Counter(one.verdict for one in outcomes)
    print(f"\n{len(outcomes)} runs: {dict(verdicts)}; spliced {sum(one.spliced for one in outcomes)}")
    return set(verdicts) <= {"equal", "differs"}


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", file=sys.stderr)
    return 0 if report(uvloop.run(run(arguments.runs, arguments.seed))) else 1


if __name__ == "__main__":
    sys.exit(main())
