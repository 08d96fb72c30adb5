"""A streaming answer: from a journal and a dispatcher to tokens, over as many workers as it takes."""

from __future__ import annotations

import weakref
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self

from client_sdk.attempts import Attempts
from client_sdk.call import Call, Request
from client_sdk.dispatch import Dispatcher, queue_seconds, refusal
from client_sdk.events import EventDecoder
from client_sdk.failover import Delta, Journal
from client_sdk.selection import Need
from client_sdk.types import Completion, Explanation, Token
from mesh.errors import BackendFailed

MAX_ERROR_BODY = 64 << 10


class TokenStream:
    """An answer as it is written; iterate once. Leaving the loop frees the worker's slot.

    After the end `completion()` tells the whole; `explain` is filled as the answer proceeds.
    Iterating raises what `Attempts.run` raises.
    """

    def __init__(
        self, dispatcher: Dispatcher, journal: Journal, need: Need, model: str | None, priority: int
    ) -> None:
        self._dispatcher = dispatcher
        self._journal = journal
        self._need = need
        self._priority = priority
        self._started = False
        self._running: weakref.ref[AsyncGenerator[Token, None]] | None = None
        self._message: dict[str, Any] = {}
        self.model = model
        self.explain = Explanation()

    def __aiter__(self) -> AsyncGenerator[Token, None]:
        if self._started:
            raise RuntimeError("an answer can be iterated once; ask again for another")
        self._started = True
        # Only the loop holds the generator: dropping out of the loop closes it at once.
        running = self._run()
        self._running = weakref.ref(running)
        return running

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop the answer and free the worker's slot. Idempotent."""
        running = self._running() if self._running is not None else None
        if running is not None:
            await running.aclose()

    async def read(self) -> Completion:
        """Wait for the whole answer."""
        async for _ in self:
            pass
        return self.completion()

    def completion(self) -> Completion:
        """What has been delivered so far; after the end, the whole answer."""
        return Completion(
            text=self._journal.text,
            model=self.model or "",
            finish_reason=self._journal.finish_reason,
            usage=dict(self._journal.usage),
            explain=self.explain,
            message=dict(self._message) or None,
            timings=dict(self._journal.timings),
        )

    async def _run(self) -> AsyncGenerator[Token, None]:
        if self.model is None:
            self.model = await self._dispatcher.directory.default_model()
        request = Request(self._journal.path, self.model, self._need, self._priority)
        attempts = Attempts(self._dispatcher, self._journal, self.explain)
        async with aclosing(attempts.run(request, self._relay)) as tokens:
            async for token in tokens:
                yield token
        # A worker lost between its last token and its end leaves what the stop strings held back.
        rest = self._journal.finish()
        if rest is not None:
            yield Token(rest.text, self.explain.worker or "")

    async def _relay(self, call: Call) -> AsyncGenerator[Token, None]:
        """The tokens of one worker: the answer, or its rest."""
        journal = self._journal
        spliced = journal.started
        status = call.head.get("status")
        if status != 200:
            raise refusal(status if isinstance(status, int) else 0, await call.read_all(MAX_ERROR_BODY))
        self.explain.queue = queue_seconds(call.head)
        decoder = EventDecoder()
        async with aclosing(call.chunks()) as chunks:
            async for data in chunks:
                for event in decoder.feed(data):
                    delta = journal.accept(event)
                    if delta is not None:
                        yield self._token(call, delta, spliced)
                        spliced = False
                if journal.satisfied:
                    break
        if not journal.complete:
            raise BackendFailed("the answer ended without its last event")
        last = journal.finish()
        if last is not None:
            yield self._token(call, last, spliced)
        self.explain.speed = journal.timings.get("predicted_per_second")
        call.succeeded(journal.timings)

    def _token(self, call: Call, delta: Delta, spliced: bool) -> Token:
        if delta.message is not None:
            _merge(self._message, delta.message)
        return Token(delta.text, call.lease.id, delta.ids, delta.message, spliced)


def _merge(message: dict[str, Any], delta: Mapping[str, Any]) -> None:
    """Add a chat delta to the message so far, as OpenAI's streaming format defines it."""
    message.setdefault("role", "assistant")
    for key, value in delta.items():
        if key == "tool_calls":
            calls = message.setdefault("tool_calls", [])
            for piece in value:
                index = piece.get("index", 0)
                while len(calls) <= index:
                    calls.append({"type": "function", "function": {"name": "", "arguments": ""}})
                call, function = calls[index], piece.get("function") or {}
                if piece.get("id"):
                    call["id"] = piece["id"]
                call["function"]["name"] += function.get("name") or ""
                call["function"]["arguments"] += function.get("arguments") or ""
        elif isinstance(value, str) and isinstance(message.get(key, ""), str):
            message[key] = message.get(key, "") + value
        else:
            message[key] = value
