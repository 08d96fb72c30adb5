"""What comes through the gateway is what llama-server said: all but ids, times and timings."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest

from node.cluster import Member
from tests.gateway_support import (
    CALLED,
    EMBED,
    MESSAGES,
    RANK,
    SOLO,
    TOOLS,
    WEATHER,
    behind,
    comparable_bytes,
)

TOOL = {"type": "function", "function": {"name": "weather", "parameters": WEATHER}}
SETTLED = {"temperature": 0, "seed": 7}
"""The same answer each time, on whichever worker."""
LONG = "word " * 18_000

STREAMED: list[tuple[str, str, dict[str, Any]]] = [
    ("/v1/chat/completions", SOLO, {"messages": MESSAGES, "max_tokens": 24}),
    (
        "/v1/chat/completions",
        SOLO,
        {"messages": MESSAGES, "max_tokens": 6, "logprobs": True, "top_logprobs": 2},
    ),
    ("/v1/chat/completions", SOLO, {"messages": MESSAGES, "max_tokens": 6, "n": 1, "stop": ["fox"]}),
    ("/v1/chat/completions", TOOLS, {"messages": MESSAGES, "max_tokens": 8, "tools": [TOOL]}),
    (
        "/v1/chat/completions",
        TOOLS,
        {
            "messages": [*MESSAGES, {"role": "assistant", "content": CALLED}],
            "add_generation_prompt": False,
            "continue_final_message": True,
            "logit_bias": [[2, 100]],
            "max_tokens": 1,
            "tools": [TOOL],
        },
    ),
    (
        "/v1/chat/completions",
        SOLO,
        {
            "messages": MESSAGES,
            "max_tokens": 60,
            "response_format": {"type": "json_schema", "json_schema": {"schema": WEATHER}},
        },
    ),
    ("/v1/completions", SOLO, {"prompt": "Once upon a time", "max_tokens": 24}),
    ("/completion", SOLO, {"prompt": "Once upon a time", "n_predict": 24, "return_tokens": True}),
    ("/v1/responses", SOLO, {"input": "Hello", "max_output_tokens": 12}),
    ("/v1/messages", SOLO, {"messages": MESSAGES, "max_tokens": 12}),
]
WHOLE: list[tuple[str, str, dict[str, Any]]] = [
    ("/v1/embeddings", EMBED, {"input": ["a fox", "the sea"]}),
    ("/v1/embeddings", EMBED, {"input": "a fox", "encoding_format": "base64"}),
    ("/v1/rerank", RANK, {"query": "fox", "documents": ["a small fox", "the deep sea"]}),
    ("/tokenize", SOLO, {"content": "Hello äö üñ 🦊", "with_pieces": True}),
    ("/detokenize", SOLO, {"tokens": [259, 1840]}),
    ("/apply-template", TOOLS, {"messages": MESSAGES, "tools": [TOOL]}),
    ("/v1/messages/count_tokens", SOLO, {"messages": MESSAGES}),
    ("/v1/chat/completions/input_tokens", SOLO, {"messages": MESSAGES}),
    ("/v1/responses/input_tokens", SOLO, {"input": "Hello"}),
    ("/infill", SOLO, {"input_prefix": "def f(", "input_suffix": "return"}),
    ("/v1/chat/completions", SOLO, {"messages": [{"role": "user", "content": LONG}]}),
    ("/v1/chat/completions", SOLO, {"messages": "none"}),
    ("/v1/chat/completions", SOLO, {"messages": MESSAGES, "max_tokens": 4, "unknown_field": {"a": [1.5]}}),
    ("/v1/completions", SOLO, {}),
    ("/v1/messages", SOLO, {"messages": [{"role": "user", "content": LONG}], "max_tokens": 4}),
    ("/v1/rerank", SOLO, {"query": "fox", "documents": ["a"]}),
    ("/v1/embeddings", SOLO, {"input": "a fox"}),
]
CASES = [
    *((path, model, {**body, **SETTLED}) for path, model, body in STREAMED),
    *((path, model, {**body, **SETTLED, "stream": True}) for path, model, body in STREAMED),
    *((path, model, {**body, "temperature": 0}) for path, model, body in WHOLE),
]


@pytest.mark.parametrize(("path", "model", "body"), CASES)
async def test_the_bytes_are_llama_servers(
    nodes: list[Member], url: str, http: aiohttp.ClientSession, path: str, model: str, body: dict[str, Any]
) -> None:
    request = {"model": model, **body}
    server = behind(nodes[0], model)
    headers = {"Authorization": f"Bearer {server.key}"}

    async def ask(base: str) -> tuple[int, str, bytes]:
        async with http.post(base + path, json=request, headers=headers) as answer:
            return answer.status, answer.headers["Content-Type"], comparable_bytes(await answer.read())

    await ask(server.url)  # warms the cache, whose size is part of the answer
    assert await ask(url) == await ask(server.url)
