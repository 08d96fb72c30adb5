"""An in-memory network under a virtual clock, on which real `Dht` nodes run unchanged.

`VirtualLoop` is an asyncio loop whose time jumps to the next timer, and whose datagram endpoints are
ports of a `World`: with latency, loss, partitions and one seed for everything that is random.
"""

from __future__ import annotations

import asyncio
import random
import selectors
import socket
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

T = TypeVar("T")
Address = tuple[str, int]

EPOCH = 1_800_000_000.0


class _Instant(selectors.BaseSelector):
    """Waits by moving the virtual clock."""

    def __init__(self) -> None:
        self.now = 0.0

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return selectors.SelectorKey(fileobj, 0, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return selectors.SelectorKey(fileobj, 0, 0, None)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("the simulation waits for something that will never happen")
        self.now += max(0.0, timeout)
        return []

    def get_map(self) -> dict[Any, selectors.SelectorKey]:
        return {}


class VirtualLoop(asyncio.SelectorEventLoop):
    """asyncio under a virtual clock."""

    def __init__(self, world: World) -> None:
        self._instant = _Instant()
        self._world = world
        super().__init__(self._instant)

    def time(self) -> float:
        return self._instant.now

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
        self.loop.call_later(self.rng.uniform(*self.latency), self._deliver, sender.address, to, data)

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
