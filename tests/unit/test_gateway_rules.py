"""The gateway's rules: limits, keys, errors, origins, traces, settings, addresses, log lines."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from client_sdk import ModelInfo, RawAnswer, WorkerInfo
from mesh import errors as mesh
from node import logs
from node.gateway import waiting as waiting_module
from node.gateway.binding import bind, url
from node.gateway.catalogue import Catalogue, Remembered
from node.gateway.endpoints import BY_PATH, ENDPOINTS, Form
from node.gateway.errors import ApiError, api_error
from node.gateway.intake import Budget, fields
from node.gateway.keys import KeyFile, Keys
from node.gateway.limits import MINUTE, Allowance, Allowances, estimated_tokens
from node.gateway.openapi import description
from node.gateway.origins import Origins, names_this_machine
from node.gateway.settings import GatewaySettings
from node.gateway.trace import continue_trace, trace_id
from node.gateway.waiting import Waiting
from node.inference import COUNTING, GENERATING
from node.logs import ConsoleFormatter, JsonFormatter, log_file
from node.metrics import OTHER, Bounded
from tests.support import seconds

# ── limits ──────────────────────────────────────────────────────────────────────────────────────


@given(
    st.integers(1, 20),
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50), st.integers(0, 80)), max_size=60),
)
def test_no_key_gets_more_than_its_limits(requests: int, steps: list[tuple[float, int, int]]) -> None:
    tokens = 100
    allowance = Allowance(requests, tokens, 0.0)
    now = 0.0
    for taken, (pause, estimate, real) in enumerate(steps, 1):
        now += pause
        wait = allowance.take(estimate, now)
        if wait:
            assert allowance.take(estimate, now + wait * 0.99) > 0  # honest: not before that
            now += wait + 1e-6
            assert allowance.take(estimate, now) == 0
        allowance.settle(estimate, real, now)
        assert taken <= requests + now * requests / MINUTE + 0.01
        assert all(int(value.rstrip("s").partition(".")[0]) >= 0 for value in allowance.headers().values())


def test_a_key_without_limits_is_never_refused() -> None:
    allowance = Allowance(None, None, 0.0)
    assert not any(allowance.take(10_000, 0.0) for _ in range(100))
    assert allowance.headers() == {}


def test_limits_that_changed_begin_anew() -> None:
    allowances = Allowances()
    first = allowances.of("k", 1, None, 0.0)
    assert first.take(1, 0.0) == 0
    assert allowances.of("k", 1, None, 0.0) is first
    assert first.take(1, 0.0) == pytest.approx(60)
    assert allowances.of("k", 2, None, 0.0).take(1, 0.0) == 0


def test_a_request_larger_than_the_limit_takes_all_of_it() -> None:
    allowance = Allowance(None, 100, 0.0)
    assert allowance.take(5000, 0.0) == 0
    assert allowance.take(1, 0.0) > 0


def test_what_a_request_is_expected_to_take() -> None:
    assert estimated_tokens(400, {"max_tokens": 50}.get) == 150
    assert estimated_tokens(400, {"max_tokens": True, "n_predict": -1}.get) == 356


# ── keys ────────────────────────────────────────────────────────────────────────────────────────


def test_a_running_gateway_sees_keys_come_and_go(tmp_path: Path) -> None:
    file = KeyFile(tmp_path)
    keys = Keys(file, required=False, now=0.0)
    assert not keys.required(0.0)
    key, secret = file.add("one")
    assert keys.find(secret, 0.5) is None  # looked a moment ago
    assert keys.required(2.0)
    assert keys.find(secret, 2.0) == key
    assert keys.find(secret + "x", 2.0) is None
    assert secret not in file.path.read_text()
    file.revoke("one")
    assert keys.find(secret, 4.0) is None
    assert keys.required(4.0)  # revoking the last key opens nothing
    file.path.unlink()
    assert not keys.required(6.0)


def test_a_broken_key_file_locks_and_never_opens(tmp_path: Path) -> None:
    file = KeyFile(tmp_path)
    _, secret = file.add("one")
    keys = Keys(file, required=False, now=0.0)
    file.path.write_text("{")
    assert keys.required(2.0)
    assert keys.find(secret, 2.0) is not None  # the known ones stay in force
    with pytest.raises(mesh.ConfigurationError, match="cannot be read"):
        Keys(file, required=False, now=0.0)


@pytest.mark.parametrize("name", ["", " ", "x" * 65, "a\nb"])
def test_names_of_keys(tmp_path: Path, name: str) -> None:
    with pytest.raises(mesh.ConfigurationError):
        KeyFile(tmp_path).add(name)


# ── errors ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("error", "status", "openai", "anthropic"),
    [
        (mesh.BadRequest("x"), 400, "invalid_request_error", "invalid_request_error"),
        (mesh.ContextExceeded("x"), 400, "invalid_request_error", "invalid_request_error"),
        (mesh.Unauthorized("x"), 403, "permission_error", "permission_error"),
        (mesh.ModelNotFound("x"), 404, "invalid_request_error", "not_found_error"),
        (mesh.Overloaded("x", retry_after=2.2), 429, "rate_limit_error", "rate_limit_error"),
        (mesh.NoWorkers("x"), 503, "unavailable_error", "overloaded_error"),
        (mesh.ShuttingDown("x"), 503, "unavailable_error", "overloaded_error"),
        (mesh.ConnectFailed("x"), 503, "unavailable_error", "overloaded_error"),
        (mesh.DeadlineExceeded("x"), 504, "timeout_error", "timeout_error"),
        (mesh.BackendFailed("x"), 502, "server_error", "api_error"),
        (mesh.AllWorkersFailed("x", []), 502, "server_error", "api_error"),
        (mesh.StreamInterrupted("x", text="", tokens=0), 502, "server_error", "api_error"),
    ],
)
def test_errors_in_both_forms(error: mesh.QMeshError, status: int, openai: str, anthropic: str) -> None:
    answer = api_error(error)
    assert answer.status == status
    assert orjson.loads(answer.body(Form.OPENAI, "id"))["error"]["type"] == openai
    other = orjson.loads(answer.body(Form.ANTHROPIC, "id"))
    assert (other["type"], other["error"]["type"], other["request_id"]) == ("error", anthropic, "id")
    assert ("Retry-After" in answer.headers) == (status in (429, 503))


def test_errors_in_streams() -> None:
    error = api_error(mesh.Overloaded("busy", retry_after=2.2))
    assert error.headers["Retry-After"] == "3"
    assert error.event(Form.OPENAI, "id").startswith(b'data: {"error":')
    assert error.event(Form.ANTHROPIC, "id").startswith(b'event: error\ndata: {"type":"error"')
    assert error.event(Form.OPENAI, "id").endswith(b"\n\n")


@pytest.mark.parametrize("body", [b"", b"[]", b"1", b"{", b'{"a":}', b"\xff"])
def test_bodies_that_are_no_objects(body: bytes) -> None:
    with pytest.raises(ApiError) as refused:
        fields(body)
    assert refused.value.status == 400


def test_the_budget_is_for_all_together() -> None:
    budget = Budget(100)
    budget.take(60)
    with pytest.raises(ApiError) as refused:
        budget.take(60)
    assert refused.value.status == 503
    budget.give_back(60)
    budget.take(100)
    assert budget.held == 100


# ── origins, traces, settings ───────────────────────────────────────────────────────────────────


def test_pages_of_other_sites() -> None:
    origins = Origins(["https://chat.example"])
    assert origins.permits(None, "127.0.0.1:9471")
    assert origins.permits("http://127.0.0.1:9471", "127.0.0.1:9471")
    assert origins.permits("https://Chat.example", "127.0.0.1:9471")
    assert not origins.permits("https://evil.example", "127.0.0.1:9471")
    assert not origins.permits("null", "127.0.0.1:9471")
    assert not origins.permits("http://[", "127.0.0.1:9471")
    assert not Origins([]).permits("https://chat.example", "x")
    assert Origins([]).headers("https://chat.example") == {}
    assert Origins(["*"]).preflight("https://a", None)["Access-Control-Allow-Origin"] == "https://a"


@pytest.mark.parametrize(
    ("host", "ours"),
    [
        (None, True),
        ("localhost:9471", True),
        ("127.0.0.1", True),
        ("[::1]:9471", True),
        ("api.localhost", True),
        ("192.168.1.4:9471", False),
        ("evil.example", False),
        ("[::1", False),
    ],
)
def test_names_of_this_machine(host: str | None, ours: bool) -> None:
    assert names_this_machine(host) == ours


def test_traces_are_continued() -> None:
    given_trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    ours = continue_trace(given_trace)
    assert trace_id(ours) == trace_id(given_trace)
    assert ours[36:52] != given_trace[36:52]
    assert ours.endswith("-01")


@pytest.mark.parametrize(
    "header",
    [None, "", "x", "00-" + "0" * 32 + "-00f067aa0ba902b7-01", "ff-" + "1" * 32 + "-1111111111111111-01"],
)
def test_traces_begin_anew(header: str | None) -> None:
    ours = continue_trace(header)
    assert len(ours) == 55
    assert trace_id(ours).strip("0")
    assert trace_id(ours) not in (header or "")


def test_settings_that_make_no_sense() -> None:
    for wrong in ({"tls_key": "k"}, {"cors_origins": ["chat.example"]}, {"wait_seconds": -1}, {"unknown": 1}):
        with pytest.raises(ValidationError):
            GatewaySettings.model_validate(wrong)


# ── addresses ───────────────────────────────────────────────────────────────────────────────────


def test_the_next_port_only_where_none_was_named() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(mesh.ConfigurationError) as refused:
            bind(address, or_next=False, has_keys=False)
        assert refused.value.exit_code == 6
        with closing(bind(address, or_next=True, has_keys=False)) as other:
            assert other.getsockname()[1] > taken.getsockname()[1]
            assert url(other, tls=True).startswith("https://127.0.0.1:")


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"])
def test_nobody_else_without_a_key(address: str) -> None:
    with pytest.raises(mesh.ConfigurationError, match="keys add"):
        bind(address, or_next=False, has_keys=False)


def test_a_foreign_address() -> None:
    with pytest.raises(mesh.ConfigurationError) as refused:
        bind("192.0.2.1:0", or_next=True, has_keys=True)
    assert refused.value.exit_code == 6


# ── the table of endpoints ──────────────────────────────────────────────────────────────────────


def test_workers_know_every_endpoint() -> None:
    assert {endpoint.path for endpoint in ENDPOINTS} == GENERATING | COUNTING
    assert len(BY_PATH) == sum(1 + len(endpoint.other_paths) for endpoint in ENDPOINTS)
    assert set(description()["paths"]) >= {endpoint.path for endpoint in ENDPOINTS}


def test_labels_are_bounded() -> None:
    label = Bounded(2)
    assert [label(value) for value in ("a", "b", "c", "a")] == ["a", "b", OTHER, "a"]


# ── models and waiting ──────────────────────────────────────────────────────────────────────────


class StubMesh:
    """Tells of models and workers as the test wants it."""

    def __init__(self, models: dict[str, int] | None) -> None:
        self.counts = models
        self.asked = 0

    async def models(self) -> list[ModelInfo]:
        self.asked += 1
        if self.counts is None:
            raise mesh.ConnectFailed("nobody is there")
        return [ModelInfo(name, workers) for name, workers in self.counts.items()]

    async def workers(self, model: str | None = None) -> list[WorkerInfo]:
        self.asked += 1
        if not (self.counts or {}).get(str(model)):
            raise mesh.NoWorkers("none")
        worker = dict.fromkeys(WorkerInfo.__dataclass_fields__, 0) | {"model": model, "banned": False}
        return [WorkerInfo(**worker)]  # type: ignore[arg-type]

    @asynccontextmanager
    async def request(self, path: str, body: bytes, **options: Any) -> AsyncIterator[RawAnswer]:
        raise AssertionError(f"{path} is not asked for here: {body!r} {options}")
        yield


def catalogue(
    models: dict[str, int] | None, local: dict[str, str] | None = None, **settings: Any
) -> tuple[StubMesh, Catalogue]:
    stub = StubMesh(models)
    return stub, Catalogue(stub, GatewaySettings.model_validate(settings), lambda: local or {})


async def test_which_model_a_request_means() -> None:
    _, names = catalogue({"big": 3, "small": 1}, aliases={"gpt-4o": "small"})
    assert await names.resolve("gpt-4o") == "small"
    assert await names.resolve("other") == "other"
    assert await names.resolve(None) == await names.resolve("") == await names.resolve("default") == "big"
    assert await catalogue({"big": 3}, default_model="mine")[1].resolve(None) == "mine"
    assert await catalogue(None)[1].resolve(None) is None
    assert await catalogue(None, {"own": "loading"})[1].resolve(None) == "own"
    assert await catalogue({"a": 1, "own": 1}, {"own": "ready"})[1].resolve(None) == "own"


async def test_which_models_are_worth_waiting_for() -> None:
    _, names = catalogue({"there": 1})
    assert await names.expects("there")
    assert not await names.expects("never")
    names.saw("gone")
    assert await names.expects("gone")
    assert await catalogue({}, {"own": "loading"})[1].expects("own")
    assert not await catalogue({}, {"own": "loading"})[1].expects("other")
    assert await catalogue({})[1].expects("any")
    assert await catalogue(None)[1].expects("any")


async def test_many_wait_with_one_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting_module, "POLL", 0.05)
    stub, names = catalogue({})
    waiting = Waiting(stub, names, 5.0)
    reason = mesh.NoWorkers("none yet")
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(seconds(5)), asyncio.TaskGroup() as group:
        for _ in range(100):
            group.create_task(waiting.for_worker("model", loop.time() + 5, reason))
        await asyncio.sleep(0.3)
        assert waiting.count == 100
        assert stub.asked < 30
        stub.counts = {"model": 1}
    assert waiting.count == 0


async def test_waiting_has_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting_module, "POLL", 0.01)
    stub, names = catalogue(None)
    reason = mesh.ConnectFailed("nobody is there")
    now = asyncio.get_running_loop().time()
    with pytest.raises(ApiError) as late:
        await Waiting(stub, names, 0.05).for_worker("model", now + 0.05, reason)
    assert late.value.status == 503
    assert late.value.details["mesh"]["reachable"] is False
    assert "nobody is there" in late.value.message
    stopped = Waiting(stub, names, 60.0)
    stopped.close()
    with pytest.raises(ApiError, match="stopping"):
        await stopped.for_worker("model", now + 60, reason)
    monkeypatch.setattr(waiting_module, "MOST_WAITING", 0)
    with pytest.raises(ApiError, match="too many"):
        await Waiting(stub, names, 5).for_worker("model", now + 5, reason)
    with pytest.raises(ApiError) as unknown:
        await Waiting(*catalogue({"a": 1}), 5).for_worker("b", now + 5, reason)
    assert unknown.value.status == 404


async def test_a_cancelled_question_does_not_stop_the_others() -> None:
    asked: list[int] = []
    gate = asyncio.Event()

    async def ask() -> int:
        asked.append(1)
        await gate.wait()
        return len(asked)

    value = Remembered(ask, 60.0)
    first, second = asyncio.create_task(value.get()), asyncio.create_task(value.get())
    await asyncio.sleep(0)
    first.cancel()
    gate.set()
    assert await second == 2
    assert await value.get() == 2


# ── logs ────────────────────────────────────────────────────────────────────────────────────────


def test_log_lines(tmp_path: Path) -> None:
    record = logging.LogRecord("qmesh.x", logging.INFO, "f", 1, "served %s", ("it",), None)
    record.facts = {"status": 200, "key": None}
    line = json.loads(JsonFormatter().format(record))
    assert (line["message"], line["status"], line["level"]) == ("served it", 200, "info")
    assert ConsoleFormatter().format(record).endswith("qmesh.x: served it status=200")
    with log_file(tmp_path, "x.log"):
        logging.getLogger("qmesh.test").error("odd", extra={"facts": {"path": os.sep, "text": "\ud800"}})
    (written,) = (tmp_path / "logs" / "x.log").read_text("utf-8").splitlines()
    assert json.loads(written)["path"] == os.sep


def test_log_files_are_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "FILE_BYTES", 2000)
    with log_file(tmp_path, "x.log"):
        for number in range(100):
            logging.getLogger("qmesh.test").error("line %d", number)
    files = sorted((tmp_path / "logs").iterdir())
    assert [path.name for path in files] == ["x.log", *(f"x.log.{n}" for n in range(1, logs.FILES + 1))]
    assert all(path.stat().st_size < 2200 for path in files)
    lines = [
        json.loads(line)["message"] for path in reversed(files[1:]) for line in path.read_text().splitlines()
    ]
    assert lines == [f"line {n}" for n in range(int(lines[0][5:]), int(lines[0][5:]) + len(lines))]
