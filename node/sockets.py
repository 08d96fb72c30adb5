"""The node's TCP and UDP sockets, on one port number, and the addresses that peers may use."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable
from ipaddress import ip_address

from mesh.address import format_address, parse_address
from mesh.errors import ConfigurationError
from mesh.interfaces import local_addresses

EXIT_PORT = 6
TRIES = 100
MAX_ADVERTISED = 4
_NO_IPV6 = {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT}


def bind(listen: str, *, or_next: bool) -> tuple[socket.socket, socket.socket]:
    """A listening TCP socket and a UDP socket on the same port; with `or_next` the first free one up
    from there. Port 0 takes any that is free for both. ``[::]`` is every address of this machine, IPv6
    and IPv4 alike.

    Raises ConfigurationError where the address cannot be had.
    """
    host, port = parse_address(listen)
    try:
        return _first_free(host, port, or_next=or_next)
    except OSError as error:
        problem = error
    if host == "::" and problem.errno in _NO_IPV6:
        return bind(format_address("0.0.0.0", port), or_next=or_next)
    if problem.errno == errno.EADDRINUSE:
        raise ConfigurationError(
            f"{listen} is in use by another program",
            "Choose another port with --listen, or leave it out to take the next free one.",
            exit_code=EXIT_PORT,
        )
    raise ConfigurationError(
        f"{listen} cannot be listened on: {problem.strerror}",
        "Give an address of this machine to --listen.",
        exit_code=EXIT_PORT,
    )


def _first_free(host: str, port: int, *, or_next: bool) -> tuple[socket.socket, socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    ports: Iterable[int] = (
        [0] * TRIES if port == 0 else range(port, min(port + TRIES, 65536)) if or_next else [port]
    )
    problem = OSError(errno.EADDRINUSE, "no port is free")
    for number in ports:
        try:
            return _pair(family, host, number)
        except OSError as error:
            problem = error
            if error.errno != errno.EADDRINUSE:
                break
    raise problem


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
    return format_address("127.0.0.1" if ip_address(host).is_unspecified else host, port)


def advertised(
    sock: socket.socket, configured: Iterable[str] = (), outside: str | None = None
) -> tuple[str, ...]:
    """The addresses for the node's records: what is configured, else what it listens on, else those
    of the machine's real interfaces and the `outside` one (a host) that peers have shown to lead here;
    loopback only where there is nothing else.
    """
    if configured:
        return tuple(configured)[:MAX_ADVERTISED]
    host, port = sock.getsockname()[:2]
    if not ip_address(host).is_unspecified:
        return (format_address(host, port),)
    hosts = [one for one in local_addresses() if host == "::" or ":" not in one][:MAX_ADVERTISED]
    if outside is not None and outside not in hosts:
        hosts.append(outside)
    return tuple(format_address(one, port) for one in hosts) or (local_address(sock),)
