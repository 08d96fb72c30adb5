"""A mesh of real nodes with real llama.cpp: what must hold while nobody dies."""

from __future__ import annotations

import asyncio
import gc
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from client_sdk import Completion, MeshClient, SyncMeshClient
from mesh.errors import (
    BadRequest,
    ConfigurationError,
    ConnectFailed,
    ContextExceeded,
    NoWorkers,
    QMeshError,
    RemoteDeadline,
    is_retryable,
)
from node.cluster import Member
from tests.mesh_support import MODEL, PROMPT, Proxy, ask, completion, connected, llama_of, until
from tests.support import seconds

pytestmark = pytest.mark.xdist_group("mesh")

CLIENTS, REQUESTS = 16, 200
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


async def idle(members: list[Member]) -> bool:
    """Whether no node has a request, by the nodes' word and by their llama.cpp's."""
    for member in members:
        async with connected(member) as connection:
            load = (await ask(connection, "status"))["load"]
        if load["busy"] or load["queue"] or any([await one.busy() for one in llama_of(member.pid)]):
            return False
    return True


def sockets(members: list[Member]) -> Counter[int]:
    """Established TCP connections of each node to its peers and clients."""
    found: Counter[int] = Counter()
    for member in members:
        port = int(member.address.rpartition(":")[2])
        found[member.pid] = sum(
            one.status == psutil.CONN_ESTABLISHED and bool(one.laddr) and one.laddr.port == port
            for one in psutil.Process(member.pid).net_connections(kind="tcp")
        )
    return found


# --- answers


async def test_an_answer_streams_and_names_its_worker(mesh: MeshClient, members: list[Member]) -> None:
    stream = mesh.generate_stream(PROMPT, max_tokens=24, **GREEDY)
    tokens = [token async for token in stream]
    answer = stream.completion()
    assert len(tokens) > 5, "it came in one piece"
    assert answer.text == "".join(token.text for token in tokens)
    assert " " in answer.text
    assert (answer.model, answer.finish_reason) == (MODEL, "length")
    assert answer.usage["completion_tokens"] == 24 == sum(len(token.ids) for token in tokens)
    assert answer.usage["prompt_tokens"] > 1
    explain = answer.explain
    assert {token.worker for token in tokens} == {explain.worker}
    assert explain.worker in {member.worker_id for member in members}
    assert [attempt.worker for attempt in explain.attempts] == [explain.worker]
    assert explain.splices == 0
    assert not any(token.spliced for token in tokens)
    assert explain.first_token is not None
    assert explain.speed is not None
    assert explain.path is not None
    assert 0 < explain.first_token < seconds(10)
    assert explain.speed > 0
    assert len(explain.candidates) == 3


async def test_a_burst_goes_to_all_workers(mesh: MeshClient) -> None:
    answers = await asyncio.gather(*(mesh.generate(PROMPT, max_tokens=16, **GREEDY) for _ in range(9)))
    assert all(answer.usage["completion_tokens"] == 16 for answer in answers)
    assert len({answer.explain.worker for answer in answers}) == 3


async def test_a_chat_goes_on_from_its_history(mesh: MeshClient) -> None:
    history = [{"role": "user", "content": "Tell me a story about a fox."}]
    first = await mesh.chat(history, max_tokens=24, temperature=0)
    assert first.text
    assert first.message == {"role": "assistant", "content": first.text}
    history += [dict(first.message), {"role": "user", "content": "Another one."}]
    second = await mesh.chat(history, max_tokens=8, temperature=0)
    assert second.text
    assert second.usage["prompt_tokens"] > first.usage["prompt_tokens"]


async def test_workers_and_models(mesh: MeshClient, members: list[Member]) -> None:
    workers = await mesh.workers(MODEL)
    assert {worker.id for worker in workers} == {member.worker_id for member in members}
    assert {worker.addresses for worker in workers} == {(member.address,) for member in members}
    assert all(worker.health > 0 and worker.slots == 2 and worker.context >= 512 for worker in workers)
    assert [worker.expected for worker in workers] == sorted(worker.expected for worker in workers)
    (model,) = await mesh.models()
    assert (model.name, model.workers) == (MODEL, 3)


async def test_any_node_is_a_way_in(members: list[Member]) -> None:
    for member in members:
        async with MeshClient(f"{member.worker_id}@{member.address}") as mesh:
            assert len(await mesh.workers()) == 3


async def test_a_dead_entry_is_passed_over(members: list[Member]) -> None:
    async with MeshClient(["127.0.0.1:1", members[1].address]) as mesh:
        assert (await mesh.generate(PROMPT, max_tokens=2)).text


