"""Hands requests to the mesh and its answers to the clients, bytes unchanged."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext

from aiohttp import web

from client_sdk import RawAnswer
from mesh.errors import ConnectFailed, NoWorkers, QMeshError
from node.gateway.call import Call, routing_headers
from node.gateway.catalogue import Catalogue, Mesh
from node.gateway.endpoints import Endpoint
from node.gateway.errors import ApiError, api_error
from node.gateway.intake import Budget, Intake, fields
from node.gateway.limits import estimated_tokens
from node.gateway.outlet import Outlet
from node.gateway.waiting import Waiting
from node.metrics import Metrics

SERVER_ERROR = 500
UNPROCESSABLE = 422
"""llama-server says 500 of requests that it cannot make sense of; clients would send them again and again."""


class Proxy:
    """The endpoints that workers answer."""

    def __init__(
        self,
        mesh: Mesh,
        catalogue: Catalogue,
        waiting: Waiting,
        intake: Intake,
        budget: Budget,
        metrics: Metrics,
    ) -> None:
        self._mesh = mesh
        self._metrics = metrics
        self._catalogue = catalogue
        self._waiting = waiting
        self._intake = intake
        self._budget = budget

    async def answer(self, call: Call, endpoint: Endpoint) -> web.StreamResponse:
        """Answer one request. Raises ApiError as long as nothing was sent, ClientGone."""
        async with self._intake.body(call.request) as body:
            wanted = fields(body)
            name = wanted.get("model")
            if name is not None and not isinstance(name, str):
                raise ApiError(400, "model must be a string", param="model")
            self._charge(call, estimated_tokens(len(body), wanted.get))
            outlet = Outlet(call)
            pings = outlet.pings() if endpoint.streams and wanted.get("stream") is True else nullcontext()
            try:
                async with AsyncExitStack() as stack:
                    async with pings:
                        answer = await self._open(stack, call, endpoint, body, name)
                    return await self._deliver(call, outlet, answer)
            except (QMeshError, OSError) as error:
                failure = api_error(error)
            except ApiError as error:
                failure = error
        if not outlet.begun:
            raise failure
        call.status, call.error = failure.status, failure.code
        return await outlet.fail(failure)

    @staticmethod
    def _charge(call: Call, tokens: float) -> None:
        """Take the request from its key's allowance. Raises ApiError (429)."""
        if call.allowance is None:
            return
        wait = call.allowance.take(tokens, time.monotonic())
        call.headers |= call.allowance.headers()
        if wait > 0:
            raise ApiError(
                429,
                f"this API key's limit is reached; try again in {wait:.1f} s",
                code="rate_limit_exceeded",
                retry_after=wait,
            )
        call.estimate = tokens

    async def _open(
        self, stack: AsyncExitStack, call: Call, endpoint: Endpoint, body: bytes, name: str | None
    ) -> RawAnswer:
        """The beginning of an answer, as soon as a worker gives one."""
        until = time.monotonic() + self._waiting.limit
        while True:
            call.model = model = await self._catalogue.resolve(name)
            reason: QMeshError = NoWorkers("the mesh has no worker yet")
            if model is not None:
                try:
                    answer = await stack.enter_async_context(
                        self._mesh.request(endpoint.path, body, model=model, trace=call.trace)
                    )
                except (NoWorkers, ConnectFailed) as error:
                    reason = error
                else:
                    self._catalogue.saw(model)
                    call.explain = answer.explain
                    call.first_byte = time.monotonic() - call.began
                    return answer
            await self._waiting.for_worker(model, until, reason)

    async def _deliver(self, call: Call, outlet: Outlet, answer: RawAnswer) -> web.StreamResponse:
        if answer.content_type.startswith("text/event-stream"):
            response = await self._stream(call, outlet, answer)
        else:
            response = await self._whole(call, outlet, answer)
        call.told(answer.trailer or {})
        return response

    async def _stream(self, call: Call, outlet: Outlet, answer: RawAnswer) -> web.StreamResponse:
        await outlet.begin(answer.status, answer.content_type, routing_headers(answer.explain))
        between = self._metrics.between_pieces(call.model or "")
        before = 0.0
        async for data in answer:
            await outlet.write(data)
            now = time.monotonic()
            if call.pieces:
                between.observe(now - before)
            before = now
            call.pieces += 1
        return await outlet.end()

    async def _whole(self, call: Call, outlet: Outlet, answer: RawAnswer) -> web.StreamResponse:
        async with self._held(answer) as body:
            if not outlet.begun:
                headers = routing_headers(answer.explain)
                status = UNPROCESSABLE if answer.status == SERVER_ERROR else answer.status
                return outlet.whole(status, answer.content_type, body, headers)
            # A ping has promised a stream; what came instead is an error, as one event.
            call.status = answer.status
            await outlet.write(b"data: " + body.replace(b"\n", b" ") + b"\n\n")
            return await outlet.end()

    @asynccontextmanager
    async def _held(self, answer: RawAnswer) -> AsyncIterator[bytes]:
        """A whole body, counted in the budget until the block ends."""
        parts: list[bytes] = []
        size = 0
        try:
            async for data in answer:
                self._budget.take(len(data))
                size += len(data)
                parts.append(data)
            yield b"".join(parts)
        finally:
            self._budget.give_back(size)
