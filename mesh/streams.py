"""One stream's bookkeeping: credit in both directions, the queue to send, and which ends are closed.

Pure. Bodies that arrive are handed on at once and only counted here; what waits for the peer's credit
is kept in order.
"""

from __future__ import annotations

from collections import deque

import msgpack

from mesh.limits import INITIAL_CREDIT, MAX_CREDIT, MAX_DATA

DATA_OVERHEAD = 1 + 1 + 5 + 3
"""Bytes of a DATA message around its body, at most: array, type, sid, length."""


class StreamState:
    """A stream as one side sees it. Sizes in bytes.

    `send_credit`: how much may still be sent. `queued`: how much waits to be. `receive_credit`: how much
    the peer may still send. `unread`: what arrived and the application has not consumed. `window`: what
    the peer is kept supplied with. `granting`: consumed, but not yet granted again.
    """

    __slots__ = (
        "_data_prefix", "_queue", "blocked_since", "end", "granting", "head_received",
        "head_sent", "local_ended", "queued", "receive_credit", "remote_ended", "scheduled",
        "send_credit", "sid", "stop_receiving", "unread", "window",
    )  # fmt: skip

    def __init__(self, sid: int, send_credit: int) -> None:
        self.sid = sid
        self.send_credit = send_credit
        self.queued = 0
        self.receive_credit = INITIAL_CREDIT
        self.window = INITIAL_CREDIT
        self.unread = 0
        self.granting = 0
        self.head_sent = False
        self.head_received = False
        self.end: bytes | None = None
        """END as it will be sent when the queue is empty."""
        self.local_ended = False
        """END was sent."""
        self.remote_ended = False
        self.stop_receiving = False
        """Nobody will read what still arrives."""
        self.scheduled = False
        """It is in the connection's round of streams that can send."""
        self.blocked_since: float | None = None
        """When a tick first found that a body waits for the peer's credit."""
        self._queue: deque[bytes | memoryview] | None = None  # made with the first byte that waits
        self._data_prefix = b"\x93\x01" + msgpack.packb(sid)

    def enqueue(self, data: bytes) -> None:
        """Append to what will be sent as DATA."""
        if data:
            if self._queue is None:
                self._queue = deque()
            self._queue.append(data)
            self.queued += len(data)

    @property
    def can_send(self) -> bool:
        """Whether there is something to send that the peer has room for."""
        if self.queued:
            return self.send_credit > 0
        return self.end is not None and not self.local_ended

    @property
    def starved(self) -> bool:
        """Whether a body waits for nothing but the peer's credit."""
        return self.queued > 0 and self.send_credit == 0

    def take(self, room: int) -> list[bytes | memoryview]:
        """One DATA message of at most `room` bytes as pieces to be joined; empty if none is possible."""
        size = min(room - DATA_OVERHEAD, MAX_DATA, self.queued, self.send_credit)
        if size <= 0 or self._queue is None:
            return []
        header = b"\xc4" + size.to_bytes(1, "big") if size < 256 else b"\xc5" + size.to_bytes(2, "big")
        pieces: list[bytes | memoryview] = [self._data_prefix, header]
        self.queued -= size
        self.send_credit -= size
        while size:
            piece = self._queue.popleft()
            if len(piece) > size:
                view = memoryview(piece)
                self._queue.appendleft(view[size:])
                piece = view[:size]
            pieces.append(piece)
            size -= len(piece)
        return pieces

    def drop_queue(self) -> None:
        """Forget what was not sent."""
        self._queue = None
        self.queued = 0
        self.end = None

    def received(self, size: int) -> bool:
        """Count `size` bytes of DATA; False if the peer had no credit for them."""
        if size > self.receive_credit:
            return False
        self.receive_credit -= size
        self.unread += size
        return True

    def consumed(self, size: int, growth: int) -> int:
        """Count `size` bytes as read and return how many to grant now (0: not worth a message yet).

        A stream that keeps being read is a bulk transfer: its window doubles with every grant, by at most
        `growth` bytes, so that the sender is not stopped by the round trip.
        """
        self.unread -= size
        self.granting += size
        if self.remote_ended or self.granting < self.window // 2:
            return 0
        grown = min(self.window, MAX_CREDIT - self.window, growth)
        self.window += grown
        amount = self.granting + grown
        self.granting = 0
        self.receive_credit += amount
        return amount

    def validate(self) -> None:
        """Raises AssertionError where an invariant does not hold."""
        waiting = sum(len(piece) for piece in self._queue or ())
        _require(self.queued == waiting, "queued is the size of the queue")
        _require(self.send_credit >= 0 and self.receive_credit >= 0, "credit is never negative")
        _require(self.unread >= 0 and self.granting >= 0, "no byte is consumed twice")
        _require(INITIAL_CREDIT <= self.window <= MAX_CREDIT, "the window is within its bounds")
        if not self.stop_receiving:
            held = self.receive_credit + self.unread + self.granting
            _require(held == self.window, "credit, unread and consumed bytes make up the window")
        _require(not (self.local_ended and self.queued), "nothing is queued behind END")


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise AssertionError(rule)
