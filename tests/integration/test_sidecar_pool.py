"""Several models in one node, and servers that somebody else runs. The fake stands for the models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from sidecar.changes import Backend
from sidecar.config import SidecarConfig
from sidecar.errors import (
    ModelLoadFailed,
    SidecarError,
    SidecarStopped,
    SidecarTimeout,
    SidecarUnresponsive,
    UnknownModel,
)
from sidecar.external import ExternalBackend
from sidecar.modes import Mode
from sidecar.pool import ModelEntry, ModelPool, memory_limit
from sidecar.process import State, Supervisor
from tests.sidecar_support import QUICK, QUICK_PROBES, Watcher, alive, config, fake_server, real_server, until
from tests.support import seconds

GENERATE = {"prompt": "x", "n_predict": 2}
EVERYTHING = 1 << 40


def make(settings: SidecarConfig) -> Backend:
    if settings.backend_url:
        return ExternalBackend(settings, poll=0.05, poll_while_down=0.05)
    return Supervisor(settings, fake_server(), policy=QUICK, probing=QUICK_PROBES)


def entry(
    tmp_path: Path, name: str, *faults: str, ttl: float | None = None, autostart: bool = False
) -> ModelEntry:
    return ModelEntry(config(tmp_path, *faults, alias=name), ttl=ttl, autostart=autostart)


def pool_of(*entries: ModelEntry, limit: int = EVERYTHING) -> ModelPool:
    return ModelPool(entries, None, limit, make=make)


def loaded(pool: ModelPool) -> set[str]:
    return {status.name for status in pool.ps() if status.state in (State.READY, State.DEGRADED)}


async def one_model(tmp_path: Path) -> int:
    """The memory estimate of one of the test's models."""
    async with make(config(tmp_path)) as backend:
        return backend.memory


async def test_models_load_on_request_and_leave_nothing(tmp_path: Path) -> None:
    async with pool_of(entry(tmp_path, "a"), entry(tmp_path, "b")) as pool:
        assert pool.names == ["a", "b"]
        assert loaded(pool) == set()
        async with pool.use("a", seconds(10)) as client:
            assert (await client.completion(GENERATE))["content"] == " t0 t1"
            (a, b) = pool.ps()
            assert (a.users, b.users) == (1, 0)
            assert a.memory > 64 << 20
            assert a.pid
        async with pool.use("b", seconds(10)):
            assert loaded(pool) == {"a", "b"}
        pids = [status.pid for status in pool.ps() if status.pid]
    assert len(pids) == 2
    assert not any(map(alive, pids))
    with pytest.raises(SidecarStopped):
        await pool.load("a")


async def test_an_unknown_model_names_the_known_ones(tmp_path: Path) -> None:
    async with pool_of(entry(tmp_path, "a"), entry(tmp_path, "b")) as pool:
        with pytest.raises(UnknownModel, match="a, b"):
            await pool.load("c")


async def test_the_least_recently_used_gives_way(tmp_path: Path) -> None:
    limit = int(2.5 * await one_model(tmp_path))
    async with pool_of(*(entry(tmp_path, name) for name in "abc"), limit=limit) as pool:
        for name in "aba":
            await pool.load(name, seconds(10))
        await pool.load("c", seconds(10))
        assert loaded(pool) == {"a", "c"}
        await pool.load("b", seconds(10))
        assert loaded(pool) == {"c", "b"}


async def test_a_model_in_use_is_waited_for_and_takes_no_new_request_meanwhile(tmp_path: Path) -> None:
    limit = int(1.5 * await one_model(tmp_path))
    async with pool_of(entry(tmp_path, "a"), entry(tmp_path, "b"), limit=limit) as pool:
        order = []

        async def request(name: str) -> None:
            async with pool.use(name, seconds(10)):
                order.append(name)

        async with pool.use("a", seconds(10)) as client:
            other = asyncio.create_task(request("b"))
            await asyncio.sleep(0.05)
            late = asyncio.create_task(request("a"))
            await asyncio.sleep(0.05)
            assert order == []
            assert (await client.completion(GENERATE))["content"]  # it was not taken away
        await asyncio.gather(other, late)
        assert order == ["b", "a"]


