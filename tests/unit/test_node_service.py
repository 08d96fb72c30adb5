"""What a hostile peer may write into a request: it is refused, and nothing breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, cast

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesh.dht import Dht
from mesh.errors import (
    BadRequest,
    ModelNotFound,
    Overloaded,
    RemoteDeadline,
    RemoteError,
    Unauthorized,
)
from mesh.identity import NodeId
from mesh.limits import MAX_BODY
from mesh.transport import Stream
from node import bodies
from node import service as module
from node.bodies import Bodies
from node.config import PeerSettings
from node.gate import Gate
from node.inference import COUNTING, DEFAULT_COST, GENERATING, MAX_COST, Inference, Used, weigh
from node.reachability import Reachability
from node.served import ServedModel
from node.service import Service
from tests.support import seconds

CHUNK = 1 << 20
OWN, PEER = NodeId(b"o" * 32), NodeId(b"p" * 32)


@dataclass
class FakeStream:
    """A stream that carries one request; `body` None never ends."""

    method: str = "infer"
    meta: Mapping[str, Any] = field(default_factory=dict)
    body: bytes | None = b"{}"
    peer_id: NodeId = PEER
    trailer: Mapping[str, Any] | None = None

    async def read(self) -> bytes | None:
        if self.body is None:
            await asyncio.Event().wait()
            raise AssertionError
        part, self.body = self.body[:CHUNK], self.body[CHUNK:]
        return part or None

    async def end(self, meta: Mapping[str, Any] | None = None) -> None:
        self.trailer = meta


class FakeDht:
    """Knows nobody."""

    peers = ()
    unreached: Mapping[Any, str] = {}

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    async def lookup(self, model: str, want: int) -> list[Any]:
        self.asked.append((model, want))
        return []

    async def models(self) -> dict[str, int]:
        return {"m": 1}


class FakeReachability:
    """Has tried nothing."""

    def describe(self) -> dict[str, Any]:
        return {}


class FakeModel:
    """A model whose server is coming back: a sound request gets that far and no further."""

    name = "m"
    failed = False
    recovering = True

    def __init__(self) -> None:
        self.gate = Gate(1)

    async def settled(self, *, streaming: bool) -> None:
        return


@dataclass
class Served:
    dht: FakeDht
    model: FakeModel
    service: Service

    async def handle(self, stream: FakeStream) -> FakeStream:
        async with asyncio.timeout(seconds(5)):
            await self.service.handle(cast("Stream", stream))
        return stream

    async def ask(self, data: bytes | None = b"{}", **meta: Any) -> FakeStream:
        return await self.handle(FakeStream("infer", {"path": "/completion", "model": "m"} | meta, data))


def make(peers: PeerSettings = PeerSettings()) -> Served:  # noqa: B008 - frozen
    dht, model = FakeDht(), FakeModel()
    models = {"m": cast("ServedModel", model)}
    service = Service(
        OWN,
        models,
        cast("Dht", dht),
        cast("Reachability", FakeReachability()),
        Inference(OWN, peers, load=lambda: {}),
        status=lambda: {"a": 1},
    )
    return Served(dht, model, service)


@pytest.fixture
def served() -> Served:
    return make()


@pytest.mark.parametrize("path", sorted(GENERATING | COUNTING))
async def test_a_sound_request_gets_as_far_as_the_model(served: Served, path: str) -> None:
    with pytest.raises(Overloaded, match="starting") as refused:
        await served.ask(path=path)
    assert refused.value.retry_after
    assert served.model.gate.admission.busy == 0


@pytest.mark.parametrize(
    "path",
    [None, 5, "", "/slots", "/props", "/v1/models", "/completion/", "/lora-adapters", [], {}, b"/completion"],
)
async def test_other_endpoints_are_refused(served: Served, path: object) -> None:
    with pytest.raises(BadRequest, match="not served to peers"):
        await served.ask(path=path)


@pytest.mark.parametrize("model", [None, 5, "", "other", [], {}, b"m", ["m"]])
async def test_other_models_are_not_found(served: Served, model: object) -> None:
    with pytest.raises(ModelNotFound):
        await served.ask(model=model)


@pytest.mark.parametrize(
    "meta",
    [
        {"deadline_ms": 0},
        {"deadline_ms": -5},
        {"deadline_ms": "5"},
        {"deadline_ms": 1.5},
        {"deadline_ms": []},
        {"priority": "high"},
        {"priority": None},
        {"priority": 1.5},
        {"body": 5},
        {"body": "{}"},
        {"body": b"{}"},
        {"body": [1]},
        {"body": {1: 2}},
        {"body": {"a": b"bytes"}},
        {"body": {"a": {"b": [b""]}}},
    ],
)
async def test_wrong_types_are_bad_requests(served: Served, meta: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        await served.ask(**meta)


@pytest.mark.parametrize(
    "body", [b"", b"x", b"[]", b"5", b"null", b"\xff", b"{", b"[" * 100_000, b'{"a":' * 5000]
)
async def test_bodies_that_are_no_json_object(served: Served, body: bytes) -> None:
    with pytest.raises(BadRequest, match="JSON"):
        await served.ask(body)


async def test_a_body_that_never_comes_is_given_up(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "PATIENCE", 0.01)
    with pytest.raises(RemoteDeadline, match="body did not come"):
        await served.ask(None)


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.binary(), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(["path", "model", "deadline_ms", "priority", "body", "want", "trace"])


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.sampled_from(["infer", "find", "status", "models", "load", "", "nothing", "x" * 256]),
    st.dictionaries(keys, anything, max_size=7),
    st.binary(max_size=20) | anything.map(lambda value: repr(value).encode()),
    st.booleans(),
)
def test_nothing_that_can_be_written_breaks_it(
    method: str, wild: dict[str, Any], body: bytes, sound: bool
) -> None:
    async def handle() -> None:
        one = make()
        meta = {"path": "/completion", "model": "m", **wild} if sound else wild
        with suppress(RemoteError):
            await one.handle(FakeStream(method, meta, body))
        assert one.model.gate.admission.busy == 0

    asyncio.run(handle())


@given(anything, anything)
def test_the_weight_of_a_request_is_bounded(limit: object, other: object) -> None:
    try:
        body = orjson.dumps({"n_predict": limit, "max_tokens": other})
    except TypeError:
        return
    assert 1 <= weigh(body)[0] <= MAX_COST


def test_the_weight_is_the_limit_of_tokens() -> None:
    assert weigh(b'{"max_tokens": 7, "stream": true}') == (7, True)
    assert weigh(b"{}") == (DEFAULT_COST, False)
    assert weigh(b'{"n_predict": -1, "stream": 1}') == (DEFAULT_COST, False)


# --- bodies


@asynccontextmanager
async def holding(held: Bodies, *streams: FakeStream) -> AsyncIterator[list[bytes]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(held.of(cast("Stream", stream))) for stream in streams]


async def test_bodies_arrive_whole_and_are_given_back() -> None:
    held = Bodies(OWN)
    data = bytes(range(256)) * 10_000
    async with holding(held, FakeStream(body=data), FakeStream(meta={"body": {"a": 1}})) as (first, second):
        assert (first, second) == (data, b'{"a":1}')
        assert held.held == len(data) + 7
    assert held.held == 0
    with pytest.raises(LookupError):
        async with holding(held, FakeStream(body=data)):
            raise LookupError
    assert held.held == 0


async def test_a_body_has_a_largest_size() -> None:
    held = Bodies(OWN)
    async with holding(held, FakeStream(body=bytes(MAX_BODY))):
        pass
    with pytest.raises(BadRequest, match="at most"):
        async with holding(held, FakeStream(body=bytes(MAX_BODY + 1))):
            pass
    assert held.held == 0


async def test_what_peers_have_underway_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MAX_HELD_PER_PEER", 4 * CHUNK)
    monkeypatch.setattr(bodies, "MAX_HELD", 6 * CHUNK)
    held, large = Bodies(OWN), bytes(4 * CHUNK)
    async with holding(held, FakeStream(body=large)):
        with pytest.raises(Overloaded, match="this peer") as refused:
            async with holding(held, FakeStream(body=b"x")):
                pass
        assert refused.value.retry_after
        async with holding(held, FakeStream(body=b"x", peer_id=NodeId(b"q" * 32))):
            pass
        with pytest.raises(Overloaded, match="too many large"):
            async with holding(held, FakeStream(body=large, peer_id=OWN)):
                pass
        assert held.held == len(large)
    async with holding(held, FakeStream(body=bytes(6 * CHUNK), peer_id=OWN)):
        pass
    assert held.held == 0


async def test_only_the_nodes_own_key_may_go_first(served: Served) -> None:
    asked: list[int] = []
    slot = served.model.gate.slot

    def spy(peer: bytes, *, cost: float, priority: int, deadline: float | None) -> Any:
        asked.append(priority)
        return slot(peer, cost=cost, priority=priority, deadline=deadline)

    served.model.gate.slot = spy  # type: ignore[method-assign]
    for peer in (PEER, OWN):
        for priority in (-9, 0, 9):
            meta = {"path": "/completion", "model": "m", "priority": priority}
            with pytest.raises(Overloaded):
                await served.handle(FakeStream("infer", meta, peer_id=peer))
    assert asked == [-1, 0, 0, -1, 0, 1]


@pytest.mark.parametrize(
    "meta", [{}, {"model": 5}, {"model": ""}, {"model": "x" * 256}, {"model": "m", "want": "9"}]
)
async def test_find_needs_a_name_and_a_number(served: Served, meta: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="find needs"):
        await served.handle(FakeStream("find", meta))
    assert served.dht.asked == []


async def test_find_bounds_what_is_wanted(served: Served) -> None:
    for want in (-5, 0, 1, 10**9):
        stream = await served.handle(FakeStream("find", {"model": "m", "want": want}))
        assert stream.trailer == {"records": []}
    assert [want for _, want in served.dht.asked] == [1, 1, 1, module.MAX_WANT]


async def test_unknown_methods_are_refused(served: Served) -> None:
    with pytest.raises(BadRequest, match="no method"):
        await served.handle(FakeStream("delete everything"))


async def test_who_the_peers_are_is_told_to_the_nodes_own_key_alone(served: Served) -> None:
    assert "contacts" not in ((await served.handle(FakeStream("status"))).trailer or {})
    assert "contacts" in ((await served.handle(FakeStream("status", peer_id=OWN))).trailer or {})


@pytest.mark.parametrize("method", ["load", "unload"])
async def test_models_are_managed_by_the_nodes_own_key_alone(served: Served, method: str) -> None:
    with pytest.raises(Unauthorized):
        await served.handle(FakeStream(method, {"model": "m"}))
    with pytest.raises(ModelNotFound):
        await served.handle(FakeStream(method, {"model": ["m"]}, peer_id=OWN))


async def test_a_peer_has_so_many_requests_per_minute() -> None:
    served = make(PeerSettings(requests_per_minute=2))
    for _ in range(2):
        with pytest.raises(Overloaded, match="starting"):
            await served.ask()
    with pytest.raises(Overloaded, match="limit of requests") as refused:
        await served.ask()
    assert refused.value.retry_after == pytest.approx(30, abs=1), "one of two per minute"
    other = FakeStream("infer", {"path": "/completion", "model": "m"}, peer_id=NodeId(b"q" * 32))
    with pytest.raises(Overloaded, match="starting"):
        await served.handle(other)
    for _ in range(5):
        with pytest.raises(Overloaded, match="starting"):
            await served.handle(FakeStream("infer", {"path": "/completion", "model": "m"}, peer_id=OWN))


async def test_a_peer_has_so_many_tokens_per_minute() -> None:
    served = make(PeerSettings(tokens_per_minute=600))
    with pytest.raises(Overloaded, match="starting"):
        await served.ask(b'{"n_predict": 500}')
    with pytest.raises(Overloaded, match="limit of requests") as refused:
        await served.ask(b'{"n_predict": 200}')
    assert refused.value.retry_after == pytest.approx(11, abs=1), "105 tokens too many at 10 per second"


@pytest.mark.parametrize(
    ("facts", "tokens"),
    [
        ({}, 99),
        ({"usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}}, 12),
        ({"usage": {"input_tokens": 5, "output_tokens": 7}}, 12),
        ({"timings": {"prompt_n": 1, "cache_n": 4, "predicted_n": 7, "prompt_ms": 3.0}}, 12),
        ({"usage": {"prompt_tokens": "5"}, "timings": {"predicted_n": 3}}, 99),
    ],
)
def test_what_a_request_used_is_read_from_its_end(facts: dict[str, Any], tokens: float) -> None:
    used = Used(99)
    used.learn(facts)
    assert used.tokens == tokens
