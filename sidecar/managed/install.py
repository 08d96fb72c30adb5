"""`runtime install`: a checked llama.cpp release, unpacked, proved to work, and put into use."""

from __future__ import annotations

import asyncio
import logging
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

from sidecar.errors import RuntimeFailure, SidecarError
from sidecar.managed.archive import unpack
from sidecar.managed.download import Downloader, Progress
from sidecar.managed.gpu import ACCELERATORS, find_gpu
from sidecar.managed.manifest import Manifest
from sidecar.managed.releases import Asset, Platform, Release, choose, parse_releases
from sidecar.managed.store import Install, Store
from sidecar.managed.verify import sees, verify

log = logging.getLogger("qmesh.sidecar")

GITHUB = "https://api.github.com"
REPOSITORY = "ggml-org/llama.cpp"


async def install(
    store: Store,
    *,
    base_url: str = GITHUB,
    manifest: Manifest | None = None,
    tag: str | None = None,
    accelerator: str | None = None,
    machine: Platform | None = None,
    downloader: Downloader | None = None,
    progress: Progress | None = None,
) -> Install:
    """Install a release and put it into use; the one in use before is kept for `Store.rollback`.

    `base_url` is any server with a release index in the GitHub API form (a mirror). `tag` and
    `accelerator` default to the manifest's and to what the machine's GPU needs; where a build does not
    see the GPU the next best is tried. A second install at the same time waits for the first and finds
    its work done. Raises RuntimeFailure (DownloadFailed, ChecksumMismatch, UnsafeArchive) or
    BinaryNotFound; the store is then as it was.
    """
    manifest = manifest or Manifest()
    machine = machine or Platform(platform.system(), platform.machine())
    gpu = await asyncio.to_thread(find_gpu)
    accelerators = (accelerator,) if accelerator else ACCELERATORS[gpu]
    tag = tag or manifest.tag
    async with store.locked(), downloader or Downloader() as source:
        where = f"releases/tags/{tag}" if tag else "releases?per_page=30"
        index = await source.index(f"{base_url.rstrip('/')}/repos/{REPOSITORY}/{where}")
        candidates = choose(parse_releases(index), machine, accelerators)
        for release, assets in candidates:
            last = assets is candidates[-1][1]
            try:
                done = await _install(store, source, release, assets, manifest, progress)
            except SidecarError as error:
                if last:
                    raise
                log.warning(
                    "the %s build does not work here (%s); trying the next", assets[0].accelerator, error
                )
                continue
            if last or sees(done.devices, gpu):
                return store.use(done.name)
            log.warning("the %s build does not see the GPU; trying the next", assets[0].accelerator)
    raise AssertionError("unreachable: `choose` returns at least one candidate")


async def _install(
    store: Store,
    source: Downloader,
    release: Release,
    assets: Sequence[Asset],
    manifest: Manifest,
    progress: Progress | None,
) -> Install:
    build, hashes = assets[0], [manifest.hash_of(asset) for asset in assets]
    name = f"{release.tag}-{build.accelerator}" + (f"-{build.version}" if build.version else "")
    ready = store.load(name)
    if ready and ready.sha256 == hashes[0]:
        return ready
    place = store.folder_for(name)
    downloads = store.root / "downloads"
    downloads.mkdir(exist_ok=True)
    try:
        for asset, sha256 in zip(assets, hashes, strict=True):
            archive = downloads / asset.name
            await source.file(asset.url, archive, sha256, size=asset.size, progress=progress)
            await asyncio.to_thread(unpack, archive, place / asset.name.partition("-bin-")[0])
            archive.unlink()
        binary = await asyncio.to_thread(_gather, place)
        proof = await verify(binary)
        return store.keep(
            place,
            Install(
                name=name,
                source=build.url,
                binary=str(binary.relative_to(place)),
                version=proof.version,
                accelerator=build.accelerator,
                sha256=hashes[0],
                devices=proof.devices,
            ),
        )
    finally:
        await asyncio.to_thread(shutil.rmtree, place, ignore_errors=True)


def _gather(place: Path) -> Path:
    """The llama-server below `place`, with the libraries of other assets moved beside it."""
    found = sorted(p for p in place.rglob("llama-server*") if p.name in ("llama-server", "llama-server.exe"))
    if not found:
        raise RuntimeFailure("the archive holds no llama-server")
    for library in place.rglob("*.dll"):
        if library.parent != found[0].parent:
            shutil.move(library, found[0].parent / library.name)
    return found[0]