async def test_waiting_for_room_ends_at_the_deadline_and_changes_nothing(tmp_path: Path) -> None:
    limit = int(1.5 * await one_model(tmp_path))
    async with pool_of(entry(tmp_path, "a"), entry(tmp_path, "b"), limit=limit) as pool:
        async with pool.use("a", seconds(10)) as client:
            with pytest.raises(SidecarTimeout, match="b was not ready"):
                await pool.load("b", 0.1)
            await pool.load("a", seconds(1))  # it takes requests again
            assert (await client.completion(GENERATE))["content"]
        await pool.load("b", seconds(10))


async def test_closing_the_pool_ends_every_wait_and_leaves_nothing(tmp_path: Path) -> None:
    limit = int(1.5 * await one_model(tmp_path))
    slow = entry(tmp_path, "slow", "--load-seconds", "60")
    pids: list[int | None] = []

    async def request(pool: ModelPool, name: str) -> None:
        async with pool.use(name):
            raise AssertionError("nothing can be used")

    async with pool_of(entry(tmp_path, "a"), slow, entry(tmp_path, "b"), limit=limit) as pool:
        await pool.load("a", seconds(10))
        waits = [asyncio.create_task(request(pool, name)) for name in ("slow", "b", "slow")]
        backend = None
        await until(lambda: pool.backend("slow") is not None)
        backend = pool.backend("slow")
        assert backend
        await until(lambda: backend.pid is not None)
        pids = [status.pid for status in pool.ps()]
    results = await asyncio.gather(*waits, return_exceptions=True)
    assert [type(result) for result in results] == [SidecarStopped] * 3
    assert not any(alive(pid) for pid in pids if pid)


async def test_a_model_over_the_limit_is_loaded_alone(tmp_path: Path) -> None:
    async with pool_of(entry(tmp_path, "a"), entry(tmp_path, "b"), limit=1) as pool:
        await pool.load("a", seconds(10))
        await pool.load("b", seconds(10))
        assert loaded(pool) == {"b"}


async def test_ttl_autostart_and_unload(tmp_path: Path) -> None:
    async with pool_of(entry(tmp_path, "a", ttl=0.3, autostart=True), entry(tmp_path, "b")) as pool:
        await pool.load("a", seconds(10))  # waits for the autostart
        backend = pool.backend("a")
        assert isinstance(backend, Supervisor)
        watcher = Watcher(backend)
        await until(lambda: pool.ps()[0].expires_in is not None)
        assert (pool.ps()[0].expires_in or 9) <= 0.3
        async with pool.use("a"):
            await asyncio.sleep(0.4)
            assert loaded(pool) == {"a"}, "a model in use does not expire"
        await watcher.state(State.STOPPED)
        await pool.load("b", seconds(10))
        await pool.unload("b", seconds(10))
        assert loaded(pool) == set()
        async with pool.use("b", seconds(10)):
            with pytest.raises(SidecarTimeout, match="still in use"):
                await pool.unload("b", 0.05)


async def test_one_broken_model_does_not_hurt_another(tmp_path: Path) -> None:
    missing = ModelEntry(config(tmp_path, model=tmp_path / "none.gguf", alias="missing"), autostart=True)
    refused = entry(tmp_path, "refused", "--die-while-loading", "1")
    async with pool_of(missing, refused, entry(tmp_path, "good")) as pool:
        for name in ("missing", "refused", "refused"):
            with pytest.raises(ModelLoadFailed):
                await pool.load(name, seconds(10))
        assert isinstance(pool.ps()[1].error, ModelLoadFailed)
        await pool.load("good", seconds(10))


async def test_many_requests_for_more_models_than_fit_are_all_answered(tmp_path: Path) -> None:
    limit = int(2.5 * await one_model(tmp_path))
    names = "abc"
    async with pool_of(*(entry(tmp_path, name) for name in names), limit=limit) as pool:

        async def request(i: int) -> str:
            async with pool.use(names[i % 3], seconds(30)) as client:
                assert len(loaded(pool)) <= 2
                return str((await client.completion(GENERATE))["content"])

        assert await asyncio.gather(*map(request, range(18))) == [" t0 t1"] * 18
        assert all(status.users == 0 for status in pool.ps())


