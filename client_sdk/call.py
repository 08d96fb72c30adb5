"""One request at one worker, from the choice of the worker to the last byte of its answer."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

from client_sdk.dispatch import Dispatcher, Lease
from client_sdk.selection import Need
from client_sdk.types import Explanation
from mesh.errors import DeadlineExceeded
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


@dataclass(slots=True)
class Asked:
    """What one attempt sends and how long it may take."""

    body: bytes
    exclude: frozenset[bytes]
    """Workers that are not to be asked (again)."""
    digest: bytes | None
    """The model file that the worker must have; None for any."""
    left: float | None
    """Seconds left for the whole answer; None without a deadline."""
    first_token: float | None
    """Seconds to wait for the first bytes."""
    explain: Explanation = field(default_factory=Explanation)


class Call:
    """An answer that has begun. An async context manager: leaving it early cancels the request at the
    worker, and an exception passing through tells the scoreboard of the worker's failure.
    """

    def __init__(self, dispatcher: Dispatcher, lease: Lease, stream: Stream, stack: AsyncExitStack) -> None:
        self._dispatcher = dispatcher
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
                    request.model, request.need, asked.explain, exclude=asked.exclude, digest=asked.digest
                )
            )
            meta: dict[str, Any] = {
                "path": request.path,
                "model": request.model,
                "priority": request.priority,
            }
            if asked.left is not None:
                meta["deadline_ms"] = max(1, int(asked.left * 1000))
            if request.trace is not None:
                meta["trace"] = request.trace
            stream = await stack.enter_async_context(await lease.connection.open("infer", meta, asked.body))
            call = cls(dispatcher, lease, stream, stack)
            call.head = await call._while_alive(stream.head, asked.first_token)
            call.first = await call._while_alive(stream.read, asked.first_token)
            call.first_token = time.monotonic() - call.sent
            call._stack = stack.pop_all()
            return call

    async def chunks(self, patience: Callable[[], float | None]) -> AsyncGenerator[bytes, None]:
        """The body as it comes. `patience` says how many seconds the next silence may last.

        A worker's node that says nothing for a while is pinged, so that a dead machine is told from
        a slow model. Raises DeadlineExceeded, and whatever goes wrong with the worker.
        """
        data = self.first
        while data is not None:
            yield data
            data = await self._while_alive(self.stream.read, patience())

    async def read_all(self, limit: int) -> bytes:
        """The whole body, cut off after `limit` bytes."""
        body = b""
        async with aclosing(self.chunks(lambda: self._dispatcher.timeouts.first_token)) as chunks:
            async for data in chunks:
                body += data
                if len(body) >= limit:
                    break
        return body[:limit]

    def succeeded(self, timings: Mapping[str, Any]) -> None:
        """The answer is whole: learn from it. `timings` are the server's own, where it gave some."""
        now = time.monotonic()
        board, worker = self._dispatcher.board, self.lease.record.node_id
        board.succeeded(
            worker, now, first_token=self.first_token, speed=_positive(timings, "predicted_per_second")
        )
        prompt_speed = _positive(timings, "prompt_per_second")
        if prompt_speed is not None and timings.get("prompt_n", 0) >= 16:
            board[worker].prompt_speed.add(prompt_speed, now)
        self._dispatcher.learn_load(self.lease.connection, (self.stream.trailer or {}).get("load"))

    async def _while_alive(self, wait: Callable[[float], Awaitable[T]], patience: float | None) -> T:
        silence = self._dispatcher.timeouts.silence
        limit = math.inf if patience is None else time.monotonic() + patience
        while (left := limit - time.monotonic()) > 0:
            try:
                return await wait(min(left, silence))
            except DeadlineExceeded:
                await self.stream.connection.ping(timeout=silence)
                self._dispatcher.learn_load(self.stream.connection)
        raise DeadlineExceeded(f"the worker sent nothing for {patience:g} s")


async def start_hedged(dispatcher: Dispatcher, request: Request, asked: Asked) -> Call:
    """As `Call.start`; where the first token is late and the budget allows, a second worker is asked
    too. The first to speak is returned, the other one is cancelled at its worker.
    """
    hedging = dispatcher.hedging(request.model)
    began = time.monotonic()
    hedging.requested()
    delay = hedging.delay()
    first = dispatcher.spawn(Call.start(dispatcher, request, asked), "call")
    running: dict[asyncio.Task[Call], Asked] = {first: asked}
    try:
        done, _ = await asyncio.wait(running, timeout=delay)
        if not done and asked.explain.worker is not None and hedging.take():
            other = Asked(
                asked.body,
                asked.exclude | {bytes.fromhex(asked.explain.worker)},
                asked.digest,
                asked.left,
                asked.first_token,
            )
            running[dispatcher.spawn(Call.start(dispatcher, request, other), "hedge")] = other
        winner = await _first_success(running)
    except BaseException:
        await _cancel(running)
        raise
    call = winner.result()
    told = running.pop(winner).explain
    await _cancel(running)
    if told is not asked.explain:
        slower = bytes.fromhex(asked.explain.worker or "")
        dispatcher.board.late(slower, time.monotonic(), time.monotonic() - began)
        asked.explain.adopt(told)
        asked.explain.hedged += 1
    hedging.answered(call.first_token)
    return call


async def _first_success(running: dict[asyncio.Task[Call], Asked]) -> asyncio.Task[Call]:
    """The first task that succeeds. Raises the first request's error where none does."""
    pending = set(running)
    while pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if task.exception() is None:
                return task
    return_first = next(iter(running))
    error = return_first.exception()
    assert error is not None
    raise error


async def _cancel(running: dict[asyncio.Task[Call], Asked]) -> None:
    """End what is still asked: its request is cancelled at the worker, also if it has just begun."""
    for task in running:
        task.cancel()
    results = await asyncio.gather(*running, return_exceptions=True)
    for result in results:
        if isinstance(result, Call):
            await result.__aexit__(None, None, None)


def _positive(timings: Mapping[str, Any], key: str) -> float | None:
    value = timings.get(key)
    return float(value) if isinstance(value, int | float) and value > 0 else None
