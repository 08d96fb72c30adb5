"""The clients that people have, against a real mesh with real llama.cpp."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import aiohttp
import anthropic
import openai
import pytest

from node.cluster import Member
from tests.gateway_support import (
    CALLED,
    CHAT,
    EMBED,
    MESSAGES,
    RANK,
    SOLO,
    TOOLS,
    WEATHER,
    metric,
    until,
)

TOOL = {"type": "function", "function": {"name": "weather", "description": "Now", "parameters": WEATHER}}
FORCED = {"add_generation_prompt": False, "continue_final_message": True, "logit_bias": [[2, 100]]}
"""Continue the last message and end it: token 2 ends a message of the demo model."""


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(
        **{"model": CHAT, "messages": MESSAGES, "max_tokens": 12, "temperature": 0, **options}
    )


def test_openai_chat(client: openai.OpenAI, nodes: list[Member]) -> None:
    raw = client.chat.completions.with_raw_response.create(model=CHAT, messages=MESSAGES, max_tokens=12)  # type: ignore[arg-type]
    answer = raw.parse()
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    paths = {nodes[0].worker_id: "local", nodes[1].worker_id: f"direct {nodes[1].address}"}
    assert raw.headers["X-QMesh-Path"] == paths[raw.headers["X-QMesh-Worker"]]
    assert raw.headers["X-QMesh-Attempts"] == "1"
    assert float(raw.headers["X-QMesh-Queue-Ms"]) >= 0
    assert len(raw.headers["X-QMesh-Request-Id"]) == 24


def test_a_node_asks_itself_without_a_socket(nodes: list[Member]) -> None:
    paths = []
    for node in nodes:
        with openai.OpenAI(base_url=f"{node.ready['gateway']}/v1", api_key="none", max_retries=0) as client:
            raw = client.completions.with_raw_response.create(model=SOLO, prompt="A", max_tokens=4)
            assert raw.headers["X-QMesh-Worker"] == nodes[0].worker_id
            paths.append(raw.headers["X-QMesh-Path"])
    assert paths == ["local", f"direct {nodes[0].address}"]
    wire = int(nodes[0].address.rpartition(":")[2])
    callers = []
    for node in nodes:
        process = node.process()
        assert process is not None
        callers.append(
            [one for one in process.net_connections("tcp") if one.raddr and one.raddr.port == wire]
        )
    assert [len(connections) for connections in callers] == [0, 1]


def test_openai_stream(client: openai.OpenAI) -> None:
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == ask(client).choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 12


def test_openai_json_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    answer = ask(client, response_format=form, max_tokens=200)
    assert json.loads(answer.choices[0].message.content)["colour"] in ("red", "blue")


def test_openai_tools(client: openai.OpenAI) -> None:
    plain = ask(client, model=TOOLS)
    offered = ask(client, model=TOOLS, tools=[TOOL])
    assert offered.usage.prompt_tokens > plain.usage.prompt_tokens + 50  # the model is told of them
    turn = [*MESSAGES, {"role": "assistant", "content": CALLED}]
    answer = ask(client, model=TOOLS, messages=turn, tools=[TOOL], max_tokens=1, extra_body=FORCED)
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Oslo"})
    result = [
        *MESSAGES,
        answer.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "Rain"},
    ]
    assert ask(client, model=TOOLS, messages=result, tools=[TOOL]).choices[0].message.content


def test_openai_tools_streamed(client: openai.OpenAI) -> None:
    turn = [*MESSAGES, {"role": "assistant", "content": CALLED}]
    chunks = list(
        ask(client, model=TOOLS, messages=turn, tools=[TOOL], max_tokens=1, stream=True, extra_body=FORCED)
    )
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [call.function.name for call in calls if call.function.name] == ["weather"]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_openai_other_endpoints(client: openai.OpenAI) -> None:
    assert client.completions.create(model=CHAT, prompt="Once upon", max_tokens=4).choices[0].text
    vectors = client.embeddings.create(model=EMBED, input=["a fox", "the sea"], encoding_format="float")
    assert len(vectors.data) == 2
    assert len(vectors.data[0].embedding) > 10
    packed = client.embeddings.create(model=EMBED, input="a fox")  # base64 on the wire
    assert packed.data[0].embedding == pytest.approx(vectors.data[0].embedding, abs=1e-3)


def test_openai_responses(client: openai.OpenAI) -> None:
    assert client.responses.create(model=CHAT, input="Hello", max_output_tokens=8).output_text
    assert client.responses.input_tokens.count(model=CHAT, input="Hello").input_tokens > 5
    events = list(client.responses.create(model=CHAT, input="Hello", max_output_tokens=8, stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"


def test_openai_models(client: openai.OpenAI, nodes: list[Member]) -> None:
    models = {model.id: model.model_dump() for model in client.models.list()}
    assert set(models) == {CHAT, EMBED, RANK, SOLO, TOOLS}
    assert models[CHAT]["workers"] == len(nodes)
    assert models[EMBED]["workers"] == 1
    assert models[CHAT]["context_length"] >= 2048
    assert len(bytes.fromhex(models[CHAT]["digest"])) == 16
    assert client.models.retrieve(EMBED).id == EMBED
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")


async def test_who_leaves_frees_the_place(url: str, http: aiohttp.ClientSession) -> None:
    """One client in the model's only slot, another behind it in the queue."""
    options: dict[str, Any] = {"model": SOLO, "messages": MESSAGES, "max_tokens": 16_000}

    async def told(what: str, expected: int) -> bool:
        return await metric(http, url, f"qmesh_model_{what}", model=SOLO) == expected

    async with (
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as gpt,
        anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0, timeout=60) as claude,
    ):
        stream = await gpt.chat.completions.create(**options, stream=True, extra_body={"ignore_eos": True})
        await anext(aiter(stream))
        await until(partial(told, "busy", 1))
        queued = asyncio.create_task(claude.messages.create(**options))
        await until(partial(told, "queue", 1))
        queued.cancel()
        await until(partial(told, "queue", 0), timeout=2.0)
        assert await told("busy", 1)
        await stream.close()
        await until(partial(told, "busy", 0), timeout=2.0)


def test_anthropic_messages(claude: anthropic.Anthropic) -> None:
    options: dict[str, Any] = {
        "model": CHAT,
        "max_tokens": 12,
        "messages": MESSAGES,
        "extra_body": {"temperature": 0},
    }
    answer = claude.messages.create(**options)
    with claude.messages.stream(**options) as stream:
        text = "".join(stream.text_stream)
    assert answer.content[0].text == text
    assert answer.usage.output_tokens == 12
    assert claude.messages.count_tokens(model=CHAT, messages=MESSAGES).input_tokens > 5  # type: ignore[arg-type]
    assert CHAT in {model.id for model in claude.models.list()}


def test_anthropic_tools(claude: anthropic.Anthropic) -> None:
    tool: Any = {"name": "weather", "description": "Now", "input_schema": WEATHER}
    options: dict[str, Any] = {"model": TOOLS, "messages": MESSAGES}
    told = claude.messages.count_tokens(**options).input_tokens
    counted = claude.messages.count_tokens(**options, tools=[tool]).input_tokens
    assert counted > told + 50  # the model is told of the tool
    usage = claude.messages.create(**options, tools=[tool], max_tokens=4).usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted
    use = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Oslo"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "Rain"}
    turns = [{"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    options["messages"] = [*MESSAGES, *turns]
    assert claude.messages.count_tokens(**options, tools=[tool]).input_tokens > counted + 20
    assert claude.messages.create(**options, tools=[tool], max_tokens=4).content
