"""Drains a server's output where nothing can block it: a thread, rotating files, the last lines.

A server whose pipe is not read wedges while /health still says 200, so the pump reads on whatever
happens to the files: a full disk costs log lines, never tokens.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import threading
from pathlib import Path

FILE_BYTES = 10 * 1024 * 1024
FILES = 5
TAIL_BYTES = 32 * 1024
_CHUNK = 64 * 1024


class RotatingFile:
    """Appends bytes to `path`, moving it to `path.1` … when it is full. At most `files` files remain."""

    def __init__(self, path: Path, *, file_bytes: int = FILE_BYTES, files: int = FILES) -> None:
        self.path, self._limit, self._files = path, file_bytes, files
        path.parent.mkdir(parents=True, exist_ok=True)
        self._open()

    def _open(self) -> None:
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._fd).st_size

    def write(self, data: bytes) -> None:
        """Append `data`; raises OSError, after which the next write tries again."""
        if self._fd < 0:
            self._open()
        if self._size + len(data) > self._limit and self._size:
            self.close()
            for i in range(self._files - 2, 0, -1):
                with contextlib.suppress(FileNotFoundError):
                    self._numbered(i).replace(self._numbered(i + 1))
            self.path.replace(self._numbered(1))
            self._open()
        self._size += os.write(self._fd, data)

    def _numbered(self, index: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{index}")

    def close(self) -> None:
        """Close the file; a later write opens it again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class OutputPump:
    """Reads one pipe to its end in a thread of its own.

    Give `write_fd` to the child and call `start()` once it is spawned; `finish()` ends the thread.
    """

    def __init__(self, log: RotatingFile) -> None:
        self._read_fd, self.write_fd = os.pipe()
        self._wake_read, self._wake_write = os.pipe()
        self._log = log
        self._tail = bytearray()
        self._lock = threading.Lock()
        self.total = 0
        """Bytes read so far: a sign of life while the model loads."""
        self._thread = threading.Thread(target=self._run, name="sidecar-output", daemon=True)

    def start(self) -> None:
        """Begin to drain; closes our copy of the write end, so that the end of the child ends the pipe."""
        os.close(self.write_fd)
        self._thread.start()

    def abandon(self) -> None:
        """Free everything when the child could not be spawned."""
        for fd in (self._read_fd, self.write_fd, self._wake_read, self._wake_write):
            os.close(fd)
        self._log.close()

    def finish(self, timeout: float) -> None:
        """Wait up to `timeout` seconds for the pipe's end, then stop reading in any case; idempotent."""
        self._thread.join(timeout)
        with self._lock:
            if self._wake_write >= 0:
                os.close(self._wake_write)
                self._wake_write = -1
        self._thread.join()

    def tail(self, lines: int = 50) -> list[str]:
        """The last lines, oldest first."""
        with self._lock:
            text = self._tail.decode("utf-8", "replace")
        return [line for line in text.splitlines() if line.strip()][-lines:]

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._read_fd, selectors.EVENT_READ)
            selector.register(self._wake_read, selectors.EVENT_READ)
            while not any(key.fd == self._wake_read for key, _ in selector.select()):
                data = os.read(self._read_fd, _CHUNK)
                if not data:
                    break
                self._take(data)
        os.close(self._read_fd)
        os.close(self._wake_read)
        self._log.close()

    def _take(self, data: bytes) -> None:
        with self._lock:
            self.total += len(data)
            self._tail += data[-TAIL_BYTES:]
            del self._tail[:-TAIL_BYTES]
        with contextlib.suppress(OSError):  # a full disk must not stop the draining
            self._log.write(data)
