"""One request to one worker: choose, reserve, connect, send; and learn from how it went."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

import orjson

from client_sdk.directory import Directory
from client_sdk.events import decode_object
from client_sdk.pool import Pool
from client_sdk.scoreboard import Scoreboard
from client_sdk.selection import Choice, Need, choose, expected
from client_sdk.types import Explanation, Timeouts, WorkerInfo
from mesh.address import format_address, parse_address
from mesh.errors import (
    BackendFailed,
    BadRequest,
    ContextExceeded,
    DeadlineExceeded,
    ModelNotFound,
    NoWorkers,
    Overloaded,
    ProtocolError,
    QMeshError,
    RemoteError,
    TransportError,
    Unauthorized,
    is_retryable,
)
from mesh.records import WorkerRecord
from mesh.tasks import TaskOwner
from mesh.transport import Connection, Stream

PROBES = 4
"""Workers pinged at once to learn their round trip and load."""
PROBE_WAIT = 0.25
"""Seconds that the first request waits for the probes."""
PROBE_AGE = 10.0
MAX_ERROR_BODY = 64 << 10

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Lease:
    """A worker reserved for one request, and the connection to it."""

    record: WorkerRecord
    connection: Connection

    @property
    def id(self) -> str:
        """The worker's id as text."""
        return self.record.node_id.hex()


class Dispatcher:
    """Chooses workers for requests and keeps the scoreboard."""

    def __init__(self, pool: Pool, directory: Directory, timeouts: Timeouts, rng: Random) -> None:
        self.pool = pool
        self.directory = directory
        self.timeouts = timeouts
        self.board = Scoreboard()
        self._rng = rng
        self._probed: dict[str, float] = {}
        self._tasks = TaskOwner()

    async def close(self) -> None:
        """Stop probing."""
        await self._tasks.close()

    async def candidates(self, model: str, *, fresh: bool = False) -> list[WorkerRecord]:
        """The model's workers; several of them have been pinged lately. Raises NoWorkers."""
        records = await self.directory.workers(model, fresh=fresh)
        if not records and not fresh:
            records = await self.directory.workers(model, fresh=True)
        if not records:
            raise NoWorkers(f"no worker of the mesh has the model {model!r}")
        await self._probe(model, records)
        return records

    @asynccontextmanager
    async def lease(
        self,
        model: str,
        need: Need,
        explain: Explanation,
        *,
        exclude: Collection[bytes] = (),
        digest: bytes | None = None,
    ) -> AsyncIterator[Lease]:
        """A worker for one request. On the way out the scoreboard learns of a failure.

        Raises NoWorkers where none is left, and the errors of connecting.
        """
        choice = await self._choose(model, need, exclude, digest)
        record = choice.chosen.record
        self.board.reserve(record.node_id, time.monotonic())
        self._tell(explain, choice)
        try:
            addresses = [parse_address(address) for address in record.addresses]
            connection = await self.pool.get(record.node_id, addresses)
            explain.path = _path(connection)
            explain.rtt = connection.rtt
            try:
                yield Lease(record, connection)
            except TransportError:
                self.pool.drop(record.node_id, connection)
                raise
        except Overloaded as error:
            self.board.busy_until(record.node_id, time.monotonic() + min(5.0, error.retry_after or 0.25))
            raise
        except (TransportError, ProtocolError, RemoteError, OSError) as error:
            if is_retryable(error):
                self.board.failed(record.node_id, time.monotonic())
            raise
        finally:
            self.board.release(record.node_id)

    async def open(
        self, lease: Lease, path: str, model: str, body: bytes, *, deadline: float | None, priority: int
    ) -> Stream:
        """Send a request. `deadline` is the time left for it, in seconds."""
        meta: dict[str, Any] = {"path": path, "model": model, "priority": priority}
        if deadline is not None:
            meta["deadline_ms"] = max(1, int(deadline * 1000))
        return await lease.connection.open("infer", meta, body)

    async def head(self, stream: Stream, patience: float | None) -> Mapping[str, Any]:
        """The head of the response; waits as `read` does."""
        return await self._while_alive(stream, stream.head, patience)

    async def read(self, stream: Stream, patience: float | None) -> bytes | None:
        """The next bytes of an answer, None at its end.

        A worker's node that says nothing for a while is pinged, so that a dead machine is told from
        a slow model. Raises DeadlineExceeded after `patience` seconds of silence.
        """
        return await self._while_alive(stream, stream.read, patience)

    async def _while_alive(
        self, stream: Stream, wait: Callable[[float], Awaitable[T]], patience: float | None
    ) -> T:
        limit = math.inf if patience is None else time.monotonic() + patience
        while (left := limit - time.monotonic()) > 0:
            try:
                return await wait(min(left, self.timeouts.silence))
            except DeadlineExceeded:
                await stream.connection.ping(timeout=self.timeouts.silence)
                self.learn_load(stream.connection)
        raise DeadlineExceeded(f"the worker sent nothing for {patience:g} s")

    def learn_load(self, connection: Connection, load: Mapping[str, Any] | None = None) -> None:
        """Take in a load report: of END if given, else of the connection's last PONG."""
        load = connection.load if load is None else load
        if not load:
            return
        try:
            busy, queue, slots = int(load["busy"]), int(load["queue"]), int(load["slots"])
        except (KeyError, TypeError, ValueError):
            return  # Another implementation may say less; its records still count.
        self.board.report(connection.peer_id, busy, queue, slots, time.monotonic())

    def describe(self, record: WorkerRecord) -> WorkerInfo:
        """A worker for people and programs."""
        now = time.monotonic()
        candidate = expected(record, self.board, Need(), now)
        score = self.board[record.node_id]
        return WorkerInfo(
            id=record.node_id.hex(),
            model=record.model,
            addresses=record.addresses,
            health=record.health,
            slots=record.slots,
            context=record.context,
            software=record.software,
            expires=record.expires,
            expected=candidate.cost,
            load=candidate.load,
            rtt=score.rtt.value if score.rtt.count else None,
            banned=not self.board.available(record.node_id, now),
        )

    async def _choose(
        self, model: str, need: Need, exclude: Collection[bytes], digest: bytes | None
    ) -> Choice:
        for fresh in (False, True):
            records = await self.candidates(model, fresh=fresh)
            if digest is not None:
                records = [record for record in records if record.digest == digest]
            choice = choose(records, self.board, need, now=time.monotonic(), rng=self._rng, exclude=exclude)
            if choice is not None:
                return choice
        raise NoWorkers(f"every worker of {model!r} has been tried, is unwell or is banned for a while")

    def _tell(self, explain: Explanation, choice: Choice) -> None:
        explain.worker = choice.chosen.id.hex()
        explain.reason = choice.reason
        explain.candidates = [
            {"worker": one.id.hex(), "expected": round(one.cost, 4), "load": round(one.load, 3)}
            for one in choice.candidates
        ]

    async def _probe(self, model: str, records: list[WorkerRecord]) -> None:
        """Ping a few workers: before the first request for a moment, later in the background."""
        if len(records) < 2 or time.monotonic() - self._probed.get(model, -PROBE_AGE) < PROBE_AGE:
            return
        first = model not in self._probed
        self._probed[model] = now = time.monotonic()
        best = sorted(records, key=lambda record: expected(record, self.board, Need(), now).cost)
        asked = [*best[: PROBES - 1], *self._rng.sample(best[PROBES - 1 :], min(1, len(best[PROBES - 1 :])))]
        probes = [self._tasks.spawn(self._ping(record), name="probe") for record in asked]
        if first:
            await asyncio.wait(probes, timeout=PROBE_WAIT)

    async def _ping(self, record: WorkerRecord) -> None:
        addresses = [parse_address(address) for address in record.addresses]
        try:
            connection = await self.pool.get(record.node_id, addresses)
            rtt = await connection.ping(timeout=self.timeouts.connect)
        except (QMeshError, OSError):
            self.board.failed(record.node_id, time.monotonic())
            return
        self.board[record.node_id].rtt.add(rtt, time.monotonic())
        self.learn_load(connection)


