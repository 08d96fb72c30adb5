"""The asyncio shell around `node.admission`: requests wait here for a slot of their model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mesh.errors import Overloaded, RemoteDeadline
from node.admission import Admission, Ticket

DEFAULT_PATIENCE = 300.0
"""Seconds that a request without a deadline waits at most."""
DISPLACED = "its place in the full queue went to a peer with fewer requests"


class Gate:
    """The slots of one model."""

    def __init__(self, slots: int) -> None:
        self.admission = Admission(slots)
        self._waiting: dict[Ticket, asyncio.Future[None]] = {}

    @asynccontextmanager
    async def slot(
        self, peer: bytes, *, cost: float, priority: int, deadline: float | None
    ) -> AsyncIterator[float]:
        """Hold a slot; gives the seconds waited for it. `deadline` is a `time.monotonic()` time.

        Raises Overloaded where the queue is full (or another peer's request took the place), and
        RemoteDeadline where the time ran out.
        """
        asked = time.monotonic()
        until = asked + DEFAULT_PATIENCE if deadline is None else deadline
        ticket = Ticket(peer, cost, priority, until)
        self.admission.expire(asked)  # their own timers, due now, tell those who waited
        accepted, displaced = self.admission.offer(ticket, asked)
        if displaced is not None and not (future := self._waiting[displaced]).done():
            future.set_exception(self._overloaded(DISPLACED))
        if not accepted:
            raise self._overloaded("every slot is busy and the queue is full")
        if ticket.started is None:
            await self._wait(ticket, until)
        try:
            yield time.monotonic() - asked
        finally:
            self._wake(self.admission.release(ticket, time.monotonic()))

    def resize(self, slots: int) -> None:
        """The model now has another number of slots."""
        self._wake(self.admission.resize(slots, time.monotonic()))

    async def _wait(self, ticket: Ticket, until: float) -> None:
        future = self._waiting[ticket] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(until - time.monotonic()):
                await future
        except BaseException as error:
            if ticket.started is not None:  # It was given a slot in the moment it gave up.
                self._wake(self.admission.release(ticket, time.monotonic()))
            else:
                self.admission.withdraw(ticket)
            if isinstance(error, TimeoutError):
                raise RemoteDeadline("the request's deadline passed while it waited for a slot") from None
            raise
        finally:
            del self._waiting[ticket]

    def _wake(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            future = self._waiting[ticket]
            if not future.done():
                future.set_result(None)

    def _overloaded(self, why: str) -> Overloaded:
        return Overloaded(why, retry_after=self.admission.retry_after(time.monotonic()))
