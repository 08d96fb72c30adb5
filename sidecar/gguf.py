"""Reads the header of a GGUF file: what the model is and how much memory it will take.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little endian).
Nothing but the key-value section is read, and every length is checked against the file before use.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sidecar.errors import ModelLoadFailed

Value = int | float | bool | str | list["Value"]

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_MAX_PAIRS = 1 << 16
_KEEP_ITEMS = 1024  # longer arrays (vocabularies) are skipped, not kept


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The facts of a model file. Sizes are in bytes, `train_context` in tokens."""

    path: Path
    file_bytes: int
    metadata: Mapping[str, Value]

    @property
    def architecture(self) -> str:
        """For example `llama`."""
        return str(self.metadata.get("general.architecture", "unknown"))

    @property
    def name(self) -> str:
        """The model's own name, or the file's."""
        return str(self.metadata.get("general.name") or self.path.stem)

    @property
    def train_context(self) -> int:
        """The context that the model was trained for; 0 where the file does not say."""
        return self._int("context_length")

    @property
    def layers(self) -> int:
        """Transformer blocks."""
        return self._int("block_count")

    @property
    def cache_bytes_per_token(self) -> int:
        """Key-value cache of one token in f16: 2 × 2 bytes × head size × key-value heads, over all layers.

        An upper estimate: sliding windows and recurrent layers take less.
        """
        heads = max(1, self._int("attention.head_count"))
        size = self._int("embedding_length") // heads
        sizes = self._int("attention.key_length", size) + self._int("attention.value_length", size)
        per_layer = self.metadata.get(f"{self.architecture}.attention.head_count_kv")
        if isinstance(per_layer, list):
            kv_heads = sum(n for n in per_layer if isinstance(n, int))
        else:
            kv_heads = self._int("attention.head_count_kv", heads) * self.layers
        return 2 * sizes * max(0, kv_heads)

    def memory(self, tokens: int) -> int:
        """Estimated resident bytes: weights, cache for `tokens` in all, 10 % and 64 MiB of buffers."""
        return int((self.file_bytes + tokens * self.cache_bytes_per_token) * 1.1) + (64 << 20)

    def _int(self, key: str, default: int = 0) -> int:
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, list):
            value = max((v for v in value if isinstance(v, int)), default=default)
        return value if isinstance(value, int) and value >= 0 else default


def read_header(path: Path) -> GgufHeader:
    """Read `path`; raises ModelLoadFailed with cause and fix when it is no readable GGUF file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise ModelLoadFailed(f"{path} is not a GGUF model: only {size} bytes. Download it again.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return GgufHeader(path, size, _Reader(data).metadata())
    except OSError as error:
        raise ModelLoadFailed(f"cannot read the model {path}: {error.strerror}. Check the path.") from error
    except (struct.error, _Malformed) as error:
        raise ModelLoadFailed(f"{path} is not a usable GGUF model: {error}. Download it again.") from error


class _Malformed(ValueError):
    pass


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at, self._size = data, 0, len(data)

    def metadata(self) -> dict[str, Value]:
        magic, version = self._data[:4], struct.unpack_from("<I", self._data, 4)[0]
        if magic != b"GGUF":
            raise _Malformed(f"it starts with {magic!r}, not GGUF")
        if version not in (2, 3):
            raise _Malformed(f"GGUF version {version} is not supported")
        self._at = 16
        pairs = int(self._scalar(10))
        if pairs > _MAX_PAIRS:
            raise _Malformed(f"{pairs} metadata entries")
        return {self._string(): self._value(int(self._scalar(4))) for _ in range(pairs)}

    def _scalar(self, kind: int) -> int | float | bool:
        form = _SCALARS.get(kind)
        if form is None:
            raise _Malformed(f"unknown value type {kind}")
        value: int | float | bool = struct.unpack_from(form, self._data, self._at)[0]
        self._at += struct.calcsize(form)
        return value

    def _take(self, length: int) -> int:
        start = self._at
        if length > self._size - start:
            raise _Malformed("the file is cut off")
        self._at += length
        return start

    def _string(self) -> str:
        length = int(self._scalar(10))
        start = self._take(length)
        return self._data[start : start + length].decode("utf-8", "replace")

    def _value(self, kind: int) -> Value:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(kind)
        of, count = int(self._scalar(4)), int(self._scalar(10))
        if of == _ARRAY:
            raise _Malformed("nested arrays")
        if count > self._size:
            raise _Malformed("the file is cut off")
        if count <= _KEEP_ITEMS:
            return [self._value(of) for _ in range(count)]
        if of == _STRING:
            for _ in range(count):
                self._take(int(self._scalar(10)))
        else:
            form = _SCALARS.get(of)
            if form is None:
                raise _Malformed(f"unknown value type {of}")
            self._take(count * struct.calcsize(form))
        return []
