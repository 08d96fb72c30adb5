"""A private mesh as its people use it: founded, invited to, entered, closed to others; and what `doctor` says."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mesh.address import parse_address
from mesh.dht import probe
from mesh.errors import AuthenticationError, DeadlineExceeded
from mesh.identity import Identity
from mesh.join import decode_token
from mesh.network import Network
from mesh.transport import connect
from tests.support import seconds

COMMAND = (sys.executable, "-P", "-m", "node")


async def run(*arguments: str, folder: Path) -> tuple[int, list[dict[str, Any]], str]:
    """A command with --json to its end: exit code, what it printed, its stderr."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND, *arguments, "--json", "--data-dir", str(folder), stdout=-1, stderr=-1
    )
    async with asyncio.timeout(seconds(30)):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, [json.loads(line) for line in out.splitlines()], err.decode()


@asynccontextmanager
async def node(folder: Path, *arguments: str) -> AsyncIterator[dict[str, Any]]:
    """A running node; gives its `ready` event."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "run", "--json", "--listen", "127.0.0.1:0", "--no-mdns", "--no-gateway", "--data-dir",
        str(folder), *arguments, stdout=-1,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        async with asyncio.timeout(seconds(30)):
            while (event := json.loads(await process.stdout.readline()))["event"] != "ready":
                pass
        yield event
    finally:
        process.terminate()
        async with asyncio.timeout(seconds(30)):
            await process.communicate()


def checks(printed: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in printed}


async def test_a_private_mesh_from_its_founding_to_its_closed_door(tmp_path: Path) -> None:
    first, second, outsider = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    assert (await run("join", "--new", "kitchen", folder=first))[1] == [
        {"network": "kitchen", "private": True}
    ]
    async with node(first) as one:
        code, (invitation,), _ = await run("invite", folder=first)
        assert code == 0
        assert invitation["private"]
        assert (await run("join", invitation["token"], folder=second))[0] == 0
        async with node(second) as two:
            code, (model,), _ = await run("models", folder=second)
            assert {worker["id"] for worker in model["workers"]} == {one["worker_id"], two["worker_id"]}
            code, printed, _ = await run("doctor", folder=second)
            assert code == 0
            assert all(check["ok"] for check in printed)
            code, (found,), _ = await run("ping", one["worker_id"][:12], folder=second)
            assert code == 0
            assert found["tcp"] > 0
            assert found["udp"] > 0

            code, printed, _ = await run("models", "--join", one["address"], folder=outsider)
            assert code == 8
            code, printed, _ = await run("doctor", "--join", one["address"], folder=outsider)
            assert code == 8
            check = checks(printed)[f"node {one['address']}"]
            assert "another secret" in check["finding"]
            assert "invite" in check["fix"]

            # the holder of a copied key is sent away, and told why
            copy = tmp_path / "copy"
            copy.mkdir()
            for name in ("identity.key", "mesh.json"):
                shutil.copy(second / name, copy / name)
            code, printed, _ = await run(
                "run", "--listen", "127.0.0.1:0", "--no-mdns", "--no-gateway", folder=copy
            )
            assert code == 3
            assert printed[-1]["event"] in {"stopped", "error"}
            assert any("identity of this one" in str(event.get("error")) for event in printed)
            log = second / "logs" / "node.log"
            async with asyncio.timeout(seconds(10)):
                while "was started with the identity of this one" not in log.read_text():  # noqa: ASYNC110 - a file has no event
                    await asyncio.sleep(0.1)
    assert (await run("leave", folder=second))[1] == [{"left": True}]


async def test_a_leaked_token_is_worth_nothing_once_it_is_revoked_or_over(tmp_path: Path) -> None:
    home, early, late = tmp_path / "home", tmp_path / "early", tmp_path / "late"
    await run("join", "--new", "kitchen", folder=home)
    async with node(home) as one:
        (leaked,) = (await run("invite", "--hours", "1", folder=home))[1]
        (other,) = (await run("invite", folder=home))[1]
        assert abs(other["expires"] - time.time() - 24 * 3600) < seconds(60)
        code, listed, _ = await run("invite", "--list", folder=home)
        assert [line["id"] for line in listed] == [leaked["id"], other["id"]]

        async with node(early, "--join", leaked["token"]):
            (model,) = (await run("models", "--join", leaked["token"], folder=tmp_path / "asking"))[1]
            assert len(model["workers"]) == 2
        assert (await run("invite", "--revoke", leaked["token"], folder=home))[1] == [
            {"revoked": leaked["id"]}
        ]

        # for the one who comes too late it opens nothing: no membership, no answer, no datagram
        for command in (["join", leaked["token"]], ["models", "--join", leaked["token"]]):
            code, _, told = await run(*command, folder=late)
            assert code == 2
            assert "does not accept it" in told
            assert "ask for a new one" in told
        code, printed, _ = await run("doctor", "--join", leaked["token"], folder=late)
        assert code == 8
        assert "does not accept it" in checks(printed)["mesh"]["finding"]
        assert not (late / "mesh.json").exists()
        assert not (late / "joined").exists()
        ticket = decode_token(leaked["token"]).ticket
        assert ticket is not None
        thief, address = Network("kitchen", ticket.key), parse_address(one["address"])
        for network in (thief, Network("kitchen")):
            with pytest.raises(AuthenticationError):
                await connect(*address, identity=Identity(), network=network, peer_id=ticket.inviter)
            with pytest.raises(DeadlineExceeded):
                await probe(*address, network, 1)

        # a token that is over by the node's list is no better, whatever the clock of its holder says
        (home / "invitations.json").write_text(json.dumps({other["id"]: int(time.time()) - 1}))
        assert (await run("join", other["token"], folder=late))[0] == 2

        # who came in time stays in, with the token in its settings for good
        async with node(early, "--join", leaked["token"]):
            (model,) = (await run("models", folder=early))[1]
            assert len(model["workers"]) == 2
    quiet = ("--listen", "127.0.0.1:0", "--no-mdns", "--no-gateway")
    code, printed, told = await run("run", *quiet, "--join", other["token"], folder=late)
    assert code == 8
    assert "does not answer" in told
    assert "fix:" in told
    assert printed[-1] == {"event": "stopped"}


async def test_peers_dial_back_and_netcheck_says_so(tmp_path: Path) -> None:
    async with node(tmp_path / "a") as one, node(tmp_path / "b", "--join", one["address"]):
        async with asyncio.timeout(seconds(40)):
            while True:
                _, (found,), _ = await run("netcheck", folder=tmp_path / "b")
                if found["reachable"] is not None:
                    break
        assert found["reachable"]
        assert found["role"] == "holder"
        assert found["reports"][0]["tcp"] is None
        assert found["reports"][0]["udp"] is None


async def test_doctor_names_what_is_wrong(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = f"127.0.0.1:{taken.getsockname()[1]}"
        code, printed, _ = await run("doctor", "--listen", busy, folder=tmp_path)
        assert code == 8
        assert "in use" in checks(printed)["port"]["finding"]
    code, printed, _ = await run(
        "doctor", "--join", "127.0.0.1:1", "--llama-server", "/nowhere", folder=tmp_path
    )
    assert code == 8
    assert checks(printed)["node 127.0.0.1:1"]["finding"] == "nothing listens there"
    assert not checks(printed)["llama.cpp"]["ok"]
    (tmp_path / "identity.key").chmod(0o644)
    code, printed, _ = await run("doctor", folder=tmp_path)
    assert "chmod 600" in checks(printed)["identity"]["fix"]


async def test_doctor_tells_a_firewall_for_udp_from_one_for_tcp(tmp_path: Path) -> None:
    """A relay that passes only one of the two stands in for the firewall."""
    async with node(tmp_path / "a") as one:
        port = int(one["address"].rpartition(":")[2])

        async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(65536):
                writer.write(data)
            writer.close()

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            upstream = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.gather(pump(reader, upstream[1]), pump(upstream[0], writer))

        server = await asyncio.start_server(relay, "127.0.0.1", 0)
        async with server:
            where = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            code, printed, _ = await run("doctor", "--join", where, folder=tmp_path / "b")
        assert code == 8
        assert "drops UDP" in checks(printed)[f"node {where}"]["finding"]
