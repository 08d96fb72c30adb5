"""Requests of peers to a model: checked, charged, given a slot, forwarded. One task per request."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import orjson

from mesh.errors import (
    BackendFailed,
    BadRequest,
    ContextExceeded,
    Overloaded,
    RemoteDeadline,
    RemoteError,
    ShuttingDown,
)
from mesh.identity import NodeId
from mesh.limits import SEND_BUFFER
from mesh.tasks import TaskOwner
from mesh.transport import Stream
from node.bodies import Bodies
from node.config import PeerSettings
from node.gateway.limits import Allowance, Allowances
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
        "/v1/responses/input_tokens",
    }
)
"""Endpoints that cost next to nothing and take no slot."""

LOADING_RETRY = 0.5
"""Seconds after which a model that is starting is worth asking again."""
LOAD_PATIENCE = 300.0
"""Seconds that a request without a deadline waits for its model to be loaded."""
DEFAULT_COST = 256.0
BYTES_PER_TOKEN = 4
"""Of a request's body, roughly."""
MAX_COST = 4096.0
"""The most tokens one request weighs in the queue, whatever it asks for."""


class Inference:
    """Answers `infer`. `load` gives the node's current load, which every answer tells at its end."""

    def __init__(self, own_id: NodeId, peers: PeerSettings, load: Callable[[], Mapping[str, Any]]) -> None:
        self._own_id = own_id
        self._peers = peers
        self._load = load
        self._allowances = Allowances()
        self._bodies = Bodies(own_id)
        self._settling = TaskOwner()
        self.served = 0
        """Requests answered in whole."""

    async def close(self) -> None:
        """Wait no longer for the servers to end what was cancelled."""
        await self._settling.close()

    async def answer(self, stream: Stream, model: ServedModel) -> None:
        """Serve one stream. Raises the RemoteError that becomes its RESET."""
        arrived = time.monotonic()
        path, deadline, priority = self._parse(stream, arrived)
        with _noted(stream, model.name, path):
            async with self._bodies.of(stream) as body:
                cost, streaming = weigh(body)
                one = Forwarding(stream, model, path, body, deadline, streaming)
                with self._charged(stream.peer_id, len(body) / BYTES_PER_TOKEN + cost) as used:
                    if path in GENERATING:
                        slot = model.gate.slot(
                            stream.peer_id, cost=cost, priority=priority, deadline=deadline
                        )
                        await self._generate(slot, one, used)
                    else:
                        _check_ready(model)
                        await self._forward(one, 0.0, used)
        self.served += 1

    @contextmanager
    def _charged(self, peer: NodeId, estimate: float) -> Iterator[Used]:
        """Take a request of about so many tokens from the peer's limits; what it really used is settled
        at the end. Raises Overloaded with the time after which there is room again.
        """
        used = Used(estimate)
        allowance = self._allowance(peer)
        if allowance is not None and (wait := allowance.take(estimate, time.monotonic())) > 0:
            raise Overloaded("this peer's limit of requests per minute is reached", retry_after=wait)
        try:
            yield used
        finally:
            if allowance is not None:
                allowance.settle(estimate, used.tokens, time.monotonic())

    def _allowance(self, peer: NodeId) -> Allowance | None:
        requests, tokens = self._peers.requests_per_minute, self._peers.tokens_per_minute
        if peer == self._own_id or not (requests or tokens):
            return None  # this machine's own client is not a peer
        return self._allowances.of(peer.hex(), requests, tokens, time.monotonic())

    async def _generate(self, slot: AbstractAsyncContextManager[float], one: Forwarding, used: Used) -> None:
        """Forward a request in a slot. One that does not end in order keeps its slot until the server has
        stopped working on it, whatever happens to the stream and to this task meanwhile.
        """
        async with AsyncExitStack() as stack:
            waited = await stack.enter_async_context(slot)
            _check_ready(one.model)
            try:
                await self._forward(one, waited, used)
            except BaseException:
                self._settling.spawn(_settle(one, stack.pop_all()), name="settle")
                raise

    async def _forward(self, one: Forwarding, waited: float, used: Used) -> None:
        stream, model, deadline = one.stream, one.model, one.deadline
        tail = Tail()

        def forward(data: bytes) -> bool:
            tail.feed(data)
            return stream.send_nowait(data) <= SEND_BUFFER

        try:
            async with (
                model.use(_left(deadline) or LOAD_PATIENCE) as client,
                await client.request("POST", one.path, one.body, timeout=_left(deadline)) as response,
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
                async with asyncio.timeout(_left(deadline)):
                    while not await response.pump(forward):
                        await stream.drained()
        except side.SidecarError as error:
            raise wire_error(error) from error
        except TimeoutError:
            raise RemoteDeadline("the request's deadline passed") from None
        facts = tail.facts()
        if timings := facts.get("timings"):
            model.measured(timings)
        used.learn(facts)
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


@dataclass(frozen=True, slots=True)
class Forwarding:
    """One request on its way to a model's server. `deadline` is on the clock of `time.monotonic()`."""

    stream: Stream
    model: ServedModel
    path: str
    body: bytes
    deadline: float | None
    streaming: bool


@dataclass(slots=True)
class Used:
    """The tokens that a request took, an estimate until they are known."""

    tokens: float

    def learn(self, facts: Mapping[str, Any]) -> None:
        """Take in what the end of the answer told."""
        usage, timings = facts.get("usage") or {}, facts.get("timings") or {}
        counts = [
            usage.get(key) for key in ("prompt_tokens", "completion_tokens", "input_tokens", "output_tokens")
        ]
        counts = (
            counts if any(counts) else [timings.get(key) for key in ("prompt_n", "cache_n", "predicted_n")]
        )
        known = [count for count in counts if isinstance(count, int) and count > 0]
        if known:
            self.tokens = float(sum(known))


def _check_ready(model: ServedModel) -> None:
    """Refuse at once while the model's server comes back: another worker may answer meanwhile."""
    if not model.recovering:
        return
    if model.failed:
        raise BackendFailed(f"{model.name} cannot be started")
    raise Overloaded(f"{model.name} is starting", retry_after=LOADING_RETRY)


async def _settle(one: Forwarding, slot: AsyncExitStack) -> None:
    async with slot:
        await one.model.settled(streaming=one.streaming)


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


def weigh(body: bytes) -> tuple[float, bool]:
    """The tokens that a request may take, for its weight in the queue, and whether its answer is streamed.

    Raises BadRequest for anything but a JSON object.
    """
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest("the request's body is not JSON") from error
    if not isinstance(request, dict):
        raise BadRequest("the request's body is not a JSON object")
    limits = (
        request.get(key) for key in ("n_predict", "max_tokens", "max_completion_tokens", "max_output_tokens")
    )
    limit = next((limit for limit in limits if isinstance(limit, int) and limit > 0), DEFAULT_COST)
    return float(min(limit, MAX_COST)), request.get("stream") is True


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.001, deadline - time.monotonic())
