"""What the measurements share: the slots as llama.cpp tells them, servers made slow, quantiles."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

import aiohttp

from node.cluster import Member
from tests.mesh_support import Llama, llama_of

MODEL = "qmesh-demo"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "ignore_eos": True}
POLL = 0.004


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which this share of them lies; nan where there is none."""
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else math.nan


class Slots:
    """The slots of some llama.cpp servers, by their own word, over connections that stay open."""

    def __init__(self, servers: Sequence[Llama], sessions: Sequence[aiohttp.ClientSession]) -> None:
        self._asked = [*zip(servers, sessions, strict=True)]

    @classmethod
    @asynccontextmanager
    async def of(cls, members: Sequence[Member]) -> AsyncIterator[Slots]:
        """Those of these nodes, one after the other."""
        servers = [server for member in members for server in llama_of(member.pid)]
        async with AsyncExitStack() as stack:
            sessions = [
                await stack.enter_async_context(
                    aiohttp.ClientSession(headers={"Authorization": f"Bearer {server.key}"})
                )
                for server in servers
            ]
            yield cls(servers, sessions)

    async def busy(self, number: int | None = None) -> int:
        """Slots at work, of all servers or of one."""
        asked = self._asked if number is None else [self._asked[number]]
        return sum(await asyncio.gather(*(_busy(*one) for one in asked)))

    async def until(self, count: int, *, timeout: float = 20.0, number: int | None = None) -> float:
        """Wait until so many are at work (0), or at least so many; the seconds it took."""
        began = time.perf_counter()
        async with asyncio.timeout(timeout):
            while (busy := await self.busy(number)) < count or (not count and busy):  # noqa: ASYNC110 - another process
                await asyncio.sleep(POLL)
        return time.perf_counter() - began


async def _busy(server: Llama, session: aiohttp.ClientSession) -> int:
    async with session.get(f"http://127.0.0.1:{server.port}/slots") as response:
        return sum(bool(slot["is_processing"]) for slot in await response.json())


class Slowed:
    """Makes one process slower, by stopping it most of the time (SIGSTOP, SIGCONT)."""

    RUN = 0.003

    def __init__(self, stop: float = 0.027) -> None:
        self._stop = stop
        self._pid: int | None = None
        self._ended = threading.Event()
        self._lock = threading.Lock()

    def slow_down(self, pid: int | None) -> None:
        """From now on this one, and no other."""
        with self._lock:
            if self._pid is not None:
                os.kill(self._pid, signal.SIGCONT)
            self._pid = pid
            if pid is not None:
                os.kill(pid, signal.SIGSTOP)  # until the next time to run

    @contextmanager
    def running(self) -> Iterator[Slowed]:
        """Stop and continue until the block ends."""
        thread = threading.Thread(target=self._run, name="slow down")
        thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            thread.join()
            self.slow_down(None)

    def _run(self) -> None:
        while not self._ended.is_set():
            self._signal(signal.SIGSTOP)
            self._ended.wait(self._stop)
            self._signal(signal.SIGCONT)
            self._ended.wait(self.RUN)

    def _signal(self, number: signal.Signals) -> None:
        with self._lock:
            if self._pid is not None:
                os.kill(self._pid, number)
