"""What the end of an answer tells: usage and timings, read without parsing every token. Pure."""

from __future__ import annotations

import json
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
            value = _last_object(text, f'"{name}":')
            if value:
                found[name] = value
        return found


def _last_object(text: str, key: str) -> dict[str, Any] | None:
    at = text.rfind(key)
    if at < 0:
        return None
    try:
        value, _ = _DECODER.raw_decode(text, at + len(key))
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
