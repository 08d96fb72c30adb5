"""What is kept of a raw answer for continuing it."""

from __future__ import annotations

from random import Random

import pytest

from client_sdk.passthrough import Passthrough
from client_sdk.transcript import MAX_JOURNAL, Transcript
from mesh.errors import BackendFailed, StreamInterrupted

PATH = "/v1/chat/completions"


def event(content: str, **more: str) -> bytes:
    fields = "".join(f',"{key}":{value}' for key, value in more.items())
    choice = f'{{"index":0,"delta":{{"content":"{content}"}}{fields}}}'
    return f'data: {{"id":"chatcmpl-1","choices":[{choice}]}}\n\n'.encode()


def test_the_text_of_a_chat_is_read_when_it_is_asked_for() -> None:
    transcript = Transcript(chat=True)
    transcript.add(event("On") + b": a comment\n\n" + event("ce"))
    transcript.add(event(" é"))
    assert (transcript.text, transcript.tokens, transcript.ascii) == ("Once é", 3, False)
    assert transcript.first == {"id": "chatcmpl-1"}
    assert len(transcript.payloads) == 3
    transcript.add(event("", finish_reason='"stop"'))
    assert transcript.text is None
    assert len(transcript.payloads) == 4


def test_what_is_too_long_is_counted_and_not_kept() -> None:
    journal = Passthrough(PATH, {"messages": [], "stream": True}, Random(1))
    piece = event("x" * 100_000)
    for _ in range(MAX_JOURNAL // len(piece) + 1):
        assert journal.feed(piece) == piece
    with pytest.raises(StreamInterrupted, match="longer than"):
        journal.next_body(0.0)


@pytest.mark.parametrize("before", [b"", event("Once")])
def test_the_servers_own_error_is_not_handed_on(before: bytes) -> None:
    journal = Passthrough(PATH, {"messages": [], "stream": True}, Random(1))
    assert journal.feed(event('say \\"error\\"')), "the word alone is no error"
    with pytest.raises(BackendFailed):
        journal.feed(before + b'data: {"error":{"code":500,"message":"x"}}\n\n')


def test_events_are_handed_on_whole() -> None:
    journal = Passthrough(PATH, {"messages": [], "stream": True}, Random(1))
    first, second = event("a"), event("b")
    assert journal.feed(first[:10]) == b""
    assert journal.feed(first[10:] + second[:-1]) == first
    assert journal.feed(second[-1:]) == second
    assert journal.feed(first) == first
    assert journal.finish() == b""
