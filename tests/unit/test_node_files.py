"""The node's small parts: the end of an answer, the digest cache, its folder and its sockets."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from itertools import pairwise
from pathlib import Path
from select import select
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.address import parse_address
from mesh.errors import ConfigurationError
from node import sockets
from node.digest import CACHE_FILE, model_digest
from node.folder import EXIT_IN_USE, RUNTIME_FILE, DataFolder, running_node
from node.tail import KEEP, Tail
from tests.support import seconds

# --- tail


def facts(*parts: bytes) -> dict[str, Any]:
    tail = Tail()
    for part in parts:
        tail.feed(part)
    return tail.facts()


END = b'data: {"content":"","stop":true,"timings":{"prompt_n":3,"predicted_per_second":99.5}}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":9}}\n\ndata: [DONE]\n\n'


@given(st.lists(st.integers(0, len(END + USAGE)), max_size=6), st.integers(0, 3 * KEEP))
def test_usage_and_timings_however_the_bytes_are_cut(cuts: list[int], before: int) -> None:
    whole = END + USAGE
    edges = [0, *sorted(cuts), len(whole)]
    parts = [whole[start:end] for start, end in pairwise(edges)]
    assert facts(b"x" * before, *parts) == {
        "timings": {"prompt_n": 3, "predicted_per_second": 99.5},
        "usage": {"prompt_tokens": 3, "completion_tokens": 9},
    }


def test_blanks_in_the_json_do_not_matter() -> None:
    assert facts(b'{"usage": {"prompt_tokens": 1}, "timings" :\n {"a": 2}}') == {
        "usage": {"prompt_tokens": 1},
        "timings": {"a": 2},
    }


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\xff" * 100,
        b'"usage":',
        b'"usage":5',
        b'"usage":{"a":',
        b'"usage":' + b"[" * 9000,
        b'"usage":null',
    ],
)
def test_no_facts_in_garbage(garbage: bytes) -> None:
    assert facts(garbage) == {}


def test_a_token_that_quotes_the_key_is_no_usage() -> None:
    assert facts(json.dumps({"content": '"usage":{"prompt_tokens":666}'}).encode()) == {}


def test_what_is_kept_is_bounded() -> None:
    tail = Tail()
    for _ in range(1000):
        tail.feed(b"x" * 1000)
    assert tail._size < KEEP + 1000


# --- digest


def test_the_digest_is_the_files_sha256_and_read_once(tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    model.write_bytes(b"weights")
    expected = hashlib.sha256(b"weights").digest()[:16]
    assert model_digest(model, tmp_path) == expected
    state = model.stat()
    model.write_bytes(b"WEIGHTS")
    os.utime(model, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert model_digest(model, tmp_path) == expected, "not taken from the cache"
    os.utime(model, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert model_digest(model, tmp_path) == hashlib.sha256(b"WEIGHTS").digest()[:16]


@pytest.mark.parametrize("garbage", [b"", b"{", b"[]", b"5", b"\xff", b'{"x": 1}'])
def test_a_garbled_cache_is_made_anew(tmp_path: Path, garbage: bytes) -> None:
    model = tmp_path / "m.gguf"
    model.write_bytes(b"weights")
    (tmp_path / CACHE_FILE).write_bytes(garbage)
    assert model_digest(model, tmp_path) == hashlib.sha256(b"weights").digest()[:16]
    assert model_digest(model, tmp_path) == hashlib.sha256(b"weights").digest()[:16]


@pytest.mark.parametrize("value", ["zz", 5, None, ""])
def test_a_garbled_entry_is_made_anew(tmp_path: Path, value: object) -> None:
    model = tmp_path / "m.gguf"
    model.write_bytes(b"weights")
    model_digest(model, tmp_path)
    cache = tmp_path / CACHE_FILE
    cache.write_text(json.dumps(dict.fromkeys(json.loads(cache.read_text()), value)))
    assert model_digest(model, tmp_path) == hashlib.sha256(b"weights").digest()[:16]


def test_many_models_at_once(tmp_path: Path) -> None:
    models = [tmp_path / f"{number}.gguf" for number in range(24)]
    for model in models:
        model.write_bytes(model.name.encode())
    gate = threading.Barrier(8, timeout=seconds(10))

    def digest(model: Path) -> bytes:
        gate.wait()
        return model_digest(model, tmp_path)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(digest, models))
    assert found == [hashlib.sha256(model.name.encode()).digest()[:16] for model in models]
    assert len(json.loads((tmp_path / CACHE_FILE).read_text())) == 24


def test_a_missing_model_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        model_digest(tmp_path / "gone.gguf", tmp_path)


# --- folder


def test_a_folder_has_one_holder(tmp_path: Path) -> None:
    path = tmp_path / "data"
    with closing(DataFolder(path)), pytest.raises(ConfigurationError, match="another node") as refused:
        DataFolder(path)
    assert refused.value.exit_code == EXIT_IN_USE
    DataFolder(path).close()


def test_without_a_wish_the_next_free_folder_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "qmesh"
    with ExitStack() as stack:
        held = [stack.enter_context(closing(DataFolder.hold(path, or_next=True))) for _ in range(3)]
        assert [folder.path.name for folder in held] == ["qmesh", "qmesh-2", "qmesh-3"]
        held[1].close()
        again = stack.enter_context(closing(DataFolder.hold(path, or_next=True)))
        assert again.path.name == "qmesh-2"
        with pytest.raises(ConfigurationError, match="another node"):
            DataFolder.hold(path, or_next=False)


def test_another_processs_lock_ends_with_it(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from node.folder import DataFolder\n"
        "folder = DataFolder(Path(sys.argv[1]))\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ConfigurationError, match="another node"):
            DataFolder(tmp_path)
        other.kill()
    DataFolder(tmp_path).close()


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be used") as refused:
        DataFolder.hold(tmp_path / "file", or_next=True)
    assert refused.value.exit_code == 2


def test_what_a_node_publishes_is_there_while_it_runs(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    assert running_node(tmp_path) is None
    folder.publish({"pid": os.getpid(), "address": "127.0.0.1:1"})
    assert running_node(tmp_path) == {"pid": os.getpid(), "address": "127.0.0.1:1"}
    assert stat.S_IMODE((tmp_path / RUNTIME_FILE).stat().st_mode) == 0o600, (
        "it may hold the secret of the mesh"
    )
    folder.close()
    folder.close()
    assert running_node(tmp_path) is None


def test_a_dead_nodes_words_do_not_count(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait(timeout=seconds(10))
    (tmp_path / RUNTIME_FILE).write_text(json.dumps({"pid": dead.pid}))
    assert running_node(tmp_path) is None


@pytest.mark.parametrize(
    "garbage", ["", "{", "[]", "{}", '{"pid": "x"}', '{"pid": null}', '{"pid": 0}', '{"pid": -1}']
)
def test_garbled_facts_of_a_node(tmp_path: Path, garbage: str) -> None:
    (tmp_path / RUNTIME_FILE).write_text(garbage)
    assert running_node(tmp_path) is None


# --- sockets


@contextmanager
def bound(listen: str, *, or_next: bool = False) -> Iterator[tuple[socket.socket, socket.socket]]:
    tcp, udp = sockets.bind(listen, or_next=or_next)
    with closing(tcp), closing(udp):
        yield tcp, udp


def port_of(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


def test_both_sockets_have_one_port() -> None:
    with bound("127.0.0.1:0") as (tcp, udp):
        assert port_of(tcp) == port_of(udp) != 0
        assert not tcp.getblocking()
        assert not udp.getblocking()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_busy_port_is_refused_or_passed_over(kind: socket.SocketKind) -> None:
    with closing(socket.socket(socket.AF_INET, kind)) as other:
        other.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            other.listen()
        busy = port_of(other)
        with pytest.raises(ConfigurationError, match="in use") as refused:
            sockets.bind(f"127.0.0.1:{busy}", or_next=False)
        assert refused.value.exit_code == sockets.EXIT_PORT
        with bound(f"127.0.0.1:{busy}", or_next=True) as (tcp, udp):
            assert busy < port_of(tcp) == port_of(udp) < busy + sockets.TRIES


def test_no_socket_is_left_after_a_refusal() -> None:
    with bound("127.0.0.1:0") as (tcp, _):
        before = psutil.Process().num_fds()
        for _ in range(5):
            with pytest.raises(ConfigurationError):
                sockets.bind(f"127.0.0.1:{port_of(tcp)}", or_next=False)
        assert psutil.Process().num_fds() == before


def test_the_default_is_for_both_ip_versions() -> None:
    with bound("[::]:0") as (tcp, udp):
        port = port_of(tcp)
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, port), timeout=seconds(5)).close()
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            with closing(socket.socket(family, socket.SOCK_DGRAM)) as sender:
                sender.sendto(host.encode(), (host, port))
                assert select([udp], [], [], seconds(5))[0]
                assert udp.recv(64) == host.encode()
        with pytest.raises(ConfigurationError, match="in use"):
            sockets.bind(f"127.0.0.1:{port}", or_next=False)


@pytest.mark.parametrize("number", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
def test_without_ipv6_it_is_ipv4(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnlyFour(socket.socket):
        def __init__(
            self, family: int = -1, kind: int = -1, proto: int = -1, fileno: int | None = None
        ) -> None:
            if family == socket.AF_INET6:
                raise OSError(number, os.strerror(number))
            super().__init__(family, kind, proto, fileno)

    monkeypatch.setattr(socket, "socket", OnlyFour)
    with bound("[::]:0") as (tcp, _):
        assert tcp.getsockname()[0] == "0.0.0.0"


@pytest.mark.parametrize("listen", ["192.0.2.1:0", "no.such.host.invalid:0"])
def test_an_address_of_another_machine(listen: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot be listened on") as refused:
        sockets.bind(listen, or_next=True)
    assert refused.value.exit_code == sockets.EXIT_PORT


def test_where_this_machine_reaches_the_node() -> None:
    with bound("127.0.0.1:0") as (tcp, _):
        assert sockets.local_address(tcp) == f"127.0.0.1:{port_of(tcp)}"
        assert sockets.advertised(tcp) == (f"127.0.0.1:{port_of(tcp)}",)
        assert sockets.advertised(tcp, ["a:1", "b:2", "c:3", "d:4", "e:5"]) == ("a:1", "b:2", "c:3", "d:4")


class Wildcard:
    """A socket that listens everywhere, as far as `advertised` looks at it."""

    def __init__(self, host: str) -> None:
        self._name = (host, 9470)

    def getsockname(self) -> tuple[str, int]:
        return self._name


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_what_is_advertised_when_listening_everywhere(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def address(family: socket.AddressFamily, text: str) -> Any:
        return SimpleNamespace(family=family, address=text)

    four, six = socket.AF_INET, socket.AF_INET6
    monkeypatch.setattr(
        psutil,
        "net_if_addrs",
        lambda: {
            "lo": [address(four, "127.0.0.1"), address(six, "::1")],
            "docker0": [address(four, "172.17.0.1")],
            "br-0123456789ab": [address(four, "172.18.0.1")],
            "br-lan": [address(six, "fd00::7")],
            "down0": [address(four, "192.168.7.7")],
            "eth0": [address(four, "8.8.8.7"), address(six, "fe80::1%eth0"), address(six, "2606:4700::7")],
            "wlan0": [address(four, "192.168.1.7"), address(four, "169.254.3.3")],
        },
    )
    names = ("lo", "docker0", "br-0123456789ab", "br-lan", "down0", "eth0", "wlan0")
    monkeypatch.setattr(
        psutil, "net_if_stats", lambda: {name: SimpleNamespace(isup=name != "down0") for name in names}
    )
    found = sockets.advertised(Wildcard(host))  # type: ignore[arg-type]
    assert found[0] == "192.168.1.7:9470"
    assert "8.8.8.7:9470" in found
    assert found == (
        ("192.168.1.7:9470", "[fd00::7]:9470", "8.8.8.7:9470", "[2606:4700::7]:9470")
        if host == "::"
        else ("192.168.1.7:9470", "8.8.8.7:9470")
    )
    assert sockets.advertised(Wildcard(host), outside="9.9.9.9")[-1] == "9.9.9.9:9470"  # type: ignore[arg-type]
    assert sockets.advertised(Wildcard(host), outside="8.8.8.7") == found  # type: ignore[arg-type]
    assert all(parse_address(one)[1] == 9470 for one in found)
    assert not {"127.0.0.1:9470", "172.17.0.1:9470", "192.168.7.7:9470", "169.254.3.3:9470"} & set(found)
    assert sockets.local_address(Wildcard(host)) == "127.0.0.1:9470"  # type: ignore[arg-type]
