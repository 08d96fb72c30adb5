"""Server-sent events from bytes, however they are cut. Pure.

Follows https://html.spec.whatwg.org/multipage/server-sent-events.html (parsing an event stream):
lines end in LF, CRLF or CR, `data` lines are joined by LF, a colon at the start is a comment, and an
event that no empty line ended is dropped at the end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sidecar.errors import SidecarError

MAX_EVENT_BYTES = 16 << 20
_LINE_END = re.compile(rb"\r\n|\n|\r")


@dataclass(frozen=True, slots=True)
class Event:
    """One event. `data` is undecoded; `name` is empty for a plain `data:` event."""

    data: bytes
    name: str = ""


class EventTooLarge(SidecarError):
    """An event is over MAX_EVENT_BYTES."""


class EventParser:
    """`feed(bytes)` returns the events that are complete by now."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._name = ""
        self._size = 0
        self._first = True

    def feed(self, chunk: bytes) -> list[Event]:
        """Take the next bytes; raises EventTooLarge."""
        buffer = self._rest + chunk
        if self._first and len(buffer) >= 3:
            buffer = buffer.removeprefix(b"\xef\xbb\xbf")
            self._first = False
        events: list[Event] = []
        start = 0
        for match in _LINE_END.finditer(buffer):
            if match.group() == b"\r" and match.end() == len(buffer):
                break  # the LF of a CRLF may come next
            self._line(buffer[start : match.start()], events)
            start = match.end()
        self._rest = buffer[start:]
        if len(self._rest) + self._size > MAX_EVENT_BYTES:
            raise EventTooLarge(f"an event is over {MAX_EVENT_BYTES} bytes")
        return events

    def _line(self, line: bytes, events: list[Event]) -> None:
        if not line:
            if self._data:
                events.append(Event(b"\n".join(self._data), self._name))
            self._data, self._name, self._size = [], "", 0
            return
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data.append(value)
            self._size += len(value) + 1
        elif field == b"event":
            self._name = value.decode("utf-8", "replace")
