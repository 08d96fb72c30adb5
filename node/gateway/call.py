"""One HTTP request on its way through the gateway, and what is known of it so far."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from client_sdk import Explanation
from node.__about__ import USER_AGENT
from node.gateway.endpoints import Endpoint, Form
from node.gateway.keys import ApiKey
from node.gateway.limits import Allowance
from node.gateway.trace import continue_trace


@dataclass(slots=True)
class Call:
    """The request, and the facts that headers, metrics and the log want. Times in seconds."""

    request: web.BaseRequest
    name: str
    """The endpoint as metrics name it."""
    endpoint: Endpoint | None = None
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    began: float = field(default_factory=time.monotonic)
    trace: str = ""
    key: ApiKey | None = None
    allowance: Allowance | None = None
    estimate: float = 0.0
    """Tokens taken from the allowance so far."""
    headers: dict[str, str] = field(default_factory=dict)
    """What every answer to this request carries."""
    model: str | None = None
    status: int = 0
    error: str | None = None
    """The code of the error that it ended with."""
    explain: Explanation | None = None
    first_byte: float | None = None
    pieces: int = 0
    """Pieces of a streamed answer that were sent, usually one token each."""
    prompt_tokens: int = 0
    answer_tokens: int = 0

    def __post_init__(self) -> None:
        self.trace = continue_trace(self.request.headers.get("traceparent"))
        self.headers["X-QMesh-Request-Id"] = self.id
        self.headers["Server"] = USER_AGENT

    @property
    def form(self) -> Form:
        """Whose error bodies the client expects."""
        if self.endpoint is not None:
            return self.endpoint.form
        return Form.ANTHROPIC if "anthropic-version" in self.request.headers else Form.OPENAI

    @property
    def used(self) -> int:
        """Tokens to charge; those of an answer that broke off are counted by its pieces."""
        return self.prompt_tokens + (self.answer_tokens or self.pieces)

    def told(self, trailer: Mapping[str, Any]) -> None:
        """Take in what the worker told at the end: usage, else the server's timings."""
        usage, timings = trailer.get("usage") or {}, trailer.get("timings") or {}
        cached = _count(timings, "cache_n")
        self.prompt_tokens = _count(usage, "prompt_tokens", "input_tokens") or (
            _count(timings, "prompt_n") + cached
        )
        self.answer_tokens = _count(usage, "completion_tokens", "output_tokens") or _count(
            timings, "predicted_n"
        )


def routing_headers(explain: Explanation) -> dict[str, str]:
    """Who answered, and how the request came there."""
    headers = {"X-QMesh-Attempts": str(explain.asked)}
    if explain.worker is not None:
        headers["X-QMesh-Worker"] = explain.worker
    if explain.path is not None:
        headers["X-QMesh-Path"] = explain.path
    if explain.queue is not None:
        headers["X-QMesh-Queue-Ms"] = f"{explain.queue * 1000:.3f}"
    return headers


def _count(values: Mapping[str, Any], *names: str) -> int:
    """The first of these fields that holds a number."""
    for name in names:
        value = values.get(name)
        if isinstance(value, int) and value > 0:
            return value
    return 0
