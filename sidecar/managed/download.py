"""Downloads a file over a bad network: resumed, bounded, checked by sha256, with clear errors.

Proxies are taken from the usual environment variables.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from sidecar.errors import ChecksumMismatch, DownloadFailed

MAX_INDEX_BYTES = 16 << 20
MAX_FILE_BYTES = 8 << 30
MAX_WAIT = 60.0
"""The longest Retry-After that is waited for; with a longer one the caller is told instead."""
IDLE_TIMEOUT = 30.0
ATTEMPTS = 6
_CHUNK = 1 << 18

Progress = Callable[[int, int], None]
"""Called with bytes so far and bytes in all (0: unknown)."""


class Downloader:
    """An HTTP session for downloads; an async context manager."""

    def __init__(self, *, idle_timeout: float = IDLE_TIMEOUT, pause: float = 1.0) -> None:
        self._idle, self._pause = idle_timeout, pause

    async def __aenter__(self) -> Downloader:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._idle, sock_read=self._idle)
        headers = {"User-Agent": "qmesh", "Accept-Encoding": "identity"}
        self._session = aiohttp.ClientSession(timeout=timeout, headers=headers, trust_env=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def index(self, url: str) -> Any:
        """Fetch and decode JSON. Raises DownloadFailed."""
        last: Exception | None = None
        for attempt in range(ATTEMPTS):
            try:
                async with self._session.get(
                    url, headers={"Accept": "application/vnd.github+json"}
                ) as answer:
                    if not await self._refused(answer, attempt):
                        return orjson.loads(await _bounded(answer))
            except orjson.JSONDecodeError as error:
                raise DownloadFailed(f"{url} is not JSON: {error}") from error
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                last = error
                await asyncio.sleep(self._pause * attempt)
        raise DownloadFailed(f"{url} cannot be fetched: {_words(last)}") from last

    async def file(
        self, url: str, target: Path, sha256: str, *, size: int = 0, progress: Progress | None = None
    ) -> None:
        """Download to `target`, going on where an earlier try stopped (`target` + `.part`).

        Raises DownloadFailed when it does not arrive, ChecksumMismatch when it is not what was
        promised; then nothing of it stays.
        """
        part = target.with_name(target.name + ".part")
        limit = size or MAX_FILE_BYTES
        for whole in (False, True):
            if whole:
                part.unlink(missing_ok=True)  # what was resumed may be of another file
            resumed = part.exists()
            await self._fetch(url, part, limit, progress)
            digest = await asyncio.to_thread(_sha256, part)
            if digest == sha256.lower():
                part.replace(target)
                return
            if not resumed:
                break
        part.unlink(missing_ok=True)
        raise ChecksumMismatch(
            f"{url} has sha256 {digest}, not {sha256}. It was deleted; do not use that mirror."
        )

    async def _fetch(self, url: str, part: Path, limit: int, progress: Progress | None) -> None:
        last: Exception | None = None
        failures, have = 0, -1
        while failures < ATTEMPTS:
            before, have = have, _size(part)
            failures = failures + 1 if have <= before else 1  # while it goes on, it may break off again
            if have >= limit:
                return
            try:
                headers = {"Range": f"bytes={have}-"} if have else {}
                async with self._session.get(url, headers=headers) as answer:
                    if answer.status == 416:
                        return  # there is nothing beyond what we have
                    if await self._refused(answer, failures - 1):
                        continue
                    if url.startswith("https:") and answer.url.scheme != "https":
                        raise DownloadFailed(f"{url} leads to {answer.url}, which is not encrypted")
                    await _save(answer, part, have if answer.status == 206 else 0, limit, progress)
                    return
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                last = error
                await asyncio.sleep(self._pause * failures)
        raise DownloadFailed(
            f"{url} stopped after {have} bytes: {_words(last)}. Run it again to go on."
        ) from last

    async def _refused(self, answer: aiohttp.ClientResponse, attempt: int) -> bool:
        """True after waiting as the server asked; raises DownloadFailed where waiting does not help."""
        if answer.status < 400:
            return False
        wait = _retry_after(answer)
        limited = answer.status == 429 or (answer.status == 403 and wait is not None)
        if not limited and answer.status < 500:
            raise DownloadFailed(f"{answer.url} says {answer.status} {answer.reason}")
        if wait is None:
            wait = self._pause * (attempt + 1)
        if wait > MAX_WAIT or attempt == ATTEMPTS - 1:
            said = f"{answer.url} says {answer.status}; it may be asked again in {wait:.0f} s"
            raise DownloadFailed(said, retry_after=wait)
        await asyncio.sleep(wait)
        return True


async def _save(
    answer: aiohttp.ClientResponse, part: Path, at: int, limit: int, progress: Progress | None
) -> None:
    expected = at + (answer.content_length or 0)
    with part.open("r+b" if at else "wb") as file:
        file.seek(at)
        file.truncate()
        async for data in answer.content.iter_chunked(_CHUNK):
            at += len(data)
            if at > limit:
                _forget(part)
                raise DownloadFailed(
                    f"{answer.url} sends more than the {limit} bytes that the index promises"
                )
            file.write(data)
            if progress:
                progress(at, expected)


async def _bounded(answer: aiohttp.ClientResponse) -> bytes:
    body = b""
    async for data in answer.content.iter_chunked(_CHUNK):
        body += data
        if len(body) > MAX_INDEX_BYTES:
            raise DownloadFailed(f"{answer.url} is over {MAX_INDEX_BYTES} bytes")
    return body


def _retry_after(answer: aiohttp.ClientResponse) -> float | None:
    """Seconds until the server may be asked again, by Retry-After or GitHub's rate limit headers."""
    said, reset = answer.headers.get("Retry-After", ""), answer.headers.get("X-RateLimit-Reset", "")
    if said.isdigit():
        return float(said)
    if answer.headers.get("X-RateLimit-Remaining") == "0" and reset.isdigit():
        return max(0.0, float(reset) - time.time())
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _words(error: Exception | None) -> str:
    return str(error) or type(error).__name__


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _forget(path: Path) -> None:
    path.unlink(missing_ok=True)
