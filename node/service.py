"""What peers may ask of a node: `infer`, `status`, `find`, `models`. One task per stream runs here."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from typing import Any

import orjson

from mesh.address import format_address
from mesh.dht import Dht
from mesh.errors import (
    BackendFailed,
    BadRequest,
    ContextExceeded,
    ModelNotFound,
    Overloaded,
    RemoteDeadline,
    RemoteError,
    ShuttingDown,
    Unauthorized,
)
from mesh.identity import NodeId
from mesh.limits import MAX_BODY
from mesh.transport import Stream
from node.reachability import Reachability
from node.served import ServedModel
from node.tail import Tail
from sidecar import errors as side

log = logging.getLogger("qmesh.service")

GENERATING = frozenset(
    {
        "/completion",
        "/infill",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/messages",
        "/v1/rerank",
        "/v1/responses",
    }
)
"""Endpoints whose requests take a slot."""
COUNTING = frozenset(
    {
        "/apply-template",
        "/detokenize",
        "/tokenize",
        "/v1/chat/completions/input_tokens",
        "/v1/messages/count_tokens",
    }
)
"""Endpoints that cost next to nothing and take no slot."""

LOADING_RETRY = 0.5
"""Seconds after which a model that is starting is worth asking again."""
LOAD_PATIENCE = 300.0
"""Seconds that a request without a deadline waits for its model to be loaded."""
DEFAULT_COST = 256.0
MAX_COST = 4096.0
"""The most tokens one request weighs in the queue, whatever it asks for."""
BODY_PATIENCE = 60.0
"""Seconds within which a request's body must have come."""
MAX_WANT = 64
MAX_NAME = 255


