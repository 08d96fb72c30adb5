"""`runtime install` against a release server that misbehaves: the right result or a clear error each time."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from typer.testing import CliRunner

from node.cli.runtime import app
from sidecar.errors import BinaryNotFound, ChecksumMismatch, DownloadFailed, RuntimeFailure, UnsafeArchive
from sidecar.managed import verify as verify_module
from sidecar.managed.download import Downloader
from sidecar.managed.gpu import Gpu
from sidecar.managed.install import install
from sidecar.managed.manifest import Manifest
from sidecar.managed.store import Install, Store
from sidecar.managed.verify import Proof
from sidecar.runtime import find_server
from tests.sidecar_mirror import ARCHIVE, NAME, Mirror, serving, tarball
from tests.support import seconds


@pytest.fixture
async def mirror() -> AsyncIterator[Mirror]:
    async with serving() as mirror:
        yield mirror


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runtime")


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips the proof that the server runs, where the download is what is tested."""

    async def trusts(_binary: Path) -> Proof:
        return Proof("9999 (fake)", [], " t0")

    monkeypatch.setattr("sidecar.managed.install.verify", trusts)


async def fetch(mirror: Mirror, store: Store, **options: object) -> Install:
    defaults: dict[str, object] = {
        "base_url": mirror.url,
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


@pytest.mark.usefixtures("unverified")
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


@pytest.mark.parametrize("said", ["does not see the GPU", "does not work here"])
async def test_a_build_that_does_not_use_the_gpu_gives_way_to_the_next(
    mirror: Mirror,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    said: str,
) -> None:
    monkeypatch.setattr("sidecar.managed.install.find_gpu", lambda: Gpu.OTHER)  # the fake sees no device
    system, arch = NAME.split("-")[3], NAME.split("-")[4]
    mirror.names = [NAME, f"llama-b9999-bin-{system}-vulkan-{arch}"]
    if said == "does not work here":
        verify = verify_module.verify

        async def fails_on_vulkan(binary: Path) -> Proof:
            if "vulkan" in str(binary):
                raise RuntimeFailure("no loader")
            return await verify(binary)

        monkeypatch.setattr("sidecar.managed.install.verify", fails_on_vulkan)
    done = await fetch(mirror, store, accelerator=None)
    assert done.accelerator == "cpu"
    assert store.current() == done
    assert f"the vulkan build {said}" in caplog.text


# ── bad servers ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("unverified")
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


@pytest.mark.usefixtures("unverified")
async def test_an_interrupted_install_resumes_in_the_next(mirror: Mirror, store: Store) -> None:
    part = store.root / "downloads" / f"{NAME}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(mirror.archive[:50_000])
    assert await fetch(mirror, store)
    assert "asset bytes=50000-" in mirror.requests


@pytest.mark.usefixtures("unverified")
async def test_a_leftover_of_another_file_is_started_anew(mirror: Mirror, store: Store) -> None:
    part = store.root / "downloads" / f"{NAME}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"something else" * 1000)
    assert await fetch(mirror, store)
    assert mirror.requests[-1] == "asset"


@pytest.mark.usefixtures("unverified")
async def test_a_server_that_ignores_ranges(mirror: Mirror, store: Store) -> None:
    async def whole(request: web.Request) -> web.Response:
        return web.Response(body=mirror.archive)

    mirror.answer = whole
    part = store.root / "downloads" / f"{NAME}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(mirror.archive[:50_000])
    assert await fetch(mirror, store)


@pytest.mark.usefixtures("unverified")
async def test_wrong_hash_is_refused_and_deleted(mirror: Mirror, store: Store) -> None:
    mirror.digest = "0" * 64
    with pytest.raises(ChecksumMismatch, match="deleted"):
        await fetch(mirror, store)
    assert list((store.root / "downloads").iterdir()) == []
    assert store.current() is None
    assert store.installs() == []


@pytest.mark.usefixtures("unverified")
async def test_the_pinned_hash_wins_over_the_index(mirror: Mirror, store: Store) -> None:
    right = hashlib.sha256(mirror.archive).hexdigest()
    with pytest.raises(ChecksumMismatch, match="index promises another"):
        await fetch(mirror, store, manifest=Manifest("b9999", {NAME: "1" * 64}))
    done = await fetch(mirror, store, manifest=Manifest("b9999", {NAME: right}))
    assert done.sha256 == right
    assert "/repos/ggml-org/llama.cpp/releases/tags/b9999" in mirror.requests


@pytest.mark.usefixtures("unverified")
async def test_redirects_are_followed(mirror: Mirror, store: Store) -> None:
    async def moved(_request: web.Request) -> web.Response:
        raise web.HTTPFound("/moved")

    mirror.answer = moved
    assert await fetch(mirror, store)


@pytest.mark.usefixtures("unverified")
async def test_a_redirect_without_end_is_an_error(mirror: Mirror, store: Store) -> None:
    async def loop(_request: web.Request) -> web.Response:
        raise web.HTTPFound("/asset")

    mirror.answer = loop
    with pytest.raises(DownloadFailed):
        await fetch(mirror, store)


@pytest.mark.usefixtures("unverified")
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


@pytest.mark.usefixtures("unverified")
async def test_a_silent_server_is_given_up(mirror: Mirror, store: Store) -> None:
    async def silent(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(60)
        return web.Response()

    mirror.answer = silent
    start = time.monotonic()
    with pytest.raises(DownloadFailed, match="stopped after 0 bytes"):
        await fetch(mirror, store, downloader=Downloader(idle_timeout=0.05, pause=0.01))
    assert time.monotonic() - start < seconds(5)


@pytest.mark.usefixtures("unverified")
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
@pytest.mark.usefixtures("unverified")
async def test_a_bad_index_is_a_clear_error(mirror: Mirror, store: Store, answer: web.Response) -> None:
    mirror.index_answers = [answer]
    with pytest.raises(DownloadFailed):
        await fetch(mirror, store)


@pytest.mark.usefixtures("unverified")
async def test_more_bytes_than_promised_are_refused(mirror: Mirror, store: Store) -> None:
    async def more(_request: web.Request) -> web.Response:
        return web.Response(body=mirror.archive + b"x" * 1000)

    mirror.answer = more
    with pytest.raises(DownloadFailed, match="sends more"):
        await fetch(mirror, store)


@pytest.mark.usefixtures("unverified")
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


# ── the command line ────────────────────────────────────────────────────────────────────────────


async def test_the_commands(mirror: Mirror, tmp_path: Path) -> None:
    async def run(*arguments: str) -> tuple[int, list[dict[str, object]]]:
        command = [*arguments, "--runtime-dir", str(tmp_path / "runtime"), "--json"]
        result = await asyncio.to_thread(CliRunner().invoke, app, command)
        return result.exit_code, [json.loads(line) for line in result.stdout.splitlines()]

    at_mirror = ("--base-url", mirror.url, "--accelerator", "cpu")
    code, (first,) = await run("install", *at_mirror)
    assert (code, first["name"], first["state"]) == (0, "b9999-cpu", "in use")
    mirror.tag = "b10000"
    await run("install", *at_mirror)
    code, listed = await run("ls")
    assert code == 0
    assert [(row.get("name"), row.get("state")) for row in listed[:-1]] == [
        ("b10000-cpu", "in use"),
        ("b9999-cpu", "previous"),
    ]
    chosen = listed[-1]["chosen"]
    assert isinstance(chosen, dict)
    assert chosen["kind"] == "managed"
    assert (await run("rollback"))[1][0]["name"] == "b9999-cpu"
    assert (await run("use", "b10000-cpu"))[1][0]["name"] == "b10000-cpu"
    code, (error,) = await run("use", "none")
    assert code == 7
    assert "b10000-cpu, b9999-cpu" in str(error["error"])
    mirror.digest = "0" * 64
    mirror.tag = "b10001"
    code, (error,) = await run("install", *at_mirror)
    assert code == 7
    assert "sha256" in str(error["error"])
