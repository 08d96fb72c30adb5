"""The engine and every endpoint of the client, on real llama.cpp with the demo model."""

from __future__ import annotations

import asyncio
import math
import os
import runpy
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from sidecar.client import SidecarClient
from sidecar.engine import Conversation, InferenceEngine
from sidecar.errors import (
    AccessDenied,
    BackendError,
    ContextExceeded,
    InvalidRequest,
    ModelLoadFailed,
    NotFound,
    NotSupported,
    SidecarStopped,
)
from sidecar.process import Supervisor
from tests.sidecar_support import ROOT, alive, config, real_server
from tests.support import seconds

GREEDY: dict[str, Any] = {"temperature": 0}


def engine_of(**settings: Any) -> InferenceEngine:
    named = os.environ.get("QMESH_TEST_LLAMA_SERVER")
    return InferenceEngine(mode="performance", context=256, server=named, **settings)


async def test_generate() -> None:
    async with engine_of() as engine:
        whole = await engine.generate("Once upon a time", max_tokens=24, **GREEDY)
        assert 0 < whole.tokens <= 24
        assert whole.prompt_tokens > 0
        assert whole.stop in ("limit", "eos")
        assert whole.timings["predicted_per_second"] > 0
        pieces = [
            piece async for piece in engine.generate_stream("Once upon a time", max_tokens=24, **GREEDY)
        ]
        assert len(pieces) > 5
        assert "".join(pieces) == whole.text


async def test_chat_keeps_its_history_and_trims_it_to_the_context() -> None:
    async with engine_of() as engine:
        talk = Conversation(system="Be brief.")
        sizes = []
        for _ in range(8):
            answer = ""
            async for text in engine.chat_stream(
                "Tell me a story.", conversation=talk, max_tokens=50, **GREEDY
            ):
                answer += text
            assert talk.turns[-2:] == [
                {"role": "user", "content": "Tell me a story."},
                {"role": "assistant", "content": answer},
            ]
            sizes.append(len(talk.turns))
        assert sizes[:2] == [2, 4]
        assert sizes[-1] < 16
        assert engine.conversation.turns == []
        before = list(talk.turns)
        with pytest.raises(ContextExceeded) as caught:
            async for _ in engine.chat_stream("word " * 300, conversation=talk):
                pass
        assert caught.value.context == 256
        assert caught.value.prompt_tokens
        assert talk.turns == before, "a question that does not fit costs no history"


async def test_an_answer_left_early_stays_as_far_as_it_came() -> None:
    async with engine_of() as engine:
        stream = engine.chat_stream("Tell me a story.", max_tokens=100, **GREEDY)
        first = await anext(stream)
        await stream.aclose()
        assert engine.conversation.turns[-1] == {"role": "assistant", "content": first}


async def test_embed() -> None:
    engine = engine_of()
    try:
        same, other, again = await engine.embed(["a small fox", "the deep blue sea", "a small fox"])
    finally:
        await engine.dispose()
    assert math.isclose(sum(x * x for x in same), 1, rel_tol=1e-3)
    assert math.dist(same, again) < 1e-3 < math.dist(same, other)


async def test_dispose_ends_everything(tmp_path: Path) -> None:
    engine = engine_of(log_dir=tmp_path)
    async with engine:
        stream = engine.generate_stream("Once", max_tokens=100_000, ignore_eos=True)
        await anext(stream)
        supervisor = engine._supervisors[False]
        pid = supervisor.pid
        await engine.dispose()
        with pytest.raises(SidecarStopped):
            async for _ in stream:
                pass
        with pytest.raises(SidecarStopped):
            await engine.generate("Once")
    assert pid
    assert not alive(pid)
    assert (tmp_path / "qmesh-demo.log").exists()


async def test_wrong_input_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="contxt"):
        InferenceEngine(contxt=5)
    with pytest.raises(ModelLoadFailed, match="No such file"):
        async with InferenceEngine(tmp_path / "none.gguf"):
            pass


async def test_two_first_uses_start_one_server() -> None:
    engine = engine_of()
    try:
        await asyncio.gather(*(engine.generate("Once", max_tokens=2) for _ in range(4)))
        assert len(engine._supervisors) == 1
    finally:
        await engine.dispose()


def test_the_example_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["engine.py"])
    runpy.run_path(str(ROOT / "examples" / "engine.py"))
    assert len(capsys.readouterr().out) > 20


