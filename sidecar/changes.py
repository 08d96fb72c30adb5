"""How others learn at once that a server's state changed, and what every kind of server has in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from sidecar.client import SidecarClient
from sidecar.errors import SidecarError
from sidecar.probe import Info
from sidecar.states import State


@dataclass(frozen=True, slots=True)
class Change:
    """What a subscriber is told: the new state, and the failure that led to it."""

    state: State
    error: SidecarError | None


class Changes:
    """The subscribers of one server."""

    def __init__(self) -> None:
        self._subscribers: list[Callable[[Change], None]] = []

    def subscribe(self, callback: Callable[[Change], None]) -> Callable[[], None]:
        """Call `callback` on every change; returns the way to unsubscribe."""
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    def publish(self, change: Change) -> None:
        """Tell everyone."""
        for callback in list(self._subscribers):
            callback(change)


class Backend(Protocol):
    """A server that answers for one model: `Supervisor` or `ExternalBackend`."""

    last_error: SidecarError | None
    info: Info | None

    @property
    def pid(self) -> int | None:
        """Its process id, or None while there is none of ours."""

    @property
    def restarts(self) -> int:
        """Restarts after a failure."""

    @property
    def state(self) -> State:
        """The state of its life."""

    @property
    def client(self) -> SidecarClient | None:
        """Its client while it can answer, else None."""

    @property
    def memory(self) -> int:
        """Estimated bytes that it takes on this machine while it runs."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def ensure_ready(self, timeout: float | None = None) -> SidecarClient:
        """Start it unless it runs, and wait until it can answer."""

    async def stop(self) -> None:
        """End it; idempotent."""

    def subscribe(self, callback: Callable[[Change], None]) -> Callable[[], None]:
        """Call `callback` on every change of state; returns the way to unsubscribe."""
