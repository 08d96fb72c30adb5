"""What a user can get wrong: each ends with cause, fix and a documented exit code, and nothing left running."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from mesh.keystore import KEY_FILE, load_identity
from node.cli.output import ExitCode
from node.cluster import Member
from tests.mesh_support import PROMPT, Done, Home
from tests.sidecar_support import DEMO
from tests.support import seconds

pytestmark = pytest.mark.xdist_group("cli")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    user = Home(tmp_path / "home")
    yield user
    try:
        assert user.marked.gone(within=2) == []
    finally:
        user.marked.kill()


def refused(done: Done, code: ExitCode, *words: str) -> None:
    """It says the cause with these words, a fix and the code, on stderr."""
    assert done.code == code, done
    assert "error: " in done.err
    assert "fix: " in done.err
    assert f"(exit code {int(code)})" in done.err
    for word in words:
        assert word in done.err
    assert len(done.err.splitlines()) < 30


def run(home: Home, *arguments: str) -> Done:
    """`run` on the loopback, in the user's own folder."""
    return home.run("run", "--no-mdns", "--no-gateway", "--listen", "127.0.0.1:0", *arguments)


# --- models and servers


def missing(folder: Path) -> Path:
    return folder / "missing.gguf"


def garbage(folder: Path) -> Path:
    path = folder / "garbage.gguf"
    path.write_bytes(os.urandom(4096))
    return path


def cut(folder: Path) -> Path:
    path = folder / "cut.gguf"
    path.write_bytes(DEMO.read_bytes()[: DEMO.stat().st_size // 2])
    return path


@pytest.mark.parametrize("model", [missing, garbage, cut])
def test_a_model_that_is_none(home: Home, tmp_path: Path, model: Callable[[Path], Path]) -> None:
    path = model(tmp_path)
    done = run(home, str(path), "--json")
    refused(done, ExitCode.MODEL, path.name)
    assert done.lines[-1] == {"event": "stopped"}
    assert {"event": "error", "exit_code": 4}.items() <= done.lines[-2].items()


def no_file(folder: Path) -> Path:
    return folder / "no-such-server"


def another_program(_: Path) -> Path:
    return Path("/bin/true")


@pytest.mark.parametrize("server", [no_file, another_program])
def test_a_server_that_is_none(home: Home, tmp_path: Path, server: Callable[[Path], Path]) -> None:
    path = server(tmp_path)
    refused(run(home, "--llama-server", str(path)), ExitCode.SERVER, str(path))


def test_a_backend_that_is_not_there(home: Home) -> None:
    refused(run(home, "--backend-url", "http://127.0.0.1:1"), ExitCode.SERVER, "http://127.0.0.1:1")


def test_arguments_that_the_server_refuses(home: Home, tmp_path: Path) -> None:
    folder = tmp_path / "node"
    folder.mkdir()
    toml = f"[[models]]\npath = {str(DEMO)!r}\nextra_args = ['--no-such-flag']\n"
    (folder / "qmesh.toml").write_text(toml)
    refused(run(home, "--data-dir", str(folder)), ExitCode.MODEL)


# --- settings


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("lisen = '127.0.0.1:0'", ("'lisen'", "Did you mean 'listen'")),
        ("slots =", ("not valid TOML",)),
    ],
)
def test_a_wrong_configuration(home: Home, tmp_path: Path, toml: str, words: tuple[str, ...]) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(toml)
    refused(run(home, "--config", str(file)), ExitCode.USAGE, *words)


def test_a_wrong_variable(home: Home) -> None:
    done = home.run("run", environ={"QMESH_SLOTZ": "4"})
    refused(done, ExitCode.USAGE, "QMESH_SLOTZ", "QMESH_SLOTS")


def test_a_wrong_flag(home: Home) -> None:
    assert home.run("run", "--no-such-flag").code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--join", "a..b:9470"), "a..b"),
        (("--advertise", "nowhere"), "nowhere"),
    ],
)
def test_flags_with_wrong_values(home: Home, arguments: tuple[str, ...], word: str) -> None:
    refused(run(home, *arguments), ExitCode.USAGE, word)


def test_contradicting_flags(home: Home) -> None:
    refused(home.run("run", "--gateway", "127.0.0.1:0", "--no-gateway"), ExitCode.USAGE, "contradict")


# --- identities and folders


def readable_by_all(key: Path) -> None:
    key.chmod(0o644)


