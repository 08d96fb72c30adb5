"""Why it does not work: checks with cause and fix, for `ping`, `netcheck` and `doctor`."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from statistics import median
from typing import Any, Literal

import psutil

from mesh.address import Address, format_address, parse_address
from mesh.dht import probe
from mesh.errors import AuthenticationError, ConfigurationError, ProtocolError, QMeshError, VersionMismatch
from mesh.identity import Identity
from mesh.interfaces import local_addresses
from mesh.keystore import load_identity
from mesh.network import Network
from mesh.transport import connect
from node.config import DEFAULT_LISTEN, DEMO_MODEL
from node.contacts import MOST_SKEW, skew
from node.sockets import bind
from sidecar.errors import SidecarError
from sidecar.gguf import read_header
from sidecar.runtime import find_server

TIMEOUT = 4.0
PINGS = 4
LEAST_DISK = 1 << 30


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. `fix` is empty where it is in order."""

    name: str
    ok: bool
    finding: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Reach:
    """How a node is reached: round trips in seconds, None where that way is closed; `skew` in seconds."""

    address: str
    peer: str | None
    tcp: float | None
    tcp_problem: str | None
    udp: float | None
    udp_problem: str | None
    skew: float | None
    denied: Literal["mesh", "version"] | None = None
    """What it is where it answered, but would not talk: of another mesh, or of another version."""


async def reach(address: Address, identity: Identity, network: Network) -> Reach:
    """Try a node over TCP (the wire) and UDP (the DHT). Never raises for what is wrong out there."""
    (peer, rtt, lead, tcp_problem, denied), (udp, udp_problem, clock) = await asyncio.gather(
        _reach_tcp(address, identity, network), _reach_udp(address, network)
    )
    return Reach(
        format_address(*address),
        peer,
        rtt,
        tcp_problem,
        udp,
        udp_problem,
        lead if lead is not None else clock,
        denied,
    )


async def _reach_tcp(
    address: Address, identity: Identity, network: Network
) -> tuple[str | None, float | None, float | None, str | None, Literal["mesh", "version"] | None]:
    try:
        connection = await connect(*address, identity=identity, network=network, timeout=TIMEOUT)
    except VersionMismatch as error:
        return None, None, None, str(error), "version"
    except (AuthenticationError, ProtocolError) as error:
        return None, None, None, str(error), "mesh"
    except (QMeshError, OSError) as error:
        return None, None, None, str(error), None
    try:
        best = min([await connection.ping(TIMEOUT) for _ in range(PINGS)])
        return connection.peer_id.hex(), best, connection.clock_skew, None, None
    except QMeshError as error:
        return connection.peer_id.hex(), None, connection.clock_skew, str(error), None
    finally:
        await connection.close()


async def _reach_udp(address: Address, network: Network) -> tuple[float | None, str | None, float | None]:
    try:
        pong = await probe(*address, network, TIMEOUT)
    except (QMeshError, OSError) as error:
        return None, str(error), None
    return pong.rtt, None, pong.clock_offset


def judge(found: Reach) -> list[Check]:
    """What the ways to a node say: the first cause that explains them all, and what to do."""
    name = f"node {found.address}"
    if found.denied == "version":
        return [Check(name, False, f"{found.tcp_problem}", "Update QMesh on the older of the two machines.")]
    if found.denied == "mesh":
        return [
            Check(
                name,
                False,
                "it answers, but refuses the handshake: it is in another network or has another secret",
                "Compare the network's name on both sides (`qmesh-node status`); in a private mesh join "
                "again with a fresh token from `qmesh-node invite`.",
            )
        ]
    checks = []
    if found.tcp is None and found.udp is None:
        closed = "refused" in (found.tcp_problem or "")
        checks.append(
            Check(
                name,
                False,
                "nothing listens there" if closed else f"no answer over TCP or UDP ({found.tcp_problem})",
                "Start the node there, or check the port with `qmesh-node status` on it."
                if closed
                else "Check the address, that the machine is on and on the same network, and its firewall.",
            )
        )
    elif found.tcp is None:
        checks.append(
            Check(
                name,
                False,
                f"UDP works, TCP does not ({found.tcp_problem}): a firewall drops TCP",
                f"Open TCP port {parse_address(found.address)[1]} in the firewall of that machine.",
            )
        )
    elif found.udp is None:
        checks.append(
            Check(
                name,
                False,
                "TCP works, UDP does not: a firewall drops UDP",
                f"Open UDP port {parse_address(found.address)[1]} in the firewalls of both machines; "
                "without it nodes use each other only through the addresses that they are given.",
            )
        )
    else:
        checks.append(
            Check(name, True, f"TCP {found.tcp * 1000:.1f} ms, UDP {found.udp * 1000:.1f} ms, {found.peer}")
        )
    if found.skew is not None and abs(found.skew) > MOST_SKEW:
        checks.append(
            Check(
                f"clock of {found.address}",
                False,
                f"its clock is {skew(found.skew)} this machine's: records look expired or forged",
                "Set the clocks of both machines (turn on NTP).",
            )
        )
    return checks


def local_checks(
    folder: Path, *, listen: str | None, running: bool, llama_server: Path | None
) -> list[Check]:
    """Everything that can be wrong on this machine. Blocks for some milliseconds."""
    checks = [_identity(folder), _disk(folder), _server(llama_server), _model()]
    if running:
        checks.append(Check("port", True, "the node here is running"))
    else:
        checks.append(_port(listen))
    return checks


