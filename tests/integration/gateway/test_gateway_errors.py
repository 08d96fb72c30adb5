"""What the clients that people have make of a gateway that cannot or will not answer."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import openai
import psutil
import pytest

from client_sdk import attempts
from node.cluster import Member
from node.gateway.keys import KeyFile
from tests.gateway_support import CHAT, MESSAGES, gateway_to, metric, running_node, until

LONG = [{"role": "user", "content": "Hello there. " * 2000}]
SLOTS, QUEUE = 1, 4


@dataclass(frozen=True, slots=True)
class Clients:
    """The real clients of one gateway."""

    openai: openai.AsyncOpenAI
    anthropic: anthropic.AsyncAnthropic

    async def chat(self, **options: Any) -> Any:
        return await self.openai.chat.completions.create(
            **{"model": CHAT, "messages": MESSAGES, "max_tokens": 4, **options}
        )

    async def message(self, **options: Any) -> Any:
        return await self.anthropic.messages.create(
            **{"model": CHAT, "messages": MESSAGES, "max_tokens": 4, **options}
        )


@asynccontextmanager
async def clients(url: str, key: str = "none") -> AsyncIterator[Clients]:
    async with (
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as one,
        anthropic.AsyncAnthropic(base_url=url, api_key=key, max_retries=0) as other,
    ):
        yield Clients(one, other)


def kind(error: anthropic.APIStatusError) -> str:
    """The type that Anthropic's form of an error names."""
    body: Any = error.body
    assert body["type"] == "error"
    return str(body["error"]["type"])


async def test_requests_that_are_wrong(url: str) -> None:
    async with clients(url) as ask:
        with pytest.raises(openai.NotFoundError) as missing:
            await ask.chat(model="no-such-model")
        assert missing.value.code == "model_not_found"
        assert CHAT in missing.value.message
        with pytest.raises(openai.BadRequestError) as long:
            await ask.chat(messages=LONG)
        assert long.value.type == "exceed_context_size_error"
        for wrong in ({"messages": "no list"}, {"model": 7}):
            with pytest.raises(openai.BadRequestError):
                await ask.chat(**wrong)
        with pytest.raises(anthropic.NotFoundError) as unknown:
            await ask.message(model="no-such-model")
        assert kind(unknown.value) == "not_found_error"
        with pytest.raises(anthropic.BadRequestError):
            await ask.message(messages=LONG)


async def test_keys_and_their_limits(nodes: list[Member], tmp_path: Path) -> None:
    _, secret = KeyFile(tmp_path).add("test", requests_per_minute=2, tokens_per_minute=10_000)
    async with gateway_to(nodes[0].address, tmp_path) as gateway:
        async with clients(gateway.url, "qm-wrong") as stranger:
            with pytest.raises(openai.AuthenticationError) as refused:
                await stranger.openai.models.list()
            assert refused.value.code == "invalid_api_key"
            with pytest.raises(anthropic.AuthenticationError) as unknown:
                await stranger.message()
            assert kind(unknown.value) == "authentication_error"
        async with clients(gateway.url, secret) as ask:
            raw = await ask.openai.completions.with_raw_response.create(model=CHAT, prompt="A", max_tokens=4)
            assert raw.headers["x-ratelimit-limit-requests"] == "2"
            assert raw.headers["x-ratelimit-remaining-requests"] == "1"
            assert raw.headers["x-ratelimit-limit-tokens"] == "10000"
            await ask.message()
            with pytest.raises(openai.RateLimitError) as limited:
                await ask.chat()
            assert limited.value.code == "rate_limit_exceeded"
            assert 0 < int(limited.value.response.headers["Retry-After"]) <= 30
            with pytest.raises(anthropic.RateLimitError) as also:
                await ask.message()
            assert kind(also.value) == "rate_limit_error"


async def test_no_worker(tmp_path: Path) -> None:
    async with gateway_to("127.0.0.1:1", tmp_path, wait_seconds=0.3) as gateway, clients(gateway.url) as ask:
        with pytest.raises(openai.InternalServerError) as unavailable:
            await ask.chat()
        response = unavailable.value.response
        assert response.status_code == 503
        assert int(response.headers["Retry-After"]) > 0
        assert response.json()["error"]["mesh"] == {"reachable": False, "models": {}, "this_node": {}}
        with pytest.raises(anthropic.APIStatusError) as overloaded:
            await ask.message()
        assert overloaded.value.status_code == 503
        assert kind(overloaded.value) == "overloaded_error"


async def test_every_queue_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped llama.cpp holds its slot, so that the queue behind it stays full for as long as we look."""
    monkeypatch.setattr(attempts, "PATIENCE", 0.2)
    monkeypatch.setattr(attempts, "LONGEST_NAP", 0.1)
    async with running_node(tmp_path / "node", [{"slots": SLOTS}]) as node, AsyncExitStack() as stack:
        facts = await node.ready()
        gateway = await stack.enter_async_context(gateway_to(facts["address"], tmp_path))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        ask = await stack.enter_async_context(clients(gateway.url))
        server = llama_server(node.pid)
        running = await ask.chat(stream=True, max_tokens=1500, extra_body={"ignore_eos": True})
        await anext(aiter(running))
        server.send_signal(signal.SIGSTOP)
        try:
            queued = [asyncio.create_task(ask.chat()) for _ in range(QUEUE)]

            async def full() -> bool:
                return await metric(http, facts["gateway"], "qmesh_model_queue", model=CHAT) == QUEUE

            await until(full)
            with pytest.raises(openai.RateLimitError) as busy:
                await ask.chat()
            assert busy.value.code == "overloaded"
            assert int(busy.value.response.headers["Retry-After"]) >= 1
            with pytest.raises(anthropic.RateLimitError) as also:
                await ask.message()
            assert kind(also.value) == "rate_limit_error"
            with pytest.raises(openai.RateLimitError):
                await ask.chat(stream=True)
        finally:
            server.send_signal(signal.SIGCONT)
        assert len([chunk async for chunk in running]) > 100
        for answer in await asyncio.gather(*queued):
            assert answer.usage.completion_tokens == 4


def llama_server(node: int) -> psutil.Process:
    """The process of the node's llama.cpp."""
    (server,) = (
        child for child in psutil.Process(node).children(recursive=True) if "--model" in child.cmdline()
    )
    return server
