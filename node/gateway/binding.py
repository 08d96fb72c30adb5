"""Where the gateway listens: its socket, its TLS, and the rule for leaving this machine."""

from __future__ import annotations

import errno
import socket
import ssl
from ipaddress import ip_address

from mesh.address import format_address, parse_address
from mesh.errors import ConfigurationError
from node.gateway.settings import GatewaySettings

EXIT_PORT = 6
TRIES = 100
BACKLOG = 512


def bind(address: str, *, or_next: bool, has_keys: bool) -> socket.socket:
    """A listening socket; with `or_next` on the first free port up from there.

    Raises ConfigurationError where the address cannot be had, and where it is reachable from outside
    this machine although there is no API key.
    """
    host, port = parse_address(address)
    if not (has_keys or is_loopback(host)):
        raise ConfigurationError(
            f"the gateway would listen on {address}, where others could use it without a key",
            "Make a key with `qmesh-node keys add NAME`, or listen on 127.0.0.1.",
        )
    last = min(port + TRIES, 65536) if or_next and port else port + 1
    problem: OSError | None = None
    for number in range(port, last):
        try:
            return _listen(host, number)
        except OSError as error:
            problem = error
            if error.errno != errno.EADDRINUSE:
                break
    if problem is not None and problem.errno == errno.EADDRINUSE:
        raise ConfigurationError(
            f"{address} is in use by another program",
            "Choose another port with --gateway, or leave it out to take the next free one.",
            exit_code=EXIT_PORT,
        )
    raise ConfigurationError(
        f"the gateway cannot listen on {address}: {problem.strerror if problem else 'no such port'}",
        "Give an address of this machine to --gateway.",
        exit_code=EXIT_PORT,
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def url(sock: socket.socket, *, tls: bool) -> str:
    """Where programs on this machine reach the gateway."""
    host, port = sock.getsockname()[:2]
    if ip_address(host).is_unspecified:
        host = "::1" if ":" in host else "127.0.0.1"
    return f"{'https' if tls else 'http'}://{format_address(host, port)}"


def tls_context(settings: GatewaySettings) -> ssl.SSLContext | None:
    """The TLS context of the settings, None for plain HTTP. Raises ConfigurationError."""
    if settings.tls_certificate is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.tls_certificate, settings.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(
            f"the certificate {settings.tls_certificate} or its key cannot be used: {error}",
            "Give a PEM certificate chain and its unencrypted PEM key.",
        ) from error
    return context


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    sock.setblocking(False)
    return sock
