"""The gate: whatever happens to a waiting request, its place is given back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from mesh.errors import Overloaded, RemoteDeadline
from node.gate import Gate
from tests.support import seconds


@asynccontextmanager
async def idle_afterwards(gate: Gate) -> AsyncIterator[Gate]:
    async with asyncio.timeout(seconds(10)):
        yield gate
    gate.admission.validate()
    assert gate.admission.busy == 0
    assert gate.admission.waiting == 0
    assert not gate._waiting


class Request:
    """One request: waits for a slot, holds it until told to end."""

    def __init__(self, gate: Gate, peer: bytes = b"p", deadline: float | None = None) -> None:
        self.entered = asyncio.Event()
        self.leave = asyncio.Event()
        self.task = asyncio.create_task(self._run(gate, peer, deadline))

    async def _run(self, gate: Gate, peer: bytes, deadline: float | None) -> float:
        async with gate.slot(peer, cost=1, priority=0, deadline=deadline) as waited:
            self.entered.set()
            await self.leave.wait()
            return waited

    async def end(self) -> float:
        self.leave.set()
        return await self.task

    async def cancelled(self) -> bool:
        self.task.cancel()
        try:
            await self.task
        except asyncio.CancelledError:
            return True
        return False


async def steps(count: int) -> None:
    """Let the loop run so many times."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_slots_are_given_in_turn() -> None:
    async with idle_afterwards(Gate(1)) as gate:
        one, two = Request(gate), Request(gate)
        await one.entered.wait()
        assert not two.entered.is_set()
        await one.end()
        await two.entered.wait()
        assert await two.end() >= 0


@pytest.mark.parametrize("after", range(6))
async def test_cancelling_at_any_await_leaves_nothing(after: int) -> None:
    """The first request's end grants the slot; the second is cancelled so many steps around that."""
    async with idle_afterwards(Gate(1)) as gate:
        one, two, three = Request(gate), Request(gate), Request(gate)
        await one.entered.wait()
        one.leave.set()
        await steps(after)
        two.leave.set()
        await two.cancelled()
        await three.entered.wait()
        await three.end()
        await one.task


async def test_cancelled_in_the_very_moment_of_the_grant() -> None:
    async with idle_afterwards(Gate(1)) as gate:
        one, two, three = Request(gate), Request(gate), Request(gate)
        await one.entered.wait()
        await steps(2)
        one.leave.set()
        two.task.cancel()  # one runs first and hands its slot to a request that is as good as gone
        await one.task
        gate.admission.validate()
        assert await two.cancelled()
        await three.entered.wait()
        await three.end()


async def test_displaced_in_the_very_moment_of_its_cancellation() -> None:
    async with idle_afterwards(Gate(1)) as gate:
        running = Request(gate, b"x")
        await running.entered.wait()
        greedy = [Request(gate, b"greedy") for _ in range(gate.admission.queue_limit)]
        await steps(2)
        assert gate.admission.waiting == gate.admission.queue_limit
        modest = Request(gate, b"modest")
        greedy[-1].task.cancel()  # its future is cancelled, but modest's request comes before it wakes
        await steps(3)
        assert await greedy[-1].cancelled()
        await running.end()
        for request in (greedy[0], modest, *greedy[1:-1]):
            await request.end()


async def test_a_displaced_request_is_told_to_try_elsewhere() -> None:
    async with idle_afterwards(Gate(1)) as gate:
        running = Request(gate, b"x")
        await running.entered.wait()
        greedy = [Request(gate, b"greedy") for _ in range(gate.admission.queue_limit)]
        await steps(2)
        modest = Request(gate, b"modest")
        with pytest.raises(Overloaded, match="went to a peer with fewer") as refused:
            await greedy[-1].task
        assert refused.value.retry_after is not None
        await running.end()
        for request in (greedy[0], modest, *greedy[1:-1]):
            await request.end()


async def test_a_full_queue_refuses_with_a_time() -> None:
    async with idle_afterwards(Gate(1)) as gate:
        requests = [Request(gate) for _ in range(1 + gate.admission.queue_limit)]
        await requests[0].entered.wait()
        with pytest.raises(Overloaded) as refused:
            async with gate.slot(b"p", cost=1, priority=0, deadline=None):
                pass
        assert refused.value.retry_after == pytest.approx(
            gate.admission.retry_after(time.monotonic()), rel=0.5
        )
        for request in requests:
            await request.end()


async def test_a_deadline_ends_the_wait() -> None:
    async with idle_afterwards(Gate(1)) as gate:
        one = Request(gate)
        await one.entered.wait()
        with pytest.raises(RemoteDeadline):
            async with gate.slot(b"p", cost=1, priority=0, deadline=time.monotonic() + 0.01):
                pass
        await one.end()


async def test_a_deadline_in_the_past_still_needs_no_wait_for_a_free_slot() -> None:
    past = time.monotonic() - 1
    async with idle_afterwards(Gate(1)) as gate, gate.slot(b"p", cost=1, priority=0, deadline=past) as waited:
        assert waited < seconds(0.1)


async def test_more_slots_wake_those_who_wait() -> None:
    async with idle_afterwards(Gate(1)) as gate:
        requests = [Request(gate) for _ in range(3)]
        await requests[0].entered.wait()
        gate.resize(3)
        for request in requests:
            await request.entered.wait()
        for request in requests:
            await request.end()


async def test_an_exception_inside_gives_the_slot_back() -> None:
    async with idle_afterwards(Gate(1)) as gate:
        with pytest.raises(ZeroDivisionError):
            async with gate.slot(b"p", cost=1, priority=0, deadline=None):
                _ = 1 / 0


async def test_a_crowd_that_comes_and_goes_leaves_nothing() -> None:
    async with idle_afterwards(Gate(2)) as gate:
        requests = [Request(gate, bytes([number % 5])) for number in range(60)]
        for number, request in enumerate(requests):
            if number % 3 == 0:
                request.task.cancel()
            if number % 7 == 0:
                await steps(1)
            request.leave.set()
        ended = await asyncio.gather(*(request.task for request in requests), return_exceptions=True)
        assert all(isinstance(one, float | Overloaded | asyncio.CancelledError) for one in ended)
        assert any(isinstance(one, float) for one in ended)