# ── every endpoint ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[SidecarClient]:
    async with Supervisor(config(tmp_path), real_server()) as supervisor:
        yield await supervisor.ensure_ready(seconds(20))


MESSAGES = [{"role": "user", "content": "Hello"}]
CHAT = {"messages": MESSAGES, "max_tokens": 8}


async def test_generating_endpoints(client: SidecarClient) -> None:
    completion = await client.completion({"prompt": "Once", "n_predict": 4, "return_tokens": True})
    assert len(completion["tokens"]) == 4
    assert (await client.chat(CHAT))["choices"][0]["message"]["content"]
    assert (await client.completions({"prompt": "Once", "max_tokens": 4}))["choices"][0]["text"]
    assert (await client.responses({"input": "Hello", "max_output_tokens": 8}))["output"]
    assert (await client.messages(CHAT))["content"][0]["text"]
    with pytest.raises(NotSupported):
        await client.infill({"input_prefix": "a", "input_suffix": "b"})
    with pytest.raises(NotSupported, match="audio"):
        await client.transcribe(b"RIFF....WAVE")


async def test_streams_of_every_dialect(client: SidecarClient) -> None:
    completion = [event async for event in client.stream_completion({"prompt": "Once", "n_predict": 8})]
    assert completion[-1]["stop"]
    assert completion[-1]["timings"]["predicted_n"] == 8
    chat = [event async for event in client.stream_chat({**CHAT, "stream_options": {"include_usage": True}})]
    assert chat[-1]["usage"]["completion_tokens"] > 0
    legacy = {"prompt": "Once", "max_tokens": 8}
    assert [e async for e in client.stream_events("/v1/completions", legacy)][-1]["choices"][0][
        "finish_reason"
    ]
    responses = {"input": "Hello", "max_output_tokens": 8}
    kinds = [event["type"] async for event in client.stream_events("/v1/responses", responses)]
    assert kinds[-1] == "response.completed"
    kinds = [event["type"] async for event in client.stream_events("/v1/messages", CHAT)]
    assert kinds[-1] == "message_stop"


async def test_counting_and_converting(client: SidecarClient) -> None:
    tokens = await client.tokenize("Once upon a time")
    assert tokens
    assert (await client.detokenize(tokens)).strip() == "Once upon a time"
    prompt = await client.apply_template(MESSAGES)
    assert "Hello" in prompt
    count = len(await client.tokenize(prompt, add_special=True))
    assert abs(await client.count_chat_tokens(CHAT) - count) <= 1
    assert abs(await client.count_message_tokens(CHAT) - count) <= 1


async def test_the_server_itself(client: SidecarClient) -> None:
    assert await client.health()
    assert (await client.models())[0]["id"] == "qmesh-demo"
    assert (await client.props())["total_slots"] == 2
    assert len(await client.slots()) == 2
    assert await client.lora_adapters() == []
    assert "requests_processing" in await client.metrics()
    with pytest.raises(BackendError):
        await client.slot_action(0, "no-such-action")
    with pytest.raises(BackendError):
        await client.rerank("q", ["a"])
    with pytest.raises(BackendError):
        await client.embeddings(["a"])


async def test_errors_are_mapped(client: SidecarClient) -> None:
    with pytest.raises(InvalidRequest):
        await client.chat({"messages": "no list"})
    with pytest.raises(NotFound):
        await client.call("GET", "/no/such/endpoint")
    with pytest.raises(ContextExceeded) as caught:
        await client.completion({"prompt": "word " * 20_000})
    assert caught.value.prompt_tokens
    assert caught.value.context
    stranger = SidecarClient(client.base_url, "wrong")
    with pytest.raises(AccessDenied):
        await stranger.props()
    await stranger.aclose()
    with pytest.raises(ContextExceeded):
        async for _ in client.stream_chat({"messages": [{"role": "user", "content": "word " * 20_000}]}):
            pass


async def test_raw_bytes_are_the_servers(client: SidecarClient) -> None:
    async with await client.request(
        "POST", "/completion", {"prompt": "Once", "n_predict": 3, "stream": True}
    ) as raw:
        assert (raw.status, raw.content_type) == (200, "text/event-stream")
        body = await raw.read()
    assert body.startswith(b"data: {")
    assert body.endswith(b"}\n\n")
    async with await client.request("POST", "/completion", b"{broken") as raw:
        assert raw.status in (400, 500)
        assert b'"error"' in await raw.read()
