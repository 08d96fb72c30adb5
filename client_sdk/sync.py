"""The same client for programs without asyncio: its event loop runs in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from client_sdk.client import MeshClient, Message
from client_sdk.generate import TokenStream
from client_sdk.types import Completion, Explanation, ModelInfo, Token, WorkerInfo

T = TypeVar("T")


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

    def __iter__(self) -> Iterator[Token]:
        tokens = aiter(self._stream)
        try:
            while True:
                try:
                    yield self._client._run(_next(tokens))
                except StopAsyncIteration:
                    return
        finally:
            if not self._client.closed:
                self._client._run(self._stream.aclose())


class SyncMeshClient:
    """A blocking client with the methods of `MeshClient`; a context manager. Safe to use from threads."""

    def __init__(self, join: str | Sequence[str], **options: Any) -> None:
        self._client = MeshClient(join, **options)
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
        return self._loop.is_closed()

    def close(self) -> None:
        """Close every connection and end the thread. Idempotent."""
        if self.closed:
            return
        self._run(self._client.close())
        self._run(self._loop.shutdown_asyncgens())
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

    def workers(self, model: str | None = None) -> list[WorkerInfo]:
        """As `MeshClient.workers`."""
        return self._run(self._client.workers(model))

    def models(self) -> list[ModelInfo]:
        """As `MeshClient.models`."""
        return self._run(self._client.models())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it on the client's loop; an interrupt here cancels it there."""
        if self.closed:
            work.close()
            raise RuntimeError("the client is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


async def _next(tokens: Any) -> Token:
    token: Token = await anext(tokens)
    return token
