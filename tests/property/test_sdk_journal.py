"""An answer over any number of lost workers: every character once, whatever the way to go on.

The workers here are models of llama-server that know one true answer (a greedy or seeded model says
the same on every machine) and are lost after any number of events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client_sdk.chat_journal import ChatJournal
from client_sdk.failover import Delta, Journal, ReplayDiverged, Way
from client_sdk.text_journal import TextJournal
from mesh.errors import BackendFailed, ContextExceeded, MalformedMessage, StreamInterrupted
from tests.property.test_sdk_events import expected as until_stop

PROMPT = "Once"


Worker = Callable[[Mapping[str, Any]], Iterator[Mapping[str, Any]]]


def drive(
    journal: Journal, worker: Worker, lives: Sequence[int], took: float = 0.0
) -> tuple[str, list[Delta]]:
    """Do as `TokenStream` does with workers that live for so many events, the last one for ever.
    Writing what was delivered `took` seconds, which decides whether that is done again.
    """
    deltas: list[Delta] = []
    attempts = 0

    def deliver(delta: Delta | None) -> None:
        if delta is not None:
            assert delta.text or delta.message
            deltas.append(delta)

    def attempt(life: int) -> None:
        """One worker; it is lost after `life` events."""
        for count, event in enumerate(worker(journal.next_request(took))):
            if count >= life:
                return
            deliver(journal.accept(event))
            if journal.satisfied:
                break
        if journal.complete:
            deliver(journal.finish())

    while not journal.complete:
        assert attempts <= len(lives) + 3, "the journal does not come to an end"
        try:
            attempt(lives[attempts] if attempts < len(lives) else 1 << 30)
        except ReplayDiverged:
            journal.diverged()
        attempts += 1
    deliver(journal.finish())
    text = "".join(delta.text for delta in deltas)
    assert text == journal.text
    return text, deltas


# --- plain text by token ids

pieces = st.lists(st.text(alphabet="ab\n€", min_size=1, max_size=3), min_size=1, max_size=12)
lives = st.lists(st.integers(0, 14), max_size=5)


class TextModel:
    """Says the same answer however often it is asked; a token whose bytes are no complete text is
    either told as an id without text, or held back and told with the next one.
    """

    def __init__(self, answer: Sequence[str], *, told_apart: bool, ends: bool = True) -> None:
        self.tokens: list[bytes] = []
        for piece in answer:
            raw = piece.encode()
            half = len(raw) // 2
            self.tokens += [raw[:half], raw[half:]] if half else [raw]
        self.told_apart = told_apart
        self.ends = ends
        self.asked: list[dict[str, Any]] = []

    @property
    def text(self) -> str:
        return b"".join(self.tokens).decode()

    def __call__(self, body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        self.asked.append(dict(body))
        assert body["return_tokens"] is True
        assert body["stream"] is True
        assert "stop" not in body
        prompt = body["prompt"]
        start = 0
        if prompt != PROMPT:
            assert prompt[0] == PROMPT
            assert prompt[1:] == list(range(len(prompt) - 1)), "not the ids that were generated"
            start = len(prompt) - 1
        limit = body.get("n_predict", -1)
        end = len(self.tokens) if limit < 0 else min(len(self.tokens), start + limit)
        half, ids = b"", []
        for number in range(start, end):
            half += self.tokens[number]
            ids.append(number)
            try:
                content = half.decode()
            except UnicodeDecodeError:
                if self.told_apart:
                    yield {"content": "", "tokens": ids, "stop": False}
                    ids = []
                continue
            yield {"content": content, "tokens": ids, "stop": False}
            half, ids = b"", []
        yield {
            "content": "",
            "tokens": [],
            "stop": True,
            "stop_type": "eos" if end == len(self.tokens) else "limit",
            "timings": {"prompt_n": 1 + start, "cache_n": 0, "predicted_n": end - start},
        }


durations = st.sampled_from([0.0, 60.0])


def told(tokens: Sequence[bytes]) -> str:
    """Their text; a token whose last character is incomplete waits for the next one, which may not come."""
    for count in range(len(tokens), 0, -1):
        with suppress(UnicodeDecodeError):
            return b"".join(tokens[:count]).decode()
    return ""


@given(pieces, lives, st.booleans(), st.sampled_from([{"temperature": 0}, {}, {"seed": 7}]), durations)
def test_text_is_neither_repeated_nor_lost(
    answer: list[str], lives: list[int], told_apart: bool, body: dict[str, Any], took: float
) -> None:
    model = TextModel(answer, told_apart=told_apart)
    journal = TextJournal(PROMPT, body)
    text, deltas = drive(journal, model, lives, took)
    assert text == model.text
    assert journal.finish_reason == "stop"
    ids = [one for delta in deltas for one in delta.ids]
    assert ids == list(range(len(model.tokens))) == list(journal.ids)
    assert journal.tokens == len(ids)
    if len(model.asked) == 1:
        assert journal.splices == 0


@given(pieces, lives, st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3), st.booleans())
def test_stop_strings_are_found_over_the_seam(
    answer: list[str], lives: list[int], stops: list[str], seeded: bool
) -> None:
    model = TextModel(answer, told_apart=True)
    journal = TextJournal(PROMPT, {"stop": stops, "seed": 7} if seeded else {"stop": stops})
    text, _ = drive(journal, model, lives)
    assert text == until_stop(model.text, stops)[0]
    assert journal.finish_reason == "stop"


@given(
    pieces, lives, st.integers(1, 20), st.lists(st.text(alphabet="ab", min_size=2, max_size=3), max_size=2)
)
def test_the_limit_counts_over_all_workers(
    answer: list[str], lives: list[int], limit: int, stops: list[str]
) -> None:
    model = TextModel(answer, told_apart=True)
    journal = TextJournal(PROMPT, {"n_predict": limit, "stop": stops})
    text, _ = drive(journal, model, lives)
    assert text == until_stop(told(model.tokens[:limit]), stops)[0]
    assert journal.tokens <= limit
    assert all(body["n_predict"] >= 1 for body in model.asked)


def test_the_usage_counts_the_prompt_once() -> None:
    model = TextModel(["a", "b", "c", "d"], told_apart=True)
    journal = TextJournal(PROMPT, {"temperature": 0})
    drive(journal, model, [2], took=60.0)
    assert journal.way is Way.IDS
    assert journal.usage == {"prompt_tokens": 1, "completion_tokens": 4}
    assert journal.splices == 1


@given(pieces, pieces, st.integers(0, 6), lives)
def test_a_replay_that_differs_goes_on_by_ids(
    answer: list[str], other: list[str], life: int, lives: list[int]
) -> None:
    """The second worker's seed leads elsewhere: what was delivered stays, the rest comes by ids."""
    model, stranger = TextModel(answer, told_apart=True), TextModel(other, told_apart=True)
    journal = TextJournal(PROMPT, {"seed": 7})

    def worker(body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        fresh = body["prompt"] == PROMPT
        return (stranger if fresh and journal.way is Way.REPLAY else model)(body)

    text, _ = drive(journal, worker, [life, *lives])
    assert text in (model.text, stranger.text)


def test_a_replay_that_ends_early_is_no_end() -> None:
    model, short = TextModel(["aa", "bb", "cc"], told_apart=True), TextModel(["a"], told_apart=True)
    journal = TextJournal(PROMPT, {"seed": 7})

    def worker(body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        return (short if journal.way is Way.REPLAY else model)(body)

    assert drive(journal, worker, [3])[0] == "aabbcc"


@pytest.mark.parametrize(
    "event",
    [{"content": 5}, {"content": "a", "tokens": 5}, {"content": "a", "tokens": ["x"]}, {"tokens": "abc"}],
)
def test_a_text_event_of_the_wrong_form(event: dict[str, Any]) -> None:
    journal = TextJournal(PROMPT, {})
    journal.next_request(0.0)
    with pytest.raises(MalformedMessage):
        journal.accept(event)


# --- chat


class ChatModel:
    """A chat answer as deltas; goes on from an unfinished assistant message."""

    def __init__(self, deltas: Sequence[Mapping[str, Any]]) -> None:
        self.deltas = list(deltas)
        self.asked: list[dict[str, Any]] = []

    @property
    def text(self) -> str:
        return "".join(delta.get("content", "") for delta in self.deltas)

    def __call__(self, body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        self.asked.append(dict(body))
        assert body["stream_options"]["include_usage"] is True
        messages = body["messages"]
        deltas = self.deltas
        if messages[-1]["role"] == "assistant":
            assert body["add_generation_prompt"] is False
            assert body["continue_final_message"] is True
            said = messages[-1]["content"]
            assert self.text.startswith(said), "a prefill of what was never said"
            deltas, left = [], len(said)
            for delta in self.deltas:
                text = delta.get("content", "")
                deltas += [{"content": character} for character in text[left:]] if text else [delta]
                left = max(0, left - len(text))
        yield {"choices": [{"delta": {"role": "assistant", "content": None}, "finish_reason": None}]}
        for delta in deltas:
            yield {"choices": [{"delta": dict(delta), "finish_reason": None}]}
        yield {"choices": [{"delta": {}, "finish_reason": "stop"}], "timings": {"predicted_n": len(deltas)}}
        yield {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": len(deltas)}}


HISTORY = [{"role": "user", "content": "Hello"}]
said = st.lists(st.text(alphabet="ab €", min_size=1, max_size=3), min_size=1, max_size=10)


@given(said, lives, st.sampled_from([{"temperature": 0}, {}, {"seed": 7}]), durations)
def test_a_chat_answer_is_neither_repeated_nor_lost(
    answer: list[str], lives: list[int], body: dict[str, Any], took: float
) -> None:
    model = ChatModel([{"content": piece} for piece in answer])
    journal = ChatJournal(HISTORY, body)
    text, deltas = drive(journal, model, lives, took)
    assert text == model.text == "".join(str((delta.message or {}).get("content")) for delta in deltas)
    assert journal.finish_reason == "stop"


@given(said, said, st.integers(0, 12), lives)
def test_a_replayed_chat_may_be_cut_elsewhere(
    answer: list[str], other: list[str], life: int, lives: list[int]
) -> None:
    model = ChatModel([{"content": piece} for piece in answer])
    joined = ChatModel([{"content": model.text}])
    journal = ChatJournal(HISTORY, {"seed": 7})

    def worker(body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        return (joined if journal.way is Way.REPLAY else model)(body)

    assert drive(journal, worker, [life, *lives])[0] == model.text


tool_deltas = st.lists(
    st.one_of(
        st.builds(lambda text: {"content": text}, st.text(alphabet="ab", min_size=1, max_size=3)),
        st.builds(lambda text: {"reasoning_content": text}, st.text(alphabet="ab", min_size=1, max_size=3)),
        st.builds(
            lambda text: {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": text}}]},
            st.text(alphabet="ab", min_size=1, max_size=3),
        ),
    ),
    min_size=1,
    max_size=8,
).map(lambda deltas: sorted(deltas, key=lambda delta: "reasoning_content" not in delta))
"""Models reason before they speak."""


@given(tool_deltas, lives, st.sampled_from([{"temperature": 0}, {"seed": 7}]), durations)
def test_tools_and_reasoning_are_replayed(
    sent: list[dict[str, Any]], lives: list[int], body: dict[str, Any], took: float
) -> None:
    model = ChatModel(sent)
    _, deltas = drive(ChatJournal(HISTORY, body), model, lives, took)
    joined = "".join(str(value) for delta in deltas for value in (delta.message or {}).values())
    assert joined == "".join(str(value) for delta in sent for value in delta.values())


def test_sampled_tool_calls_cannot_be_continued() -> None:
    journal = ChatJournal(HISTORY, {"temperature": 0.9})
    model = ChatModel([{"content": "so "}, {"tool_calls": [{"index": 0}]}, {"content": "x"}])
    with pytest.raises(StreamInterrupted) as broken:
        drive(journal, model, [3])
    assert broken.value.text == "so "
    assert broken.value.tokens == 2


@given(said, lives, st.integers(1, 12), durations)
def test_a_chats_limit_is_never_exceeded_by_going_on(
    answer: list[str], lives: list[int], limit: int, took: float
) -> None:
    class Limited(ChatModel):
        """Each character is a token; ends at the limit."""

        def __call__(self, body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
            assert body["max_tokens"] >= 1
            left = body["max_tokens"]
            for event in super().__call__(body):
                if left == 0 and (event["choices"] or [{}])[0].get("delta"):
                    yield {"choices": [{"delta": {}, "finish_reason": "length"}]}
                    return
                yield event
                left -= bool((event["choices"] or [{"delta": {}}])[0]["delta"].get("content"))

    model = Limited([{"content": character} for character in "".join(answer)])
    journal = ChatJournal(HISTORY, {"max_tokens": limit, "temperature": 0})
    text, _ = drive(journal, model, lives, took)
    assert text == model.text[:limit]


@pytest.mark.parametrize(
    "event",
    [
        {"choices": 5},
        {"choices": [5]},
        {"choices": [{"delta": 5}]},
        {"choices": [{"delta": {"content": 5}}]},
        {"usage": 5},
        {"usage": {"completion_tokens": "x"}},
        {"timings": 5},
    ],
)
def test_a_chat_event_of_the_wrong_form(event: dict[str, Any]) -> None:
    journal = ChatJournal(HISTORY, {})
    journal.next_request(0.0)
    with pytest.raises(MalformedMessage):
        journal.accept(event)


def test_errors_in_mid_answer() -> None:
    journal = TextJournal(PROMPT, {})
    journal.next_request(0.0)
    with pytest.raises(ContextExceeded, match="too long"):
        journal.accept({"error": {"type": "exceed_context_size_error", "message": "too long"}})
    for error in ("text", 5, {"message": ["x"]}, {"code": 500}):
        with pytest.raises(BackendFailed):
            journal.accept({"error": error})
