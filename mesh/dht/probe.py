"""Asking a node over UDP as a stranger would."""

from __future__ import annotations

import asyncio
import socket

from mesh.dht import limits
from mesh.dht.node import Dht, Pong
from mesh.errors import DeadlineExceeded
from mesh.network import Network


async def probe(host: str, port: int, network: Network, timeout: float = limits.REQUEST_TIMEOUT) -> Pong:
    """Ping a node from a fresh socket, at whichever address of `host` answers first.

    No firewall or router lets the ping in only because the node spoke to us before. Raises
    DeadlineExceeded where nobody of this mesh answers, OSError where a name cannot be resolved or the
    system would not send.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    hosts = list(dict.fromkeys(str(where[0]) for *_, where in found))
    pings = [asyncio.ensure_future(_ping(one, port, network, timeout)) for one in hosts]
    problem: Exception | None = None
    try:
        for done in asyncio.as_completed(pings):
            try:
                return await done
            except (DeadlineExceeded, OSError) as error:
                problem = error
    finally:
        for one in pings:
            one.cancel()
        await asyncio.gather(*pings, return_exceptions=True)
    raise problem or DeadlineExceeded(f"{host} has no address")


async def _ping(host: str, port: int, network: Network, timeout: float) -> Pong:
    dht = Dht(None, network)
    await dht.start("::" if ":" in host else "0.0.0.0", 0)
    try:
        return await dht.ping(host, port, timeout)
    finally:
        await dht.stop()
