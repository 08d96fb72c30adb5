"""What was delivered of a streamed answer, byte for byte, in case that it must be continued. Pure.

Most answers need no continuing: their bytes are only kept, and read once somebody asks what they say.
"""

from __future__ import annotations

from typing import Any

import orjson

from client_sdk.events import payloads_of

MAX_JOURNAL = 8 << 20
"""Bytes of an answer kept for continuing it; a longer one can no longer be continued."""


class Transcript:
    """The events that were delivered. `chat`: whether they are those of a chat completion, with its text."""

    __slots__ = ("_first", "_payloads", "_text", "_tokens", "_unread", "ascii", "size")

    def __init__(self, *, chat: bool) -> None:
        self.size = 0
        """Bytes delivered."""
        self.ascii = True
        """Whether all of the text, as far as it was read, is ASCII."""
        self._unread: list[bytes] = []
        self._payloads: list[bytes] = []
        self._text: str | None = "" if chat else None
        self._tokens = 0
        self._first: dict[str, Any] = {}

    def add(self, events: bytes) -> None:
        """Whole events were delivered. Over MAX_JOURNAL bytes they are counted and no longer kept."""
        self.size += len(events)
        if self.size <= MAX_JOURNAL:
            self._unread.append(events)
        else:
            self._unread.clear()
            self._payloads.clear()
            self._text, self._tokens = None, 0

    @property
    def kept(self) -> bool:
        """Whether everything that was delivered is still here."""
        return self.size <= MAX_JOURNAL

    @property
    def payloads(self) -> list[bytes]:
        """The `data:` of each event."""
        self._read()
        return self._payloads

    @property
    def text(self) -> str | None:
        """The text of a chat; None once anything but plain text was delivered, or too much is."""
        self._read()
        return self._text

    @property
    def tokens(self) -> int:
        """Events with text. Each is a token, unless the server held text back."""
        self._read()
        return self._tokens

    @property
    def first(self) -> dict[str, Any]:
        """Id and time of a chat, as its first event told them."""
        self._read()
        return self._first

    def _read(self) -> None:
        for events in self._unread:
            for payload in payloads_of(events):
                self._payloads.append(payload)
                if self._text is not None and payload != b"[DONE]":
                    self._follow(decoded(payload))
        self._unread.clear()

    def _follow(self, event: dict[str, Any]) -> None:
        if not self._first:
            self._first = {key: event[key] for key in ("id", "created") if key in event}
        for choice in event.get("choices") or []:
            delta = choice.get("delta") or {}
            other = any(value for key, value in delta.items() if key not in ("role", "content"))
            if other or choice.get("index", 0) != 0 or choice.get("finish_reason") or choice.get("logprobs"):
                self._text = None
                return
            if self._text is not None and delta.get("content"):
                self._text += delta["content"]
                self._tokens += 1
                self.ascii &= str(delta["content"]).isascii()


def decoded(payload: bytes) -> dict[str, Any]:
    """The JSON object in a payload; empty where it is none."""
    try:
        value = orjson.loads(payload)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}
