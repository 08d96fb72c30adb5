"""Requests wait here while no worker can answer them."""

from __future__ import annotations

import asyncio
import time

from mesh.errors import QMeshError
from node.gateway.catalogue import Catalogue, Mesh, Remembered
from node.gateway.errors import ApiError, api_error

POLL = 0.25
"""Seconds between looks; however many requests wait, the mesh is asked once per look and model."""
MOST_WAITING = 512
RETRY_AFTER = 5.0


class Waiting:
    """The requests that wait for a worker, at most `limit` seconds each."""

    def __init__(self, mesh: Mesh, catalogue: Catalogue, limit: float) -> None:
        self._mesh = mesh
        self._catalogue = catalogue
        self.limit = limit
        self._looks: dict[str | None, tuple[Remembered[bool], int]] = {}
        self.count = 0
        self._closed = False

    def close(self) -> None:
        """Nobody waits any more: the gateway is stopping."""
        self._closed = True

    async def for_worker(self, model: str | None, until: float, reason: QMeshError) -> None:
        """Return when the model has a worker that can be asked.

        Raises ApiError: 404 for a model that nobody has, 503 at `until` (on the monotonic clock) or
        where too many wait already.
        """
        if not await self._catalogue.expects(model):
            raise await self._not_found(model)
        if self.count >= MOST_WAITING:
            raise await self._unavailable(model, reason, "too many requests wait for one already")
        self.count += 1
        look = self._enter(model)
        try:
            while (left := until - time.monotonic()) > 0 and not self._closed:
                await asyncio.sleep(min(POLL, left))
                if await look.get():
                    return
        finally:
            self.count -= 1
            self._leave(model)
        why = "the gateway is stopping" if self._closed else f"none came within {self.limit:g} s"
        raise await self._unavailable(model, reason, why)

    def _enter(self, model: str | None) -> Remembered[bool]:
        look, users = self._looks.get(model) or (Remembered(lambda: self._present(model), POLL / 2), 0)
        self._looks[model] = (look, users + 1)
        return look

    def _leave(self, model: str | None) -> None:
        look, users = self._looks.pop(model)
        if users > 1:
            self._looks[model] = (look, users - 1)

    async def _present(self, model: str | None) -> bool:
        try:
            if model is None:
                return bool(await self._catalogue.models())
            return any(not worker.banned for worker in await self._mesh.workers(model))
        except QMeshError:
            return False

    async def _not_found(self, model: str | None) -> ApiError:
        situation = await self._catalogue.situation()
        there = ", ".join(sorted({*situation["models"], *situation["this_node"]})) or "none"
        return ApiError(
            404,
            f"The model {model!r} does not exist on this mesh; there are: {there}",
            code="model_not_found",
            param="model",
        )

    async def _unavailable(self, model: str | None, reason: QMeshError, why: str) -> ApiError:
        error = api_error(reason)
        wanted = "any model" if model is None else repr(model)
        return ApiError(
            503,
            f"No worker can answer for {wanted} now: {error.message}; {why}",
            code="no_worker",
            retry_after=RETRY_AFTER,
            details={"mesh": await self._catalogue.situation()},
        )
