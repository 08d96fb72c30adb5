"""The asynchronous client of a mesh."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

from client_sdk.call import Request
from client_sdk.chat_journal import ChatJournal
from client_sdk.conversation import Conversation
from client_sdk.directory import Directory, EntryNode
from client_sdk.dispatch import Dispatcher, refusal
from client_sdk.events import decode_object
from client_sdk.failover import Journal
from client_sdk.generate import TokenStream
from client_sdk.passthrough import Passthrough
from client_sdk.pool import Pool
from client_sdk.raw import RawAnswer
from client_sdk.selection import Need
from client_sdk.text_journal import TextJournal
from client_sdk.types import Completion, Explanation, ModelInfo, RouteEvent, Timeouts, WorkerInfo
from mesh.entry import parse_entry
from mesh.errors import BadRequest, MalformedMessage
from mesh.identity import Identity
from mesh.join import Invitation
from mesh.network import OPEN_NETWORK, Network
from mesh.transport import Connection

Message = Mapping[str, Any]

CHARACTERS_PER_TOKEN = 4
DEFAULT_ANSWER = 256
HTTP_OK = 200
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict")


class MeshClient:
    """A client of the mesh that `join` leads to; an asynchronous context manager.

    `join` is one entry node or several, each as `HOST:PORT`, `ID@HOST:PORT` or a join token. A token
    brings the network along (that of a private one is redeemed with the first request, so it must still be
    good then; keep `network` for later); otherwise `network` names it (default: the open one).
    Without an `identity` the client makes one for itself. `on_event` is called, in the client's own event
    loop, for every retry, hedge and splice; it must not block or raise. `own_node` is for a client inside
    a node and with its identity: it connects the two without a socket (`Listener.connect_within`).

    Raises ConfigurationError for an entry that cannot be read. Nothing is connected before the first
    request. ::

        async with MeshClient(join="127.0.0.1:9470") as mesh:
            async for token in mesh.generate_stream("Why is the sky blue?", max_tokens=64):
                print(token.text, end="")
    """

    def __init__(
        self,
        join: str | Sequence[str],
        *,
        network: str | Network = OPEN_NETWORK,
        identity: Identity | None = None,
        timeouts: Timeouts = Timeouts(),  # noqa: B008 - frozen
        on_event: Callable[[RouteEvent], None] | None = None,
        own_node: Callable[[], Connection] | None = None,
    ) -> None:
        self.timeouts = timeouts
        known, invitation, ways = _resolve([join] if isinstance(join, str) else list(join), network)
        self.identity = identity or Identity()
        self._pool = Pool(
            self.identity, known, connect_timeout=timeouts.connect, own_node=own_node, invitation=invitation
        )
        self._directory = Directory(self._pool, ways, timeout=timeouts.find)
        self._rng = random.Random()  # noqa: S311 - nothing here is a secret
        self._dispatcher = Dispatcher(self._pool, self._directory, timeouts, self._rng, on_event=on_event)

    @property
    def network(self) -> Network:
        """The mesh: its name, and once a private one was entered with a token, its secret too."""
        return self._pool.network

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection; running answers end with ConnectionClosed. Idempotent."""
        await self._dispatcher.close()
        await self._directory.close()
        await self._pool.close()

    def generate_stream(
        self,
        prompt: str,
        *,
        model: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        priority: int = 0,
        **options: Any,
    ) -> TokenStream:
        """Continue a text, token by token.

        `model` defaults to the one that most workers have. `options` go to llama-server's
        `/completion` as they are (`top_p`, `json_schema`, `grammar` …).
        """
        body = _without_none(
            {"n_predict": max_tokens, "temperature": temperature, "seed": seed, "stop": stop, **options}
        )
        return self._stream(TextJournal(prompt, body), len(prompt), model, max_tokens, priority)

    async def generate(self, prompt: str, **options: Any) -> Completion:
        """As `generate_stream`, but waits for the whole answer."""
        return await self.generate_stream(prompt, **options).read()

    def chat_stream(
        self,
        messages: str | Sequence[Message],
        *,
        model: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        priority: int = 0,
        **options: Any,
    ) -> TokenStream:
        """Answer a conversation (a list of OpenAI messages, or one user message), token by token.

        `options` go to `/v1/chat/completions` as they are (`tools`, `response_format`, `top_p` …).
        Raises BadRequest for messages that are none.
        """
        history = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        if not history or not all(isinstance(message, Mapping) and "role" in message for message in history):
            raise BadRequest(
                "messages must be a list of {'role': …, 'content': …}, with at least one of them"
            )
        body = _without_none(
            {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "stop": stop, **options}
        )
        length = sum(len(str(message.get("content") or "")) for message in history)
        journal = ChatJournal(history, body)
        return self._stream(journal, length, model, max_tokens, priority, _prefix(history))

    async def chat(self, messages: str | Sequence[Message], **options: Any) -> Completion:
        """As `chat_stream`, but waits for the whole answer; its `message` continues the history."""
        return await self.chat_stream(messages, **options).read()

    def conversation(
        self, *, system: str | None = None, messages: Sequence[Message] = (), **options: Any
    ) -> Conversation:
        """A conversation that keeps its history; its turns stay with the worker that has it cached."""
        return Conversation(self, system=system, messages=messages, **options)

    @asynccontextmanager
    async def request(
        self,
        path: str,
        body: Mapping[str, Any] | bytes,
        *,
        model: str | None = None,
        priority: int = 0,
        trace: str | None = None,
    ) -> AsyncIterator[RawAnswer]:
        """Any generation endpoint of llama-server, raw: its status and its bytes.

        `model` defaults to the body's `model`, else to the one that most workers have; `trace` is a
        W3C traceparent that the worker's log will name. ::

            async with mesh.request("/v1/embeddings", {"input": "Hello"}) as answer:
                vectors = json.loads(await answer.read())

        Raises BadRequest for a body that is no JSON object, and what `Attempts.run` raises.
        """
        content = decode_object(body) if isinstance(body, bytes) else dict(body)
        name = model or content.get("model") or await self._directory.default_model()
        limit = next((content[key] for key in _LIMITS if isinstance(content.get(key), int)), DEFAULT_ANSWER)
        length = len(body) if isinstance(body, bytes) else len(repr(body))
        need = Need(length // CHARACTERS_PER_TOKEN + 1, max(1, limit), _prefix(content.get("messages")))
        journal = Passthrough(path, content, self._rng)
        asked = Request(path, str(name), need, priority, trace, journal.streaming)
        async with RawAnswer(self._dispatcher, journal, asked, Explanation()) as answer:
            yield answer

    async def embed(
        self, texts: str | Sequence[str], *, model: str | None = None, **options: Any
    ) -> list[list[float]]:
        """The embedding of each text, from a worker whose model makes embeddings.

        Raises BadRequest where the model does not, and what `Attempts.run` raises.
        """
        inputs = [texts] if isinstance(texts, str) else list(texts)
        async with self.request("/v1/embeddings", {"input": inputs, **options}, model=model) as answer:
            content = await answer.read()
        if answer.status != HTTP_OK:
            raise refusal(answer.status, content)
        data = decode_object(content).get("data")
        if not isinstance(data, list) or len(data) != len(inputs):
            raise MalformedMessage("the worker's embeddings have the wrong form")
        return [item["embedding"] for item in sorted(data, key=lambda item: item["index"])]

    async def workers(self, model: str | None = None) -> list[WorkerInfo]:
        """The workers of a model (of the default one where None), best first, asked for anew.

        Raises NoWorkers, ConnectFailed.
        """
        name = model or await self._directory.default_model()
        records = await self._dispatcher.candidates(name, fresh=True)
        return sorted((self._dispatcher.describe(record) for record in records), key=lambda one: one.expected)

    async def status(self) -> Mapping[str, Any]:
        """The status of the entry node itself: its models, slots, load, health and version.

        Raises ConnectFailed.
        """
        return await self._directory.status()

    async def models(self) -> list[ModelInfo]:
        """The models of the mesh, most workers first. Raises ConnectFailed."""
        counts = await self._directory.models()
        return [
            ModelInfo(name, counts[name]) for name in sorted(counts, key=lambda name: (-counts[name], name))
        ]

    def _stream(
        self,
        journal: Journal,
        characters: int,
        model: str | None,
        max_tokens: int | None,
        priority: int,
        prefix: bytes | None = None,
    ) -> TokenStream:
        if max_tokens is not None and max_tokens < 1:
            raise BadRequest("max_tokens must be at least 1")
        need = Need(characters // CHARACTERS_PER_TOKEN + 1, max_tokens or DEFAULT_ANSWER, prefix)
        return TokenStream(self._dispatcher, journal, need, model, priority)


def _resolve(
    join: Sequence[str], network: str | Network
) -> tuple[Network, Invitation | None, list[EntryNode]]:
    """The network, or the invitation that leads there, and the entry nodes that the join arguments name."""
    chosen = network if isinstance(network, Network) else Network(network)
    invitation: Invitation | None = None
    ways: list[EntryNode] = []
    for text in join:
        target = parse_entry(text, time.time())
        chosen = target.network or chosen
        invitation = target.invitation or invitation
        ways += [EntryNode(address, target.peer) for address in target.addresses]
    return chosen, invitation, ways


def _prefix(messages: object) -> bytes | None:
    """Names a conversation by what stays the same over its turns: all up to the first user message."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        return None
    digest = hashlib.blake2b(digest_size=16)
    for message in messages:
        if not isinstance(message, Mapping):
            return None
        digest.update(repr((message.get("role"), message.get("content"))).encode())
        if message.get("role") == "user":
            return digest.digest()
    return None


def _without_none(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}
