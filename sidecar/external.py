"""A server that somebody else runs: any OpenAI-compatible URL (vLLM, mlx_lm.server, Ollama …).

We only watch it. It is healthy when /health says 200, or, where it has no /health, when /v1/models does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from sidecar.changes import Change, Changes
from sidecar.client import SidecarClient
from sidecar.config import SidecarConfig
from sidecar.errors import SidecarError, SidecarTimeout, SidecarUnresponsive
from sidecar.probe import Info
from sidecar.states import SERVING, State

log = logging.getLogger("qmesh.sidecar")

POLL = 5.0
POLL_WHILE_DOWN = 1.0
TIMEOUT = 5.0
GIVE_UP_AFTER = 3
"""Silent polls in a row after which it counts as failed; it is still polled."""
DEFAULT_SLOTS = 4


class ExternalBackend:
    """Watches one URL. Has the members of `Supervisor` that concern health; there is no process.

    `loading` means not reached yet, `degraded` that the last poll failed, `failed` that several did.
    """

    def __init__(
        self, config: SidecarConfig, *, poll: float = POLL, poll_while_down: float = POLL_WHILE_DOWN
    ) -> None:
        if config.backend_url is None:
            raise ValueError("an external backend needs `backend_url`")
        self.config = config
        self.last_error: SidecarError | None = None
        self.info: Info | None = None
        self._poll, self._poll_while_down = poll, poll_while_down
        self._state = State.STOPPED
        self._changes, self._changed = Changes(), asyncio.Event()
        key = config.backend_key.get_secret_value() if config.backend_key else None
        self._client = SidecarClient(config.backend_url.rstrip("/").removesuffix("/v1"), key)
        self._watcher: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        """The state as far as it can be seen from outside."""
        return self._state

    @property
    def client(self) -> SidecarClient | None:
        """The client while the server answers, else None."""
        return self._client if self._state in SERVING else None

    @property
    def pid(self) -> int | None:
        """It is no process of ours."""
        return None

    @property
    def restarts(self) -> int:
        """It is not ours to restart."""
        return 0

    @property
    def memory(self) -> int:
        """It takes none of ours."""
        return 0

    def subscribe(self, callback: Callable[[Change], None]) -> Callable[[], None]:
        """Call `callback` on every change of state; returns the way to unsubscribe."""
        return self._changes.subscribe(callback)

    async def __aenter__(self) -> Self:
        self._set(State.LOADING)
        self._watcher = asyncio.create_task(self._watch(), name=f"backend {self.config.name}")
        self._watcher.add_done_callback(lambda _: self._changed.set())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        watcher, self._watcher = self._watcher, None
        if watcher:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
        await self.stop()

    async def ensure_ready(self, timeout: float | None = None) -> SidecarClient:
        """Wait until the server answers. Raises SidecarUnresponsive once several polls failed,
        SidecarTimeout after `timeout` seconds.
        """
        try:
            async with asyncio.timeout(timeout):
                while self._state is State.LOADING and self._watcher and not self._watcher.done():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise SidecarTimeout(f"{self.config.name} did not answer within {timeout} s") from None
        if self._watcher and self._watcher.done():
            self._watcher.result()  # a bug surfaces here
        if client := self.client:
            return client
        raise (self.last_error or SidecarUnresponsive(f"{self.config.name} is not watched")).copy()

    async def stop(self) -> None:
        """Close our connections; the server itself is not ours to end. Idempotent."""
        await self._client.aclose()
        self._set(State.STOPPED)

    async def _watch(self) -> None:
        failures = 0
        while True:
            try:
                models = await self._ask()
            except SidecarError as error:
                failures += 1
                self._fail(failures, error)
            else:
                failures, self.last_error = 0, None
                self.info = self.info or await self._introduce(models)
                self._set(State.READY)
            await asyncio.sleep(self._poll if self._state is State.READY else self._poll_while_down)

    async def _ask(self) -> list[dict[str, Any]] | None:
        """The models where they had to be asked for, else None. Raises SidecarError when unhealthy."""
        async with await self._client.request("GET", "/health", timeout=TIMEOUT) as answer:
            if answer.status == 200:
                return None
            if answer.status not in (401, 403, 404, 405, 501):
                raise SidecarUnresponsive(f"/health says {answer.status}")
        return await self._client.models(timeout=TIMEOUT)

    def _fail(self, failures: int, error: SidecarError) -> None:
        text = f"{self.config.name}: no answer from {self._client.base_url}: {error.message}"
        self.last_error = SidecarUnresponsive(text)
        if failures >= GIVE_UP_AFTER:
            self.info = None  # another server may answer there next time
            self._set(State.FAILED)
        elif self._state is State.READY:
            self._set(State.DEGRADED)

    async def _introduce(self, models: list[dict[str, Any]] | None) -> Info:
        """What the server says of itself, as far as its kind says anything."""
        props: dict[str, Any] = {}
        with contextlib.suppress(SidecarError):
            props = await self._client.props(timeout=TIMEOUT)
        if models is None:
            models = []
            with contextlib.suppress(SidecarError):
                models = await self._client.models(timeout=TIMEOUT)
        first = models[0] if models else {}
        settings = props.get("default_generation_settings") or {}
        meta = first.get("meta") or {}
        context = settings.get("n_ctx") or first.get("max_model_len") or meta.get("n_ctx") or 0
        return Info(
            model=self.config.alias or str(first.get("id") or self.config.name),
            context=int(self.config.context or context),
            slots=int(self.config.slots or props.get("total_slots") or DEFAULT_SLOTS),
            build=str(props.get("build_info") or first.get("owned_by") or ""),
            chat_template=str(props.get("chat_template") or ""),
        )

    def _set(self, state: State) -> None:
        if state is not self._state:
            self._state = state
            log.info("%s: %s", self.config.name, state.value)
            self._changes.publish(Change(state, self.last_error))
        self._changed.set()
