"""A model file's digest: tells whether two workers serve the very same weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

SIZE = 16
CACHE_FILE = "digests.json"


def model_digest(model: Path, folder: Path) -> bytes:
    """The first 16 bytes of the file's SHA-256. Reads the whole file the first time; later answers come
    from a cache in `folder`, valid while size and modification time stay the same. Blocks; raises OSError.
    """
    state = model.stat()
    entry = f"{model.resolve()}|{state.st_size}|{state.st_mtime_ns}"
    cache = folder / CACHE_FILE
    known: dict[str, str] = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        known = json.loads(cache.read_text(encoding="utf-8"))
    if entry not in known:
        with model.open("rb") as file:
            known[entry] = hashlib.file_digest(file, "sha256").hexdigest()
        fresh = cache.with_suffix(".new")
        fresh.write_text(json.dumps(known), encoding="utf-8")
        fresh.replace(cache)
    return bytes.fromhex(known[entry])[:SIZE]
