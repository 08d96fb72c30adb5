"""The same client for programs without asyncio: its event loop runs in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Self, TypeVar

from client_sdk.client import MeshClient, Message
from client_sdk.conversation import Conversation
from client_sdk.generate import TokenStream
from client_sdk.raw import RawAnswer
from client_sdk.types import Completion, Explanation, ModelInfo, Token, WorkerInfo

T = TypeVar("T")

CANCEL_PATIENCE = 5.0
"""Seconds that an interrupted call, or the client's end, waits for what it cancelled."""


class SyncTokenStream:
    """An answer as it is written; iterate once. Leaving the loop frees the worker's slot."""

    def __init__(self, client: SyncMeshClient, stream: TokenStream) -> None:
        self._client = client
        self._stream = stream

    @property
    def explain(self) -> Explanation:
        """Why the answer comes from where it comes from."""
        return self._stream.explain

    def completion(self) -> Completion:
        """What has been delivered so far; after the end, the whole answer."""
        return self._stream.completion()

    def read(self) -> Completion:
        """Wait for the whole answer."""
        return self._client._run(self._stream.read())

    def __iter__(self) -> Iterator[Token]:
        return self._client._iterate(aiter(self._stream))


class SyncRawAnswer:
    """An answer as llama-server wrote it: a context manager; iterate once for the body."""

    def __init__(self, client: SyncMeshClient, answer: AbstractAsyncContextManager[RawAnswer]) -> None:
        self._client = client
        self._context = answer
        self._answer: RawAnswer | None = None

    def __enter__(self) -> Self:
        self._answer = self._client._run(_entered(self._context))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._client.closed:
            self._client._run(_left(self._context, error))

    @property
    def status(self) -> int:
        """The HTTP status that the server gave."""
        return self._begun.status

    @property
    def content_type(self) -> str:
        """The server's content type."""
        return self._begun.content_type

    @property
    def trailer(self) -> Mapping[str, Any] | None:
        """Usage, timings and load as the worker told them, once the answer is whole."""
        return self._begun.trailer

    @property
    def explain(self) -> Explanation:
        """Why the answer comes from where it comes from."""
        return self._begun.explain

    def read(self) -> bytes:
        """The whole body."""
        return self._client._run(self._begun.read())

    def __iter__(self) -> Iterator[bytes]:
        return self._client._iterate(aiter(self._begun))

    @property
    def _begun(self) -> RawAnswer:
        if self._answer is None:
            raise RuntimeError("use `with` before reading an answer")
        return self._answer


class SyncConversation:
    """A conversation that keeps its own history; see `Conversation`."""

    def __init__(self, client: SyncMeshClient, conversation: Conversation) -> None:
        self._client = client
        self._conversation = conversation

    @property
    def messages(self) -> list[Message]:
        """The history in OpenAI's form."""
        return self._conversation.messages

    @property
    def last(self) -> Completion | None:
        """The last answer, with its explanation."""
        return self._conversation.last

    def stream(self, text: str) -> Iterator[Token]:
        """Say something; the answer streams."""
        return self._client._iterate(self._conversation.stream(text))

    def say(self, text: str) -> str:
        """Say something and wait for the whole answer."""
        return self._client._run(self._conversation.say(text))


class SyncMeshClient:
    """A blocking client with the methods of `MeshClient`; a context manager. Safe to use from threads.

    Every method raises RuntimeError once the client is closed.
    """

    def __init__(self, join: str | Sequence[str], **options: Any) -> None:
        self._client = MeshClient(join, **options)
        self._closing = False
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="qmesh client", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closing

    def close(self) -> None:
        """Close every connection and end the thread; calls in other threads fail. Idempotent."""
        with self._lock:
            if self._closing:
                return
            ending = asyncio.run_coroutine_threadsafe(self._end(), self._loop)
            self._closing = True
        try:
            ending.result()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def generate_stream(self, prompt: str, **options: Any) -> SyncTokenStream:
        """As `MeshClient.generate_stream`, to be iterated with `for`."""
        return SyncTokenStream(self, self._client.generate_stream(prompt, **options))

    def generate(self, prompt: str, **options: Any) -> Completion:
        """As `MeshClient.generate`."""
        return self._run(self._client.generate(prompt, **options))

    def chat_stream(self, messages: str | Sequence[Message], **options: Any) -> SyncTokenStream:
        """As `MeshClient.chat_stream`, to be iterated with `for`."""
        return SyncTokenStream(self, self._client.chat_stream(messages, **options))

    def chat(self, messages: str | Sequence[Message], **options: Any) -> Completion:
        """As `MeshClient.chat`."""
        return self._run(self._client.chat(messages, **options))

    def conversation(
        self, *, system: str | None = None, messages: Sequence[Message] = (), **options: Any
    ) -> SyncConversation:
        """As `MeshClient.conversation`."""
        return SyncConversation(self, self._client.conversation(system=system, messages=messages, **options))

    def request(self, path: str, body: Mapping[str, Any] | bytes, **options: Any) -> SyncRawAnswer:
        """As `MeshClient.request`, to be entered with `with`."""
        return SyncRawAnswer(self, self._client.request(path, body, **options))

    def embed(self, texts: str | Sequence[str], **options: Any) -> list[list[float]]:
        """As `MeshClient.embed`."""
        return self._run(self._client.embed(texts, **options))

    def workers(self, model: str | None = None) -> list[WorkerInfo]:
        """As `MeshClient.workers`."""
        return self._run(self._client.workers(model))

    def models(self) -> list[ModelInfo]:
        """As `MeshClient.models`."""
        return self._run(self._client.models())

    def status(self) -> Mapping[str, Any]:
        """As `MeshClient.status`."""
        return self._run(self._client.status())

    async def _end(self) -> None:
        """End what runs on the loop, so that nobody waits for it for ever."""
        await self._client.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            _, stuck = await asyncio.wait(others, timeout=CANCEL_PATIENCE)
            for task in stuck:
                task.cancel()
            await asyncio.gather(*stuck, return_exceptions=True)
        await asyncio.get_running_loop().shutdown_asyncgens()

    def _iterate(self, pieces: AsyncGenerator[T, None]) -> Iterator[T]:
        """An asynchronous iterator as a usual one; leaving the loop closes it."""
        try:
            while True:
                try:
                    yield self._run(_next(pieces))
                except StopAsyncIteration:
                    return
        finally:
            if not self.closed:
                self._run(_closed(pieces))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it on the client's loop; an interrupt here (Ctrl-C) cancels it there."""
        ended = threading.Event()
        with self._lock:
            if self._closing:
                work.close()
                raise RuntimeError("the client is closed")
            future = asyncio.run_coroutine_threadsafe(_watched(work, ended), self._loop)
        try:
            return future.result()
        except BaseException:
            if future.cancel():
                ended.wait(CANCEL_PATIENCE)
            raise


async def _watched(work: Coroutine[Any, Any, T], ended: threading.Event) -> T:
    try:
        return await work
    finally:
        ended.set()


async def _next(pieces: AsyncGenerator[T, None]) -> T:
    return await anext(pieces)


async def _closed(pieces: AsyncGenerator[Any, None]) -> None:
    await pieces.aclose()


async def _entered(context: AbstractAsyncContextManager[T]) -> T:
    return await context.__aenter__()


async def _left(context: AbstractAsyncContextManager[Any], error: BaseException | None) -> None:
    await context.__aexit__(type(error) if error else None, error, error.__traceback__ if error else None)
