"""From the bytes of a worker's answer to JSON events, and to text that stops where it must. Pure.

llama-server writes one `data: {json}` line per event and an empty line after it; comments (`:`) keep
the connection alive. The chunks arrive cut anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import orjson

from mesh.errors import MalformedMessage

MAX_EVENT = 4 << 20


class EventDecoder:
    """Server-sent events with JSON payloads, from bytes cut anywhere.

    `done` is true once `[DONE]` was seen.
    """

    __slots__ = ("_rest", "done")

    def __init__(self) -> None:
        self._rest = b""
        self.done = False

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The events that are complete now. Raises MalformedMessage for anything that is none."""
        whole, _, self._rest = (self._rest + data).rpartition(b"\n\n")
        if len(self._rest) > MAX_EVENT:
            raise MalformedMessage(f"an event of the answer is larger than {MAX_EVENT} bytes")
        events = []
        for payload in payloads_of(whole):
            if payload == b"[DONE]":
                self.done = True
            else:
                events.append(decode_object(payload))
        return events


def payloads_of(events: bytes) -> Iterator[bytes]:
    """The `data:` of each event."""
    for line in events.split(b"\n"):
        if line.startswith(b"data:"):
            yield line[5:].strip()


def decode_object(payload: bytes) -> dict[str, Any]:
    """A JSON object. Raises MalformedMessage for anything else."""
    try:
        value = orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        raise MalformedMessage(f"the answer is not JSON: {payload[:80]!r}") from error
    if not isinstance(value, dict):
        raise MalformedMessage(f"the answer is not a JSON object: {payload[:80]!r}")
    return value


class StopMatcher:
    """Ends a text before the first of the `stops` that is complete, however the text is cut.

    Text that may be the beginning of a stop string is held back until that is decided.
    """

    __slots__ = ("_held", "_stops", "matched")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """The text that may be shown now. After a match (`matched`) there is none."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            _, at, self.matched = min(ends)  # complete first; of those the one that began first
            self._held = ""
            return text[:at]
        keep = max(self._overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, once the answer has ended."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """How many characters at the end of `text` begin `stop`."""
        for length in range(min(len(text), len(stop) - 1), 0, -1):
            if text.endswith(stop[:length]):
                return length
        return 0
