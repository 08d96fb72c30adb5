"""A connection within one process: a node and its own client, with no socket and no wire between them.

Two transports behave as the ends of a socket would, and a cipher leaves the frames as they are. All the
rules of a connection are still those of `Connection`, on both sides.
"""

from __future__ import annotations

import asyncio
from typing import cast

from mesh.handshake import Agreed
from mesh.identity import NodeId
from mesh.limits import INITIAL_CREDIT, MAX_STREAMS, WRITE_HIGH_WATER
from mesh.noise import KEY_SIZE, CipherState


class Plain(CipherState):
    """Encrypts nothing: what never leaves the process needs no protection from the way."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(bytes(KEY_SIZE))

    def encrypt(self, plaintext: bytes) -> bytes:
        """The plaintext."""
        self.nonce += 1
        return plaintext

    def decrypt(self, ciphertext: bytes) -> bytes:
        """The ciphertext."""
        self.nonce += 1
        return ciphertext

    def rekey(self) -> None:
        """There is no key."""


def agreed_within(own_id: NodeId, user_agent: str) -> Agreed:
    """What one end knows of the other where both are in one process and have one identity."""
    return Agreed(
        peer_id=own_id, peer_agent=user_agent, send=Plain(), receive=Plain(), max_streams=MAX_STREAMS,
        window=INITIAL_CREDIT, clock_skew=0.0,
    )  # fmt: skip


def link(one: asyncio.BufferedProtocol, other: asyncio.BufferedProtocol) -> None:
    """Connect two protocols with each other; both are told at once, as `connection_made`."""
    first, second = MemoryTransport(one), MemoryTransport(other)
    first.join(second)
    second.join(first)
    one.connection_made(first)
    other.connection_made(second)


class MemoryTransport(asyncio.Transport):
    """One end. What it writes is read by the other end's protocol in a later turn of the event loop.

    As with a socket, `close` lets the other end read what was written, and `abort` drops it. Writing is
    paused while the other end leaves more unread than the limits allow.
    """

    def __init__(self, protocol: asyncio.BufferedProtocol) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._protocol = protocol
        self._other: MemoryTransport | None = None
        """None once this end is lost."""
        self._unread = bytearray()
        self._ended = False
        """The other end writes no more."""
        self._closing = False
        self._reading = True
        self._writing_paused = False
        self._scheduled = False
        self.set_write_buffer_limits()

    def join(self, other: MemoryTransport) -> None:
        """Make it the other end's other end."""
        self._other = other

    # --- writing

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Have the other end read it; dropped where an end is closed."""
        other = self._other
        if self._closing or other is None or other._closing:
            return
        other._unread += data
        other._schedule()
        if not self._writing_paused and len(other._unread) > self._high:
            self._writing_paused = True
            self._protocol.pause_writing()

    def get_write_buffer_size(self) -> int:
        """Bytes that the other end has not read."""
        return 0 if self._other is None else len(self._other._unread)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Pause above `high` bytes (WRITE_HIGH_WATER), go on at `low` (a quarter of it)."""
        self._high = WRITE_HIGH_WATER if high is None else high
        self._low = self._high // 4 if low is None else low

    # --- reading

    def pause_reading(self) -> None:
        """Hand nothing over until `resume_reading`."""
        self._reading = False

    def resume_reading(self) -> None:
        """Hand over again what arrives."""
        self._reading = True
        self._schedule()

    def is_reading(self) -> bool:
        """Whether what arrives is handed over."""
        return self._reading and not self._closing

    def _schedule(self) -> None:
        if not self._scheduled and (self._unread or self._ended):
            self._scheduled = True
            self._loop.call_soon(self._hand_over)

    def _hand_over(self) -> None:
        self._scheduled = False
        if not self.is_reading():
            return
        if not self._unread:
            if not self._protocol.eof_received():
                self.close()
            return
        buffer = cast("memoryview", self._protocol.get_buffer(-1))
        size = min(len(buffer), len(self._unread))
        buffer[:size] = self._unread[:size]
        del self._unread[:size]
        if self._other is not None:
            self._other._has_room()
        self._protocol.buffer_updated(size)
        self._schedule()

    def _has_room(self) -> None:
        if self._writing_paused and not self._closing and self.get_write_buffer_size() <= self._low:
            self._writing_paused = False
            self._protocol.resume_writing()

    # --- the end

    def is_closing(self) -> bool:
        """Whether this end is closed or about to be."""
        return self._closing

    def close(self) -> None:
        """Read and write no more. What was written is still read by the other end."""
        if self._closing or self._other is None:
            return
        self._closing = True
        self._unread.clear()
        self._other._ended = True
        self._other._schedule()
        self._loop.call_soon(self._lose)

    def abort(self) -> None:
        """As `close`, but the other end reads no more of what was written."""
        if self._other is not None:
            self._other._unread.clear()
            self.close()

    def _lose(self) -> None:
        self._other = None
        self._protocol.connection_lost(None)
