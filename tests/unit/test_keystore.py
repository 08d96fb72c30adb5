"""The identity on disk: made once, private, and refused where it is not."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mesh.errors import ConfigurationError
from mesh.identity import Identity
from mesh.keystore import EXIT_IDENTITY, ID_FILE, KEY_FILE, load_identity
from tests.support import seconds

NOBODY = 65534


def refused(folder: Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_identity(folder)
    assert caught.value.exit_code == EXIT_IDENTITY
    assert caught.value.fix
    return str(caught.value)


def test_made_on_first_use_and_the_same_ever_after(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    identity = load_identity(folder)
    assert (folder / KEY_FILE).read_text() == identity.seed.hex() + "\n"
    assert (folder / ID_FILE).read_text() == identity.id.hex() + "\n"
    assert stat.S_IMODE((folder / KEY_FILE).stat().st_mode) == 0o600
    assert load_identity(folder).id == identity.id
    assert sorted(path.name for path in folder.iterdir()) == [KEY_FILE, ID_FILE]


def test_its_mode_does_not_depend_on_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        load_identity(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / KEY_FILE).stat().st_mode) == 0o600


def test_first_starts_at_once_agree_on_one_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = {identity.id for identity in pool.map(load_identity, [tmp_path] * 8)}
    assert len(ids) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [KEY_FILE, ID_FILE]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o610])
def test_refused_if_others_can_read_it(tmp_path: Path, mode: int) -> None:
    load_identity(tmp_path)
    (tmp_path / KEY_FILE).chmod(mode)
    text = refused(tmp_path)
    assert f"{mode:04o}" in text
    assert f"chmod 600 {tmp_path / KEY_FILE}" in text


@pytest.mark.parametrize(
    "content", [b"", b"xyz", b"A" * 64, b"0" * 63, b"0" * 65, b"\xff" * 64, b"0" * 64 + b"\n0"]
)
def test_a_garbled_key_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / KEY_FILE
    path.write_bytes(content)
    path.chmod(0o600)
    assert "does not hold a key" in refused(tmp_path)
    assert path.read_bytes() == content


def test_a_folder_in_its_place(tmp_path: Path) -> None:
    (tmp_path / KEY_FILE).mkdir(mode=0o700)
    assert "cannot be read" in refused(tmp_path)


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be read" in refused(tmp_path / "file")


@pytest.mark.parametrize("garbage", [b"someone else\n", b"\xff\xfe", b""])
def test_a_wrong_id_file_is_written_anew(tmp_path: Path, garbage: bytes) -> None:
    identity = load_identity(tmp_path)
    (tmp_path / ID_FILE).write_bytes(garbage)
    load_identity(tmp_path)
    assert (tmp_path / ID_FILE).read_text() == identity.id.hex() + "\n"


def test_an_id_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / ID_FILE).mkdir()
    assert ID_FILE in refused(tmp_path)


@pytest.mark.parametrize("what", ["folder", "key"])
def test_unreadable_for_this_user(tmp_path: Path, what: str) -> None:
    """As an ordinary user, also where the tests run as root."""
    folder = tmp_path / "folder"
    load_identity(folder)
    if what == "folder":
        folder.chmod(0)
    else:
        (folder / KEY_FILE).chmod(0)
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from mesh.errors import ConfigurationError\n"
        "from mesh.keystore import load_identity\n"
        "if os.geteuid() == 0: os.setuid(int(sys.argv[2]))\n"
        "try: load_identity(Path(sys.argv[1]))\n"
        "except ConfigurationError as error: print(error.exit_code, error)\n"
    )
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder), str(NOBODY)],
            capture_output=True, text=True, check=True, timeout=seconds(30),
        )  # fmt: skip
    finally:
        folder.chmod(0o700)
    assert done.stdout.startswith(f"{EXIT_IDENTITY} the identity file")
    assert "Permission denied" in done.stdout


def test_a_key_from_elsewhere_is_taken(tmp_path: Path) -> None:
    mine = Identity()
    (tmp_path / KEY_FILE).write_text(mine.seed.hex())
    (tmp_path / KEY_FILE).chmod(0o600)
    assert load_identity(tmp_path).id == mine.id


def test_leftovers_of_a_crash_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / f"{KEY_FILE.removesuffix('.key')}.{os.getpid()}.new").write_text("half a k")
    assert load_identity(tmp_path).id == load_identity(tmp_path).id
