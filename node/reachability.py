"""Whether other machines can reach this node: peers are asked to dial back.

A node that nobody reaches stays a client of the DHT: it asks, but holds nothing for others, since what
it held could not be found. Until the first answer it is a newcomer, which nobody is told of.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mesh.address import format_address, parse_address
from mesh.dht import Dht, PeerInfo, Role, probe
from mesh.dht.addresses import scope, subnet
from mesh.errors import BadRequest, Overloaded, QMeshError
from mesh.identity import Identity
from mesh.interfaces import local_addresses
from mesh.network import Network
from mesh.transport import Stream, connect

log = logging.getLogger("qmesh.node")

ASKED = 3
"""Peers asked at once."""
TIMEOUT = 4.0
EVERY = 600.0
FIRST_PAUSE = 0.25
"""Between checks while the node is not known to be reachable; doubled each time."""
LONGEST_PAUSE, LONGEST_PAUSE_ALONE = 60.0, 10.0
MOST_TOLD = 200
"""Characters of what a peer says."""
MOST_DIALS = 8
"""Dials back for others at the same time."""


class Reachability:
    """Answers and asks for dials back. `reachable` is None while nobody could be asked."""

    def __init__(self, identity: Identity, network: Network, dht: Dht, port: int) -> None:
        self._identity = identity
        self._network = network
        self._dht = dht
        self._port = port
        self._dialling: set[bytes] = set()
        self.reachable: bool | None = None
        self.reports: list[dict[str, Any]] = []
        """What each peer said last."""

    async def run(self) -> None:
        """Check now and then, until cancelled."""
        pause = FIRST_PAUSE
        while True:
            await self.check()
            if self.reachable:
                await asyncio.sleep(EVERY)
                pause = FIRST_PAUSE
            else:
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_ALONE if self.reachable is None else LONGEST_PAUSE)

    async def check(self) -> None:
        """Ask a few peers, and draw the conclusion."""
        asked = choose(self._dht.peers, ASKED)
        answers = await asyncio.gather(*(self._ask(peer.host, peer.port) for peer in asked))
        reports = [report for report in answers if report is not None]
        if not reports:
            return
        self.reports = reports
        self.reachable = any(_came_through(report) for report in reports)
        role = Role.HOLDER if self.reachable else Role.CLIENT
        if self._dht.role is not role:
            log.info(
                "peers %s reach this node: it is a %s", "can" if self.reachable else "cannot", role.value
            )
            self._dht.role = role

    @property
    def outside(self) -> str | None:
        """The host, none of this machine's own, at which peers both see and reach this node."""
        seen = self._dht.seen_address
        if seen is None or scope(seen[0]) == 0 or seen[0] in local_addresses():
            return None
        through = {_host(report["seen"]) for report in self.reports if _came_through(report)}
        return seen[0] if seen[0] in through else None

    async def answer(self, stream: Stream) -> None:
        """Dial back to the caller, at the address it called from and the port that it names: nobody can
        be made to dial somebody else.
        """
        port = stream.meta.get("port")
        if not isinstance(port, int) or not 0 < port < 65536:
            raise BadRequest("dial_back needs a port")
        if stream.peer_id in self._dialling or len(self._dialling) >= MOST_DIALS:
            raise Overloaded("already dialling back", retry_after=TIMEOUT)
        self._dialling.add(stream.peer_id)
        try:
            host, seen_port = stream.connection.remote_address[:2]
            tcp, udp = await asyncio.gather(self._dial_tcp(host, port, stream), self._dial_udp(host, port))
            await stream.end({"seen": format_address(host, seen_port), "tcp": tcp, "udp": udp})
        finally:
            self._dialling.discard(stream.peer_id)

    def describe(self) -> Mapping[str, Any]:
        """For `netcheck`. `behind_nat`: peers see an address that is none of this machine's own; `held`:
        records that it keeps, its own among them.
        """
        seen = self._dht.seen_address
        foreign = seen is not None and scope(seen[0]) > 0 and seen[0] not in local_addresses()
        return {
            "reachable": self.reachable,
            "seen": format_address(*seen) if seen else None,
            "behind_nat": foreign,
            "role": self._dht.role.value,
            "held": self._dht.holdings.records,
            "reports": self.reports,
        }

    async def _ask(self, host: str, port: int) -> dict[str, Any] | None:
        try:
            connection = await connect(
                host, port, identity=self._identity, network=self._network, timeout=TIMEOUT
            )
        except (QMeshError, OSError):
            return None
        try:
            async with await connection.open("dial_back", {"port": self._port}) as stream:
                while await stream.read(timeout=3 * TIMEOUT) is not None:
                    pass
                said = stream.trailer or {}
                return {
                    "peer": connection.peer_id.hex(),
                    **{key: _told(said.get(key)) for key in ("seen", "tcp", "udp")},
                }
        except QMeshError:
            return None
        finally:
            await connection.close()

    async def _dial_tcp(self, host: str, port: int, stream: Stream) -> str | None:
        try:
            connection = await connect(
                host,
                port,
                identity=self._identity,
                network=self._network,
                peer_id=stream.peer_id,
                timeout=TIMEOUT,
            )
        except (QMeshError, OSError) as error:
            return str(error)[:MOST_TOLD]
        await connection.close()
        return None

    async def _dial_udp(self, host: str, port: int) -> str | None:
        try:
            await probe(host, port, self._network, TIMEOUT)
        except (QMeshError, OSError) as error:
            return str(error)[:MOST_TOLD]
        return None


def choose(peers: Sequence[PeerInfo], count: int) -> list[PeerInfo]:
    """Whom to ask: the farthest away, each in another subnet where possible; chance decides the rest.

    Whoever shares our LAN reaches us also where nobody else does.
    """
    ranked = []
    before: Counter[bytes] = Counter()
    for peer in random.sample(peers, len(peers)):
        group = subnet(peer.host)
        ranked.append((-scope(peer.host), before[group], peer))
        before[group] += 1
    ranked.sort(key=lambda one: one[:2])
    return [peer for *_, peer in ranked[:count]]


def _came_through(report: Mapping[str, Any]) -> bool:
    return report.get("tcp") is None and report.get("udp") is None


def _told(value: object) -> str | None:
    """What a peer says, fit for a terminal."""
    if value is None:
        return None
    return "".join(character for character in str(value)[:MOST_TOLD] if character.isprintable())


def _host(seen: object) -> str | None:
    try:
        return parse_address(str(seen))[0]
    except ValueError:
        return None