class Service:
    """Answers the streams that peers open. `status` gives the node's state, `load` its current load."""

    def __init__(
        self,
        own_id: NodeId,
        models: Mapping[str, ServedModel],
        dht: Dht,
        reachability: Reachability,
        *,
        status: Callable[[], Mapping[str, Any]],
        load: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._own_id = own_id
        self._models = models
        self._dht = dht
        self._reachability = reachability
        self._status = status
        self._load = load
        self.served = 0
        """Requests answered in whole."""

    async def handle(self, stream: Stream) -> None:
        """Serve one stream. A RemoteError that leaves here becomes the stream's RESET."""
        match stream.method:
            case "infer":
                await self._infer(stream)
            case "status":
                await stream.end(self._told(stream.peer_id))
            case "find":
                await self._find(stream)
            case "models":
                await stream.end({"models": await self._dht.models()})
            case "dial_back":
                await self._reachability.answer(stream)
            case "load" | "unload":
                await self._manage(stream)
            case _:
                raise BadRequest(f"there is no method {stream.method[:40]!r}")

    def _told(self, peer: NodeId) -> Mapping[str, Any]:
        """The node's status; who its peers are is told to nobody but the holder of its own key."""
        status = {**self._status(), "peers": len(self._dht.peers)}
        if peer == self._own_id:
            status["contacts"] = contacts(self._dht)
            status["reachability"] = self._reachability.describe()
        return status

    async def _manage(self, stream: Stream) -> None:
        """Load or unload a model: only for the holder of the node's own key."""
        if stream.peer_id != self._own_id:
            raise Unauthorized("only this machine's user may do that")
        model = self._model(stream.meta)
        try:
            await (model.load() if stream.method == "load" else model.unload())
        except side.SidecarError as error:
            raise BackendFailed(error.message[:500]) from error
        await stream.end(self._status())

    async def _find(self, stream: Stream) -> None:
        model, want = stream.meta.get("model"), stream.meta.get("want", 16)
        if not isinstance(model, str) or not 0 < len(model) <= MAX_NAME or not isinstance(want, int):
            raise BadRequest("find needs a model's name, and a number as `want`")
        found = await self._dht.lookup(model, want=min(max(1, want), MAX_WANT))
        await stream.end({"records": [[one.key, one.blob] for one in found]})

    async def _infer(self, stream: Stream) -> None:
        arrived = time.monotonic()
        path, deadline, priority = self._parse(stream, arrived)
        model = self._model(stream.meta)
        async with AsyncExitStack() as stack:
            stack.enter_context(_noted(stream, model.name, path))
            body = await _body(stream)
            waited = 0.0
            if path in GENERATING:
                waited = await stack.enter_async_context(
                    model.gate.slot(stream.peer_id, cost=_cost(body), priority=priority, deadline=deadline)
                )
            await self._forward(stream, model, path, body, waited, deadline)
        self.served += 1

    async def _forward(
        self,
        stream: Stream,
        model: ServedModel,
        path: str,
        body: bytes,
        waited: float,
        deadline: float | None,
    ) -> None:
        if model.recovering:
            # Refused at once: another worker may answer while this one's server comes back.
            raise self._not_ready(model)
        tail = Tail()
        whole = False
        try:
            async with (
                model.use(_left(deadline) or LOAD_PATIENCE) as client,
                await client.request("POST", path, body, timeout=_left(deadline)) as response,
            ):
                await stream.send_head(
                    {
                        "status": response.status,
                        "content_type": response.content_type,
                        "worker": self._own_id,
                        "model": model.name,
                        "digest": model.digest,
                        "queue_ms": round(waited * 1000, 3),
                    }
                )
                async for data in response:
                    tail.feed(data)
                    await stream.send(data)
                    if deadline is not None and time.monotonic() > deadline:
                        raise RemoteDeadline("the request's deadline passed")
            whole = True
        except side.SidecarError as error:
            raise wire_error(error) from error
        finally:
            if not whole and path in GENERATING:
                await model.settled()
        facts = tail.facts()
        if timings := facts.get("timings"):
            model.measured(timings)
        await stream.end({**facts, "load": self._load()})

    def _parse(self, stream: Stream, now: float) -> tuple[str, float | None, int]:
        meta = stream.meta
        path, limit, priority = meta.get("path"), meta.get("deadline_ms"), meta.get("priority", 0)
        if not isinstance(path, str) or (path not in GENERATING and path not in COUNTING):
            raise BadRequest(f"the endpoint {str(path)[:80]!r} is not served to peers")
        if limit is not None and (not isinstance(limit, int) or limit <= 0):
            raise BadRequest("deadline_ms must be a positive number")
        if not isinstance(priority, int):
            raise BadRequest("priority must be a number")
        # Only this machine's own client may go before the others; anybody may stand back.
        most = 1 if stream.peer_id == self._own_id else 0
        return path, None if limit is None else now + limit / 1000, max(-1, min(priority, most))

    def _model(self, meta: Mapping[str, Any]) -> ServedModel:
        name = meta.get("model")
        model = self._models.get(name) if isinstance(name, str) else None
        if model is None:
            raise ModelNotFound(f"this worker does not serve {str(name)[:80]!r}")
        return model

    @staticmethod
    def _not_ready(model: ServedModel) -> RemoteError:
        if model.failed:
            return BackendFailed(f"{model.name} cannot be started")
        return Overloaded(f"{model.name} is starting", retry_after=LOADING_RETRY)


@contextmanager
def _noted(stream: Stream, model: str, path: str) -> Iterator[None]:
    """Log how a request ended, with the caller's trace."""
    arrived, outcome = time.monotonic(), "ok"
    try:
        yield
    except BaseException as error:
        outcome = type(error).__name__
        raise
    finally:
        trace = stream.meta.get("trace")
        facts = {
            "endpoint": path,
            "model": model,
            "peer": stream.peer_id.hex(),
            "trace": trace[:64] if isinstance(trace, str) else None,
            "outcome": outcome,
            "ms": round((time.monotonic() - arrived) * 1000, 2),
        }
        log.info("served %s: %s", path, outcome, extra={"facts": facts})


def contacts(dht: Dht) -> dict[str, Any]:
    """The peers that a node knows, and the addresses that it was told of but cannot reach."""
    return {
        "peers": [
            {
                "id": peer.id.hex(),
                "address": format_address(peer.host, peer.port),
                "found": peer.found,
                "last_seen": round(peer.last_seen, 1),
                "rtt": peer.rtt,
                "failures": peer.failures,
            }
            for peer in dht.peers
        ],
        "unreached": {format_address(*address): reason for address, reason in dht.unreached.items()},
    }


def wire_error(error: side.SidecarError) -> RemoteError:
    """What a peer is told of a failure of the local server: a code and no inner details."""
    match error:
        case side.ContextExceeded():
            return ContextExceeded(error.message[:200])
        case side.InvalidRequest() | side.NotSupported():
            return BadRequest(error.message[:200])
        case side.SidecarStopped():
            return ShuttingDown("the model is being stopped")
        case side.SidecarTimeout():
            return RemoteDeadline("the model did not answer within the request's deadline")
        case side.ServerBusy():
            return Overloaded("the model's server is busy", retry_after=LOADING_RETRY)
        case _:
            return BackendFailed("the model's server failed")


async def _body(stream: Stream) -> bytes:
    """The request's body as JSON bytes: from `body` of OPEN, or from DATA."""
    inline = stream.meta.get("body")
    if inline is not None:
        if not isinstance(inline, Mapping):
            raise BadRequest("body must be a map; send JSON bytes as data")
        try:
            return orjson.dumps(inline)
        except TypeError as error:
            raise BadRequest("body cannot be written as JSON") from error
    try:
        async with asyncio.timeout(BODY_PATIENCE):
            return await stream.read_all(MAX_BODY)
    except TimeoutError:
        raise RemoteDeadline(f"the request's body did not come within {BODY_PATIENCE:g} s") from None


def _cost(body: bytes) -> float:
    """Tokens that the request may take, for its weight in the queue. Raises BadRequest."""
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest("the request's body is not JSON") from error
    if not isinstance(request, dict):
        raise BadRequest("the request's body is not a JSON object")
    for key in ("n_predict", "max_tokens", "max_completion_tokens", "max_output_tokens"):
        limit = request.get(key)
        if isinstance(limit, int) and limit > 0:
            return float(min(limit, MAX_COST))
    return DEFAULT_COST


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.001, deadline - time.monotonic())
