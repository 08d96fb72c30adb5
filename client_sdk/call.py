"""One request at one worker, from the choice of the worker to the last byte of its answer."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

from client_sdk.dispatch import Dispatcher, Lease
from client_sdk.selection import Need
from client_sdk.types import Explanation, RouteEvent
from mesh.errors import ConnectionClosed, DeadlineExceeded, QMeshError
from mesh.transport import Stream

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of whichever worker: an endpoint of a model, and how urgent it is."""

    path: str
    model: str
    need: Need
    priority: int = 0
    trace: str | None = None
    streaming: bool = True
    """Whether the answer is wanted as it is written."""


class TimeIsUp(QMeshError):
    """The time for the whole answer is over; no worker is to blame for that."""


@dataclass(slots=True)
class Asked:
    """What one attempt sends and how long it may take."""

    body: bytes
    exclude: frozenset[bytes]
    """Workers that are not to be asked (again)."""
    digest: bytes | None
    """The model file that the worker must have; None for any."""
    until: float
    """When the whole answer has to be there, on the clock of `time.monotonic()`."""
    explain: Explanation = field(default_factory=Explanation)


class Call:
    """An answer that has begun. An async context manager: leaving it early cancels the request at the
    worker, and an exception passing through tells the scoreboard of the worker's failure.
    """

    def __init__(
        self, dispatcher: Dispatcher, lease: Lease, stream: Stream, until: float, stack: AsyncExitStack
    ) -> None:
        self._dispatcher = dispatcher
        self._until = until
        self._stack = stack
        self.lease = lease
        self.stream = stream
        self.head: Mapping[str, Any] = {}
        self.first: bytes | None = None
        """The first bytes of the body; None where it has none."""
        self.sent = time.monotonic()
        self.first_token = 0.0
        """Seconds from sending the request to the first bytes."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    @classmethod
    async def start(cls, dispatcher: Dispatcher, request: Request, asked: Asked) -> Call:
        """Choose a worker, send it the request and wait until it begins to answer.

        Raises NoWorkers, and whatever goes wrong with the worker.
        """
        async with AsyncExitStack() as stack:
            lease = await stack.enter_async_context(
                dispatcher.lease(
                    request.model,
                    request.need,
                    asked.explain,
                    exclude=asked.exclude,
                    digest=asked.digest,
                    streaming=request.streaming,
                )
            )
            meta: dict[str, Any] = {
                "path": request.path,
                "model": request.model,
                "priority": request.priority,
            }
            if asked.until != math.inf:
                meta["deadline_ms"] = max(1, int((asked.until - time.monotonic()) * 1000))
            if request.trace is not None:
                meta["trace"] = request.trace
            stream = await stack.enter_async_context(await lease.connection.open("infer", meta, asked.body))
            call = cls(dispatcher, lease, stream, asked.until, stack)
            patience = dispatcher.timeouts.first_token
            call.head = await call._while_alive(stream.head, patience)
            call.first = await call._while_alive(stream.read, patience)
            call.first_token = time.monotonic() - call.sent
            dispatcher.board.spoke(lease.reservation)
            call._stack = stack.pop_all()
            return call

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body as it comes.

        A worker's node that says nothing for a while is pinged, so that a dead machine is told from
        a slow model. Raises TimeIsUp, DeadlineExceeded, and whatever goes wrong with the worker.
        """
        data = self.first
        while data is not None:
            yield data
            data = await self._while_alive(self.stream.read, self._dispatcher.timeouts.between_tokens)

    async def read_all(self, limit: int) -> bytes:
        """The whole body, cut off after `limit` bytes."""
        body = b""
        async with aclosing(self.chunks()) as chunks:
            async for data in chunks:
                body += data
                if len(body) >= limit:
                    break
        return body[:limit]

    @property
    def streams(self) -> bool:
        """Whether it comes as it is written, so that its beginning tells the time to the first token."""
        return str(self.head.get("content_type")).startswith("text/event-stream")

    def succeeded(self, timings: Mapping[str, Any]) -> None:
        """The answer is whole: learn from it. `timings` are the server's own, where it gave some."""
        now = time.monotonic()
        board, worker = self._dispatcher.board, self.lease.record.node_id
        speed = _positive(timings, "predicted_per_second")
        board.succeeded(worker, now, first_token=self.first_token if self.streams else None, speed=speed)
        prompt_speed = _positive(timings, "prompt_per_second")
        if prompt_speed is not None and timings.get("prompt_n", 0) >= 16:
            board[worker].prompt_speed.add(prompt_speed, now)
        self._dispatcher.learn_load(self.lease.connection, (self.stream.trailer or {}).get("load"))

    async def _while_alive(self, wait: Callable[[float], Awaitable[T]], patience: float | None) -> T:
        silence = self._dispatcher.timeouts.silence
        limit = math.inf if patience is None else time.monotonic() + patience
        while True:
            now = time.monotonic()
            if now >= self._until:
                raise TimeIsUp
            if now >= limit:
                raise DeadlineExceeded(f"the worker sent nothing for {patience:g} s")
            try:
                return await wait(min(limit - now, self._until - now, silence))
            except DeadlineExceeded:
                await self._dispatcher.pool.verify(self.stream.connection, silence)
                self._dispatcher.learn_load(self.stream.connection)


