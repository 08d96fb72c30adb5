"""Nodes find each other: on a LAN by themselves, across LANs by address or token; meshes never mix."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

from mesh.network import Network
from tests.netns.lab import Lab
from tests.netns.nodes import Nodes, eventually


async def test_across_lans_with_and_without_multicast_and_ip_versions(tmp_path: Path) -> None:
    red, blue = Network("home", b"r" * 32), Network("home", b"b" * 32)
    with Lab() as lab:
        home = lab.switch("home", "10.1.0", "fd00:1")
        guests = lab.switch("guests", v4="10.2.0", multicast=False)
        modern = lab.switch("modern", v6="fd00:3")
        shed = lab.switch("shed", "10.4.0")
        async with Nodes(tmp_path) as nodes:
            a1, a2 = (nodes.add(f"a{n}", lab.host(f"a{n}", home, 10 + n)) for n in (1, 2))
            b1, b2 = (nodes.add(f"b{n}", lab.host(f"b{n}", guests, 10 + n)) for n in (1, 2))
            c1, c2 = (nodes.add(f"c{n}", lab.host(f"c{n}", modern, 10 + n)) for n in (1, 2))
            r1 = nodes.add("r1", lab.host("r1", home, 21), red)
            r2 = nodes.add("r2", lab.host("r2", shed, 22))
            s1, s2 = (nodes.add(f"s{n}", lab.host(f"s{n}", home, 30 + n), blue) for n in (1, 2))

            # a machine with containers, and one with two network cards
            a1.machine.ip(
                "link add docker0 type bridge", "link set docker0 up", "addr add 172.17.0.1/16 dev docker0"
            )
            lab.plug(r1.machine, shed, 21, "eth1")

            await asyncio.gather(a1.start(), r1.start())
            (invitation,) = (await a1.command("invite"))[1]
            (admission,) = (await r1.command("invite"))[1]
            await asyncio.gather(
                a2.start(),
                b1.start("--join", f"{home.address(11)}:9470"),
                b2.start("--join", invitation["token"]),
                c1.start("--join", f"[{home.address(11, 6)}]:9470"),
                c2.start(),
                r2.start("--join", admission["token"]),  # of r1's addresses it can reach one
                *(node.start() for node in (s1, s2)),
            )

            # both IP versions are offered, and each host uses what it has
            assert (await a1.status())["addresses"] == [
                f"{home.address(11)}:9470",
                f"[{home.address(11, 6)}]:9470",
            ]
            of_a1, of_b2, of_c1, of_c2 = await asyncio.gather(
                a1.knows(a2, b1, b2, c1, c2), b2.knows(a1, a2, b1), c1.knows(c2, a1, a2), c2.knows(c1, a1, a2)
            )
            assert of_a1[a2.id]["found"] == of_c1[c2.id]["found"] == "lan"
            assert {peer["found"] for peer in of_b2.values()} == {"join", "dht"}
            assert of_b2.keys() == {a1.id, a2.id, b1.id}, "an IPv4 host has no way to IPv6 hosts"
            assert all(peer["address"].startswith("[fd00:") for peer in of_c2.values())
            assert all(peer["path"] == "LAN" and peer["rtt"] > 0 for peer in of_a1.values())

            # meshes on one LAN never mix: each has found its own, and nobody else
            assert (await r1.knows(r2)).keys() == {r2.id}
            assert (await s1.knows(s2)).keys() == {s2.id}
            assert (await r2.knows(r1)).keys() == {r1.id}
            public = {node.id for node in (a1, a2, b1, b2, c1, c2)}
            assert (await a1.peers()).keys() == public - {a1.id}

            # and they are of use to each other: a model that only one of them has, over IPv4 and over IPv6
            for asker in (b2, c2):
                assert await eventually(partial(asker.workers, "a1"), bool) == {a1.id}
                code, printed = await asker.command("generate", "Once", "--model", "a1", "-n", "2")
                assert code == 0
                assert printed[-1]["worker"] == a1.id
