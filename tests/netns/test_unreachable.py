"""A node that nobody can dial is a client of the DHT, never a holder; with a forwarded port it is a peer."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

from tests.netns.lab import Lab
from tests.netns.nodes import Nodes, eventually

PORT = 9470
RECORDS = 6
"""Of three nodes, each with one model and its part of the catalogue."""


async def test_behind_nat_and_then_with_a_forwarded_port(tmp_path: Path) -> None:
    with Lab() as lab:
        outside = lab.switch("outside", "100.64.1")
        inside = lab.switch("inside", "10.9.0")
        lab.masquerade(inside, outside)
        async with Nodes(tmp_path) as nodes:
            first, second = (nodes.add(f"p{n}", lab.host(f"p{n}", outside, 10 + n)) for n in (1, 2))
            hidden = nodes.add("hidden", lab.host("hidden", inside, 11))
            join = ("--no-mdns", "--join", f"{outside.address(11)}:{PORT}")
            await first.start("--no-mdns")
            await asyncio.gather(second.start(*join), hidden.start(*join))

            status = await eventually(
                hidden.status, lambda status: status["reachability"]["reachable"] is False
            )
            found = status["reachability"]
            assert found["behind_nat"]
            assert found["seen"].startswith(f"{outside.address(1)}:"), "routers choose the port"
            assert found["role"] == "client"
            assert status["addresses"] == [f"{inside.address(11)}:{PORT}"]
            assert "behind a router" in (await hidden.doctor())["reachable"]["finding"]

            # it uses the mesh, and is in nobody's table, although routers let answers to its questions in
            await asyncio.gather(first.knows(second), second.knows(first))
            assert await hidden.workers("p2") == {second.id}
            assert await eventually(partial(second.workers, "hidden"), bool) == {hidden.id}
            for node in (first, second):
                assert hidden.id not in await node.peers()
                await eventually(node.status, lambda status: status["reachability"]["role"] == "holder")
            assert (await first.status())["reachability"]["held"] == RECORDS
            assert (await hidden.status())["reachability"]["held"] <= RECORDS / 3, "at most its own"

            # its owner forwards the port: it becomes a holder, and peers use the address that they see
            lab.forward(outside, PORT, f"{inside.address(11)}:{PORT}")
            status = await eventually(
                hidden.status, lambda status: f"{outside.address(1)}:{PORT}" in status["addresses"]
            )
            assert status["reachability"]["role"] == "holder"
            await first.knows(hidden)
            code, printed = await second.command("generate", "Once", "--model", "hidden", "-n", "2")
            assert (code, printed[-1]["worker"]) == (0, hidden.id)