def garbled(key: Path) -> None:
    key.write_text("my dog's name")


@pytest.mark.parametrize("spoil", [readable_by_all, garbled])
def test_an_identity_that_cannot_be_used(home: Home, tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    folder = tmp_path / "node"
    load_identity(folder)
    spoil(folder / KEY_FILE)
    refused(run(home, "--data-dir", str(folder)), ExitCode.IDENTITY, str(folder / KEY_FILE))


def test_a_folder_that_is_a_file(home: Home, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(run(home, "--data-dir", str(tmp_path / "file")), ExitCode.USAGE, "data folder")


# --- addresses


@pytest.mark.parametrize("flag", ["--listen", "--gateway"])
def test_a_busy_port_that_was_asked_for(home: Home, flag: str) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        other = ("--no-gateway",) if flag == "--listen" else ("--listen", "127.0.0.1:0")
        refused(home.run("run", "--no-mdns", flag, address, *other), ExitCode.PORT, address, "in use")


@pytest.mark.parametrize(
    "command",
    [
        ("generate", PROMPT, "--json"),
        ("chat", "Hello", "-m", "qmesh-demo"),
        ("models",),
    ],
)
def test_nobody_at_the_address_to_join(home: Home, command: tuple[str, ...]) -> None:
    done = home.run(*command, "--join", "127.0.0.1:1")
    refused(done, ExitCode.UNREACHABLE, "127.0.0.1:1")
    if "--json" in command:
        (line,) = done.lines
        assert (line["event"], line["exit_code"]) == ("error", 8)
    else:
        assert done.out == ""


def test_a_node_says_whom_it_cannot_join_and_goes_on_trying(home: Home) -> None:
    """It may well be the first one up after a power failure."""
    where = ("--listen", "127.0.0.1:0", "--no-gateway", "--no-mdns")
    with home.running("run", *where, "--join", "127.0.0.1:1") as node:
        assert node.stdout is not None
        assert node.stdout.readline().startswith("ready")
        assert home.run("generate", PROMPT, "-n", "2").code == 0
        node.terminate()
        _, told = node.communicate(timeout=seconds(20))
        assert node.returncode == 0
    assert "127.0.0.1:1 (--join) is not reached" in told
    assert "fix: " in told


@pytest.mark.parametrize("command", [("generate", PROMPT), ("status",)])
def test_no_node_here(home: Home, command: tuple[str, ...]) -> None:
    refused(home.run(*command), ExitCode.UNREACHABLE, "no node is running", "qmesh-node run")


# --- requests


def test_a_model_that_nobody_has(home: Home, members: list[Member]) -> None:
    done = home.run("generate", PROMPT, "-m", "gpt-99", "--join", members[0].address)
    refused(done, ExitCode.NO_WORKER, "gpt-99", "qmesh-node models")


def test_a_prompt_that_is_too_long(home: Home, members: list[Member]) -> None:
    done = home.run("generate", "-", "-q", "--join", members[0].address, stdin="word " * 20_000)
    refused(done, ExitCode.REFUSED, "context")


def test_a_prompt_that_is_no_text(home: Home, members: list[Member]) -> None:
    done = home.run("generate", "caf\udce9", "--join", members[0].address)
    refused(done, ExitCode.REFUSED, "JSON")


def test_another_network(home: Home, members: list[Member]) -> None:
    done = home.run("generate", PROMPT, "--network", "others", "--join", members[0].address)
    refused(done, ExitCode.UNREACHABLE, "network name")


def test_a_cluster_that_cannot_start(home: Home, tmp_path: Path) -> None:
    """What its first node said is told, with its fix and its exit code, and the others are ended."""
    model = str(garbage(tmp_path))
    up = ("cluster", "up", "-n", "2", "--data-dir", str(tmp_path / "cluster"))
    done = home.run(*up, "--model", model, "--json")
    refused(done, ExitCode.MODEL, "node 1 did not start", model, "Name a GGUF file")
    (told,) = done.lines
    assert (told["event"], told["exit_code"]) == ("error", ExitCode.MODEL)
    for variable, value, code in (
        ("QMESH_LLAMA_SERVER", "/no/such/server", ExitCode.SERVER),
        ("QMESH_SLOTS", "0", ExitCode.USAGE),
    ):
        refused(home.run(*up, environ={variable: value}), code, "node 1 did not start", value)
    assert not (tmp_path / "cluster" / "cluster.json").exists()
