"""The node's TCP and UDP sockets, on one port number, and the addresses that peers may use."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable
from ipaddress import ip_address

import psutil

from mesh.address import format_address, parse_address
from mesh.errors import ConfigurationError

EXIT_PORT = 6
TRIES = 100
MAX_ADVERTISED = 4
VIRTUAL = ("docker", "br-", "veth", "virbr", "cni", "flannel", "lxc", "lxd")
"""Interfaces whose addresses mean nothing to other machines."""


def bind(listen: str, *, or_next: bool) -> tuple[socket.socket, socket.socket]:
    """A listening TCP socket and a UDP socket on the same port; with `or_next` the first free one up
    from there. Port 0 takes any that is free for both.

    Raises ConfigurationError where the address cannot be had.
    """
    host, port = parse_address(listen)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    ports: Iterable[int] = (
        [0] * TRIES if port == 0 else range(port, min(port + TRIES, 65536)) if or_next else [port]
    )
    problem: OSError | None = None
    for number in ports:
        try:
            return _pair(family, host, number)
        except OSError as error:
            problem = error
            if error.errno != errno.EADDRINUSE:
                break
    if problem is not None and problem.errno == errno.EADDRINUSE:
        raise ConfigurationError(
            f"{listen} is in use by another program",
            "Choose another port with --listen, or leave it out to take the next free one.",
            exit_code=EXIT_PORT,
        )
    raise ConfigurationError(
        f"{listen} cannot be listened on: {problem.strerror if problem else 'no such port'}",
        "Give an address of this machine to --listen.",
        exit_code=EXIT_PORT,
    )


def _pair(family: socket.AddressFamily, host: str, port: int) -> tuple[socket.socket, socket.socket]:
    tcp = socket.socket(family, socket.SOCK_STREAM)
    udp = socket.socket(family, socket.SOCK_DGRAM)
    try:
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            for one in (tcp, udp):
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        tcp.bind((host, port))
        # Listening shows a conflict that SO_REUSEADDR hides at bind.
        tcp.listen(256)
        udp.bind((host, tcp.getsockname()[1]))
    except BaseException:
        tcp.close()
        udp.close()
        raise
    tcp.setblocking(False)
    udp.setblocking(False)
    return tcp, udp


def local_address(sock: socket.socket) -> str:
    """Where programs on this machine reach the node."""
    host, port = sock.getsockname()[:2]
    if host == "0.0.0.0":
        host = "127.0.0.1"
    elif host == "::":
        host = "::1"
    return format_address(host, port)


def advertised(sock: socket.socket, configured: Iterable[str] = ()) -> tuple[str, ...]:
    """The addresses for the node's records: what is configured, else what it listens on, else those
    of the machine's real interfaces; loopback only where there is nothing else.
    """
    if configured:
        return tuple(configured)[:MAX_ADVERTISED]
    host, port = sock.getsockname()[:2]
    if not ip_address(host).is_unspecified:
        return (format_address(host, port),)
    families = {socket.AF_INET} if host == "0.0.0.0" else {socket.AF_INET, socket.AF_INET6}
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = [
        ip_address(address.address.partition("%")[0])
        for name, addresses in psutil.net_if_addrs().items()
        if name in up and not name.startswith(VIRTUAL)
        for address in addresses
        if address.family in families
    ]
    usable = [address for address in found if not (address.is_loopback or address.is_link_local)]
    # Public addresses last: most callers of a small mesh sit on the same LAN.
    usable.sort(key=lambda address: (not address.is_private, address.version))
    names = [format_address(str(address), port) for address in usable] or [local_address(sock)]
    return tuple(names[:MAX_ADVERTISED])
