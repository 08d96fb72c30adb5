"""One request over as many workers as it takes: who is asked next, and when to give up."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Protocol, TypeVar

from client_sdk.call import Asked, Call, Request, TimeIsUp, start_hedged
from client_sdk.dispatch import Dispatcher
from client_sdk.failover import ReplayDiverged, Way
from client_sdk.types import Attempt, Explanation, RouteEvent
from mesh.errors import (
    AllWorkersFailed,
    ConnectionClosed,
    DeadlineExceeded,
    NoWorkers,
    Overloaded,
    QMeshError,
    RemoteDeadline,
    StreamInterrupted,
    is_retryable,
)

T = TypeVar("T")

MAX_ATTEMPTS = 8
"""Workers asked for one answer, those that were only overloaded not counted."""
PATIENCE = 30.0
"""Seconds to wait for a place while every worker is overloaded, where the request has no deadline."""
SHORTEST_NAP = 0.05
LONGEST_NAP = 2.0
"""Between two rounds of asking while every worker is overloaded; what they say is heeded in between."""
SAME_MOMENT = 0.05
"""Seconds by which a worker's clock may see the request's deadline pass before this one does."""


class Resumable(Protocol):
    """An answer that knows how it can be continued; see `client_sdk.failover`."""

    way: Way
    digest: bytes | None

    @property
    def started(self) -> bool:
        """Whether anything was delivered."""

    @property
    def complete(self) -> bool:
        """Whether everything was delivered."""

    def next_body(self, took: float) -> bytes:
        """The body for the next worker; writing what was delivered took this many seconds.

        Raises StreamInterrupted where no way is left.
        """

    def diverged(self) -> None:
        """Replaying gave another text."""

    def lost(self, reason: str) -> StreamInterrupted:
        """The error for an answer that nobody can continue."""


class Attempts:
    """The workers that are asked for one request, in order; `explain` tells of each."""

    def __init__(self, dispatcher: Dispatcher, journal: Resumable, explain: Explanation) -> None:
        self._dispatcher = dispatcher
        self._journal = journal
        self._explain = explain
        self._began = time.monotonic()
        total = dispatcher.timeouts.total
        self._until = math.inf if total is None else self._began + total
        self._failed: list[tuple[str, BaseException]] = []
        self._exclude: frozenset[bytes] = frozenset()
        self._naps = 0
        self._wrote = 0.0
        """Seconds from the first to the last piece that was delivered."""

    async def run(
        self, request: Request, relay: Callable[[Call], AsyncGenerator[T, None]]
    ) -> AsyncGenerator[T, None]:
        """Ask one worker after the other until the answer is whole; `relay` delivers what one sends.

        Raises NoWorkers, Overloaded, AllWorkersFailed, StreamInterrupted, DeadlineExceeded, ConnectionClosed
        (the client was closed), or the RemoteError of a request that no worker would take.
        """
        while not self._journal.complete:
            try:
                async with aclosing(self._attempt(request, relay)) as pieces:
                    async for piece in pieces:
                        yield piece
            except NoWorkers as error:
                if not self._failed:
                    raise
                await self._wait_for_a_place(error)
            except ReplayDiverged as error:
                self._journal.diverged()
                self._note(error)
            except (QMeshError, OSError) as error:
                self._note(error)
                self._check_time(error)
                self._check(error)
                if self._explain.worker is None:
                    await self._wait_for_a_place(error)
                else:
                    retry = RouteEvent("retry", request.model, self._explain.worker, str(error))
                    self._dispatcher.tell(retry)

    async def _attempt(
        self, request: Request, relay: Callable[[Call], AsyncGenerator[T, None]]
    ) -> AsyncGenerator[T, None]:
        journal, explain = self._journal, self._explain
        asked = Asked(journal.next_body(self._wrote), self._exclude, journal.digest, self._until, explain)
        splices = journal.started
        explain.worker = None
        try:
            async with asyncio.timeout(None if self._until == math.inf else self._until - time.monotonic()):
                call = await start_hedged(self._dispatcher, request, asked)
        except TimeoutError:
            raise TimeIsUp from None
        finally:
            self._exclude = asked.exclude
        async with call, aclosing(relay(call)) as pieces:
            async for piece in pieces:
                since = time.monotonic() - self._began
                if explain.first_token is None:
                    explain.first_token = since
                self._wrote = since - explain.first_token
                journal.digest = call.lease.record.digest
                if splices:
                    splices = False
                    explain.splices += 1
                    self._dispatcher.tell(RouteEvent("splice", request.model, call.lease.id, journal.way))
                yield piece
        explain.attempts.append(Attempt(call.lease.id, journal.way))

    def _check_time(self, error: BaseException) -> None:
        """Raises where the time is over or the client closed."""
        left = self._until - time.monotonic()
        if left <= 0 or (isinstance(error, RemoteDeadline) and left < SAME_MOMENT):
            total = self._dispatcher.timeouts.total
            raise DeadlineExceeded(f"the answer took longer than {total:g} s") from error
        if self._dispatcher.closed:
            raise ConnectionClosed("the client is closed") from error

    def _check(self, error: QMeshError | OSError) -> None:
        """Raises where nobody else is to be asked after this error."""
        worker = self._explain.worker
        if worker is None and len(self._failed) == 1 and not isinstance(error, Overloaded):
            raise error  # nobody could even be asked for workers
        if not is_retryable(error):
            if self._journal.started:
                raise self._journal.lost(str(error)) from error
            raise error
        if worker is not None:
            self._exclude |= {bytes.fromhex(worker)}
        if sum(not isinstance(error, Overloaded) for _, error in self._failed) >= MAX_ATTEMPTS:
            raise self._give_up() from error

    async def _wait_for_a_place(self, error: BaseException) -> None:
        """Every worker was asked: sleep where some were only overloaded, else give up."""
        waits = [one.retry_after or 0.0 for _, one in self._failed if isinstance(one, Overloaded)]
        if not waits or time.monotonic() - self._began > PATIENCE:
            raise self._give_up() from error
        self._naps += 1
        nap = max(waits[-1], SHORTEST_NAP * 1.5**self._naps) * self._dispatcher.rng.uniform(0.7, 1.0)
        await asyncio.sleep(max(0.0, min(nap, LONGEST_NAP, self._until - time.monotonic())))
        self._check_time(error)
        self._exclude = frozenset()

    def _give_up(self) -> QMeshError:
        worker, last = self._failed[-1]
        reason = f"worker {worker[:12]}: {last}" if worker else str(last)
        if self._journal.started:
            return self._journal.lost(f"no other worker could go on ({reason})")
        if isinstance(last, Overloaded) and all(isinstance(error, Overloaded) for _, error in self._failed):
            return Overloaded(f"every worker is busy ({reason})", retry_after=last.retry_after)
        return AllWorkersFailed(f"{len(self._failed)} attempts failed, the last with {reason}", self._failed)

    def _note(self, error: BaseException) -> None:
        worker = self._explain.worker or ""
        self._failed.append((worker, error))
        self._explain.attempts.append(Attempt(worker, self._journal.way, str(error) or type(error).__name__))
