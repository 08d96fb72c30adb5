"""A model file's digest: tells whether two workers serve the very same weights."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from pathlib import Path
from typing import Any

SIZE = 16
CACHE_FILE = "digests.json"
_ONE_AT_A_TIME = threading.Lock()
"""Models start together, and a disk reads one file faster than many at once."""


def model_digest(model: Path, folder: Path) -> bytes:
    """The first 16 bytes of the file's SHA-256. Reads the whole file the first time; later answers come
    from a cache in `folder`, valid while size and modification time stay the same. Blocks; raises OSError.
    """
    state = model.stat()
    entry = f"{model.resolve()}|{state.st_size}|{state.st_mtime_ns}"
    cache = folder / CACHE_FILE
    with _ONE_AT_A_TIME:
        known = _read(cache)
        if entry not in known:
            with model.open("rb") as file:
                known[entry] = hashlib.file_digest(file, "sha256").hexdigest()
            fresh = cache.with_suffix(".new")
            fresh.write_text(json.dumps(known), encoding="utf-8")
            fresh.replace(cache)
    return bytes.fromhex(known[entry])[:SIZE]


def _read(cache: Path) -> dict[str, str]:
    """What the cache holds; whatever is garbled counts as absent."""
    try:
        held: Any = json.loads(cache.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    if not isinstance(held, dict):
        return {}
    return {entry: text for entry, text in held.items() if re.fullmatch(r"[0-9a-f]{64}", str(text))}
