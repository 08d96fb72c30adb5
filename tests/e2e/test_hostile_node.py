"""A real node with a real llama.cpp under attack, while an honest client gets its tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import psutil
import pytest

from mesh.identity import parse_node_id
from mesh.transport import Connection, connect
from node.cluster import Cluster, Member
from tests.integration.test_wire_hostile import process
from tests.support import seconds
from tests.wire_attacks import ATTACKS
from tests.wire_support import ALICE, OPEN

REQUEST = b'{"prompt": "Once", "max_tokens": 1, "stream": true}'
MEASURED = 0.6
"""Seconds of requests per measurement."""
NOISE = 0.005
"""A p99 below this is the scheduler's doing on a machine with two busy cores, not the node's."""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Member]:
    """A node that serves nobody else."""
    cluster = Cluster(tmp_path_factory.mktemp("attacked"), attached=True)
    try:
        yield asyncio.run(cluster.up(1, ["--no-gateway"]))[0]
    finally:
        asyncio.run(cluster.down())


async def first_token(connection: Connection) -> float:
    """Seconds until the first bytes of an answer, which must then be whole."""
    start = time.perf_counter()
    meta = {"path": "/v1/completions", "model": "qmesh-demo"}
    async with await connection.open("infer", meta, REQUEST) as stream:
        assert (await stream.head(seconds(10)))["status"] == 200
        answer = await stream.read(seconds(10)) or b""
        elapsed = time.perf_counter() - start
        while (more := await stream.read(seconds(10))) is not None:
            answer += more
    assert answer.startswith(b"data: {")
    assert answer.endswith(b"data: [DONE]\n\n")
    return elapsed


def p99(times: list[float]) -> float:
    return sorted(times)[int(len(times) * 0.99)]


async def measured(connection: Connection, enough: float = 0.0) -> float:
    """The p99 of first-token times; the least of a few, since others use the machine too."""
    best = float("inf")
    for _ in range(5 if enough else 1):
        times = []
        until = time.perf_counter() + MEASURED
        while time.perf_counter() < until:
            times.append(await first_token(connection))
            await asyncio.sleep(0.002)
        best = min(best, p99(times))
        if best <= enough:
            break
    return best


@pytest.mark.parametrize("attack", ATTACKS)
async def test_an_honest_client_is_served_by_an_attacked_node(target: Member, attack: str) -> None:
    running = target.process()
    assert running is not None
    node_id, port = parse_node_id(target.worker_id), int(target.address.rsplit(":", 1)[1])
    connection = await connect("127.0.0.1", port, identity=ALICE, network=OPEN, peer_id=node_id)
    try:
        quiet = await measured(connection)
        memory, sockets = running.memory_info().rss, tcp_sockets(running)
        async with process("tests.wire_attacks", attack, str(port), node_id.hex()) as said:
            assert said == "attacking"
            attacked = await measured(connection, 3 * max(quiet, NOISE))
            grown = running.memory_info().rss - memory
        async with asyncio.timeout(seconds(10)):
            while tcp_sockets(running) > sockets:  # noqa: ASYNC110  (another process has no event)
                await asyncio.sleep(0.05)
        if attacked > 3 * max(quiet, NOISE):  # perhaps the machine has become busier meanwhile
            quiet = await measured(connection)
    finally:
        await connection.close()
    print(f"{attack}: {quiet * 1e3:.1f} ms quiet, {attacked * 1e3:.1f} ms attacked; +{grown / 1e6:.1f} MB")
    assert attacked <= 3 * max(quiet, NOISE)
    assert grown <= 64 << 20


def tcp_sockets(running: psutil.Process) -> int:
    """Established and half-closed connections to the node."""
    return sum(one.status != psutil.CONN_LISTEN for one in running.net_connections("tcp"))
