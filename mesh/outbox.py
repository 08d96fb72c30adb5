"""What one side of a connection has to send, and in which order. Pure.

Control messages go first, in their order; then the streams that have body bytes and credit take turns,
one DATA message each. What is ready together shares a frame.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from mesh.frames import Message, Meta, Pong, Token, encode
from mesh.limits import MAX_PENDING_PONGS, MAX_PLAINTEXT
from mesh.noise import CipherState
from mesh.streams import StreamState

_LEAST_ROOM = 64
"""A DATA message is not cut shorter than this to fill up a frame."""


class Outbox:
    """The queue in front of one direction's cipher.

    `load` is asked for this side's live load when a PONG is made. `on_ended` hears of every stream
    whose END was taken for sending.
    """

    __slots__ = ("_cipher", "_control", "_load", "_on_ended", "_pongs", "_rekey_after", "_ring")

    def __init__(
        self,
        cipher: CipherState,
        *,
        load: Callable[[], Meta],
        on_ended: Callable[[StreamState], None],
        rekey_after: int,
    ) -> None:
        self._cipher = cipher
        self._load = load
        self._on_ended = on_ended
        self._rekey_after = rekey_after
        self._control: deque[bytes] = deque()
        self._pongs: deque[Token] = deque(maxlen=MAX_PENDING_PONGS)
        self._ring: deque[StreamState] = deque()

    def control(self, message: Message) -> None:
        """Send a message ahead of all bodies. Raises ValueError where it cannot be encoded."""
        self._control.append(encode(message))

    def pong(self, token: Token) -> None:
        """Answer a PING; of a peer that only asks and never reads, the latest are answered."""
        self._pongs.append(token)

    def schedule(self, stream: StreamState) -> None:
        """Let a stream take turns, if it has something to send that the peer has room for."""
        if not stream.scheduled and stream.can_send:
            stream.scheduled = True
            self._ring.append(stream)

    def withdraw(self, stream: StreamState) -> None:
        """A stream is over."""
        if stream.scheduled:
            stream.scheduled = False
            self._ring.remove(stream)

    @property
    def waiting(self) -> bool:
        """Whether `pull` would return something."""
        return bool(self._control or self._ring or self._pongs)

    def pull(self, limit: int) -> list[bytes]:
        """Frames to write now as pieces in order; stops at `limit` bytes or a frame above it."""
        pieces: list[bytes] = []
        size = 0
        while size < limit and self.waiting:
            ciphertext = self._cipher.encrypt(self._next_plaintext())
            if self._cipher.nonce % self._rekey_after == 0:
                self._cipher.rekey()
            pieces.append(len(ciphertext).to_bytes(2, "big"))
            pieces.append(ciphertext)
            size += 2 + len(ciphertext)
        return pieces

    def _next_plaintext(self) -> bytes:
        parts: list[bytes | memoryview] = []
        room = MAX_PLAINTEXT
        while self._pongs:
            self.control(Pong(self._pongs.popleft(), self._load()))
        control = self._control
        while control and len(control[0]) <= room:
            room -= len(control[0])
            parts.append(control.popleft())
        while self._ring and not control and room >= _LEAST_ROOM:
            stream = self._ring.popleft()
            stream.scheduled = False
            taken = stream.take(room)
            room -= sum(map(len, taken))
            parts += taken
            if stream.end is not None and not stream.queued:
                if len(stream.end) > room:
                    self.schedule(stream)
                    break
                room -= len(stream.end)
                parts.append(stream.end)
                stream.local_ended = True
                self._on_ended(stream)
            else:
                self.schedule(stream)
        return b"".join(parts)

    def validate(self, streams: dict[int, StreamState]) -> None:
        """Raises AssertionError where an invariant does not hold."""
        scheduled = [sid for sid, stream in streams.items() if stream.scheduled]
        if sorted(stream.sid for stream in self._ring) != sorted(scheduled):
            raise AssertionError("the round holds the scheduled streams, once each")
        if any(stream.can_send != stream.scheduled for stream in streams.values()):
            raise AssertionError("exactly the streams that can send are scheduled")
