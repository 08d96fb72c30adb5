"""The endpoints that are handed on to the mesh. Pure.

Names and forms are llama-server's; its second names for one and the same endpoint are known too.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Form(Enum):
    """Whose error bodies and streams an endpoint speaks."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One endpoint that a worker answers."""

    path: str
    """The name by which workers know it."""
    summary: str
    required: tuple[str, ...] = ()
    """Fields without which no worker can answer; for the description only."""
    other_paths: tuple[str, ...] = ()
    streams: bool = False
    """Whether `"stream": true` is understood."""
    form: Form = Form.OPENAI


ENDPOINTS = (
    Endpoint(
        "/v1/chat/completions",
        "Answer a conversation (OpenAI)",
        ("messages",),
        ("/chat/completions",),
        streams=True,
    ),
    Endpoint("/v1/completions", "Continue a text (OpenAI)", ("prompt",), streams=True),
    Endpoint(
        "/v1/responses", "Answer a conversation (OpenAI Responses)", ("input",), ("/responses",), streams=True
    ),
    Endpoint(
        "/v1/messages",
        "Answer a conversation (Anthropic)",
        ("messages", "max_tokens"),
        streams=True,
        form=Form.ANTHROPIC,
    ),
    Endpoint(
        "/v1/messages/count_tokens",
        "Count the tokens of a conversation (Anthropic)",
        ("messages",),
        form=Form.ANTHROPIC,
    ),
    Endpoint(
        "/v1/chat/completions/input_tokens",
        "Count the tokens of a conversation (OpenAI)",
        ("messages",),
        ("/chat/completions/input_tokens",),
    ),
    Endpoint(
        "/v1/responses/input_tokens",
        "Count the tokens of a conversation (OpenAI Responses)",
        ("input",),
        ("/responses/input_tokens",),
    ),
    Endpoint("/v1/embeddings", "Turn text into vectors", ("input",)),
    Endpoint(
        "/v1/rerank",
        "Order documents by relevance",
        ("query", "documents"),
        ("/rerank", "/reranking", "/v1/reranking"),
    ),
    Endpoint("/completion", "Continue a text (llama.cpp)", ("prompt",), ("/completions",), streams=True),
    Endpoint("/infill", "Fill a gap in code (llama.cpp)", ("input_prefix", "input_suffix"), streams=True),
    Endpoint("/tokenize", "Text to token ids", ("content",)),
    Endpoint("/detokenize", "Token ids to text", ("tokens",)),
    Endpoint("/apply-template", "A conversation as the model's prompt", ("messages",)),
)

BY_PATH = {path: endpoint for endpoint in ENDPOINTS for path in (endpoint.path, *endpoint.other_paths)}
