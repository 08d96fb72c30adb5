"""The installed command as a user types it, against real nodes."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from select import select
from typing import Any
from urllib.request import urlopen

import pytest

from node.cluster import Member
from tests.mesh_support import MODEL, PROMPT, ROOT, Home, json_lines
from tests.support import seconds

pytestmark = pytest.mark.xdist_group("cli")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    """A user; nothing of what it started may be left."""
    user = Home(tmp_path / "home")
    yield user
    try:
        assert user.marked.gone(within=2) == []
    finally:
        user.marked.kill()


def until_event(node: subprocess.Popen[str], name: str) -> dict[str, Any]:
    """Read a node's events up to one of them."""
    assert node.stdout is not None
    for line in node.stdout:
        event: dict[str, Any] = json.loads(line)
        if event["event"] == name:
            return event
    raise AssertionError(f"it ended: {node.stderr.read() if node.stderr else ''}")


# --- two terminals


@dataclass
class Terminals:
    """A user with two nodes, both started as plainly as can be."""

    home: Home
    nodes: list[subprocess.Popen[str]]
    ready: list[dict[str, Any]]


@pytest.fixture(scope="module")
def terminals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminals]:
    user = Home(tmp_path_factory.mktemp("two") / "home")
    with ExitStack() as stack:
        first = stack.enter_context(user.running("run", "--no-mdns", "--json"))
        ready = [until_event(first, "ready")]
        second = stack.enter_context(
            user.running("run", "--no-mdns", "--json", "--join", ready[0]["address"])
        )
        ready.append(until_event(second, "ready"))
        yield Terminals(user, [first, second], ready)
        for node in (first, second):
            node.send_signal(signal.SIGTERM)
        for node in (first, second):
            out, _ = node.communicate(timeout=seconds(20))
            assert json_lines(out)[-1] == {"event": "stopped"}
            assert node.returncode == 0
    assert user.marked.gone(within=2) == []


def test_two_nodes_find_ports_and_folders_of_their_own(terminals: Terminals) -> None:
    for ready in terminals.ready:
        assert list(ready) == ["event", "worker_id", "address", "gateway", "models"]
        assert re.fullmatch(r"[0-9a-f]{64}", ready["worker_id"])
        assert re.fullmatch(r"127\.0\.0\.1:\d+", ready["address"])
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", ready["gateway"])
        assert ready["models"] == [MODEL]
    first, second = terminals.ready
    assert first["worker_id"] != second["worker_id"]
    assert first["address"] != second["address"]
    assert first["gateway"] != second["gateway"]
    everything = {
        path.relative_to(terminals.home.folder).parts[:2] for path in terminals.home.folder.rglob("*")
    }
    assert everything <= {("data",), ("data", "qmesh"), ("data", "qmesh-2")}


def test_generate_streams_and_names_the_worker(terminals: Terminals) -> None:
    done = terminals.home.run("generate", PROMPT, "-n", "20", "--join", terminals.ready[0]["address"])
    assert done.code == 0
    assert done.out.startswith(PROMPT)
    assert len(done.out) > len(PROMPT) + 20
    told = re.search(rf"\[{MODEL} on worker ([0-9a-f]{{12}}) \(direct .*\); 20 tokens", done.err)
    assert told
    assert told[1] in {ready["worker_id"][:12] for ready in terminals.ready}


def test_without_join_the_local_node_is_the_way_in(terminals: Terminals) -> None:
    done = terminals.home.run("generate", PROMPT, "--quiet", "--max-tokens", "8")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(PROMPT)


def test_generate_in_json(terminals: Terminals) -> None:
    done = terminals.home.run("generate", PROMPT, "-n", "12", "--temperature", "0", "--json")
    assert done.code == 0
    *tokens, last = done.lines
    assert len(tokens) > 3
    for token in tokens:
        assert list(token) == ["event", "text", "worker", "spliced"]
        assert token["event"] == "token"
        assert token["spliced"] is False
    assert last["event"] == "done"
    assert last["usage"]["completion_tokens"] == 12
    assert last["usage"]["prompt_tokens"] > 0
    assert {token["worker"] for token in tokens} == {last["worker"]}
    assert last["worker"] in {ready["worker_id"] for ready in terminals.ready}
    assert [attempt["worker"] for attempt in last["attempts"]] == [last["worker"]]
    assert last["splices"] == 0
    assert last["finish_reason"] == "length"
    again = terminals.home.run("generate", "-", "-n", "12", "--temperature", "0", "--json", stdin=PROMPT)
    assert [token["text"] for token in again.lines[:-1]] == [token["text"] for token in tokens]


