"""Finding nodes on the LAN by mDNS (`_qmesh._tcp`). The only importer of zeroconf.

Each node announces an instance of a random name, whose TXT record holds ``v=1`` and ``n``, a hash of the
network that is keyed with the secret in a private mesh: its name leaks to nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
from collections.abc import Callable
from ipaddress import ip_address

from zeroconf import Error as ZeroconfError
from zeroconf import IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from mesh.interfaces import local_addresses
from mesh.network import Network

log = logging.getLogger(__name__)

SERVICE_TYPE = "_qmesh._tcp.local."
_RESOLVE_TIMEOUT_MS = 3000
_CLOSE_TIMEOUT = 3.0
_MAX_WAITING = 256
_CHECK_INTERVAL = 30.0
_RETRY = 60.0

Found = Callable[[list[tuple[str, int]]], None]


def network_tag(network: Network) -> str:
    """What tells the meshes on one LAN apart: 16 hex digits."""
    secret = network.derive(b"qmesh-lan") or b""
    return hashlib.blake2b(b"qmesh-lan" + network.prologue, digest_size=8, key=secret).hexdigest()


class Lan:
    """Announces one node and tells of the others of its mesh.

    `on_found` gets the addresses of a node that was found, also of one that was known. `problem` is
    why the LAN cannot be searched, or None.
    """

    def __init__(self, network: Network, on_found: Found) -> None:
        self.problem: str | None = None
        self._tag = network_tag(network)
        self._on_found = on_found
        self._name = f"{secrets.token_hex(8)}.{SERVICE_TYPE}"
        self._changed: asyncio.Queue[str] = asyncio.Queue(_MAX_WAITING)

    async def run(self, host: str, port: int) -> None:
        """Announce ``host:port`` and search, until cancelled; anew when the machine's addresses change.

        An unspecified host (``0.0.0.0``, ``::``) stands for all of `local_addresses`.
        """
        while True:
            hosts = _announced(host)
            try:
                zeroconf = AsyncZeroconf(interfaces=list(hosts), ip_version=_ip_version(hosts))
                try:
                    self.problem = None
                    await self._announce_and_search(zeroconf, hosts, host, port)
                finally:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_CLOSE_TIMEOUT):
                            await zeroconf.async_close()
            except (OSError, ZeroconfError) as error:
                self.problem = f"mDNS is not possible here: {error}"
                log.warning("%s", self.problem)
                await asyncio.sleep(_RETRY)

    async def _announce_and_search(
        self, zeroconf: AsyncZeroconf, hosts: list[str], host: str, port: int
    ) -> None:
        service = AsyncServiceInfo(
            SERVICE_TYPE,
            self._name,
            port=port,
            properties={"v": "1", "n": self._tag},
            parsed_addresses=hosts,
            server=f"qmesh-{self._name.partition('.')[0]}.local.",
        )
        browser = AsyncServiceBrowser(zeroconf.zeroconf, SERVICE_TYPE, handlers=[self._on_change])
        try:
            await zeroconf.async_register_service(service)
            while True:
                try:
                    async with asyncio.timeout(_CHECK_INTERVAL):  # wait_for may lose a cancellation
                        name = await self._changed.get()
                except TimeoutError:
                    if _announced(host) != hosts:
                        return
                else:
                    await self._resolve(zeroconf.zeroconf, name)
        finally:
            await browser.async_cancel()
            await zeroconf.async_unregister_all_services()

    def _on_change(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        if state_change is not ServiceStateChange.Removed and name != self._name and not self._changed.full():
            self._changed.put_nowait(name)

    async def _resolve(self, zeroconf: Zeroconf, name: str) -> None:
        service = AsyncServiceInfo(SERVICE_TYPE, name)
        if not await service.async_request(zeroconf, _RESOLVE_TIMEOUT_MS):
            return
        if service.properties.get(b"n") != self._tag.encode() or not service.port:
            return
        addresses = [(host, service.port) for host in service.parsed_addresses() if _usable(host)]
        if addresses:
            self._on_found(addresses)


def _announced(host: str) -> list[str]:
    return (local_addresses() or ["127.0.0.1"]) if ip_address(host).is_unspecified else [host]


def _usable(host: str) -> bool:
    address = ip_address(host)
    return not (address.is_link_local or address.is_unspecified or address.is_multicast)


def _ip_version(hosts: list[str]) -> IPVersion:
    versions = {":" in host for host in hosts}
    if len(versions) == 2:
        return IPVersion.All
    return IPVersion.V6Only if versions == {True} else IPVersion.V4Only
