"""Keeps the node's records on the DHT true: at intervals, and at once when something changed."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping

from mesh.dht import Dht
from mesh.errors import QMeshError
from mesh.limits import ANNOUNCE_INTERVAL, MIN_ANNOUNCE_INTERVAL, RECORD_TTL
from mesh.records import WorkerRecord

log = logging.getLogger("qmesh.node")

HEALTH_STEP = 10
"""A change of health by this much is told at once."""
JITTER = 0.2
BURST = 4
"""Changes told without delay, before the limit of one per 10 s applies."""

Describe = Callable[[int, int], WorkerRecord]
"""(seq, expires) → the record of one model as it is now."""


class Announcer:
    """Announces a record per model. `changed` may be called at any time, as often as one likes."""

    def __init__(self, dht: Dht, models: Callable[[], Mapping[str, Describe]]) -> None:
        self._dht = dht
        self._models = models
        self._wake = asyncio.Event()
        self.told = asyncio.Event()
        """Set once the first announcement was tried."""
        self._announced: dict[str, WorkerRecord] = {}
        self._seq = 0
        self._allowance = float(BURST)
        self._allowed_at = time.monotonic()

    def changed(self) -> None:
        """Something may have changed: compare with what was announced."""
        self._wake.set()

    async def run(self) -> None:
        """Announce until cancelled."""
        while True:
            await self._announce_all()
            self.told.set()
            interval = ANNOUNCE_INTERVAL * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 - spreads load
            await self._changed_or(interval)
            await self._respect_limit()

    async def withdraw(self) -> None:
        """Tell the mesh that this node's models are gone. Bounded by the DHT's own deadlines."""
        records = [self._record(describe, ttl=RECORD_TTL) for describe in self._models().values()]
        async with asyncio.TaskGroup() as group:
            for record in records:
                group.create_task(self._withdraw(record))
        self._announced.clear()

    async def _withdraw(self, record: WorkerRecord) -> None:
        try:
            await self._dht.withdraw(record)
        except (QMeshError, OSError) as error:
            log.warning("withdrawing %s failed: %s; its record expires by itself", record.model, error)

    async def _announce_all(self) -> None:
        current = self._models()
        for name, describe in current.items():
            record = self._record(describe, ttl=RECORD_TTL)
            try:
                replicas = await self._dht.announce(record)
            except (QMeshError, OSError) as error:
                log.warning("announcing %s failed: %s", name, error)
                continue
            self._announced[name] = record
            log.debug("announced %s (health %d) to %d nodes", name, record.health, replicas)

    async def _changed_or(self, interval: float) -> None:
        """Wait for a change that matters, at most for the interval."""
        until = time.monotonic() + interval
        while (left := until - time.monotonic()) > 0:
            self._wake.clear()
            if self._differs():
                return
            try:
                async with asyncio.timeout(left):
                    await self._wake.wait()
            except TimeoutError:
                return

    def _differs(self) -> bool:
        current = {name: describe(0, 0) for name, describe in self._models().items()}
        if current.keys() != self._announced.keys():
            return True
        now = time.time()
        for name, record in current.items():
            before = self._announced[name]
            if before.expires - now < RECORD_TTL / 2:
                return True  # the machine slept: monotonic clocks need not count that
            if abs(record.health - before.health) >= HEALTH_STEP or (not record.health) != (
                not before.health
            ):
                return True
            if record.addresses != before.addresses or record.slots != before.slots:
                return True
        return False

    async def _respect_limit(self) -> None:
        """One announcement per 10 s in the long run, a few at once."""
        now = time.monotonic()
        self._allowance = min(BURST, self._allowance + (now - self._allowed_at) / MIN_ANNOUNCE_INTERVAL)
        self._allowed_at = now
        if self._allowance < 1:
            await asyncio.sleep((1 - self._allowance) * MIN_ANNOUNCE_INTERVAL)
        self._allowance -= 1

    def _record(self, describe: Describe, *, ttl: float) -> WorkerRecord:
        # Strictly rising, also when the clock was set back.
        self._seq = max(self._seq + 1, time.time_ns() // 1_000_000)
        return describe(self._seq, int(time.time() + ttl))
