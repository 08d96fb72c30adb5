"""One request to one worker: choose, reserve, connect, send; and learn from how it went."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Hashable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

from client_sdk.directory import Directory
from client_sdk.events import decode_object
from client_sdk.hedging import SHARE, Hedging
from client_sdk.pool import Pool
from client_sdk.scoreboard import Reservation, Scoreboard
from client_sdk.selection import Choice, Need, choose, expected
from client_sdk.types import Explanation, RouteEvent, Timeouts, WorkerInfo
from mesh.address import format_address, usable_addresses
from mesh.errors import (
    BackendFailed,
    BadRequest,
    ContextExceeded,
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
from mesh.transport import Connection

PROBES = 4
"""Workers pinged at once to learn their round trip and load."""
PROBE_WAIT = 0.25
"""Seconds that the first request waits for the probes."""
PROBE_AGE = 10.0
MOST_KINDS = 256
"""Kinds of requests whose first-token times are kept."""
LONGEST_REFUSAL = 60.0
"""Seconds for which a worker is believed to be full, whatever it says."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Lease:
    """A worker reserved for one request, and the connection to it."""

    record: WorkerRecord
    connection: Connection
    reservation: Reservation

    @property
    def id(self) -> str:
        """The worker's id as text."""
        return self.record.node_id.hex()


class Dispatcher:
    """Chooses workers for requests and keeps the scoreboard."""

    def __init__(
        self,
        pool: Pool,
        directory: Directory,
        timeouts: Timeouts,
        rng: Random,
        *,
        on_event: Callable[[RouteEvent], None] | None = None,
        hedge_share: float = SHARE,
    ) -> None:
        self.pool = pool
        self.directory = directory
        self.timeouts = timeouts
        self.board = Scoreboard()
        self.rng = rng
        self.closed = False
        self._on_event = on_event
        self.hedge_share = hedge_share
        """The share of the requests that may be sent twice."""
        self._probed: dict[str, float] = {}
        self._hedging: dict[Hashable, Hedging] = {}
        self._tasks = TaskOwner()

    async def close(self) -> None:
        """End what is being asked."""
        self.closed = True
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
        streaming: bool = True,
    ) -> AsyncIterator[Lease]:
        """A worker for one request. On the way out the scoreboard learns of a failure.

        Raises NoWorkers where none is left, and the errors of connecting.
        """
        choice = await self._choose(model, need, exclude, digest)
        record = choice.chosen.record
        now = time.monotonic()
        # A whole answer begins when it is complete, whose length nobody knows.
        due = now + choice.chosen.first_token if streaming else math.inf
        reservation = self.board.reserve(record.node_id, now, due)
        self._tell(explain, choice)
        try:
            connection = await self.pool.get(record.node_id, usable_addresses(record.addresses))
            explain.path = _path(connection)
            explain.rtt = connection.rtt
            yield Lease(record, connection, reservation)
        except Overloaded as error:
            self.board.busy_until(record.node_id, time.monotonic() + _refusal(error))
            raise
        except (TransportError, ProtocolError, RemoteError, OSError) as error:
            if is_retryable(error):
                self.board.failed(record.node_id, time.monotonic())
            raise
        finally:
            self.board.release(reservation)

    def hedging(self, kind: Hashable) -> Hedging:
        """The hedging policy for a kind of requests, which take about as long."""
        policy = self._hedging.get(kind)
        if policy is None:
            if len(self._hedging) >= MOST_KINDS:
                self._hedging.clear()
            policy = self._hedging[kind] = Hedging(self.hedge_share)
        return policy

    def tell(self, event: RouteEvent) -> None:
        """Tell the client's user."""
        if self._on_event is not None:
            self._on_event(event)

    def spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """A task that somebody awaits, and that ends with the client at the latest."""
        return self._tasks.spawn(work, name=name, awaited=True)

    def learn_load(self, connection: Connection, load: Mapping[str, Any] | None = None) -> None:
        """Take in a load report: of END if given, else of the connection's last PONG."""
        load = connection.load if load is None else load
        if not load:
            return
        try:
            busy, queue, slots = int(load["busy"]), int(load["queue"]), int(load["slots"])
        except (KeyError, TypeError, ValueError, OverflowError):
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
            digest=record.digest.hex(),
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
        # What is known; then asked anew; at last even those that failed lately.
        for fresh, banned in ((False, False), (True, False), (False, True)):
            records = [
                record
                for record in await self.candidates(model, fresh=fresh)
                if record.node_id not in exclude and (digest is None or record.digest == digest)
            ]
            now = time.monotonic()
            choice = choose(records, self.board, need, now=now, rng=self.rng, banned=banned)
            if choice is not None:
                return choice
        waits = [self.board.full_for(record.node_id, now) for record in records if record.health]
        if any(waits):
            raise Overloaded(f"every worker of {model!r} is busy", retry_after=min(filter(None, waits)))
        raise NoWorkers(f"every worker of {model!r} has been tried or is unwell")

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
        asked = [*best[: PROBES - 1], *self.rng.sample(best[PROBES - 1 :], min(1, len(best[PROBES - 1 :])))]
        probes = [self._tasks.spawn(self._ping(record), name="probe") for record in asked]
        if first:
            await asyncio.wait(probes, timeout=PROBE_WAIT)

    async def _ping(self, record: WorkerRecord) -> None:
        try:
            connection = await self.pool.get(record.node_id, usable_addresses(record.addresses))
            rtt = await connection.ping(timeout=self.timeouts.connect)
        except (QMeshError, OSError):
            self.board.failed(record.node_id, time.monotonic())
            return
        self.board[record.node_id].rtt.add(rtt, time.monotonic())
        self.learn_load(connection)


def _refusal(error: Overloaded) -> float:
    """Seconds for which the worker takes no requests."""
    return min(LONGEST_REFUSAL, error.retry_after or 0.25)


def queue_seconds(head: Mapping[str, Any]) -> float | None:
    """How long the request waited for a slot, as the worker says."""
    value = head.get("queue_ms")
    return value / 1000 if isinstance(value, int | float) else None


def refusal(status: int, body: bytes) -> QMeshError:
    """The exception for an HTTP status other than 200, from llama-server's error body."""
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


def _path(connection: Connection) -> str:
    host, port = connection.remote_address
    return f"direct {format_address(host, port)}" if host else "local"
