"""A mesh heals itself: after its bootstrap nodes were killed, and after a node slept past its records."""

from __future__ import annotations

import asyncio
import signal
from functools import partial
from pathlib import Path

from tests.netns.lab import Lab, Switch
from tests.netns.nodes import Node, Nodes, eventually
from tests.netns.short_lived import TTL

PORT = 9470
SHORT_LIVED = ("-m", "tests.netns.short_lived")


async def test_it_heals(tmp_path: Path) -> None:
    """Both at the same time, in meshes of their own, since both mostly wait."""
    with Lab() as lab:
        lan, other = lab.switch("lan", "10.1.0"), lab.switch("other", "10.2.0")
        async with Nodes(tmp_path) as nodes, asyncio.TaskGroup() as group:
            group.create_task(_bootstrap_nodes_die_and_return(lab, lan, nodes))
            group.create_task(_a_node_sleeps(lab, other, nodes))


async def _bootstrap_nodes_die_and_return(lab: Lab, lan: Switch, nodes: Nodes) -> None:
    bootstrap = [nodes.add(f"boot{n}", lab.host(f"boot{n}", lan, 10 + n)) for n in (1, 2)]
    others = [nodes.add(f"other{n}", lab.host(f"other{n}", lan, 20 + n)) for n in (1, 2, 3)]
    join = [word for n in (1, 2) for word in ("--join", f"{lan.address(10 + n)}:{PORT}")]

    async def start(node: Node) -> None:
        await node.start("--no-mdns", *(join if node in others else join[:2]))

    await asyncio.gather(*map(start, (*bootstrap, *others)))
    await asyncio.gather(*(node.knows(*bootstrap) for node in others))
    await asyncio.gather(*(node.stop(signal.SIGKILL) for node in bootstrap))
    for node in bootstrap:
        assert not (node.folder / "peers.msgpack").exists(), "they remember nobody"
    await asyncio.gather(*map(start, bootstrap))
    async with asyncio.timeout(60):
        await asyncio.gather(*(node.knows(*others) for node in bootstrap))
        for node in bootstrap:
            for wanted in others:
                assert await eventually(partial(node.workers, wanted.folder.name), bool) == {wanted.id}
        for node in others:
            assert await eventually(partial(node.workers, "boot1"), bool) == {bootstrap[0].id}


async def _a_node_sleeps(lab: Lab, lan: Switch, nodes: Nodes) -> None:
    first, second = (nodes.add(f"awake{n}", lab.host(f"awake{n}", lan, 10 + n)) for n in (1, 2))
    sleeper = nodes.add("sleeper", lab.host("sleeper", lan, 13))
    join = ("--no-mdns", "--join", f"{lan.address(11)}:{PORT}")
    await first.start("--no-mdns")
    await asyncio.gather(second.start(*join), sleeper.start(*join, program=SHORT_LIVED))
    await asyncio.gather(first.knows(sleeper), second.knows(sleeper))
    look = partial(second.workers, "sleeper")
    assert await eventually(look, bool) == {sleeper.id}
    sleeper.send(signal.SIGSTOP)
    await eventually(look, lambda found: not found)  # its record has expired
    await asyncio.sleep(TTL)
    sleeper.send(signal.SIGCONT)
    assert await eventually(look, bool) == {sleeper.id}
    await asyncio.gather(first.knows(sleeper), second.knows(sleeper), sleeper.knows(first, second))