async def test_stop_strings_and_seeds(mesh: MeshClient) -> None:
    whole = await mesh.generate(PROMPT, max_tokens=40, **GREEDY)
    stop = whole.text[20:24]
    cut = await mesh.generate(PROMPT, max_tokens=40, stop=stop, **GREEDY)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    one, other = [await mesh.generate(PROMPT, max_tokens=16, temperature=1.0, seed=5) for _ in range(2)]
    assert one.text == other.text


# --- what is refused


async def test_an_unknown_model_is_said_so(mesh: MeshClient) -> None:
    with pytest.raises(NoWorkers, match="no-such-model"):
        await mesh.generate(PROMPT, model="no-such-model")


async def test_a_prompt_that_is_too_long_is_refused_once(mesh: MeshClient) -> None:
    stream = mesh.generate_stream("word " * 20_000, max_tokens=4)
    with pytest.raises(ContextExceeded):
        await stream.read()
    assert len(stream.explain.attempts) == 1


async def test_what_the_model_server_refuses_is_a_bad_request(mesh: MeshClient) -> None:
    with pytest.raises(BadRequest):
        await mesh.generate(PROMPT, grammar="this is no grammar (")
    with pytest.raises(BadRequest):
        await mesh.generate(PROMPT, unwritable={1, 2})


async def test_a_deadline_ends_an_answer(members: list[Member]) -> None:
    async with connected(members[0]) as connection:
        meta = completion(1500) | {"deadline_ms": 60}
        async with await connection.open("infer", meta) as stream:
            with pytest.raises(RemoteDeadline):
                while await stream.read(timeout=seconds(10)) is not None:
                    pass
    await until(lambda: idle(members[:1]), 5)


async def test_nobody_at_the_entry() -> None:
    async with MeshClient("127.0.0.1:1") as mesh:
        for ask_for in (mesh.models(), mesh.workers(), mesh.generate("x"), mesh.generate("x", model="m")):
            with pytest.raises(ConnectFailed, match="no entry node can be reached"):
                await ask_for


async def test_a_stranger_of_another_network_learns_nothing(members: list[Member]) -> None:
    async with MeshClient(members[0].address, network="another") as mesh:
        with pytest.raises(ConnectFailed, match="refused the handshake"):
            await mesh.models()


# --- secrecy


async def test_who_listens_in_reads_neither_prompt_nor_answer(members: list[Member]) -> None:
    secret = "The secret word of the day is xylophone"
    async with Proxy(members[0].address) as proxy, MeshClient(proxy.address) as mesh:
        answers: list[Completion] = []
        for _ in range(4):
            asked = [mesh.generate(f"{secret} {number}", max_tokens=30, **GREEDY) for number in range(6)]
            answers += [
                answer
                for answer in await asyncio.gather(*asked)
                if answer.explain.worker == members[0].worker_id
            ]
            if answers:
                break
        assert answers, "no answer came through the proxy"
        assert all(proxy.address in (answer.explain.path or "") for answer in answers)
        heard = bytes(proxy.sent) + b"|" + bytes(proxy.received)
    assert len(proxy.sent) > 500
    assert len(proxy.received) > 500
    for clear in (b"xylophone", b"secret", b"prompt", b"completion", b"content", MODEL.encode()):
        assert clear not in heard
    for answer in answers:
        words = [word.encode() for word in answer.text.split() if len(word) > 4]
        assert words
        assert not any(word in heard for word in words)


@pytest.mark.parametrize("direction", ["request", "answer"])
async def test_a_tampered_byte_closes_the_connection(members: list[Member], direction: str) -> None:
    async with Proxy(members[0].address) as proxy, connected(members[0], address=proxy.address) as connection:
        async with await connection.open("infer", completion(4)) as stream:
            while await stream.read(timeout=seconds(10)) is not None:
                pass
        setattr(proxy, f"tamper_{direction}", True)
        with pytest.raises(QMeshError) as failed:
            async with await connection.open("infer", completion(64)) as stream:
                while await stream.read(timeout=seconds(10)) is not None:
                    pass
        assert is_retryable(failed.value)
        assert re.search("did not authenticate|AuthenticationError", str(failed.value))
        async with asyncio.timeout(seconds(5)):
            await connection.wait_closed()
        assert connection.closed
        with pytest.raises(QMeshError):
            await connection.open("status", {})
    await until(lambda: idle(members[:1]), 5)


async def test_a_tampered_answer_comes_from_elsewhere(members: list[Member]) -> None:
    """To the user a forger on the way is a worker that was lost."""
    async with Proxy(members[0].address) as proxy, MeshClient(proxy.address) as mesh:
        await mesh.workers()
        proxy.tamper_answer = True
        answers = await asyncio.gather(*(mesh.generate(PROMPT, max_tokens=8, **GREEDY) for _ in range(6)))
        assert all(answer.usage["completion_tokens"] == 8 for answer in answers)


# --- crowds