def test_chat_once_and_as_a_conversation(terminals: Terminals) -> None:
    once = terminals.home.run("chat", "Hello", "-n", "8", "--json")
    assert once.code == 0
    assert once.lines[-1]["event"] == "done"
    several = terminals.home.run("chat", "-n", "8", "--json", stdin="Hello\nTell me a story.\n\n")
    assert several.code == 0
    assert sum(line["event"] == "done" for line in several.lines) == 2
    first, second = (line["usage"]["prompt_tokens"] for line in several.lines if line["event"] == "done")
    assert second > first, "the history is not sent along"
    assert terminals.home.run("chat", "Hello", "-n", "8", "-q").out.strip()


def test_status(terminals: Terminals) -> None:
    done = terminals.home.run("status", "--json")
    (status,) = done.lines
    assert status["worker_id"] == terminals.ready[0]["worker_id"]
    assert status["health"] > 0
    assert set(status["load"]) >= {"slots", "busy", "queue", "health"}
    (model,) = status["models"]
    assert (model["name"], model["state"]) == (MODEL, "ready")
    assert model["health_parts"]
    shown = terminals.home.run("status")
    assert shown.code == 0
    assert terminals.ready[0]["worker_id"] in shown.out
    assert MODEL in shown.out


def test_peers_and_models(terminals: Terminals) -> None:
    deadline = time.monotonic() + seconds(10)
    while not (peers := terminals.home.run("peers", "--json").lines[0])["peers"]:
        assert time.monotonic() < deadline
    assert [peer["id"] for peer in peers["peers"]] == [terminals.ready[1]["worker_id"]]
    assert terminals.ready[1]["worker_id"][:12] in terminals.home.run("peers").out
    (model,) = terminals.home.run("models", "--json").lines
    assert model["model"] == MODEL
    assert {one["id"] for one in model["workers"]} == {ready["worker_id"] for ready in terminals.ready}
    shown = terminals.home.run("models").out
    assert all(ready["worker_id"][:12] in shown for ready in terminals.ready)


def test_the_identity_is_that_of_the_node(terminals: Terminals) -> None:
    done = terminals.home.run("identity", "--json")
    assert done.lines[0]["worker_id"] == terminals.ready[0]["worker_id"]
    assert terminals.home.run("identity").out.strip() == terminals.ready[0]["worker_id"]


def test_a_folder_in_use_and_a_port_in_use_that_were_asked_for(terminals: Terminals, tmp_path: Path) -> None:
    folder = str(terminals.home.folder / "data" / "qmesh")
    held = terminals.home.run(
        "run", "--no-mdns", "--no-gateway", "--listen", "127.0.0.1:0", "--data-dir", folder
    )
    assert held.code == 5
    assert "another node is running" in held.err
    for flag, other, address in (
        ("--listen", "--no-gateway", terminals.ready[0]["address"]),
        ("--gateway", "--listen=127.0.0.1:0", terminals.ready[0]["gateway"].removeprefix("http://")),
    ):
        busy = terminals.home.run(
            "run", "--no-mdns", "--json", flag, address, other, "--data-dir", str(tmp_path / "new")
        )
        assert busy.code == 6, busy
        assert address in busy.err
        assert "fix:" in busy.err
        assert busy.lines[-1] == {"event": "stopped"}


# --- settings


