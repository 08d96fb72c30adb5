"""What arrived on a connection and was not dealt with yet: frames, opened and decoded one at a time. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from mesh.frames import Deframer, Message, Unknown, decode
from mesh.noise import CipherState


class Inbox:
    """The queue behind one direction's cipher. Iterate it for the messages that are whole, in order; an
    iteration that is left early goes on with the next.

    Iterating raises AuthenticationError and MalformedMessage, `feed` what `Deframer.feed` raises.
    """

    __slots__ = ("_cipher", "_deframer", "_frames", "_messages", "_rekey_after", "heard")

    def __init__(self, cipher: CipherState, *, rekey_after: int) -> None:
        self._cipher = cipher
        self._rekey_after = rekey_after
        self._deframer = Deframer()
        self._frames: deque[bytes] = deque()
        self._messages: Iterator[Message | Unknown] | None = None
        self.heard = False
        """A frame of the peer authenticated, so it is no replay of an old handshake."""

    def feed(self, data: bytes | memoryview) -> None:
        """Bytes from the socket."""
        self._frames += self._deframer.feed(data)

    @property
    def waiting(self) -> bool:
        """Whether there may be a message."""
        return self._messages is not None or bool(self._frames)

    def __iter__(self) -> Iterator[Message | Unknown]:
        return self

    def __next__(self) -> Message | Unknown:
        while True:
            if self._messages is not None:
                message = next(self._messages, None)
                if message is not None:
                    return message
                self._messages = None
            if not self._frames:
                raise StopIteration
            self._messages = decode(self._open(self._frames.popleft()))

    def _open(self, frame: bytes) -> bytes:
        plaintext = self._cipher.decrypt(frame)
        if self._cipher.nonce % self._rekey_after == 0:
            self._cipher.rekey()
        self.heard = True
        return plaintext
