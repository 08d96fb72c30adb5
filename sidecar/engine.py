"""The local API: one model on this machine, without a mesh.

::

    async with InferenceEngine("model.gguf") as engine:
        async for text in engine.generate_stream("Once upon a time", max_tokens=64):
            print(text, end="")
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sidecar.client import SidecarClient
from sidecar.config import SidecarConfig
from sidecar.errors import ContextExceeded, SidecarStopped
from sidecar.process import Info, Supervisor
from sidecar.runtime import Server, find_server

DEMO_MODEL = Path(__file__).parent / "assets" / "qmesh-demo.gguf"
LOAD_TIMEOUT = 600.0
DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer. `tokens` and `prompt_tokens` are counts; `stop` is `eos`, `limit` or `word`."""

    text: str
    tokens: int
    prompt_tokens: int
    stop: str
    timings: Mapping[str, float]


@dataclass(slots=True)
class Conversation:
    """The turns of a chat, oldest first; `system` stays when old turns are dropped."""

    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def messages(self, since: int, question: str) -> list[dict[str, str]]:
        """What is sent to the model: the system prompt, the turns from `since` on, the question."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self.turns[since:], {"role": "user", "content": question}]


class InferenceEngine:
    """A model behind a supervised llama.cpp server that restarts by itself.

    Without `model` it runs the demo model. `settings` are those of `SidecarConfig`: context, slots,
    gpu_layers, threads, mode, extra_args, server. The server starts on first use, or on entering the
    context. Every method raises SidecarError; which one is in the docs of `Supervisor.ensure_ready` and
    `SidecarClient`.
    """

    def __init__(self, model: Path | str | None = None, **settings: Any) -> None:
        values = {"log_dir": Path(tempfile.gettempdir()), **settings, "model": Path(model or DEMO_MODEL)}
        self.config = SidecarConfig.model_validate(values)
        self._own_folder = "log_dir" not in settings
        self.conversation = Conversation()
        self._supervisors: dict[bool, Supervisor] = {}
        self._starting = asyncio.Lock()
        self._server: Server | None = None
        self._folder: Path | None = None
        self._disposed = False

    async def __aenter__(self) -> Self:
        try:
            await self._client()
        except BaseException:
            await self.dispose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.dispose()

    async def dispose(self) -> None:
        """Stop the server and delete its logs (unless `log_dir` was given); idempotent.

        Open streams raise SidecarStopped.
        """
        self._disposed = True
        async with contextlib.AsyncExitStack() as stack:
            if self._folder:
                stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
            while self._supervisors:
                stack.push_async_exit(self._supervisors.popitem()[1])

    @property
    def info(self) -> Info | None:
        """What the running server says of itself."""
        supervisor = self._supervisors.get(False)
        return supervisor.info if supervisor else None

    async def generate(
        self, prompt: str, *, max_tokens: int = DEFAULT_MAX_TOKENS, **options: Any
    ) -> Generation:
        """Continue `prompt`. `options` are those of llama-server's /completion: temperature, seed, stop …"""
        client = await self._client()
        answer = await client.completion({**options, "prompt": prompt, "n_predict": max_tokens})
        return Generation(
            text=answer["content"],
            tokens=answer["tokens_predicted"],
            prompt_tokens=answer["tokens_evaluated"],
            stop=answer.get("stop_type", ""),
            timings=answer.get("timings", {}),
        )

    async def generate_stream(
        self, prompt: str, *, max_tokens: int = DEFAULT_MAX_TOKENS, **options: Any
    ) -> AsyncGenerator[str, None]:
        """As `generate`, piece by piece. Leaving the loop frees the slot at once."""
        client = await self._client()
        body = {**options, "prompt": prompt, "n_predict": max_tokens}
        async with contextlib.aclosing(client.stream_completion(body)) as events:
            async for event in events:
                if event["content"]:
                    yield event["content"]

    async def chat_stream(
        self,
        message: str,
        *,
        conversation: Conversation | None = None,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        **options: Any,
    ) -> AsyncGenerator[str, None]:
        """Say something and stream the answer; both are added to the conversation.

        Without `conversation` the engine's own goes on. The oldest turns are dropped when the context
        would overflow; ContextExceeded when `message` and `max_tokens` alone do not fit. An answer that
        is left early stays in the history as far as it came.
        """
        client = await self._client()
        talk = self.conversation if conversation is None else conversation
        since = await self._fitting(client, talk, message, max_tokens)
        body = {**options, "messages": talk.messages(since, message), "max_tokens": max_tokens}
        answer, ended = "", False
        try:
            async with contextlib.aclosing(client.stream_chat(body)) as events:
                async for event in events:
                    for choice in event["choices"]:
                        text = choice["delta"].get("content") or ""
                        if text:
                            answer += text
                            yield text
            ended = True
        finally:
            if answer or ended:
                del talk.turns[:since]
                talk.turns.append({"role": "user", "content": message})
                talk.turns.append({"role": "assistant", "content": answer})

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """One vector per text. A second server runs for it: llama-server either generates or embeds."""
        client = await self._client(embeddings=True)
        return await client.embeddings(texts)

    async def _fitting(self, client: SidecarClient, talk: Conversation, message: str, max_tokens: int) -> int:
        """From which turn on the conversation fits into the context, in whole exchanges."""
        context = int((await client.props())["default_generation_settings"]["n_ctx"])
        tokens = 0
        for since in range(0, len(talk.turns) + 1, 2):
            prompt = await client.apply_template(talk.messages(since, message))
            tokens = len(await client.tokenize(prompt, add_special=True))
            if tokens + max_tokens <= context:
                return since
        text = f"{tokens} prompt tokens and {max_tokens} to generate do not fit into {context}"
        error = ContextExceeded(text, status=400)
        error.prompt_tokens, error.context = tokens, context
        raise error

    async def _client(self, *, embeddings: bool = False) -> SidecarClient:
        async with self._starting:
            if self._disposed:
                raise SidecarStopped("the engine is disposed")
            supervisor = self._supervisors.get(embeddings)
            if supervisor is None:
                if self._server is None:
                    self._server = await asyncio.to_thread(find_server, self.config.server)
                if self._own_folder and self._folder is None:
                    self._folder = Path(tempfile.mkdtemp(prefix="qmesh-engine-"))
                config = self.config.model_copy(update={"log_dir": self._folder or self.config.log_dir})
                if embeddings:
                    alias = f"{config.name}-embeddings"
                    config = config.model_copy(update={"embeddings": True, "alias": alias})
                supervisor = await Supervisor(config, self._server).__aenter__()
                self._supervisors[embeddings] = supervisor
        return await supervisor.ensure_ready(LOAD_TIMEOUT)
