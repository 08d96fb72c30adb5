"""What the gateway answers by itself: the list of models, its health, metrics and description."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from aiohttp import web

from mesh.errors import QMeshError
from node.gateway.call import Call
from node.gateway.catalogue import Catalogue
from node.gateway.errors import ApiError, api_error
from node.gateway.openapi import description
from node.metrics import CONTENT_TYPE, Metrics

MODELS = "/v1/models"
OTHER_NAMES = {"/models": MODELS, "/v1/health": "/health"}
UNKNOWN = "unknown"
_READ = ("GET", "HEAD")


class Pages:
    """The endpoints that need no worker."""

    def __init__(self, catalogue: Catalogue, metrics: Metrics) -> None:
        self._catalogue = catalogue
        self._metrics = metrics
        self._pages: dict[str, Callable[[Call], Awaitable[web.StreamResponse]]] = {
            MODELS: self._models,
            "/health": self._health,
            "/metrics": self._exposition,
            "/openapi.json": self._description,
        }

    def name(self, path: str) -> str:
        """How metrics call a path: bounded, whatever is asked for."""
        path = OTHER_NAMES.get(path, path)
        if path.startswith(f"{MODELS}/"):
            return MODELS
        return path if path in self._pages else UNKNOWN

    @staticmethod
    def is_public(path: str) -> bool:
        """Whether a path needs no key: whether the mesh can answer may be asked by any load balancer."""
        return OTHER_NAMES.get(path, path) == "/health"

    async def answer(self, call: Call) -> web.StreamResponse:
        """Answer a request. Raises ApiError."""
        path = OTHER_NAMES.get(call.request.path, call.request.path)
        page = self._pages.get(path) or (self._model if path.startswith(f"{MODELS}/") else None)
        if page is None:
            raise ApiError(404, f"there is no endpoint {call.request.path[:200]!r}", code="unknown_url")
        if call.request.method not in _READ:
            raise ApiError(405, f"{path} takes GET", code="method_not_allowed", allow=", ".join(_READ))
        try:
            return await page(call)
        except QMeshError as error:
            raise api_error(error) from error

    async def _models(self, call: Call) -> web.StreamResponse:
        models = await self._catalogue.listing()
        ids = [model["id"] for model in models]
        return _json(
            call,
            {
                "object": "list",
                "data": models,
                "has_more": False,
                "first_id": ids[0] if ids else None,
                "last_id": ids[-1] if ids else None,
            },
        )

    async def _model(self, call: Call) -> web.StreamResponse:
        wanted = call.request.path.removeprefix("/v1").removeprefix("/models/")
        name = await self._catalogue.resolve(wanted)
        for model in await self._catalogue.listing():
            if model["id"] == name:
                return _json(call, model)
        raise ApiError(404, f"The model {wanted!r} does not exist", code="model_not_found", param="model")

    async def _health(self, call: Call) -> web.StreamResponse:
        """As llama-server's: 200 when a request would be answered now."""
        try:
            ready = bool(await self._catalogue.models())
        except QMeshError:
            ready = False
        if ready:
            return _json(call, {"status": "ok"})
        raise ApiError(
            503,
            "no worker is ready",
            code="no_worker",
            retry_after=2.0,
            details={"mesh": await self._catalogue.situation()},
        )

    async def _exposition(self, call: Call) -> web.StreamResponse:
        call.status = 200
        return web.Response(
            body=self._metrics.exposition(), headers={**call.headers, "Content-Type": CONTENT_TYPE}
        )

    async def _description(self, call: Call) -> web.StreamResponse:
        return _json(call, description())


def _json(call: Call, value: Any) -> web.Response:
    call.status = 200
    headers = {**call.headers, "Content-Type": "application/json"}
    return web.Response(body=orjson.dumps(value), headers=headers)
