"""A live listener under attack while an honest client goes on streaming."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mesh.transport import Connection, connect
from tests.support import seconds
from tests.wire_attacks import ATTACKS
from tests.wire_support import ALICE, BOB, PRIVATE

ROOT = Path(__file__).resolve().parents[2]
MEASURED = 0.7
"""Seconds of requests per measurement."""
NOISE = 0.005
"""A p99 below this is the scheduler's doing on a machine with two busy cores, not the node's."""


@asynccontextmanager
async def process(*arguments: str) -> AsyncIterator[str]:
    """Runs a module of the tests; its first line of output."""
    started = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        *arguments,
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert started.stdin is not None
    assert started.stdout is not None
    try:
        async with asyncio.timeout(seconds(20)):
            yield (await started.stdout.readline()).decode().strip()
            started.stdin.close()
            assert await started.wait() == 0
    finally:
        if started.returncode is None:
            started.kill()
            await started.wait()


async def stats(connection: Connection) -> dict[str, Any]:
    async with await connection.open("stats", {}) as stream:
        assert await stream.read(seconds(10)) is None
        assert stream.trailer is not None
        return dict(stream.trailer)


async def first_token_times(connection: Connection) -> list[float]:
    """A short request every few milliseconds; each must be answered whole."""
    times = []
    until = time.perf_counter() + MEASURED
    while time.perf_counter() < until:
        start = time.perf_counter()
        async with await connection.open("tokens", {}) as stream:
            answer = await stream.read(seconds(10)) or b""
            times.append(time.perf_counter() - start)
            while (more := await stream.read(seconds(10))) is not None:
                answer += more
        assert answer == b"".join(b"token %d" % number for number in range(10))
        await asyncio.sleep(0.003)
    return times


def p99(times: list[float]) -> float:
    return sorted(times)[int(len(times) * 0.99)]


async def least_p99(connection: Connection, enough: float) -> float:
    """The best of a few measurements: other programs of the machine can only make one worse."""
    best = float("inf")
    for _ in range(5):
        best = min(best, p99(await first_token_times(connection)))
        if best <= enough:
            break
    return best


@pytest.mark.parametrize("attack", ATTACKS)
async def test_an_honest_client_is_served_under_attack(attack: str) -> None:
    async with process("tests.wire_node") as port:
        connection = await connect(
            "127.0.0.1", int(port), identity=ALICE, network=PRIVATE, peer_id=BOB.id, timeout=seconds(5)
        )
        quiet = p99(await first_token_times(connection))
        before = await stats(connection)
        async with process("tests.wire_attacks", attack, port) as said:
            assert said == "attacking"
            attacked = await least_p99(connection, 3 * max(quiet, NOISE))
            during = await stats(connection)
        async with asyncio.timeout(seconds(10)):
            while True:
                after = await stats(connection)
                if all(after[what] <= before[what] for what in before if what != "rss"):
                    break
                await asyncio.sleep(0.05)
        quiet = max(quiet, p99(await first_token_times(connection)))
        await connection.close()
    print(
        f"{attack}: p99 {quiet * 1e3:.1f} ms quiet, {attacked * 1e3:.1f} ms attacked; "
        f"+{(during['rss'] - before['rss']) / 1e6:.1f} MB; at most {during['half_open']} half-open, "
        f"{during['established']} established"
    )
    assert attacked <= 3 * max(quiet, NOISE)
    assert during["rss"] - before["rss"] <= 64 << 20
    assert after["established"] == 1
    assert after["half_open"] == 0