def test_all_commands_find_the_mesh_by_the_same_settings(
    home: Home, members: list[Member], tmp_path: Path
) -> None:
    address, everybody = members[1].address, {member.worker_id for member in members}
    file = tmp_path / "named.toml"
    file.write_text(f"join = ['{address}']\n")
    (model,) = home.run("models", "--json", environ={"QMESH_JOIN": address}).lines
    assert {worker["id"] for worker in model["workers"]} == everybody
    assert home.run("chat", "Hello", "-n", "4", "--config", str(file)).code == 0
    elsewhere = home.run("generate", PROMPT, environ={"QMESH_JOIN": address, "QMESH_NETWORK": "others"})
    assert elsewhere.code == 8
    assert "network name" in elsewhere.err

    # what the node here would start from, while none runs
    (invited,) = home.run("invite", "--json", "--data-dir", members[0].folder).lines
    assert (invited["private"], invited["id"]) == (False, None)
    assert home.run("join", invited["token"]).code == 0
    assert home.run("generate", PROMPT, "-n", "4").code == 0

    # and the folder of a node
    file.write_text(f"data_dir = '{members[2].folder}'\n")
    (status,) = home.run("status", "--json", "--config", str(file)).lines
    assert status["worker_id"] == members[2].worker_id


# --- versions, help, clusters


def test_version(home: Home) -> None:
    assert re.fullmatch(r"qmesh \d+\.\d+\.\d+.*\n", home.run("version").out)
    (facts,) = home.run("version", "--json").lines
    assert {"qmesh", "python", "platform", "kademlia"} <= set(facts)


def test_help_lists_every_command_and_needs_nothing_heavy(home: Home) -> None:
    code = (
        "import sys\n"
        "sys.argv = ['qmesh-node', '--help']\n"
        "from node.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=home.environ, cwd=ROOT, capture_output=True, text=True,
        timeout=seconds(20), check=True,
    )  # fmt: skip
    for command in ("run", "generate", "chat", "status", "peers", "models", "cluster", "identity", "version"):
        assert re.search(rf"^\s+{command}\s", done.stdout, re.MULTILINE)
    loaded = set(done.stderr.split())
    assert "typer" in loaded
    heavy = "aiohttp kademlia nacl pydantic msgpack orjson psutil uvloop zeroconf xllamacpp mesh sidecar client_sdk"
    assert not loaded & set(heavy.split())


def loaded_by(statement: str) -> set[str]:
    """The top-level packages in memory after an import."""
    code = f"import sys, {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=seconds(20), check=True
    )  # fmt: skip
    return set(done.stdout.split())


def test_the_sdk_needs_nothing_of_the_node_or_the_sidecar() -> None:
    loaded = loaded_by("client_sdk")
    assert {"client_sdk", "mesh"} <= loaded
    assert not loaded & {"node", "sidecar", "aiohttp", "kademlia", "psutil", "typer", "xllamacpp", "zeroconf"}


def test_a_node_listens_before_it_loads_what_only_the_gateway_and_the_lan_need() -> None:
    loaded = loaded_by("node.daemon")
    assert {"mesh", "sidecar", "kademlia"} <= loaded
    assert not loaded & {"aiohttp", "prometheus_client", "zeroconf", "client_sdk", "xllamacpp"}


