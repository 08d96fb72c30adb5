"""Unpacks a downloaded archive so that nothing can leave its folder."""

from __future__ import annotations

import shutil
import stat
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

from sidecar.errors import UnsafeArchive

MAX_BYTES = 16 << 30
MAX_FILES = 20_000


def unpack(archive: Path, target: Path) -> None:
    """Unpack a .zip or .tar.gz into the new folder `target`.

    Raises UnsafeArchive, with nothing left in `target`, for paths or links that lead outside, devices,
    or more than MAX_BYTES or MAX_FILES; also when it is no readable archive.
    """
    target.mkdir(parents=True)
    try:
        if archive.name.endswith((".zip", ".whl")):
            _unzip(archive, target)
        else:
            _untar(archive, target)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
        shutil.rmtree(target, ignore_errors=True)
        raise UnsafeArchive(f"{archive.name} cannot be unpacked safely: {error}") from error
    except UnsafeArchive:
        shutil.rmtree(target, ignore_errors=True)
        raise


def _untar(archive: Path, target: Path) -> None:
    if not hasattr(tarfile, "data_filter"):
        raise UnsafeArchive(f"{archive.name} cannot be unpacked safely by this Python. Use 3.11.4 or newer.")
    with tarfile.open(archive, "r:gz") as tar:
        total = 0
        for count, member in enumerate(tar):
            total += member.size
            _check_size(archive, count, total)
            tar.extract(member, target, filter="data")  # refuses .., absolute paths, devices, outer links


def _unzip(archive: Path, target: Path) -> None:
    with zipfile.ZipFile(archive) as packed:
        total = 0
        for count, member in enumerate(packed.infolist()):
            total += member.file_size
            _check_size(archive, count, total)
            path = PurePosixPath(member.filename)
            mode = member.external_attr >> 16
            if path.is_absolute() or ".." in path.parts or "\\" in member.filename or ":" in member.filename:
                raise UnsafeArchive(f"{archive.name} holds the path {member.filename!r}, which leads outside")
            if stat.S_ISLNK(mode):
                raise UnsafeArchive(f"{archive.name} holds the link {member.filename!r}")
            out = Path(packed.extract(member, target))
            if mode & 0o111 and out.is_file():
                out.chmod(0o755)


def _check_size(archive: Path, count: int, total: int) -> None:
    if total > MAX_BYTES or count >= MAX_FILES:
        raise UnsafeArchive(f"{archive.name} unpacks to more than {MAX_BYTES} bytes or {MAX_FILES} files")
