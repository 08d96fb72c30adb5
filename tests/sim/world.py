"""An in-memory network under a virtual clock, on which real `Dht` nodes run unchanged.

`VirtualLoop` is an asyncio loop whose time jumps to the next timer, and whose datagram endpoints are
ports of a `World`: with latency, loss, partitions and one seed for everything that is random.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
import selectors
import socket
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

T = TypeVar("T")
Address = tuple[str, int]

EPOCH = 1_800_000_000.0


class _Timer:
    """What `call_at` gives, to be cancelled."""

    __slots__ = ("_args", "_callback")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        self._callback: Callable[..., object] | None = callback
        self._args = args

    def cancel(self) -> None:
        self._callback = None

    def run(self) -> None:
        if self._callback is not None:
            self._callback(*self._args)


class _Instant(selectors.BaseSelector):
    """Waits by moving the virtual clock to what comes next, and doing it."""

    def __init__(self, proceed: Callable[[], None]) -> None:
        self._proceed = proceed

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return selectors.SelectorKey(fileobj, 0, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return selectors.SelectorKey(fileobj, 0, 0, None)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout != 0:
            self._proceed()
        return []

    def get_map(self) -> dict[Any, selectors.SelectorKey]:
        return {}


class VirtualLoop(asyncio.SelectorEventLoop):
    """asyncio under a virtual clock.

    Timers and datagrams wait in one heap of tuples and are called from there: asyncio's own handles would
    cost as much as the nodes. What a callback raises ends the simulation.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._now = 0.0
        self._later: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._order = itertools.count()
        super().__init__(_Instant(self._proceed))

    def time(self) -> float:
        return self._now

    def call_at(  # type: ignore[override]  # a handle that can do no more than be cancelled
        self, when: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> _Timer:
        timer = _Timer(callback, args)
        heapq.heappush(self._later, (max(when, self._now), next(self._order), timer.run, ()))
        return timer

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> _Timer:
        return self.call_at(self._now + delay, callback, *args)

    def deliver(self, delay: float, callback: Callable[..., object], *args: Any) -> None:
        """As `call_later`, for what is never cancelled."""
        heapq.heappush(self._later, (self._now + delay, next(self._order), callback, args))

    def _proceed(self) -> None:
        """Do what comes next, until a task can go on."""
        ready = self._ready  # type: ignore[attr-defined]
        while not ready:
            if not self._later:
                raise RuntimeError("the simulation waits for something that will never happen")
            self._now, _, callback, args = heapq.heappop(self._later)
            callback(*args)

    async def create_datagram_endpoint(  # type: ignore[override]  # only what a node uses
        self, protocol_factory: Callable[[], Any], local_addr: Address | None = None, **_: Any
    ) -> tuple[asyncio.DatagramTransport, Any]:
        if local_addr is None:
            raise OSError("a simulated node is bound by its address")
        protocol = protocol_factory()
        transport = Port(self._world, local_addr, protocol)
        self._world.bind(local_addr, transport)
        protocol.connection_made(transport)
        return transport, protocol


class _Socket:
    family = socket.AF_INET


class Port(asyncio.DatagramTransport):
    """One bound UDP port of the world."""

    def __init__(self, world: World, address: Address, protocol: Any) -> None:
        super().__init__({"socket": _Socket, "sockname": address})
        self.address = address
        self.protocol = protocol
        self.sent = self.received = 0
        self._world = world

    def sendto(self, data: Any, addr: Any = None) -> None:
        self.sent += len(data)
        self._world.send(self, addr, data)

    def close(self) -> None:
        self._world.unbind(self)

    def is_closing(self) -> bool:
        return self._world.port(self.address) is not self


class World:
    """The network. `latency` is the range of one-way delays in seconds, `loss` the share of datagrams lost.

    `reaches` may cut links: (sender's host, receiver's host) → bool.
    """

    def __init__(self, seed: int, *, latency: tuple[float, float] = (0.01, 0.08), loss: float = 0.0) -> None:
        self.rng = random.Random(seed)
        self.seed = seed
        self.latency = latency
        self.loss = loss
        self.reaches: Callable[[str, str], bool] | None = None
        self.datagrams = 0
        self.loop = VirtualLoop(self)
        self._ports: dict[Address, Port] = {}
        self._next_host = 0

    def new_host(self) -> str:
        """A public address of its own /24."""
        self._next_host += 1
        number = self._next_host
        return f"{20 + number // 65536}.{number // 256 % 256}.{number % 256}.1"

    def bind(self, address: Address, port: Port) -> None:
        if address in self._ports:
            raise OSError(98, "address in use")
        self._ports[address] = port

    def unbind(self, port: Port) -> None:
        if self._ports.get(port.address) is port:
            del self._ports[port.address]

    def port(self, address: Address) -> Port | None:
        return self._ports.get(address)

    def send(self, sender: Port, to: Address, data: bytes) -> None:
        self.datagrams += 1
        if self.loss and self.rng.random() < self.loss:
            return
        if self.reaches is not None and not self.reaches(sender.address[0], to[0]):
            return
        self.loop.deliver(self.rng.uniform(*self.latency), self._deliver, sender.address, to, data)

    def _deliver(self, sender: Address, to: Address, data: bytes) -> None:
        port = self._ports.get(to)
        if port is not None:
            port.received += len(data)
            port.protocol.datagram_received(data, sender)

    def wall(self) -> float:
        """Unix seconds of the virtual clock."""
        return EPOCH + self.loop.time()

    def run(self, scenario: Awaitable[T]) -> T:
        """Run a scenario to its end; a failure names the seed. Leftover tasks are a failure."""
        try:
            with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
                return runner.run(_awaited(scenario))
        except BaseException as error:
            error.add_note(f"simulation seed: {self.seed}")
            raise


async def _awaited(scenario: Awaitable[T]) -> T:
    return await scenario
