"""Reads a release index in the GitHub API form and picks the asset for a machine. Pure.

Asset names are parsed, never compared as literals: `llama-<tag>-bin-<os>[-<accelerator>[-<version>]]-
<arch>.{zip,tar.gz}`; versions of accelerators drift from tag to tag. The CUDA runtime of Windows is an
asset of its own (`cudart-llama-bin-…`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sidecar.errors import DownloadFailed

_NAME = re.compile(
    r"^(?P<kind>llama-[\w.]+|cudart-llama)-bin-(?P<system>win|macos|ubuntu|linux)"
    r"(?:-(?P<accelerator>[a-z]+)(?:-(?P<version>[\w.]+))?)?-(?P<arch>x64|x86_64|amd64|arm64|aarch64)"
    r"\.(?:zip|tar\.gz)$"
)
_SYSTEMS = {"Linux": {"ubuntu", "linux"}, "Darwin": {"macos"}, "Windows": {"win"}}
_ARCHITECTURES = {"x86_64": "x64", "amd64": "x64", "x64": "x64", "arm64": "arm64", "aarch64": "arm64"}
_SAME = {"rocm": "hip"}


@dataclass(frozen=True, slots=True)
class Platform:
    """What `platform.system()` and `platform.machine()` say."""

    system: str
    machine: str


@dataclass(frozen=True, slots=True)
class Asset:
    """One downloadable file. `sha256` is empty where the index gives none; `size` is in bytes."""

    name: str
    url: str
    size: int
    sha256: str
    system: str
    accelerator: str
    version: str
    arch: str
    is_cuda_runtime: bool


@dataclass(frozen=True, slots=True)
class Release:
    """One release with the assets whose names we understand."""

    tag: str
    assets: tuple[Asset, ...]


def parse_releases(index: Any) -> list[Release]:
    """The releases of an index: a list of them, or one. Raises DownloadFailed when it is no index."""
    entries = index if isinstance(index, list) else [index]
    releases = []
    for entry in entries:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("assets"), list):
            raise DownloadFailed("the release index is not in the form of the GitHub API")
        tag = str(entry.get("tag_name", ""))
        if not re.fullmatch(r"\w[\w.-]{0,99}", tag):
            raise DownloadFailed(f"the release index has the strange tag {tag!r}")
        parsed = (parse_asset(asset) for asset in entry["assets"])
        releases.append(Release(tag, tuple(filter(None, parsed))))
    return releases


def parse_asset(entry: Any) -> Asset | None:
    """An asset of the index, or None when its name is not that of a server build."""
    if not isinstance(entry, Mapping):
        return None
    name = str(entry.get("name", ""))
    found, url = _NAME.match(name), entry.get("browser_download_url")
    if not found or not isinstance(url, str):
        return None
    accelerator = found["accelerator"] or "cpu"
    digest, size = str(entry.get("digest") or ""), entry.get("size")
    return Asset(
        name=name,
        url=url,
        size=size if isinstance(size, int) else 0,
        sha256=digest.removeprefix("sha256:") if digest.startswith("sha256:") else "",
        system=found["system"],
        accelerator=_SAME.get(accelerator, accelerator),
        version=found["version"] or "",
        arch=_ARCHITECTURES[found["arch"]],
        is_cuda_runtime=found["kind"] == "cudart-llama",
    )


def choose(
    releases: Iterable[Release], platform: Platform, accelerators: Sequence[str]
) -> list[tuple[Release, list[Asset]]]:
    """What to try, best first: of the newest release with a build for this platform, one entry for each
    wanted accelerator that it has. An entry is the build and what it needs beside it.

    Raises DownloadFailed when no release has a build for the platform.
    """
    systems = _SYSTEMS.get(platform.system, set())
    arch = _ARCHITECTURES.get(platform.machine.lower(), platform.machine)
    for release in releases:
        fitting = [a for a in release.assets if a.system in systems and a.arch == arch]
        builds = [a for a in fitting if not a.is_cuda_runtime]
        found = []
        for accelerator in accelerators:
            same = [a for a in builds if a.accelerator == accelerator]
            if same:
                build = max(same, key=lambda a: version_key(a.version))
                beside = [a for a in fitting if a.is_cuda_runtime and a.version == build.version]
                found.append((release, [build, *beside] if accelerator == "cuda" else [build]))
        if found:
            return found
    wanted = "/".join(accelerators)
    raise DownloadFailed(
        f"no release has a {wanted} build for {platform.system} on {platform.machine}. "
        "Use `qmesh-node runtime build`, or the embedded server."
    )


def version_key(version: str) -> tuple[int, ...]:
    """`12.4` as (12, 4), so that 12.10 is newer than 12.4."""
    return tuple(int(part) for part in re.findall(r"\d+", version))
