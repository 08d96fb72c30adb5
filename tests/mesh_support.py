"""Real nodes for tests: what they left running, what their llama.cpp is doing, and a proxy that listens in."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import aiohttp
import orjson
import psutil

from mesh.address import parse_address
from mesh.errors import ReplayError
from mesh.identity import Identity, parse_node_id
from mesh.network import Network
from mesh.records import WorkerRecord, open_record
from mesh.transport import Connection, connect
from node.cluster import Member
from tests.support import seconds

ROOT = Path(__file__).parent.parent
MODEL = "qmesh-demo"
PROMPT = "Once upon a time"
MARK = "QMESH_TEST_MARK"


async def until(test: Callable[[], Awaitable[bool]], timeout: float, *, every: float = 0.02) -> float:
    """Ask until it is so; the seconds that took. Raises TimeoutError."""
    began = time.monotonic()
    async with asyncio.timeout(seconds(timeout)):
        while not await test():  # noqa: ASYNC110 - another process has no event to wait on
            await asyncio.sleep(every)
    return time.monotonic() - began


class Marked:
    """Processes that carry a mark in their environment, which their children inherit."""

    def __init__(self) -> None:
        self._value = uuid.uuid4().hex

    @property
    def environ(self) -> dict[str, str]:
        """The environment for a command, without settings of whoever runs the tests."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("QMESH_")}
        return {**clean, "NO_COLOR": "1", "COLUMNS": "160", MARK: self._value}

    def alive(self) -> list[psutil.Process]:
        """Those that run; zombies do not."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self._value:
                    found.append(process)
        return found

    def gone(self, within: float) -> list[str]:
        """The command lines of those that are still there after so many seconds."""
        deadline = time.monotonic() + seconds(within)
        while (alive := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return [" ".join(process.cmdline()) for process in alive]

    def kill(self) -> None:
        """End whatever a failed test left."""
        for process in self.alive():
            with suppress(psutil.Error):
                process.kill()


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Its output, where that is one JSON object per line."""
        return json_lines(self.out)


class Home:
    """A user with a home folder of its own, who types `qmesh-node …`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.marked = Marked()
        folder.mkdir(parents=True, exist_ok=True)
        self.environ = {**self.marked.environ, "HOME": str(folder), "XDG_DATA_HOME": str(folder / "data")}

    @staticmethod
    def command(*arguments: str) -> list[str]:
        """The installed program with these arguments."""
        return [str(Path(sys.executable).with_name("qmesh-node")), *arguments]

    def run(
        self, *arguments: str, stdin: str = "", timeout: float = 30, environ: Mapping[str, str] | None = None
    ) -> Done:
        """Run a command to its end. No traceback may be shown, whatever happens."""
        done = subprocess.run(
            self.command(*arguments), env={**self.environ, **(environ or {})}, cwd=self.folder, input=stdin,
            capture_output=True, text=True, timeout=seconds(timeout), check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        assert "fault of QMesh" not in done.stderr, done.stderr
        return Done(done.returncode, done.stdout, done.stderr)

    @contextmanager
    def running(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """A command that goes on; its output can be read line by line. Killed at last."""
        with subprocess.Popen(
            self.command(*arguments), env=self.environ, cwd=self.folder, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            try:
                yield process
            finally:
                process.kill()


@dataclass(frozen=True)
class Llama:
    """A node's llama.cpp, asked behind the node's back."""

    process: psutil.Process
    port: int
    key: str

    async def busy(self) -> int:
        """Slots at work, by its own word."""
        async with (
            aiohttp.ClientSession(headers={"Authorization": f"Bearer {self.key}"}) as http,
            http.get(f"http://127.0.0.1:{self.port}/slots") as response,
        ):
            return sum(bool(slot["is_processing"]) for slot in await response.json())


def llama_of(pid: int) -> list[Llama]:
    """The llama.cpp processes under a node."""
    found: list[Llama] = []
    with suppress(psutil.Error):
        for child in psutil.Process(pid).children(recursive=True):
            found += [
                Llama(child, one.laddr.port, child.environ()["LLAMA_API_KEY"])
                for one in child.net_connections(kind="tcp")
                if one.status == psutil.CONN_LISTEN
            ]
    return found


@asynccontextmanager
async def connected(member: Member, *, address: str | None = None) -> AsyncIterator[Connection]:
    """A bare connection to a node, as a stranger; perhaps through another address."""
    connection = await connect(
        *parse_address(address or member.address),
        identity=Identity(),
        network=Network(),
        peer_id=parse_node_id(member.worker_id),
        timeout=seconds(5),
    )
    try:
        yield connection
    finally:
        await connection.close()


async def ask(connection: Connection, method: str, **meta: Any) -> Mapping[str, Any]:
    """One question, answered by END."""
    async with await connection.open(method, meta) as stream:
        while await stream.read(timeout=seconds(5)) is not None:
            pass
        return stream.trailer or {}


async def found_at(connection: Connection, model: str = MODEL) -> dict[str, WorkerRecord]:
    """The valid records that a node finds for a model now, by worker id."""
    answer = await ask(connection, "find", model=model, want=16)
    found = {}
    for key, blob in answer["records"]:
        with suppress(ReplayError):  # it expired on the way
            record = open_record(blob, Network(), key, time.time())
            if record.health > 0:
                found[record.node_id.hex()] = record
    return found


def completion(tokens: int, prompt: str = PROMPT) -> dict[str, Any]:
    """The meta of a streaming request for so many tokens."""
    return {
        "path": "/completion",
        "model": MODEL,
        "body": {"prompt": prompt, "n_predict": tokens, "stream": True, "ignore_eos": True, "temperature": 0},
    }


class Proxy:
    """A TCP proxy on the loopback that records both directions and can flip a bit in passing."""

    def __init__(self, target: str) -> None:
        self._target = parse_address(target)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.sent = bytearray()
        """What the caller sent."""
        self.received = bytearray()
        """What the worker sent."""
        self.tamper_request = False
        self.tamper_answer = False

    @property
    def address(self) -> str:
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()
        return f"{host}:{port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(*self._target)
        self._writers |= {writer, there_writer}
        async with asyncio.TaskGroup() as group:
            self._tasks.add(group.create_task(self._pump(reader, there_writer, self.sent, request=True)))
            self._tasks.add(group.create_task(self._pump(there_reader, writer, self.received, request=False)))

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, record: bytearray, *, request: bool
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                record += data
                if self.tamper_request if request else self.tamper_answer:
                    data = data[:-1] + bytes([data[-1] ^ 1])
                writer.write(data)
                await writer.drain()
        writer.close()


def json_lines(output: bytes | str) -> list[dict[str, Any]]:
    """The objects of an output of one JSON object per line; anything else in it is an error."""
    lines = output.encode() if isinstance(output, str) else output
    return [orjson.loads(line) for line in lines.splitlines()]
