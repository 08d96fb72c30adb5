"""What dialling and listening share: socket options, addresses and the buffer to read into."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from contextlib import suppress

from mesh.limits import READ_BUFFER
from mesh.liveness import TokenBucket

USER_AGENT = "qmesh/0.1.0"

logger = logging.getLogger("mesh.wire")

_thread = threading.local()
_complaints = TokenBucket(20, 1.0, 0.0)


def read_buffer() -> memoryview:
    """The buffer that all connections of the calling thread read into.

    An event loop reads and hands over in one step, so what was read is dealt with before the next
    read; an idle connection needs no buffer of its own.
    """
    buffer: memoryview | None = getattr(_thread, "buffer", None)
    if buffer is None:
        buffer = _thread.buffer = memoryview(bytearray(READ_BUFFER))
    return buffer


def peer_address(transport: asyncio.BaseTransport) -> tuple[str, int]:
    """The remote host and port; empty where the peer hung up already.

    IPv4 peers of a socket for both IP versions look as on one for IPv4, without ``::ffff:``.
    """
    name = transport.get_extra_info("peername")
    return (str(name[0]).removeprefix("::ffff:"), int(name[1])) if name else ("", 0)


def set_options(transport: asyncio.BaseTransport) -> None:
    """Send small frames at once, and let the kernel notice dead peers too."""
    sock = transport.get_extra_info("socket")
    if sock is not None:
        with suppress(OSError):  # the peer may have hung up already
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def complain(text: str, *arguments: object) -> None:
    """Log what a peer did wrong; of a flood, one line a second."""
    if _complaints.take(time.monotonic()):
        logger.warning(text, *arguments)


def unix_ms() -> int:
    """The time that handshakes tell."""
    return time.time_ns() // 1_000_000