def test_a_cluster_goes_up_and_down(home: Home, tmp_path: Path) -> None:
    folder = str(tmp_path / "cluster")
    another = {"QMESH_JOIN": "127.0.0.1:1", "QMESH_NETWORK": "another", "QMESH_CONFIG": "/none"}
    up = home.run("cluster", "up", "-n", "2", "--json", "--data-dir", folder, timeout=60, environ=another)
    assert up.code == 0
    assert [list(line) for line in up.lines] == [["event", "worker_id", "address", "gateway", "models"]] * 2
    assert {line["event"] for line in up.lines} == {"ready"}
    told = home.run("cluster", "status", "--json", "--data-dir", folder)
    assert [(one["worker_id"], one["running"]) for one in told.lines] == [
        (one["worker_id"], True) for one in up.lines
    ]
    assert up.lines[1]["worker_id"][:12] in home.run("cluster", "status", "--data-dir", folder).out
    for line in up.lines:
        with urlopen(f"{line['gateway']}/v1/models", timeout=seconds(10)) as models:
            assert [one["id"] for one in json.load(models)["data"]] == [MODEL]
    twice = home.run("cluster", "up", "--data-dir", folder)
    assert twice.code == 2
    assert "is running" in twice.err
    answer = home.run("generate", PROMPT, "-n", "4", "--join", up.lines[1]["address"])
    assert answer.code == 0
    down = home.run("cluster", "down", "--json", "--data-dir", folder)
    assert down.lines == [{"ended": 2}]
    assert home.marked.gone(within=1) == []
    assert home.run("cluster", "down", "--json", "--data-dir", folder).lines == [{"ended": 0}]
    assert home.run("cluster", "status", "--json", "--data-dir", folder).lines == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_cluster_that_is_interrupted_while_it_starts_can_be_ended(
    home: Home, tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "cluster"
    with home.running("cluster", "up", "-n", "2", "--data-dir", str(folder)) as up:
        deadline = time.monotonic() + seconds(20)
        while not (folder / "cluster.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        up.send_signal(number)
        assert up.wait(timeout=seconds(30)) != 0
    home.run("cluster", "down", "--data-dir", str(folder))


# --- interruptions


def test_ctrl_c_ends_a_node_in_order(home: Home, tmp_path: Path) -> None:
    with home.running(
        "run", "--no-mdns", "--no-gateway", "--listen", "127.0.0.1:0", "--data-dir", str(tmp_path / "node")
    ) as node:
        assert node.stdout is not None
        line = node.stdout.readline()
        assert line.startswith(f"ready    {MODEL} at 127.0.0.1:")
        node.send_signal(signal.SIGINT)
        _, told = node.communicate(timeout=seconds(20))
        assert node.returncode == 0
    assert "stopping" in told
    assert told.rstrip().endswith("stopped")
    assert not (tmp_path / "node" / "node.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_node_that_is_interrupted_while_it_starts_leaves_nothing(
    home: Home, tmp_path: Path, number: signal.Signals
) -> None:
    with home.running(
        "run",
        "--json",
        "--no-mdns",
        "--no-gateway",
        "--listen",
        "127.0.0.1:0",
        "--data-dir",
        str(tmp_path / "n"),
    ) as node:
        until_event(node, "starting")
        node.send_signal(number)
        out, _ = node.communicate(timeout=seconds(20))
        assert json_lines(out)[-1] == {"event": "stopped"}
        assert node.returncode == 0


def test_ctrl_c_in_an_answer(home: Home, members: list[Member]) -> None:
    with home.running("generate", PROMPT, "-n", "1900", "--json", "--join", members[0].address) as generate:
        until_event(generate, "token")
        generate.send_signal(signal.SIGINT)
        _, told = generate.communicate(timeout=seconds(10))
        assert generate.returncode == 130
    assert "Traceback" not in told


def test_ctrl_c_at_the_prompt_of_a_chat(home: Home, members: list[Member]) -> None:
    """On a real terminal, where reading a line cannot be cancelled."""
    own, terminal = pty.openpty()
    # The first terminal that a session's leader opens becomes its own: Ctrl-C there is a signal here.
    shell = ["/bin/sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(terminal)]
    command = home.command("chat", "-n", "4", "--join", members[0].address)
    with subprocess.Popen([*shell, *command], env=home.environ, start_new_session=True) as chat:
        try:
            read_until(own, rb"> ")
            os.write(own, b"Hello\n")
            read_until(own, rb"tokens[^>]*> ")
            os.write(own, b"\x03")
            assert chat.wait(timeout=seconds(5)) == 130
        finally:
            chat.kill()
            os.close(terminal)
            os.close(own)


def read_until(terminal: int, pattern: bytes) -> None:
    """Read what a terminal shows, up to a pattern."""
    shown = b""
    deadline = time.monotonic() + seconds(20)
    while not re.search(pattern, shown):
        ready, _, _ = select([terminal], [], [], max(0, deadline - time.monotonic()))
        assert ready, shown
        shown += os.read(terminal, 4096)


def test_a_reader_that_leaves_is_no_error(home: Home, members: list[Member]) -> None:
    with home.running("generate", PROMPT, "-n", "1900", "--json", "--join", members[0].address) as generate:
        assert generate.stdout is not None
        assert generate.stderr is not None
        generate.stdout.readline()
        generate.stdout.close()
        assert generate.wait(timeout=seconds(20)) == 0
        assert generate.stderr.read() == ""
