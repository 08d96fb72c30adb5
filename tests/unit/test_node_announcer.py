"""The announcer: at intervals and at changes that matter, not too often, with a rising number."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import cast

import pytest

from mesh.dht import Dht
from mesh.errors import ConfigurationError, DeadlineExceeded
from mesh.identity import NodeId
from mesh.limits import RECORD_TTL
from mesh.records import WorkerRecord
from node import announcer as module
from node.announcer import BURST, Announcer, Describe
from tests.support import seconds


@dataclass
class FakeDht:
    """Remembers what was announced; `wait` for more of it."""

    failure: Exception | None = None
    announced: list[WorkerRecord] = field(default_factory=list)
    withdrawn: list[WorkerRecord] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def announce(self, record: WorkerRecord) -> int:
        async with self._news:
            self.announced.append(record)
            self.times.append(time.monotonic())
            self._news.notify_all()
        if self.failure is not None:
            raise self.failure
        return 3

    async def withdraw(self, record: WorkerRecord) -> None:
        if self.failure is not None:
            raise self.failure
        self.withdrawn.append(record)

    async def wait(self, count: int) -> WorkerRecord:
        """The so-many-th announcement."""
        async with asyncio.timeout(seconds(10)), self._news:
            await self._news.wait_for(lambda: len(self.announced) >= count)
        return self.announced[count - 1]


class FakeNode:
    """Models by name, as they are now."""

    def __init__(self, *names: str) -> None:
        self.models = {name: self.record(name) for name in names}

    @staticmethod
    def record(name: str) -> WorkerRecord:
        return WorkerRecord(
            node_id=NodeId(b"n" * 32), seq=0, expires=0, addresses=("127.0.0.1:1",), model=name,
            digest=bytes(16), health=80, slots=4, context=2048, generation_speed=1.0, prompt_speed=1.0,
            flags=frozenset(), software="test",
        )  # fmt: skip

    def set(self, name: str, **facts: object) -> None:
        self.models[name] = replace(self.models[name], **facts)  # type: ignore[arg-type]

    def describers(self) -> dict[str, Describe]:
        def describer(name: str) -> Describe:
            return lambda seq, expires: replace(self.models[name], seq=seq, expires=expires)

        return {name: describer(name) for name in self.models}


@dataclass
class Running:
    dht: FakeDht
    node: FakeNode
    announcer: Announcer

    async def quiet(self) -> None:
        """Let the announcer do whatever it is about to do."""
        for _ in range(10):
            await asyncio.sleep(0)


@asynccontextmanager
async def running(*names: str, failure: Exception | None = None) -> AsyncIterator[Running]:
    dht, node = FakeDht(failure), FakeNode(*names)
    announcer = Announcer(cast("Dht", dht), node.describers)
    task = asyncio.create_task(announcer.run())
    try:
        yield Running(dht, node, announcer)
    finally:
        task.cancel()
        await asyncio.wait([task], timeout=seconds(5))
        assert task.cancelled(), "it ended by itself"


async def test_every_model_is_announced_at_once_for_its_time_to_live() -> None:
    async with running("a", "b") as one:
        await one.dht.wait(2)
        assert {record.model for record in one.dht.announced} == {"a", "b"}
        for record in one.dht.announced:
            assert RECORD_TTL - 2 <= record.expires - time.time() <= RECORD_TTL
            assert abs(record.seq - time.time() * 1000) < seconds(5000)
        await asyncio.wait_for(one.announcer.told.wait(), seconds(5))


@pytest.mark.parametrize(
    "change", [{"health": 70}, {"health": 0}, {"health": 90}, {"slots": 5}, {"addresses": ("b:1",)}]
)
async def test_a_change_that_matters_is_told_at_once(change: dict[str, object]) -> None:
    async with running("a") as one:
        await one.dht.wait(1)
        one.node.set("a", **change)
        one.announcer.changed()
        record = await one.dht.wait(2)
        assert {name: getattr(record, name) for name in change} == change


async def test_a_change_during_an_announcement_is_not_lost() -> None:
    async with running("a") as one:
        await one.dht.wait(1)
        one.node.set("a", health=1)
        one.announcer.changed()
        one.node.set("a", health=0)
        await one.dht.wait(2)
        one.node.set("a", health=80)  # seen although nobody says so again: the announcement is compared
        one.announcer.changed()
        assert (await one.dht.wait(3)).health == 80


async def test_falling_to_1_and_to_0_is_not_the_same() -> None:
    async with running("a") as one:
        one.node.set("a", health=5)
        await one.dht.wait(1)
        one.node.set("a", health=0)
        one.announcer.changed()
        assert (await one.dht.wait(2)).health == 0


@pytest.mark.parametrize("change", [{}, {"health": 71}, {"health": 89}, {"generation_speed": 9.0}])
async def test_a_change_that_does_not_matter_waits(change: dict[str, object]) -> None:
    async with running("a") as one:
        await one.dht.wait(1)
        one.node.set("a", **change)
        one.announcer.changed()
        await one.quiet()
        assert len(one.dht.announced) == 1


async def test_after_the_machine_slept_it_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running("a") as one:
        await one.dht.wait(1)
        one.announcer.changed()
        await one.quiet()
        assert len(one.dht.announced) == 1
        later = time.time() + 600
        monkeypatch.setattr("node.announcer.time.time", lambda: later)
        one.announcer.changed()
        assert (await one.dht.wait(2)).expires == int(later + RECORD_TTL)


async def test_small_changes_add_up() -> None:
    async with running("a") as one:
        await one.dht.wait(1)
        for health in range(79, 69, -1):
            one.node.set("a", health=health)
            one.announcer.changed()
            await one.quiet()
        assert (await one.dht.wait(2)).health == 70
        assert len(one.dht.announced) == 2


async def test_a_model_that_comes_is_told() -> None:
    async with running("a") as one:
        await one.dht.wait(1)
        one.node.models["b"] = one.node.record("b")
        one.announcer.changed()
        await one.dht.wait(3)
        assert one.dht.announced[-1].model == "b"


async def test_it_is_repeated_at_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANNOUNCE_INTERVAL", 0.05)
    monkeypatch.setattr(module, "MIN_ANNOUNCE_INTERVAL", 0.001)
    async with running("a") as one:
        await one.dht.wait(8)
        gaps = [after - before for before, after in zip(one.dht.times, one.dht.times[1:], strict=False)]
        assert min(gaps) > 0.035
        assert len({round(gap, 4) for gap in gaps}) > 1, "no jitter"


async def test_flapping_is_told_a_few_times_at_once_and_then_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIN_ANNOUNCE_INTERVAL", 0.2)
    async with running("a") as one:
        until = time.monotonic() + 1.1
        health = 80
        while time.monotonic() < until:
            health = 100 - health
            one.node.set("a", health=health)
            one.announcer.changed()
            await asyncio.sleep(0.005)
        told = len(one.dht.announced)
        # the first, the burst, and one per 0.2 s
        assert BURST + 1 + 2 <= told <= BURST + 1 + 6
        # What counts at the end is told at the end.
        one.node.set("a", health=33)
        one.announcer.changed()
        assert (await one.dht.wait(told + 1)).health == 33


async def test_the_number_rises_also_when_the_clock_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running("a") as one:
        await one.dht.wait(1)
        past = time.time_ns() - 3600 * 10**9
        monkeypatch.setattr("node.announcer.time.time_ns", lambda: past)
        for count in range(2, 5):
            one.node.set("a", health=count * 20)
            one.announcer.changed()
            await one.dht.wait(count)
        numbers = [record.seq for record in one.dht.announced]
        assert numbers == sorted(set(numbers))
        await one.announcer.withdraw()
        assert one.dht.withdrawn[0].seq > numbers[-1]


@pytest.mark.parametrize(
    "failure", [ConfigurationError("too long", "fix"), DeadlineExceeded("no"), OSError("no")]
)
async def test_a_failure_is_told_and_tried_again_but_not_in_a_hurry(
    failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async with running("a", failure=failure) as one:
        await one.dht.wait(BURST + 1)
        await one.quiet()
        assert len(one.dht.announced) == BURST + 1
        assert "announcing a failed" in caplog.text
        await one.announcer.withdraw()
        assert "withdrawing a failed" in caplog.text


async def test_withdrawing_covers_every_model() -> None:
    async with running("a", "b") as one:
        await one.dht.wait(2)
        await one.announcer.withdraw()
        assert {record.model for record in one.dht.withdrawn} == {"a", "b"}
        assert min(record.seq for record in one.dht.withdrawn) > max(
            record.seq for record in one.dht.announced
        )
