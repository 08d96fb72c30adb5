"""Events and stop strings do not depend on where the bytes were cut."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client_sdk.events import MAX_EVENT, EventDecoder, StopMatcher, decode_object
from mesh.errors import MalformedMessage

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(alphabet=st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet="abc"), inner, max_size=3),
    max_leaves=6,
)
events = st.lists(
    st.dictionaries(st.text(alphabet=st.characters(codec="utf-8"), max_size=5), values, max_size=4)
)


def pieces(whole: Any, cuts: list[float]) -> list[Any]:
    """`whole` cut at these fractions of its length."""
    edges = [0, *sorted(int(cut * len(whole)) for cut in cuts), len(whole)]
    return [whole[start:end] for start, end in pairwise(edges)]


cuts = st.lists(st.floats(0, 1), max_size=12)


def encode(event: object, *, ascii_only: bool) -> bytes:
    return b"data: " + json.dumps(event, ensure_ascii=ascii_only).encode() + b"\n\n"


@given(events, cuts, st.booleans(), st.booleans())
def test_any_cutting_gives_the_same_events(
    sent: list[dict[str, Any]], where: list[float], ascii_only: bool, pings: bool
) -> None:
    separator = b":\n\n" if pings else b""
    whole = separator.join(encode(event, ascii_only=ascii_only) for event in sent) + b"data: [DONE]\n\n"
    decoder = EventDecoder()
    got = [event for piece in pieces(whole, where) for event in decoder.feed(piece)]
    assert got == sent
    assert decoder.done


@given(events)
def test_byte_by_byte(sent: list[dict[str, Any]]) -> None:
    decoder = EventDecoder()
    whole = b"".join(encode(event, ascii_only=False) for event in sent)
    assert [event for byte in whole for event in decoder.feed(bytes([byte]))] == sent
    assert not decoder.done


def test_fields_other_than_data_are_passed_over() -> None:
    assert EventDecoder().feed(b"event: x\nid: 1\ndata:{}\nretry: 3\n\n: comment\n\n") == [{}]


@given(st.binary(max_size=60))
def test_garbage_is_malformed_or_nothing(garbage: bytes) -> None:
    try:
        EventDecoder().feed(b"data: " + garbage + b"\n\n")
    except MalformedMessage:
        return


@pytest.mark.parametrize("payload", [b"", b"5", b"[]", b"{", b'{"a":1}x', b"\xff", b"[" * 5000])
def test_what_is_no_object(payload: bytes) -> None:
    with pytest.raises(MalformedMessage, match=r"not JSON|not a JSON object"):
        decode_object(payload)


def test_an_endless_event_is_refused() -> None:
    decoder = EventDecoder()
    with pytest.raises(MalformedMessage, match="larger than"):
        for _ in range(2 + MAX_EVENT // (1 << 20)):
            decoder.feed(b"x" * (1 << 20))


# --- stop strings

letters = st.text(alphabet="ab\n", max_size=40)
stops = st.lists(st.text(alphabet="ab\n", max_size=4), max_size=4)


def expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The text before the stop string that is complete first; of several the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(letters, stops, cuts)
def test_any_cutting_stops_at_the_same_place(text: str, stops: list[str], where: list[float]) -> None:
    matcher = StopMatcher(stops)
    shown = "".join(matcher.feed(piece) for piece in pieces(text, where))
    if matcher.matched is None:
        shown += matcher.flush()
    assert (shown, matcher.matched) == expected(text, stops)
    assert matcher.feed("ab") == "" if matcher.matched else True


@given(letters, stops, cuts)
def test_no_more_is_held_back_than_a_stop_string_may_need(
    text: str, stops: list[str], where: list[float]
) -> None:
    matcher = StopMatcher(stops)
    seen = shown = ""
    for piece in pieces(text, where):
        seen += piece
        shown += matcher.feed(piece)
        if matcher.matched is not None:
            return
        held = seen[len(shown) :]
        assert shown + held == seen
        assert not held or any(stop.startswith(held) for stop in stops)
