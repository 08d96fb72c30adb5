"""A limit of tokens holds over any number of lost workers, also where an event is several tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from random import Random
from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from client_sdk.chat_journal import ChatJournal
from client_sdk.failover import ReplayDiverged, Way
from client_sdk.passthrough import Passthrough

HISTORY = [{"role": "user", "content": "Hello"}]
PATH = "/v1/chat/completions"

groups = st.lists(st.lists(st.sampled_from("abcdé€"), min_size=1, max_size=4), min_size=1, max_size=12)
"""Events, each of some tokens, each token one character."""
lives = st.lists(st.integers(0, 14), max_size=5)
limits = st.none() | st.integers(1, 20)


class Worker:
    """Knows one answer, and ends it at the limit of the request; goes on from an unfinished message."""

    def __init__(self, events: list[list[str]]) -> None:
        self.events = events
        self.text = "".join(token for event in events for token in event)

    def __call__(self, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        last = body["messages"][-1]
        at = len(last["content"]) if last["role"] == "assistant" else 0
        assert self.text[:at] == (last["content"] if at else "")
        limit = body.get("max_tokens")
        left = limit if limit is not None else len(self.text)
        written = 0
        yield _event({"role": "assistant", "content": None})
        passed = 0
        for event in self.events:
            piece = "".join(event)[max(0, at - passed) :]
            passed += len(event)
            piece = piece[: left - written]
            if piece:
                written += len(piece)
                yield {**_event({"content": piece}), "timings": {"predicted_n": written}}
        reason = "length" if limit is not None and written >= limit else "stop"
        yield {**_event({}), "choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}
        yield {"choices": [], "usage": {"prompt_tokens": 5 + at, "completion_tokens": written}}


def _event(delta: dict[str, Any]) -> dict[str, Any]:
    return {"id": "chatcmpl-0123456789", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


any_answer = given(
    groups,
    lives,
    limits,
    st.sampled_from([{}, {"temperature": 0}, {"seed": 5}]),
    st.sampled_from([0.0, 60.0]),
)


@any_answer
def test_a_chat_ends_exactly_at_its_limit(
    events: list[list[str]], lives: list[int], limit: int | None, body: dict[str, Any], took: float
) -> None:
    worker = Worker(events)
    journal = ChatJournal(HISTORY, {**body, "max_tokens": limit} if limit else body)
    for life in [*lives, 1 << 30]:
        for count, event in enumerate(worker(journal.next_request(took))):
            if count >= life:
                break
            journal.accept(event)
        if journal.complete:
            break
    assert journal.text == worker.text[: limit or len(worker.text)]
    assert journal.tokens == len(journal.text)
    if journal.usage:  # else the last worker was lost before its last event
        assert journal.usage == {"prompt_tokens": 5, "completion_tokens": len(journal.text)}


def _told(whole: bytes) -> tuple[str, str | None, dict[str, Any] | None]:
    """Text, finish reason and usage of a stream of chat events."""
    text, reason, usage = "", None, None
    for block in whole.split(b"\n\n")[:-1]:
        if block == b"data: [DONE]":
            continue
        event = orjson.loads(block.removeprefix(b"data: "))
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            text += choice["delta"].get("content") or ""
            reason = choice["finish_reason"] or reason
    return text, reason, usage


@any_answer
def test_a_raw_chat_ends_exactly_at_its_limit(
    events: list[list[str]], lives: list[int], limit: int | None, body: dict[str, Any], took: float
) -> None:
    """llama-server merges tokens only where one is no whole character: ASCII is a token per event."""
    split = [
        piece
        for event in events
        for piece in ([event] if not "".join(event).isascii() else [[token] for token in event])
    ]
    worker = Worker(split)
    request = {**body, "messages": HISTORY, "stream": True, **({"max_tokens": limit} if limit else {})}
    journal = Passthrough(PATH, request, Random(1))
    sent = bytearray()
    for life in [*lives, 1 << 30]:
        try:
            for count, event in enumerate(worker(orjson.loads(journal.next_body(took)))):
                if count >= life:
                    break
                sent += journal.feed(b"data: " + orjson.dumps(event) + b"\n\n")
            else:
                sent += journal.feed(b"data: [DONE]\n\n")
                sent += journal.finish()
        except ReplayDiverged:
            journal.diverged()
        if journal.complete:
            break
    text, reason, usage = _told(bytes(sent))
    assert text == worker.text[: limit or len(worker.text)]
    assert reason == ("length" if limit is not None and len(text) == limit else "stop")
    assert usage is not None
    assert sum(usage.values()) == 5 + len(text)
    if text.isascii():
        assert usage["completion_tokens"] == len(text)


def test_a_raw_chat_whose_tokens_cannot_be_counted_is_replayed() -> None:
    for request, events, way in (
        ({"max_tokens": 9}, [["a"]], Way.PREFILL),
        ({"max_tokens": 9}, [["€"]], Way.REPLAY),
        ({"max_tokens": 9, "stop": ["x"]}, [["a"]], Way.REPLAY),
        ({"max_tokens": 1}, [["a"]], Way.REPLAY),
        ({"max_tokens": -1}, [["€"]], Way.PREFILL),
        ({}, [["€"]], Way.PREFILL),
        ({"max_tokens": 9, "seed": 3}, [["a"]], Way.REPLAY),
    ):
        journal = Passthrough(PATH, {"messages": HISTORY, "stream": True, **request}, Random(1))
        journal.next_body(0.0)
        for event in [*Worker(events)({"messages": HISTORY})][:2]:
            journal.feed(b"data: " + orjson.dumps(event) + b"\n\n")
        journal.next_body(60.0)
        assert journal.way is way, (request, events)
