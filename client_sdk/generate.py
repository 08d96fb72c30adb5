"""A streaming answer: from a journal and a dispatcher to tokens, over as many workers as it takes."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self

from client_sdk.dispatch import Dispatcher, Lease, encode_body, refusal
from client_sdk.events import EventDecoder
from client_sdk.failover import Delta, Journal, ReplayDiverged
from client_sdk.selection import Need
from client_sdk.types import Attempt, Completion, Explanation, Token
from mesh.errors import (
    AllWorkersFailed,
    BackendFailed,
    DeadlineExceeded,
    NoWorkers,
    Overloaded,
    QMeshError,
    is_retryable,
)
from mesh.transport import Stream

MAX_ATTEMPTS = 8
"""Workers asked for one answer, those that were only overloaded not counted."""
PATIENCE = 30.0
"""Seconds to wait for a place while every worker is overloaded, where the request has no deadline."""


class TokenStream:
    """An answer as it is written; iterate once. Leaving the loop frees the worker's slot.

    After the end `completion()` tells the whole; `explain` is filled as the answer proceeds.
    Iterating raises NoWorkers, AllWorkersFailed, StreamInterrupted, DeadlineExceeded, or the
    RemoteError of a request that no worker would take.
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

    def __aiter__(self) -> AsyncIterator[Token]:
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
        )

    async def _run(self) -> AsyncGenerator[Token, None]:
        """Ask one worker after the other until the answer is whole."""
        began = time.monotonic()
        if self.model is None:
            self.model = await self._dispatcher.directory.default_model()
        failed: list[tuple[str, BaseException]] = []
        exclude: set[bytes] = set()
        while not self._journal.complete:
            try:
                async with aclosing(self._attempt(exclude, began)) as tokens:
                    async for token in tokens:
                        yield token
            except NoWorkers as error:
                if not failed:
                    raise
                await self._when_nobody_is_left(error, failed, exclude, began)
            except ReplayDiverged as error:
                self._journal.diverged()
                failed.append(self._note(error))
            except (QMeshError, OSError) as error:
                failed.append(self._note(error))
                if not is_retryable(error):
                    raise
                if self.explain.worker is not None:
                    exclude.add(bytes.fromhex(self.explain.worker))
            if sum(not isinstance(error, Overloaded) for _, error in failed) >= MAX_ATTEMPTS:
                raise self._give_up(failed)

    async def _when_nobody_is_left(
        self, none: NoWorkers, failed: list[tuple[str, BaseException]], exclude: set[bytes], began: float
    ) -> None:
        """Every worker was asked: wait for a place where some were only overloaded, else give up."""
        waits = [error.retry_after or 0.25 for _, error in failed if isinstance(error, Overloaded)]
        if not waits or time.monotonic() - began > PATIENCE:
            raise self._give_up(failed) from none
        await asyncio.sleep(min(*waits, 2.0) if len(waits) > 1 else min(waits[0], 2.0))
        exclude.clear()

    def _give_up(self, failed: list[tuple[str, BaseException]]) -> QMeshError:
        worker, last = failed[-1]
        reason = f"worker {worker[:12]}: {last}"
        if self._journal.started:
            return self._journal.lost(f"no other worker could go on ({reason})")
        if all(isinstance(error, Overloaded) for _, error in failed):
            return Overloaded(
                f"every worker is busy ({reason})", retry_after=getattr(last, "retry_after", None)
            )
        return AllWorkersFailed(f"{len(failed)} attempts failed, the last with {reason}", failed)

    def _note(self, error: BaseException) -> tuple[str, BaseException]:
        worker = self.explain.worker or ""
        self.explain.attempts.append(Attempt(worker, self._journal.way, str(error) or type(error).__name__))
        return worker, error

    async def _attempt(self, exclude: set[bytes], began: float) -> AsyncGenerator[Token, None]:
        """The answer, or its rest, from one worker."""
        journal = self._journal
        body = encode_body(journal.next_request())
        model = self.model or ""
        spliced = journal.started
        async with self._dispatcher.lease(
            model, self._need, self.explain, exclude=exclude, digest=journal.digest
        ) as lease:
            stream = await self._dispatcher.open(
                lease, journal.path, model, body, deadline=self._time_left(began), priority=self._priority
            )
            async with stream:
                sent = time.monotonic()
                first = None
                async with aclosing(self._events(stream, began)) as events:
                    async for event in events:
                        delta = journal.accept(event)
                        if delta is not None:
                            if first is None:
                                first = time.monotonic()
                                journal.digest = lease.record.digest
                                if self.explain.first_token is None:
                                    self.explain.first_token = first - began
                            yield self._token(lease, delta, spliced)
                            spliced = False
                        if journal.satisfied:
                            break
                if not journal.complete:
                    raise BackendFailed("the answer ended without its last event")
                last = journal.finish()
                if last is not None:
                    yield self._token(lease, last, spliced)
                self._succeeded(lease, stream.trailer, sent, first)

    async def _events(self, stream: Stream, began: float) -> AsyncGenerator[Mapping[str, Any], None]:
        timeouts = self._dispatcher.timeouts
        head = await self._dispatcher.head(stream, self._patience(timeouts.first_token, began))
        if head.get("status") != 200:
            raise await refusal(stream, int(head.get("status") or 0))
        queue_ms = head.get("queue_ms")
        self.explain.queue = queue_ms / 1000 if isinstance(queue_ms, int | float) else None
        decoder = EventDecoder()
        patience = self._patience(timeouts.first_token, began)
        while (data := await self._dispatcher.read(stream, patience)) is not None:
            patience = self._patience(timeouts.between_tokens, began)
            for event in decoder.feed(data):
                yield event

    def _patience(self, limit: float | None, began: float) -> float | None:
        """How long to wait now: the limit of this wait, or what is left of the whole, if less."""
        left = self._time_left(began)
        return left if limit is None else limit if left is None else min(limit, left)

    def _token(self, lease: Lease, delta: Delta, spliced: bool) -> Token:
        if spliced:
            self.explain.splices += 1
        if delta.message is not None:
            _merge(self._message, delta.message)
        return Token(delta.text, lease.id, delta.ids, delta.message, spliced)

    def _succeeded(
        self, lease: Lease, trailer: Mapping[str, Any] | None, sent: float, first: float | None
    ) -> None:
        now = time.monotonic()
        journal = self._journal
        speed = journal.timings.get("predicted_per_second")
        speed = float(speed) if isinstance(speed, int | float) and speed > 0 else None
        self.explain.speed = speed
        board = self._dispatcher.board
        board.succeeded(lease.record.node_id, now, first_token=(first or now) - sent, speed=speed)
        prompt_speed = journal.timings.get("prompt_per_second")
        if isinstance(prompt_speed, int | float) and prompt_speed > 0:
            board[lease.record.node_id].prompt_speed.add(float(prompt_speed), now)
        self._dispatcher.learn_load(lease.connection, (trailer or {}).get("load"))
        self.explain.attempts.append(Attempt(lease.id, journal.way))

    def _time_left(self, began: float) -> float | None:
        total = self._dispatcher.timeouts.total
        if total is None:
            return None
        left = began + total - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(f"the answer took longer than {total:g} s")
        return left


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
        elif isinstance(value, str):
            message[key] = message.get(key, "") + value
        else:
            message[key] = value