async def test_two_real_models(tmp_path: Path) -> None:
    entries = [ModelEntry(config(tmp_path, alias=name)) for name in ("one", "two")]
    async with ModelPool(entries, real_server(), EVERYTHING) as pool:
        for name in ("one", "two"):
            async with pool.use(name, seconds(20)) as client:
                assert (await client.models())[0]["id"] == name


def test_the_memory_limit_follows_the_mode() -> None:
    assert (
        memory_limit(Mode.EFFICIENCY, 100)
        < memory_limit(Mode.BALANCED, 100)
        < memory_limit(Mode.PERFORMANCE, 100)
    )


# ── external backends ───────────────────────────────────────────────────────────────────────────


class Foreign:
    """An OpenAI-compatible server of another kind."""

    def __init__(self) -> None:
        self.health = web.Response(status=404)
        self.up = True

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield site.name
        finally:
            await runner.cleanup()

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response(status=self.health.status)

    async def _models(self, request: web.Request) -> web.Response:
        if not self.up:
            return web.Response(status=500)
        assert request.headers["Authorization"] == "Bearer theirs"
        return web.json_response({"data": [{"id": "llama-70b", "max_model_len": 8192, "owned_by": "vllm"}]})


def external(tmp_path: Path, url: str, **settings: object) -> SidecarConfig:
    values = {"backend_url": url, "backend_key": "theirs", "log_dir": tmp_path}
    return SidecarConfig.model_validate(values | settings)


@pytest.mark.parametrize("health", [404, 200], ids=["by its models", "by /health"])
async def test_an_external_backend_is_watched(tmp_path: Path, health: int) -> None:
    foreign = Foreign()
    foreign.health = web.Response(status=health)
    async with (
        foreign.running() as url,
        ExternalBackend(external(tmp_path, f"{url}/v1"), poll=0.02) as backend,
    ):
        client = await backend.ensure_ready(seconds(5))
        assert client.base_url == url
        assert backend.info is not None
        assert (backend.info.model, backend.info.context, backend.info.build) == ("llama-70b", 8192, "vllm")
        changes = Watcher(backend)
        foreign.health, foreign.up = web.Response(status=503 if health == 200 else 404), False
        await changes.state(State.DEGRADED)


async def test_an_external_backend_that_is_down_fails_and_comes_back(tmp_path: Path) -> None:
    foreign = Foreign()
    async with foreign.running() as url:
        foreign.up = False
        async with ExternalBackend(external(tmp_path, url), poll=0.02, poll_while_down=0.02) as backend:
            with pytest.raises(SidecarUnresponsive, match="no answer from"):
                await backend.ensure_ready(seconds(5))
            assert backend.state is State.FAILED
            assert backend.client is None
            changes = Watcher(backend)
            foreign.up = True
            await changes.state(State.READY)
            assert await backend.ensure_ready() is backend.client
            assert backend.last_error is None


async def test_an_unreachable_backend_is_a_clear_error(tmp_path: Path) -> None:
    config = external(tmp_path, "http://127.0.0.1:9")
    async with ExternalBackend(config, poll_while_down=0.5) as backend:
        with pytest.raises(SidecarTimeout):
            await backend.ensure_ready(0.05)


async def test_a_pool_of_both_kinds(tmp_path: Path) -> None:
    foreign = Foreign()
    async with foreign.running() as url:
        theirs = ModelEntry(external(tmp_path, url, alias="theirs"), ttl=0.01, autostart=True)
        async with pool_of(entry(tmp_path, "ours"), theirs, limit=1) as pool:
            async with pool.use("theirs", seconds(5)) as client:
                assert (await client.models())[0]["id"] == "llama-70b"
            await pool.load("ours", seconds(10))
            assert loaded(pool) == {"ours", "theirs"}, "it takes no memory here and never expires"
            with pytest.raises(SidecarError, match="not ours"):
                await pool.unload("theirs")


async def test_a_real_llama_server_as_external_backend(tmp_path: Path) -> None:
    async with Supervisor(config(tmp_path), real_server()) as server:
        client = await server.ensure_ready(seconds(20))
        settings = external(tmp_path, client.base_url, backend_key=client.api_key)
        async with ExternalBackend(settings) as backend:
            seen = await backend.ensure_ready(seconds(5))
            assert (await seen.completion(GENERATE))["content"]
            assert backend.info is not None
            assert (backend.info.model, backend.info.slots) == ("qmesh-demo", 2)
