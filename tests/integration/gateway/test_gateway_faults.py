"""What goes wrong around a gateway: workers that die or load, clients that are slow, broken or gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import psutil
import pytest

from node.cluster import Member
from node.gateway import intake, outlet, server
from tests.gateway_support import CHAT, MESSAGES, cluster, gateway_to, metric, running_node, until
from tests.sidecar_support import FAKE
from tests.support import seconds

ENDLESS = {"model": CHAT, "prompt": "Once upon a time", "ignore_eos": True, "temperature": 0}


@pytest.fixture
def victims(tmp_path: Path) -> Iterator[list[Member]]:
    """Nodes to be killed."""
    with cluster(tmp_path / "mesh", 3) as members:
        yield members


async def test_the_answering_worker_is_killed(victims: list[Member], tmp_path: Path) -> None:
    by_id = {node.worker_id: node for node in victims}
    options: dict[str, Any] = {"model": CHAT, "messages": MESSAGES, "max_tokens": 1000}
    options |= {"temperature": 0, "extra_body": {"ignore_eos": True}}
    async with (
        gateway_to(victims[0].address, tmp_path) as gateway,
        aiohttp.ClientSession() as http,
        openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client,
    ):
        whole = await client.chat.completions.create(**options)
        raw = await client.chat.completions.with_raw_response.create(stream=True, **options)
        text, finish = "", None
        async for chunk in raw.parse():
            if not text and chunk.choices[0].delta.content:
                process = by_id[raw.headers["X-QMesh-Worker"]].process()
                assert process is not None
                process.send_signal(signal.SIGKILL)
            text += chunk.choices[0].delta.content or ""
            finish = chunk.choices[0].finish_reason or finish
        assert text == whole.choices[0].message.content
        assert finish == "length"
        assert await metric(http, gateway.url, "qmesh_splices_total", model=CHAT) == 1


async def test_a_request_waits_for_a_worker_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlet, "FIRST_PING", 0.1)
    monkeypatch.setattr(outlet, "NEXT_PING", 0.1)
    loading = {"extra_args": ["--load-seconds", "1.5"]}
    body = {"messages": MESSAGES, "max_tokens": 4, "stream": True}
    async with running_node(tmp_path / "node", [loading], "--llama-server", str(FAKE)) as node:
        facts = await node.published()
        async with (
            gateway_to(facts["address"], tmp_path) as gateway,
            aiohttp.ClientSession() as http,
            asyncio.TaskGroup() as group,
        ):
            own = group.create_task(_lines(http, facts["gateway"], body))
            other = group.create_task(_lines(http, gateway.url, body))
            async with http.get(f"{facts['gateway']}/health") as health:
                assert health.status == 503
                assert (await health.json())["error"]["mesh"]["this_node"][CHAT] in (
                    "stopped",
                    "starting",
                    "loading",
                )
    for lines in (own.result(), other.result()):
        assert lines[-1] == "data: [DONE]"
        assert [event for event in lines if '"content": " t3"' in event]
    assert other.result()[:3] == [": waiting for a worker"] * 3
    assert own.result()[0].startswith("data: ")  # its patience is longer than the load


async def test_waiting_ends(nodes: list[Member], tmp_path: Path, http: aiohttp.ClientSession) -> None:
    """In a stream whose status is sent already the error is an event; a whole answer has its status."""
    body = {"model": "gone", "messages": MESSAGES}
    settings = {"wait_seconds": 0.4, "aliases": {"gone": "never-there"}}
    async with (
        gateway_to(nodes[0].address, tmp_path, **settings) as gateway,
        http.post(f"{gateway.url}/v1/chat/completions", json=body) as answer,
    ):
        assert answer.status == 404  # the mesh has models, and this is none of them
    async with gateway_to("127.0.0.1:1", tmp_path, wait_seconds=0.4) as gateway:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(outlet, "FIRST_PING", 0.1)
            lines = await _lines(http, gateway.url, {**body, "stream": True})
            async with http.post(
                f"{gateway.url}/v1/messages", json={**body, "stream": True, "max_tokens": 4}
            ) as answer:
                events = await answer.text()
    assert lines[0] == ": waiting for a worker"
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "no_worker"
    assert events.startswith("event: ping\n")
    assert '"type":"overloaded_error"' in events


async def _lines(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> list[str]:
    async with http.post(f"{url}/v1/chat/completions", json=body) as answer:
        assert answer.status == 200
        return [line for line in (await answer.text()).split("\n") if line]


@asynccontextmanager
async def connection(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 14)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_slow_and_broken_clients_cost_little(nodes: list[Member], http: aiohttp.ClientSession) -> None:
    url = str(nodes[1].ready["gateway"])
    process = nodes[1].process()
    assert process is not None
    body = json.dumps({**ENDLESS, "max_tokens": 2000, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    openings = [
        b"POST /v1/chat/completions HTT",
        head + b"X-Slow: " + b"x" * 4000,
        head + b"Content-Length: 30000000\r\n\r\n" + b'{"prompt": "',
        head + b"Transfer-Encoding: chunked\r\n\r\nffff\r\nabc",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200,
        head + b"Content-Length: %d\r\n\r\n" % len(body) + body,
    ]
    before = process.memory_info().rss
    async with contextlib.AsyncExitStack() as stack:
        for opening in openings * 40:
            _, writer = await stack.enter_async_context(connection(url))
            writer.write(opening)
        async with http.get(f"{url}/v1/models") as answer:
            assert answer.status == 200
        await until(lambda: metric(http, url, "qmesh_gateway_open_requests"))
        grown = process.memory_info().rss - before
    assert grown < 48 << 20, f"{grown >> 20} MB for {len(openings) * 40} connections"

    async def idle() -> bool:
        return await metric(http, url, "qmesh_gateway_open_requests") == 1  # the one that asks

    await until(idle, timeout=15)
    async with http.post(f"{url}/v1/completions", json={"prompt": "A", "max_tokens": 2}) as answer:
        assert answer.status == 200


@pytest.mark.parametrize(
    ("opening", "status"),
    [
        (b"GET\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 9000 + b"\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 300 + b"\r\n", 400),
        (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n", 413),
        (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\n{]}", 400),
        (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n[]", 400),
        (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n\xff\xfe", 400),
        (b"POST /tokenize HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 2\r\n\r\n{}", 403),
        (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nOrigin: https://evil.example\r\n\r\n", 403),
        (b"GET /tokenize HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
        (b"DELETE /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
        (b"GET /slots HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    ],
)
async def test_bad_requests_are_refused(url: str, opening: bytes, status: int) -> None:
    async with asyncio.timeout(seconds(5)), connection(url) as (reader, writer):
        writer.write(opening)
        assert (await reader.readline()).split()[1] == str(status).encode()


async def test_limits_of_time_and_number(
    nodes: list[Member], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "BODY_SECONDS", 0.2)
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.3)
    monkeypatch.setattr(server, "MOST_CONNECTIONS", 3)
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\n"
    async with asyncio.timeout(seconds(10)), gateway_to(nodes[0].address, tmp_path) as gateway:
        async with connection(gateway.url) as (reader, writer):
            writer.write(head + b"Content-Length: 5\r\n\r\n{")
            assert b" 408 " in await reader.readline()
        async with connection(gateway.url) as (reader, writer):
            writer.write(head)
            assert await reader.read() == b""  # closed: the head did not end
        async with connection(gateway.url) as (reader, writer):
            writer.write(head + b"Expect: 100-continue\r\nContent-Length: 15\r\n\r\n")
            assert b" 100 " in await reader.readline()
            writer.write(b'{"content":"a"}')
            assert await reader.readline() == b"\r\n"
            assert b" 200 " in await reader.readline()
            async with connection(gateway.url), connection(gateway.url):
                await until(_full(gateway.url))


def _full(url: str) -> Any:
    async def turned_away() -> bool:
        async with connection(url) as (reader, _):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    return b" 503 " in await reader.readline()
        return False

    return turned_away


async def test_web_pages(nodes: list[Member], tmp_path: Path, http: aiohttp.ClientSession) -> None:
    page = {"Origin": "https://chat.example"}
    asking = {
        **page,
        "Access-Control-Request-Headers": "authorization",
        "Access-Control-Request-Method": "POST",
    }
    async with gateway_to(nodes[0].address, tmp_path, cors_origins=["https://chat.example"]) as gateway:
        async with http.get(f"{gateway.url}/v1/models", headers=page) as answer:
            assert answer.headers["Access-Control-Allow-Origin"] == "https://chat.example"
        async with http.options(f"{gateway.url}/v1/chat/completions", headers=asking) as answer:
            assert answer.status == 204
            assert answer.headers["Access-Control-Allow-Headers"] == "authorization"
        async with http.get(
            f"{gateway.url}/v1/models", headers={"Origin": "https://other.example"}
        ) as answer:
            assert answer.status == 403
            assert "Access-Control-Allow-Origin" not in answer.headers


async def test_traces_and_logs(tmp_path: Path) -> None:
    """A trace is found in the logs of gateway and worker; what was said is found in none."""
    trace, secret = "4bf92f3577b34da6a3ce929d0e0e4736", "Rumpelstiltskin"
    async with running_node(tmp_path / "node", [{}]) as node, aiohttp.ClientSession() as http:
        facts = await node.ready()
        async with http.post(
            f"{facts['gateway']}/v1/completions",
            json={"prompt": f"{secret} {secret}", "max_tokens": 16, "stream": True},
            headers={"traceparent": f"00-{trace}-00f067aa0ba902b7-01"},
        ) as answer:
            said = "".join(re.findall(r'"text":"([^"\\]+)"', await answer.text()))
        assert answer.status == 200
    logs = {path.name: path.read_text("utf-8") for path in (tmp_path / "node" / "logs").iterdir()}
    lines = [json.loads(line) for line in logs["node.log"].splitlines()]
    traced = {line["logger"]: line for line in lines if trace in str(line.get("trace"))}
    assert set(traced) == {"qmesh.gateway", "qmesh.service"}
    assert traced["qmesh.gateway"]["answer_tokens"] == 16
    everything = "".join(logs.values()) + node.errors()
    assert secret not in everything
    assert len(said) > 20
    assert not [said[at : at + 16] for at in range(len(said) - 16) if said[at : at + 16] in everything]


async def test_running_answers_end_before_the_node(tmp_path: Path) -> None:
    body = {**ENDLESS, "max_tokens": 1500, "stream": True}
    async with running_node(tmp_path / "node", [{}]) as node, aiohttp.ClientSession() as http:
        url = (await node.ready())["gateway"]
        async with http.post(f"{url}/v1/completions", json=body) as answer:
            await answer.content.readline()
            psutil.Process(node.pid).terminate()
            rest = await answer.content.read()
        assert rest.endswith(b"data: [DONE]\n\n")
        assert await node.exit_code() == 0
        with pytest.raises(aiohttp.ClientConnectorError):
            await http.get(f"{url}/health")