async def test_200_requests_of_16_clients_are_answered_and_leave_nothing(members: list[Member]) -> None:
    await until(lambda: idle(members), 5)
    gc.collect()
    tasks, files = len(asyncio.all_tasks()), psutil.Process().num_fds()
    before = sockets(members)
    clients = [MeshClient(members[number % 3].address) for number in range(CLIENTS)]

    async def work(number: int) -> list[Completion]:
        mesh = clients[number]
        count = REQUESTS // CLIENTS + (number < REQUESTS % CLIENTS)
        return [
            await mesh.generate(f"{PROMPT} {number} {index}", max_tokens=12, **GREEDY)
            for index in range(count)
        ]

    async with asyncio.timeout(seconds(60)):
        answers = [one for some in await asyncio.gather(*map(work, range(CLIENTS))) for one in some]
    assert len(answers) == REQUESTS
    assert all(answer.text and answer.usage["completion_tokens"] == 12 for answer in answers)
    shares = Counter(answer.explain.worker for answer in answers)
    assert set(shares) == {member.worker_id for member in members}
    assert min(shares.values()) >= 5, shares

    await until(lambda: idle(members), 5)
    await asyncio.gather(*(mesh.close() for mesh in clients))
    assert len(asyncio.all_tasks()) == tasks

    async def closed() -> bool:
        return sockets(members) == before and psutil.Process().num_fds() <= files

    await until(closed, 5)


@pytest.mark.parametrize("way", ["break", "cancel", "aclose", "client closed"])
async def test_leaving_an_answer_frees_the_slot(mesh: MeshClient, members: list[Member], way: str) -> None:
    """The answer would take longer than the worker may send ahead, so that only leaving ends it."""
    stream = mesh.generate_stream(PROMPT, model=MODEL, max_tokens=1900, **GREEDY)
    if way == "break":
        async for _ in stream:
            break
    elif way == "cancel":
        begun = asyncio.Event()

        async def hold() -> None:
            async for _ in stream:
                begun.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(hold())
        await begun.wait()
        assert not await idle(members)
        task.cancel()
        await asyncio.wait([task])
    else:
        tokens = aiter(stream)
        await anext(tokens)
        assert not await idle(members)
        await (stream.aclose() if way == "aclose" else mesh.close())
    await until(lambda: idle(members), 5)
    assert stream.completion().text
    assert stream.completion().finish_reason is None


async def test_a_queue_is_fair_and_honest(members: list[Member]) -> None:
    """More requests at one node than it has slots and places: those beyond are refused with a time."""
    async with connected(members[0]) as connection:

        async def request() -> str:
            try:
                async with await connection.open("infer", completion(40)) as stream:
                    while await stream.read(timeout=seconds(20)) is not None:
                        pass
            except QMeshError as error:
                assert getattr(error, "retry_after", None)
                return type(error).__name__
            return "answered"

        outcomes = Counter(await asyncio.gather(*(request() for _ in range(14))))
    assert set(outcomes) == {"answered", "Overloaded"}
    # two slots and eight places in the queue
    assert outcomes["answered"] >= 10
    await until(lambda: idle(members), 5)


async def test_more_requests_than_places_are_all_answered_by_waiting(mesh: MeshClient) -> None:
    answers = await asyncio.gather(*(mesh.generate(PROMPT, max_tokens=8, **GREEDY) for _ in range(60)))
    assert all(answer.usage["completion_tokens"] == 8 for answer in answers)


# --- the blocking client


def test_the_blocking_client(members: list[Member]) -> None:
    with SyncMeshClient(members[0].address) as mesh:
        assert [model.name for model in mesh.models()] == [MODEL]
        assert len(mesh.workers()) == 3
        answer = mesh.generate(PROMPT, max_tokens=8, **GREEDY)
        stream = mesh.generate_stream(PROMPT, max_tokens=8, **GREEDY)
        assert "".join(token.text for token in stream) == answer.text == stream.completion().text
        assert stream.explain.worker
        assert mesh.chat("Hello", max_tokens=4).message
        for _ in mesh.chat_stream("Tell me a story.", max_tokens=1500, ignore_eos=True):
            break
        asyncio.run(until(lambda: idle(members), 5))
        with pytest.raises(NoWorkers):
            mesh.generate(PROMPT, model="no-such-model")
        with ThreadPoolExecutor(8) as pool:
            texts = list(pool.map(lambda _: mesh.generate(PROMPT, max_tokens=8, **GREEDY).text, range(24)))
        assert all(texts)
        unfinished = iter(mesh.generate_stream(PROMPT, max_tokens=1500, **GREEDY))
        next(unfinished)
    mesh.close()
    with pytest.raises(RuntimeError, match="closed"):
        mesh.models()
    unfinished.close()  # type: ignore[attr-defined]


def test_the_blocking_client_leaves_nothing_when_it_cannot_begin() -> None:
    with pytest.raises(ConfigurationError):
        SyncMeshClient("a place that is none")
    gc.collect()