async def refusal(stream: Stream, status: int) -> QMeshError:
    """The exception for an HTTP status other than 200, from llama-server's error body."""
    body = b""
    while (data := await stream.read(timeout=10.0)) is not None:
        body += data
        if len(body) > MAX_ERROR_BODY:
            break
    try:
        details = decode_object(body).get("error") or {}
    except ProtocolError:
        details = {}
    if not isinstance(details, Mapping):
        details = {"message": str(details)}
    message = str(details.get("message") or f"the model server answered {status}")[:500]
    if details.get("type") == "exceed_context_size_error":
        return ContextExceeded(message)
    by_status: dict[int, type[RemoteError]] = {
        401: Unauthorized,
        403: Unauthorized,
        404: ModelNotFound,
        429: Overloaded,
    }
    if status in by_status:
        return by_status[status](message)
    return BadRequest(message) if 400 <= status < 500 or status == 501 else BackendFailed(message)


def encode_body(body: Mapping[str, Any]) -> bytes:
    """A request body as JSON. Raises BadRequest for values that JSON cannot hold."""
    try:
        return orjson.dumps(body)
    except TypeError as error:
        raise BadRequest(f"the request cannot be written as JSON: {error}") from error


def _path(connection: Connection) -> str:
    return f"direct {format_address(*connection.remote_address[:2])}"
