"""What the end of an answer tells: usage and timings, read without parsing every token. Pure."""

from __future__ import annotations

import json
import re
from typing import Any

KEEP = 16 << 10
_DECODER = json.JSONDecoder()


class Tail:
    """The last bytes of an answer."""

    __slots__ = ("_kept", "_size")

    def __init__(self) -> None:
        self._kept: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> None:
        """Take in the next bytes."""
        self._kept.append(data)
        self._size += len(data)
        while self._size - len(self._kept[0]) >= KEEP:
            self._size -= len(self._kept.pop(0))

    def facts(self) -> dict[str, Any]:
        """`usage` and `timings`, as far as the answer's last bytes hold them."""
        text = b"".join(self._kept)[-KEEP:].decode("utf-8", "replace")
        found = {}
        for name in ("usage", "timings"):
            value = _last_object(text, name)
            if value:
                found[name] = value
        return found


def _last_object(text: str, name: str) -> dict[str, Any] | None:
    at = text.rfind(f'"{name}"')
    colon = re.compile(r"\s*:\s*").match(text, at + len(name) + 2) if at >= 0 else None
    if colon is None:
        return None
    try:
        value, _ = _DECODER.raw_decode(text, colon.end())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
