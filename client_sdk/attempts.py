"""One request over as many workers as it takes: who is asked next, and when to give up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Protocol, TypeVar

from client_sdk.call import Asked, Call, Request, start_hedged
from client_sdk.dispatch import Dispatcher
from client_sdk.failover import ReplayDiverged, Way
from client_sdk.types import Attempt, Explanation
from mesh.errors import (
    AllWorkersFailed,
    DeadlineExceeded,
    NoWorkers,
    Overloaded,
    QMeshError,
    StreamInterrupted,
    is_retryable,
)

T = TypeVar("T")

MAX_ATTEMPTS = 8
"""Workers asked for one answer, those that were only overloaded not counted."""
PATIENCE = 30.0
"""Seconds to wait for a place while every worker is overloaded, where the request has no deadline."""
LONGEST_NAP = 2.0


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
        self._failed: list[tuple[str, BaseException]] = []
        self._exclude: set[bytes] = set()
        self._wrote = 0.0
        """Seconds from the first to the last piece that was delivered."""

    async def run(
        self, request: Request, relay: Callable[[Call], AsyncGenerator[T, None]]
    ) -> AsyncGenerator[T, None]:
        """Ask one worker after the other until the answer is whole; `relay` delivers what one sends.

        Raises NoWorkers, Overloaded, AllWorkersFailed, StreamInterrupted, DeadlineExceeded, or the
        RemoteError of a request that no worker would take.
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
                self._check_time()
                if not is_retryable(error) or self._explain.worker is None:
                    raise  # the request's own fault, or nobody could be asked for workers
                self._exclude.add(bytes.fromhex(self._explain.worker))
            if sum(not isinstance(error, Overloaded) for _, error in self._failed) >= MAX_ATTEMPTS:
                raise self._give_up()

    def patience(self, limit: float | None) -> float | None:
        """How long to wait now: `limit`, or what is left of the whole, if less. Raises DeadlineExceeded."""
        left = self._check_time()
        return left if limit is None else limit if left is None else min(limit, left)

    async def _attempt(
        self, request: Request, relay: Callable[[Call], AsyncGenerator[T, None]]
    ) -> AsyncGenerator[T, None]:
        journal, timeouts = self._journal, self._dispatcher.timeouts
        asked = Asked(
            journal.next_body(self._wrote),
            frozenset(self._exclude),
            journal.digest,
            self._check_time(),
            self.patience(timeouts.first_token),
            self._explain,
        )
        call = await start_hedged(self._dispatcher, request, asked)
        async with call, aclosing(relay(call)) as pieces:
            async for piece in pieces:
                since = time.monotonic() - self._began
                if self._explain.first_token is None:
                    self._explain.first_token = since
                self._wrote = since - self._explain.first_token
                journal.digest = call.lease.record.digest
                yield piece
        self._explain.attempts.append(Attempt(call.lease.id, journal.way))

    async def _wait_for_a_place(self, none: NoWorkers) -> None:
        """Every worker was asked: sleep where some were only overloaded, else give up."""
        waits = [error.retry_after or 0.25 for _, error in self._failed if isinstance(error, Overloaded)]
        if not waits or time.monotonic() - self._began > PATIENCE:
            raise self._give_up() from none
        nap = self.patience(min(*waits, LONGEST_NAP))
        await asyncio.sleep(nap or 0)
        self._exclude.clear()

    def _give_up(self) -> QMeshError:
        worker, last = self._failed[-1]
        reason = f"worker {worker[:12]}: {last}"
        if self._journal.started:
            return self._journal.lost(f"no other worker could go on ({reason})")
        if isinstance(last, Overloaded) and all(isinstance(error, Overloaded) for _, error in self._failed):
            return Overloaded(f"every worker is busy ({reason})", retry_after=last.retry_after)
        return AllWorkersFailed(f"{len(self._failed)} attempts failed, the last with {reason}", self._failed)

    def _note(self, error: BaseException) -> None:
        worker = self._explain.worker or ""
        self._failed.append((worker, error))
        self._explain.attempts.append(Attempt(worker, self._journal.way, str(error) or type(error).__name__))

    def _check_time(self) -> float | None:
        """Seconds left for the whole answer, None without a deadline. Raises DeadlineExceeded."""
        total = self._dispatcher.timeouts.total
        if total is None:
            return None
        left = self._began + total - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(f"the answer took longer than {total:g} s")
        return left