def _identity(folder: Path) -> Check:
    try:
        return Check("identity", True, load_identity(folder).id.hex())
    except ConfigurationError as error:
        return Check("identity", False, error.cause, error.fix)


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    if free < LEAST_DISK:
        return Check(
            "disk", False, f"only {free >> 20} MiB are free", "Free some space; logs take up to 50 MB."
        )
    return Check("disk", True, f"{free >> 30} GiB free")


def _server(explicit: Path | None) -> Check:
    try:
        server = find_server(explicit)
    except SidecarError as error:
        return Check("llama.cpp", False, error.message, "Run `qmesh-node runtime install`.")
    return Check("llama.cpp", True, f"{server.version}, {server.reason}")


def _model() -> Check:
    try:
        return Check("demo model", True, read_header(DEMO_MODEL).name)
    except (SidecarError, OSError) as error:
        return Check("demo model", False, str(error), "Install QMesh again.")


def _port(listen: str | None) -> Check:
    where = listen or DEFAULT_LISTEN
    try:
        for sock in bind(where, or_next=False):
            sock.close()
    except ConfigurationError as error:
        holder = _holder(parse_address(where)[1])
        fix = "Stop that program, or leave --listen out: `run` then takes the next free port."
        return Check("port", False, f"{error.cause}{f': {holder}' if holder else ''}", fix)
    return Check("port", True, f"{where} is free for TCP and UDP")


def _holder(port: int) -> str | None:
    """The program that holds a port, where the system tells."""
    with suppress(psutil.Error):
        for one in psutil.net_connections("inet"):
            if one.laddr and one.laddr.port == port and one.pid and not one.raddr:
                return f"{psutil.Process(one.pid).name()} (pid {one.pid})"
    return None


async def check_targets(targets: Iterable[Address], identity: Identity, network: Network) -> list[Check]:
    """All nodes that are to be reached, at the same time."""
    found = await asyncio.gather(*(reach(target, identity, network) for target in targets))
    return [check for one in found for check in judge(one)]


def within_reach(addresses: Iterable[str]) -> list[Address]:
    """Those that this machine could reach: it may lack the IP version of others.

    Peers of the LAN tell addresses of both.
    """
    own = [ip_address(host) for host in local_addresses()]
    lacking = {4, 6} - {address.version for address in own} if own else set()
    found = []
    for host, port in map(parse_address, addresses):
        with suppress(ValueError):
            if ip_address(host).version in lacking:
                continue
        found.append((host, port))
    return found


def check_running(status: dict[str, Any]) -> list[Check]:
    """What the running node knows of its peers, and they of it."""
    peers = (status.get("contacts") or {"peers": []})["peers"]
    checks = _lan(status["mdns"])
    if not peers:
        return [
            *checks,
            Check(
                "peers",
                False,
                "the node here knows nobody",
                "Join another node: `qmesh-node run --join HOST:9470`; on one LAN, check that multicast "
                "(UDP port 5353) is not blocked.",
            ),
        ]
    heard = peers[0]["last_seen"]
    checks.append(Check("peers", True, f"{len(peers)} known, the last heard {heard:.0f} s ago"))
    return checks + _clocks(peers) + _reachable(status["reachability"])


def _lan(mdns: str) -> list[Check]:
    if mdns in {"on", "off"}:
        return [Check("LAN", True, f"looking for peers by mDNS is {mdns}")]
    fix = "Connect this machine to a network that carries multicast, or join a node by its address."
    return [Check("LAN", False, mdns, fix)]


def _clocks(peers: list[dict[str, Any]]) -> list[Check]:
    """Whose clock is wrong: that of the minority."""
    off = [peer for peer in peers if abs(peer["clock"]) > MOST_SKEW]
    fix = "Set the clock (turn on NTP): records of the others look expired or forged."
    if len(off) >= 2 and 2 * len(off) > len(peers):
        lead = -median(peer["clock"] for peer in off)
        return [
            Check(
                "clock",
                False,
                f"this machine's clock is {skew(lead)} those of {len(off)} of {len(peers)} peers",
                fix,
            )
        ]
    return [
        Check(f"clock of {peer['address']}", False, f"it is {skew(peer['clock'])} this machine's", fix)
        for peer in off
    ]


def _reachable(found: dict[str, Any]) -> list[Check]:
    if found["reachable"] is None:
        return []
    if found["reachable"]:
        return [Check("reachable", True, f"peers can dial back; they see {found['seen']}")]
    return [Check("reachable", False, *unreachable(found))]


def unreachable(found: Mapping[str, Any]) -> tuple[str, str]:
    """Why peers cannot dial back, and what to do."""
    closed = sorted({kind.upper() for one in found["reports"] for kind in ("tcp", "udp") if one[kind]})
    ways = " and ".join(closed)
    if found["behind_nat"]:
        return (
            f"peers cannot dial back over {ways}: this machine is behind a router, they see {found['seen']}",
            "Forward the node's port (TCP and UDP) in the router to this machine. Until then it uses the "
            "mesh, but is of no use to those outside.",
        )
    return (
        f"peers cannot dial back over {ways}: a firewall drops it",
        f"Open the node's port for {ways} in the firewall of this machine.",
    )
