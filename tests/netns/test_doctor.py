"""`doctor` names the cause: real firewalls, a real wrong clock, a real foreign mesh, a real taken port."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

from mesh.network import Network
from tests.netns.lab import Lab
from tests.netns.nodes import Node, Nodes, eventually

PORT = 9470


async def test_from_outside_each_fault_by_its_name(tmp_path: Path) -> None:
    with Lab() as lab:
        lan = lab.switch("lan", "10.1.0")
        machines = {
            name: lab.host(name, lan, number)
            for number, name in enumerate(("fine", "udp", "tcp", "secret", "clock", "asker"), 11)
        }
        at = {name: f"{lan.address(number)}:{PORT}" for number, name in enumerate(machines, 11)}
        async with Nodes(tmp_path) as nodes:
            running = {
                name: nodes.add(name, machine, Network("home", b"s" * 32) if name == "secret" else None)
                for name, machine in machines.items()
            }
            asker = running.pop("asker")
            await asyncio.gather(
                *(
                    node.start("--no-mdns", clock="+3600s" if name == "clock" else None)
                    for name, node in running.items()
                )
            )
            machines["udp"].drop(f"udp dport {PORT}")
            machines["tcp"].drop(f"tcp dport {PORT}")
            taken = await machines["asker"].inside(_listen)
            with taken:
                join = [word for name in running for word in ("--join", at[name])]
                found = await asker.doctor(*join)
            assert found[f"node {at['fine']}"]["ok"]
            assert "firewall drops UDP" in found[f"node {at['udp']}"]["finding"]
            assert "firewall drops TCP" in found[f"node {at['tcp']}"]["finding"]
            assert "another secret" in found[f"node {at['secret']}"]["finding"]
            assert found[f"node {at['clock']}"]["ok"], "it is reached all the same"
            assert "3600 s ahead of this machine's" in found[f"clock of {at['clock']}"]["finding"]
            assert f"(pid {os.getpid()})" in found["port"]["finding"]
            wrong = {name for name, check in found.items() if not check["ok"]}
            assert wrong == {
                *(f"node {at[name]}" for name in ("udp", "tcp", "secret")), f"clock of {at['clock']}", "port",
            }  # fmt: skip
            assert all(found[name]["fix"] for name in wrong)

            # mended, the same command finds nothing wrong
            machines["udp"].allow()
            machines["tcp"].allow()
            found = await asker.doctor(
                *(word for name in ("fine", "udp", "tcp") for word in ("--join", at[name]))
            )
            assert [check for check in found.values() if not check["ok"]] == []


async def _listen() -> socket.socket:
    return socket.create_server(("0.0.0.0", PORT))


async def test_from_inside_what_the_running_node_suffers_from(tmp_path: Path) -> None:
    """A node whose own clock is wrong, one behind its own firewall, one with an old secret."""
    with Lab() as lab:
        lan = lab.switch("lan", "10.1.0")
        old, new = Network("home", b"o" * 32), Network("home", b"n" * 32)
        async with Nodes(tmp_path) as nodes:

            def add(name: str, number: int, network: Network = new) -> Node:
                return nodes.add(name, lab.host(name, lan, number), network)

            first, second = add("first", 11), add("second", 12)
            late, walled, lost = add("late", 13), add("walled", 14), add("lost", 15, old)
            walled.machine.drop("ct state new")
            await first.start("--no-mdns")
            join = ("--no-mdns", "--join", f"{lan.address(11)}:{PORT}")
            await asyncio.gather(
                second.start(*join), late.start(*join, clock="-3600s"), walled.start(*join), lost.start(*join)
            )
            await asyncio.gather(first.knows(second, late), late.knows(first, second))
            await eventually(walled.status, lambda status: status["reachability"]["reachable"] is False)

            of_first, of_late, of_walled, of_lost = await asyncio.gather(
                first.doctor(), late.doctor(), walled.doctor(), lost.doctor()
            )
            assert "3600 s behind this machine's" in of_first[f"clock of {lan.address(13)}:{PORT}"]["finding"]
            assert of_first["reachable"]["ok"]
            assert "this machine's clock is 3600 s behind those of 2 of" in of_late["clock"]["finding"]
            assert "over TCP and UDP: a firewall drops it" in of_walled["reachable"]["finding"]
            assert "knows nobody" in of_lost["peers"]["finding"]
            assert "another secret" in of_lost[f"node {lan.address(11)}:{PORT}"]["finding"]
            (shown,) = (await first.command("peers"))[1]
            problems = {peer["id"]: peer["problem"] for peer in shown["peers"]}
            assert problems[late.id] == "its clock is 3600 s behind this machine's"
            assert problems[second.id] is None
            assert walled.id not in problems, "whom nobody reaches is in nobody's table"
