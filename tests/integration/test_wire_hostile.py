"""A listener under attack serves its honest client, and nothing of the attack stays behind."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mesh.limits import MAX_HALF_OPEN
from mesh.transport import Connection, connect
from tests.support import seconds
from tests.wire_attacks import ATTACKS
from tests.wire_support import ALICE, BOB, PRIVATE

ROOT = Path(__file__).resolve().parents[2]
COUNTED = ("half_open", "established", "connections", "streams", "tasks", "files")


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


async def answered(connection: Connection, duration: float) -> int:
    """Short requests for some seconds, each of which must be answered whole; their number."""
    count = 0
    until = time.perf_counter() + duration
    while time.perf_counter() < until:
        async with await connection.open("tokens", {}) as stream:
            answer = await stream.read_all(1000, seconds(5))
        assert answer == b"".join(b"token %d" % number for number in range(10))
        count += 1
        await asyncio.sleep(0.003)
    return count


@pytest.mark.parametrize("attack", ATTACKS)
async def test_an_attack_leaves_no_trace(attack: str) -> None:
    async with process("tests.wire_node") as port:
        connection = await connect(
            "127.0.0.1", int(port), identity=ALICE, network=PRIVATE, peer_id=BOB.id, timeout=seconds(5)
        )
        try:
            assert await answered(connection, 0.1)
            before = await stats(connection)
            async with process("tests.wire_attacks", attack, port) as said:
                assert said == "attacking"
                assert await answered(connection, 0.6)
                during = await stats(connection)
            after = during
            async with asyncio.timeout(seconds(10)):
                while any(after[what] > before[what] for what in COUNTED):
                    after = await stats(connection)
        finally:
            await connection.close()
    print(attack, during)
    assert before["half_open"] == 0
    assert before["established"] == 1
    assert during["half_open"] <= MAX_HALF_OPEN
    assert during["rss"] - before["rss"] <= 64 << 20
