"""A release server for tests of `runtime install`, in the form of the GitHub API, that can misbehave."""

from __future__ import annotations

import hashlib
import io
import platform
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web

from tests.sidecar_support import FAKE

_SYSTEM = {"Linux": "ubuntu", "Darwin": "macos"}[platform.system()]
_ARCH = "x64" if platform.machine() in ("x86_64", "AMD64") else "arm64"
NAME = f"llama-b9999-bin-{_SYSTEM}-{_ARCH}.tar.gz"
"""An asset that fits this machine."""


def tarball(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in (files or {"build/bin/llama-server": FAKE.read_bytes()}).items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o755
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


ARCHIVE = tarball() + b"\0" * 200_000  # padding after the end: worth resuming


Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Mirror:
    """A release server. `answer` replaces the way it sends the asset."""

    def __init__(self) -> None:
        self.url = ""
        self.archive, self.digest, self.tag = ARCHIVE, "", "b9999"
        self.names = [NAME]
        self.requests: list[str] = []
        self.answer: Answer = self.send
        self.index_answers: list[web.Response] = []

    async def index(self, request: web.Request) -> web.Response:
        self.requests.append(request.path_qs)
        if self.index_answers:
            return self.index_answers.pop(0)
        digest = self.digest or hashlib.sha256(self.archive).hexdigest()
        assets = [
            {
                "name": name.replace("b9999", self.tag),
                "size": len(self.archive),
                "digest": f"sha256:{digest}",
                "browser_download_url": str(request.url.with_path("/asset").with_query(None)),
            }
            for name in self.names
        ]
        source = {"name": "source.tar.gz", "browser_download_url": "http://x/y"}
        release = {"tag_name": self.tag, "prerelease": True, "assets": [source, *assets]}
        return web.json_response(release if "/tags/" in request.path else [release])

    async def asset(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(f"asset {request.headers.get('Range', '')}".strip())
        return await self.answer(request)

    async def send(self, request: web.Request) -> web.StreamResponse:
        start = request.http_range.start or 0
        if start >= len(self.archive):
            return web.Response(status=416)
        return web.Response(status=206 if start else 200, body=self.archive[start:])

    @property
    def downloads(self) -> int:
        return sum(request.startswith("asset") for request in self.requests)


@asynccontextmanager
async def serving() -> AsyncIterator[Mirror]:
    """A running release server."""
    mirror = Mirror()
    app = web.Application()
    app.router.add_get("/repos/ggml-org/llama.cpp/releases", mirror.index)
    app.router.add_get("/repos/ggml-org/llama.cpp/releases/tags/{tag}", mirror.index)
    app.router.add_get("/asset", mirror.asset)
    app.router.add_get("/moved", mirror.send)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    mirror.url = site.name
    try:
        yield mirror
    finally:
        await runner.cleanup()


def script(path: Path, text: str, mode: int = 0o755) -> Path:
    """A file with this text, executable unless `mode` says otherwise."""
    path.write_text(text)
    path.chmod(mode)
    return path
