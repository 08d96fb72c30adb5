from __future__ import annotations

from typing import Any

import msgpack
import pytest

from mesh.errors import FrameTooLarge, MalformedMessage
from mesh.frames import (
    Credit,
    Data,
    Deframer,
    End,
    GoAway,
    Head,
    Message,
    Open,
    Ping,
    Pong,
    Reset,
    Unknown,
    decode,
    encode,
    prefix_length,
)
from mesh.limits import MAX_DATA, MAX_META_DEPTH, MAX_META_ITEMS, MAX_PLAINTEXT

EXAMPLES: list[tuple[Message, str]] = [
    (Open(1, "infer", {"model": "m"}), "940001a5696e66657281a56d6f64656ca16d"),
    (Data(1, b"abc"), "930101c403616263"),
    (End(3, {"usage": None}), "93020381a57573616765c0"),
    (Reset(2, 4, "full"), "94030204a466756c6c"),
    (Reset(2, 4, "full", 1500), "95030204a466756c6ccd05dc"),
    (Credit(70_000, 65_536), "9304ce00011170ce00010000"),
    (Ping(7), "920507"),
    (Ping(b"\x00\x01"), "9205c4020001"),
    (Pong(7, {"busy": 1}), "93060781a46275737901"),
    (GoAway(5, 9, "bye"), "94070509a3627965"),
    (Head(1, {"status": 200}), "93080181a6737461747573ccc8"),
]


@pytest.mark.parametrize(("message", "wire"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_exact_bytes_of_every_message(message: Message, wire: str) -> None:
    assert encode(message).hex() == wire
    assert list(decode(bytes.fromhex(wire))) == [message]


def test_one_frame_holds_many_messages() -> None:
    plaintext = b"".join(encode(message) for message, _ in EXAMPLES)
    assert list(decode(plaintext)) == [message for message, _ in EXAMPLES]


def test_longer_arrays_and_future_types_are_accepted_and_skipped() -> None:
    plaintext = (
        msgpack.packb([9, "from", {"the": "future"}])
        + msgpack.packb([5, 1, "more", "fields"])
        + msgpack.packb([200])
        + msgpack.packb([3, 1, 7, "", None])
    )
    assert list(decode(plaintext)) == [Unknown(9), Ping(1), Unknown(200), Reset(1, 7)]


def nested(depth: int) -> Any:
    value: Any = "bottom"
    for _ in range(depth):
        value = {"deeper": value}
    return value


MALFORMED: dict[str, bytes] = {
    "nothing": b"",
    "more than a frame holds": msgpack.packb([5, 1]) * 22_000,
    "not an array": msgpack.packb({"type": 1}),
    "an empty array": msgpack.packb([]),
    "type is text": msgpack.packb(["0", 1]),
    "type is a boolean": msgpack.packb([True, 1, b""]),
    "negative type": msgpack.packb([-1]),
    "missing field": msgpack.packb([0, 1, "infer"]),
    "stream 0": msgpack.packb([1, 0, b"x"]),
    "negative stream": msgpack.packb([1, -1, b"x"]),
    "stream above 2^31": msgpack.packb([1, 1 << 31, b"x"]),
    "stream is a boolean": msgpack.packb([1, True, b"x"]),
    "body is text": msgpack.packb([1, 1, "x"]),
    "body too long": msgpack.packb([1, 1, bytes(MAX_DATA + 1)]),
    "method is bytes": msgpack.packb([0, 1, b"infer", {}]),
    "empty method": msgpack.packb([0, 1, "", {}]),
    "endless method": msgpack.packb([0, 1, "m" * 300, {}]),
    "meta is a list": msgpack.packb([2, 1, []]),
    "meta is missing": msgpack.packb([2, 1]),
    "keys of meta are numbers": msgpack.packb([2, 1, {1: 2}]),
    "keys of meta are bytes": msgpack.packb([2, 1, {b"k": 2}]),
    "deep keys are bytes": msgpack.packb([2, 1, {"k": [{b"k": 2}]}]),
    "meta too deep": msgpack.packb([2, 1, nested(MAX_META_DEPTH + 1)]),
    "meta too long": msgpack.packb([2, 1, {str(n): n for n in range(MAX_META_ITEMS + 1)}]),
    "too many items in all": msgpack.packb([2, 1, {str(n): [0] * 1000 for n in range(5)}]),
    "an extension type": msgpack.packb([2, 1, {"k": msgpack.ExtType(5, b"")}]),
    "a timestamp": msgpack.packb([2, 1, {"k": msgpack.Timestamp(1, 0)}]),
    "text that is no UTF-8": b"\x93\x02\x01\x81\xa1k\xa1\xff",
    "credit of nothing": msgpack.packb([4, 1, 0]),
    "negative credit": msgpack.packb([4, 1, -5]),
    "endless token": msgpack.packb([5, bytes(33)]),
    "token is text": msgpack.packb([5, "x"]),
    "negative retry time": msgpack.packb([3, 1, 4, "", -1]),
    "cut off": msgpack.packb([1, 1, b"abc"])[:-1],
    "rubbish behind a message": msgpack.packb([5, 1]) + b"\xc1",
    "a length bomb": b"\x93\x01\x01\xc6\xff\xff\xff\xff",
    "an array bomb": b"\xdd\xff\xff\xff\xff",
    "a map bomb": b"\x93\x02\x01\xdf\xff\xff\xff\xff",
    "a nesting bomb": b"\x91" * 60_000,
}


@pytest.mark.parametrize("plaintext", MALFORMED.values(), ids=[name.replace(" ", "-") for name in MALFORMED])
def test_malformed_frames_are_refused(plaintext: bytes) -> None:
    with pytest.raises(MalformedMessage):
        list(decode(plaintext))


@pytest.mark.parametrize(
    "meta",
    [
        {"k": object()},
        {"k": {1, 2}},
        {1: 2},
        nested(20),
        {"k": [0] * 5000},
        {"k": "x" * 70_000},
        {"k": 1 << 70},
    ],
    ids=["object", "set", "key", "depth", "items", "size", "integer"],
)
def test_what_no_peer_would_accept_is_not_encoded(meta: Any) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        encode(Open(1, "infer", meta))


def test_the_largest_meta_fits() -> None:
    room = MAX_PLAINTEXT - len(encode(End(1, {"k": "x" * 60_000}))) + 60_000
    message = End(1, {"k": "x" * room})
    assert len(encode(message)) == MAX_PLAINTEXT
    assert list(decode(encode(message))) == [message]


def test_frames_are_cut_out_of_any_chunks() -> None:
    frames = [bytes([n]) * (17 + n * 200) for n in range(40)]
    stream = b"".join(map(prefix_length, frames))
    for size in (1, 2, 3, 18, 19, 1000, len(stream)):
        deframer = Deframer()
        got: list[bytes] = []
        for start in range(0, len(stream), size):
            got += deframer.feed(memoryview(stream)[start : start + size])
            assert deframer.pending <= 2 + 65_535
        assert got == frames
        assert deframer.pending == 0


def test_every_pair_of_cuts_gives_the_same_frames() -> None:
    frames = [bytes([n]) * (17 + n) for n in range(3)]
    stream = b"".join(map(prefix_length, frames))
    for first in range(len(stream)):
        for second in range(first, len(stream)):
            deframer = Deframer()
            parts = (stream[:first], stream[first:second], stream[second:])
            assert [frame for part in parts for frame in deframer.feed(part)] == frames
            assert deframer.pending == 0


def test_what_does_not_fit_into_a_frame() -> None:
    with pytest.raises(FrameTooLarge):
        prefix_length(bytes(65_536))
