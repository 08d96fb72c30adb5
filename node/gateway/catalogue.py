"""The models of the mesh as the gateway sees them: which one a request means, and what there is."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from typing import Any, Generic, Protocol, TypeVar

from client_sdk import ModelInfo, RawAnswer, WorkerInfo
from mesh.errors import NoWorkers, QMeshError
from node.gateway.settings import GatewaySettings

T = TypeVar("T")

FRESH = 2.0
"""Seconds for which what the mesh told about its models is used again."""
REMEMBERED = 600.0
"""Seconds for which a model that was there is expected to come back."""
MOST_LISTED = 256
DEFAULT_NAMES = frozenset({"", "default"})
"""Names by which clients that insist on one ask for the default model."""

LocalModels = Callable[[], Mapping[str, str]]
"""The models of the node that this gateway belongs to, with their states; empty where there is none."""


class Mesh(Protocol):
    """What the gateway needs of `client_sdk.MeshClient`."""

    def request(
        self,
        path: str,
        body: bytes,
        *,
        model: str | None = None,
        priority: int = 0,
        trace: str | None = None,
    ) -> AbstractAsyncContextManager[RawAnswer]:
        """Ask a worker."""

    async def models(self) -> list[ModelInfo]:
        """The models of the mesh."""

    async def workers(self, model: str | None = None) -> list[WorkerInfo]:
        """The workers of a model."""


class Remembered(Generic[T]):
    """A value that is asked for again when it is too old. Callers at the same time share one question."""

    def __init__(self, ask: Callable[[], Awaitable[T]], age: float) -> None:
        self._ask = ask
        self._age = age
        self._lock = asyncio.Lock()
        self._value: tuple[float, T] | None = None

    async def get(self) -> T:
        """The value. Raises what asking raises."""
        async with self._lock:
            if self._value is None or time.monotonic() - self._value[0] > self._age:
                value = await self._ask()
                self._value = (time.monotonic(), value)
            return self._value[1]


class Catalogue:
    """Knows names, aliases and the default; asks the mesh for the rest."""

    def __init__(self, mesh: Mesh, settings: GatewaySettings, local: LocalModels) -> None:
        self._mesh = mesh
        self._settings = settings
        self._local = local
        self._counts = Remembered(self._ask_models, FRESH)
        self._list = Remembered(self._ask_details, FRESH)
        self._seen: dict[str, float] = {}

    async def models(self) -> dict[str, int]:
        """The models that can be asked now, with the number of their workers, most workers first.

        Raises QMeshError where the mesh cannot be reached.
        """
        return await self._counts.get()

    async def resolve(self, name: str | None) -> str | None:
        """The model that a request means; None where it names none and there is none yet."""
        if name is not None and name in self._settings.aliases:
            return self._settings.aliases[name]
        if name is not None and name not in DEFAULT_NAMES:
            return name
        if self._settings.default_model is not None:
            return self._settings.default_model
        try:
            models = await self.models()
        except QMeshError:
            models = {}
        most = [model for model, workers in models.items() if workers == max(models.values())]
        if len(most) == 1:
            return most[0]
        own = list(self._local())
        # Of equals the node's own; with no model at all what this node is about to serve.
        return next((model for model in own if model in most or not most), None) or next(iter(most), None)

    async def expects(self, model: str | None) -> bool:
        """Whether waiting for a worker of this model makes sense: it was here a while ago, this node is
        to serve it, or nothing is known of the mesh yet.
        """
        local = self._local()
        if model is None or model in local:
            return True
        try:
            models = await self.models()
        except QMeshError:
            return True
        if time.monotonic() - self._seen.get(model, -REMEMBERED) < REMEMBERED:
            return True
        return not models and not local

    def saw(self, model: str) -> None:
        """The model answered."""
        if len(self._seen) >= MOST_LISTED and model not in self._seen:
            self._seen.pop(next(iter(self._seen)))
        self._seen[model] = time.monotonic()

    async def situation(self) -> dict[str, Any]:
        """What the mesh is doing, for a client that was told to come back later."""
        try:
            models: dict[str, int] | None = await self.models()
        except QMeshError:
            models = None
        return {"reachable": models is not None, "models": models or {}, "this_node": dict(self._local())}

    async def listing(self) -> list[dict[str, Any]]:
        """Every model as an object of OpenAI's and Anthropic's lists of models."""
        return await self._list.get()

    async def _ask_models(self) -> dict[str, int]:
        counts = {model.name: model.workers for model in await self._mesh.models()}
        for name in list(counts)[:MOST_LISTED]:
            self.saw(name)
        return counts

    async def _ask_details(self) -> list[dict[str, Any]]:
        names = list(await self.models())[:MOST_LISTED]
        limit = asyncio.Semaphore(8)

        async def one(name: str) -> list[WorkerInfo]:
            async with limit:
                try:
                    return await self._mesh.workers(name)
                except NoWorkers:
                    return []  # It left between the two questions.

        found = await asyncio.gather(*(one(name) for name in names))
        aliases: dict[str, list[str]] = {}
        for alias, name in self._settings.aliases.items():
            aliases.setdefault(name, []).append(alias)
        return [
            _describe(name, workers, aliases.get(name, []))
            for name, workers in zip(names, found, strict=True)
            if workers
        ]


def _describe(name: str, workers: list[WorkerInfo], aliases: list[str]) -> dict[str, Any]:
    """One model. `context_length` is what every worker has; `digest` is that of most of them."""
    digest, _ = Counter(worker.digest for worker in workers).most_common(1)[0]
    return {
        "id": name,
        "object": "model",
        "type": "model",
        "display_name": name,
        "created": 0,
        "created_at": datetime.fromtimestamp(0, UTC).isoformat(),
        "owned_by": "qmesh",
        "context_length": min(worker.context for worker in workers),
        "workers": len(workers),
        "slots": sum(worker.slots for worker in workers),
        "health": max(worker.health for worker in workers),
        "digest": digest,
        "aliases": sorted(aliases),
    }