async def start_hedged(dispatcher: Dispatcher, request: Request, asked: Asked) -> Call:
    """As `Call.start`; where the first token is late and the budget allows, a second worker is asked
    too. The first to speak is returned, the other one is cancelled at its worker. Where both fail, both
    are in `asked.exclude` afterwards.
    """
    hedging = dispatcher.hedging((request.model, request.path, request.streaming))
    began = time.monotonic()
    hedging.requested()
    first = dispatcher.spawn(Call.start(dispatcher, request, asked), "call")
    running: dict[asyncio.Task[Call], Asked] = {first: asked}
    winner: asyncio.Task[Call] | None = None
    try:
        await asyncio.wait(running, timeout=hedging.delay())
        late = asked.explain.worker
        if not first.done() and late is not None and hedging.take():
            waited = f"no answer after {time.monotonic() - began:.3f} s"
            dispatcher.tell(RouteEvent("hedge", request.model, late, waited))
            other = Asked(asked.body, asked.exclude | {bytes.fromhex(late)}, asked.digest, asked.until)
            running[dispatcher.spawn(Call.start(dispatcher, request, other), "hedge")] = other
        winner = await _first_success(running)
        if winner is None:
            asked.exclude |= {
                bytes.fromhex(one.explain.worker) for one in running.values() if one.explain.worker
            }
            raise _error(first)
    finally:
        await _end(running, winner)
    call, told = winner.result(), running[winner].explain
    if told is not asked.explain:
        if call.streams:
            slower = bytes.fromhex(asked.explain.worker or "")
            dispatcher.board.late(slower, time.monotonic(), time.monotonic() - began)
        asked.explain.adopt(told)
        asked.explain.hedged += 1
    hedging.answered(time.monotonic() - began)  # what the first one asked took at least
    return call


async def _first_success(running: Collection[asyncio.Task[Call]]) -> asyncio.Task[Call] | None:
    """The first task that succeeds, None where none does."""
    pending = set(running)
    while pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if not task.cancelled() and task.exception() is None:
                return task
    return None


def _error(task: asyncio.Task[Call]) -> BaseException:
    """Why a task did not succeed."""
    if task.cancelled():  # by the dispatcher
        return ConnectionClosed("the client is closed")
    error = task.exception()
    assert error is not None
    return error


async def _end(running: Collection[asyncio.Task[Call]], winner: asyncio.Task[Call] | None) -> None:
    """End all but the winner: their requests are cancelled at their workers, also those that have just
    begun to be answered. An interruption ends the winner as well.
    """
    losers = [task for task in running if task is not winner]
    for task in losers:
        task.cancel()
    interruption: asyncio.CancelledError | None = None
    while pending := [task for task in losers if not task.done()]:
        try:
            await asyncio.wait(pending)  # cancelled, they wait for nothing
        except asyncio.CancelledError as error:
            interruption = error
    if interruption is not None and winner is not None:
        losers.append(winner)
    for task in losers:
        if not task.cancelled() and task.exception() is None:
            await task.result().__aexit__(None, None, None)
    if interruption is not None:
        raise interruption


def _positive(timings: Mapping[str, Any], key: str) -> float | None:
    value = timings.get(key)
    return float(value) if isinstance(value, int | float) and value > 0 else None
