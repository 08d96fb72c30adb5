"""Whether other machines can reach this node: peers are asked to dial back.

A node that nobody reaches stays a client of the DHT: it asks, but holds nothing for others, since what
it held could not be found (docs/discovery.md).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping
from typing import Any

from mesh.address import format_address
from mesh.dht import Dht
from mesh.errors import BadRequest, Overloaded, QMeshError
from mesh.identity import Identity
from mesh.network import Network
from mesh.transport import Stream, connect

log = logging.getLogger("qmesh.node")

ASKED = 3
"""Peers asked at once."""
TIMEOUT = 4.0
EVERY = 600.0
EVERY_WHILE_UNKNOWN = 20.0
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
        while True:
            await self.check()
            await asyncio.sleep(EVERY_WHILE_UNKNOWN if self.reachable is None else EVERY)

    async def check(self) -> None:
        """Ask a few peers, and draw the conclusion."""
        peers = self._dht.peers
        asked = random.sample(peers, min(ASKED, len(peers)))
        answers = await asyncio.gather(*(self._ask(peer.host, peer.port) for peer in asked))
        reports = [report for report in answers if report is not None]
        if not reports:
            return
        self.reports = reports
        self.reachable = any(report.get("tcp") is None and report.get("udp") is None for report in reports)
        if self._dht.client == self.reachable:
            log.info("peers %s reach this node", "can" if self.reachable else "cannot")
            self._dht.client = not self.reachable

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
        """For `netcheck`."""
        seen = self._dht.seen_address
        return {
            "reachable": self.reachable,
            "seen": format_address(*seen) if seen else None,
            "holder": not self._dht.client,
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
                    **{key: said.get(key) for key in ("seen", "tcp", "udp")},
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
            return str(error)[:200]
        await connection.close()
        return None

    async def _dial_udp(self, host: str, port: int) -> str | None:
        try:
            await self._dht.ping(host, port, TIMEOUT)
        except (QMeshError, OSError) as error:
            return str(error)[:200]
        return None
