"""Entry nodes and workers that lie to the client: it goes elsewhere, or says what is wrong; it never breaks."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import orjson
import pytest

from client_sdk import MeshClient, Timeouts
from mesh.errors import AllWorkersFailed, GenerationError, NoWorkers, ProtocolError, QMeshError
from mesh.identity import Identity
from mesh.records import model_key
from mesh.transport import Stream
from tests.sdk_support import MODEL, OPEN, Answer, client, client_of, node, record, says
from tests.support import seconds

QUICK = Timeouts(connect=seconds(2), first_token=seconds(2), between_tokens=seconds(2), find=seconds(2))

# --- about workers and models


@pytest.mark.parametrize(
    "records",
    [
        None,
        5,
        "records",
        {},
        {"a": 1},
        [],
        [5],
        [[]],
        [[b"", b""]],
        [[5, 6]],
        [["key", "blob"]],
        [[b"k", b"x" * 300]],
        [None],
    ],
)
async def test_records_that_are_none(records: object) -> None:
    async with client({"find": says({"records": records})}, QUICK) as mesh:
        with pytest.raises(NoWorkers):
            await mesh.workers(MODEL)


async def test_a_forged_record_is_worth_nothing() -> None:
    identity = Identity()
    key, blob = record(identity, "127.0.0.1:1")
    forged = [
        [key, blob[:-1] + bytes([blob[-1] ^ 1])],
        [model_key(OPEN, "other"), blob],
        record(identity, "127.0.0.1:1", model="other"),
        record(identity, "127.0.0.1:1", health=0),
    ]
    async with client({"find": says({"records": forged})}, QUICK) as mesh:
        with pytest.raises(NoWorkers):
            await mesh.workers(MODEL)


@pytest.mark.parametrize(
    "addresses", [(), ("nowhere",), ("relay@host:1", "::1"), ("a..b:1",), ("127.0.0.1:1",)]
)
async def test_a_worker_without_an_address_that_can_be_used(addresses: tuple[str, ...]) -> None:
    records = [record(Identity(), *addresses), record(Identity(), *addresses)]
    async with client({"find": says({"records": records})}, QUICK) as mesh:
        assert len(await mesh.workers(MODEL)) == 2
        with pytest.raises((NoWorkers, AllWorkersFailed)):
            await mesh.generate("x", model=MODEL)


@pytest.mark.parametrize("models", [None, 5, [], "models", {"m": "many"}, {"m": None}, {"m": 1.5}])
async def test_models_that_are_none(models: object) -> None:
    async with client({"models": says({"models": models})}, QUICK) as mesh:
        try:
            assert await mesh.models() == []
        except ProtocolError as error:
            assert "models" in str(error)


# --- about an answer


def event(**fields: Any) -> bytes:
    return b"data: " + orjson.dumps(fields) + b"\n\n"


TRUE = [
    event(content="yes", tokens=[1], stop=False),
    event(content="", tokens=[], stop=True, stop_type="eos"),
]


def infers(head: Mapping[str, Any] | None, body: list[bytes], trailer: Mapping[str, Any]) -> Answer:
    async def answer(stream: Stream) -> None:
        if head is not None:
            await stream.send_head(head)
        for part in body:
            await stream.send(part)
        await stream.end(trailer)

    return answer


OK: dict[str, Any] = {"status": 200, "content_type": "text/event-stream", "queue_ms": 0}


@pytest.mark.parametrize(
    ("head", "body", "trailer"),
    [
        (None, TRUE, {}),
        ({"status": "fine"}, TRUE, {}),
        ({"status": 500}, [b"\xff"], {}),
        ({"status": 503}, [b'{"error": 5}'], {}),
        ({"status": []}, [], {}),
        (OK, [], {}),
        (OK, [b"data: {"], {}),
        (OK, [b"data: 5\n\n"], {}),
        (OK, [b"data: [1]\n\n"], {}),
        (OK, [event(content=5)], {}),
        (OK, [event(content="x", tokens="abc")], {}),
        (OK, [event(error=True)], {}),
        (OK, [event(error={"message": ["x"]})], {}),
        (OK, TRUE[:1], {}),
    ],
)
async def test_a_lying_worker_is_left_for_an_honest_one(
    head: Mapping[str, Any] | None, body: list[bytes], trailer: Mapping[str, Any]
) -> None:
    """Both are equal in what they say of themselves, so that the liar is asked as well."""
    honest, false = Identity(), Identity()
    async with (
        node(honest, {"infer": infers(OK, TRUE, {})}) as good,
        node(false, {"infer": infers(head, body, trailer)}) as bad,
    ):
        found = says({"records": [record(honest, good, health=50), record(false, bad, health=100)]})
        async with node(Identity(), {"find": found}) as address:
            for _ in range(4):
                async with MeshClient(address, timeouts=QUICK) as mesh:
                    stream = mesh.generate_stream("x", model=MODEL, temperature=0)
                    text = "".join([token.text async for token in stream])
                    assert text == "yes"
                    assert stream.explain.worker == honest.id.hex()


@pytest.mark.parametrize(
    "trailer",
    [
        {"load": 5},
        {"load": {"busy": "x", "queue": 1, "slots": 1}},
        {"load": {"busy": float("inf"), "queue": 0, "slots": 0}},
        {"load": {"busy": -5, "queue": float("nan"), "slots": -1}},
        {"load": {"busy": 2**63, "queue": 2**63, "slots": 2**63}},
        {"usage": 5, "timings": [1]},
    ],
)
async def test_what_a_worker_says_of_its_load_breaks_nothing(trailer: Mapping[str, Any]) -> None:
    odd = OK | {"queue_ms": "long"}
    timings = {"predicted_per_second": "fast", "prompt_per_second": -1, "prompt_n": "many", "cache_n": 0}
    last = [TRUE[0], event(content="", stop=True, timings={**timings, "prompt_n": 3})]
    async with client_of({"infer": infers(odd, last, trailer)}, QUICK) as mesh:
        for _ in range(3):
            assert (await mesh.generate("x", model=MODEL)).text == "yes"
        (told,) = await mesh.workers(MODEL)
        assert told.expected > 0


async def test_an_endless_event_is_given_up() -> None:
    async def endless(stream: Stream) -> None:
        await stream.send_head(OK)
        while True:
            await stream.send(b"x" * 65536)

    async with client_of({"infer": endless}, QUICK) as mesh, asyncio.timeout(seconds(20)):
        with pytest.raises(GenerationError, match="larger than"):
            await mesh.generate("x", model=MODEL)


async def test_a_worker_that_says_nothing_is_given_up() -> None:
    async def silent(_: Stream) -> None:
        await asyncio.Event().wait()

    quick = Timeouts(first_token=seconds(0.2), silence=seconds(0.1))
    async with client_of({"infer": silent}, quick) as mesh, asyncio.timeout(seconds(20)):
        with pytest.raises(QMeshError, match="sent nothing"):
            await mesh.generate("x", model=MODEL)


async def test_tool_calls_without_end_do_not_fill_the_memory() -> None:
    huge = event(choices=[{"delta": {"tool_calls": [{"index": 10**9, "function": {"name": "f"}}]}}])
    async with client_of({"infer": infers(OK, [huge], {})}, QUICK) as mesh:
        with pytest.raises(GenerationError, match="wrong form"):
            await mesh.chat("x", model=MODEL)
