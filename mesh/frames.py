"""Messages and frames: what travels inside the encrypted connection (docs/protocol.md, "Frames").

A frame is `u16 big-endian length ‖ ciphertext`; its plaintext is one or more msgpack arrays, one after
another. This module cuts the byte stream into frames and turns plaintexts into messages and back. It
is strict: what is not exactly a message of the protocol raises MalformedMessage, except message types
from the future, which are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgpack

from mesh.errors import FrameTooLarge, MalformedMessage
from mesh.limits import (
    MAX_DATA,
    MAX_FRAME,
    MAX_META_DEPTH,
    MAX_META_ITEMS,
    MAX_PLAINTEXT,
    MAX_SID,
    MAX_TEXT,
    MAX_TOKEN,
)

Meta = Mapping[str, Any]
Token = int | bytes

OPEN, DATA, END, RESET, CREDIT, PING, PONG, GOAWAY, HEAD = range(9)


@dataclass(slots=True)
class Open:
    """Type 0: starts stream `sid`."""

    sid: int
    method: str
    meta: Meta


@dataclass(slots=True)
class Data:
    """Type 1: at most MAX_DATA bytes of a body."""

    sid: int
    data: bytes


@dataclass(slots=True)
class End:
    """Type 2: this direction of the stream is complete."""

    sid: int
    meta: Meta


@dataclass(slots=True)
class Reset:
    """Type 3: cancels or fails both directions of the stream. `retry_after_ms` is None or at least 0."""

    sid: int
    code: int
    message: str = ""
    retry_after_ms: int | None = None


@dataclass(slots=True)
class Credit:
    """Type 4: `amount` more bytes of DATA may be sent on the stream."""

    sid: int
    amount: int


@dataclass(slots=True)
class Ping:
    """Type 5: asks for a PONG with the same token."""

    token: Token


@dataclass(slots=True)
class Pong:
    """Type 6: answers a PING, with the sender's live load."""

    token: Token
    load: Meta


@dataclass(slots=True)
class GoAway:
    """Type 7: no new streams; those that the receiver opened above `last_sid` were not started."""

    last_sid: int
    code: int
    message: str = ""


@dataclass(slots=True)
class Head:
    """Type 8: the head of a response."""

    sid: int
    meta: Meta


@dataclass(slots=True)
class Unknown:
    """A type from a later version of the protocol: skipped."""

    kind: int


Message = Open | Data | End | Reset | Credit | Ping | Pong | GoAway | Head


class Deframer:
    """Cuts an arriving byte stream into ciphertexts. Holds at most one unfinished frame."""

    __slots__ = ("_tail",)

    def __init__(self) -> None:
        self._tail: bytearray | None = None  # made only while a frame is unfinished

    def feed(self, data: bytes | memoryview) -> list[bytes]:
        """The frames that are complete now, without their lengths; `data` is not kept."""
        frames: list[bytes] = []
        position, end = 0, len(data)
        tail = self._tail
        if tail is not None and end:
            if len(tail) == 1:
                tail += data[:1]
                position = 1
            missing = 2 + _frame_size(tail, 0) - len(tail)
            tail += data[position : position + missing]
            position += missing
            if position > end:
                return frames
            frames.append(bytes(tail[2:]))
            self._tail = None
        while end - position >= 2:
            following = position + 2 + _frame_size(data, position)
            if following > end:
                break
            frames.append(bytes(data[position + 2 : following]))
            position = following
        if position < end:
            self._tail = bytearray(data[position:])
        return frames

    @property
    def pending(self) -> int:
        """Bytes of the unfinished frame."""
        return len(self._tail or b"")


def _frame_size(data: bytes | bytearray | memoryview, position: int) -> int:
    return data[position] << 8 | data[position + 1]


def prefix_length(message: bytes) -> bytes:
    """`u16 big-endian length ‖ message`. Raises FrameTooLarge over 65,535 bytes."""
    if len(message) > MAX_FRAME:
        raise FrameTooLarge(f"{len(message)} bytes do not fit into one frame")
    return len(message).to_bytes(2, "big") + message


def encode(message: Message) -> bytes:
    """The msgpack array of a message.

    Raises ValueError for what no peer would accept: a meta too deep, with too many items or of other
    types than msgpack's own, or a message over MAX_PLAINTEXT.
    """
    match message:
        case Data(sid, data):
            fields: tuple[Any, ...] = (DATA, sid, data)
        case Open(sid, method, meta):
            fields = (OPEN, sid, method, _sendable(meta))
        case Head(sid, meta):
            fields = (HEAD, sid, _sendable(meta))
        case End(sid, meta):
            fields = (END, sid, _sendable(meta))
        case Credit(sid, amount):
            fields = (CREDIT, sid, amount)
        case Reset(sid, code, text, None):
            fields = (RESET, sid, code, text)
        case Reset(sid, code, text, retry_after_ms):
            fields = (RESET, sid, code, text, retry_after_ms)
        case Ping(token):
            fields = (PING, token)
        case Pong(token, load):
            fields = (PONG, token, _sendable(load))
        case GoAway(last_sid, code, text):
            fields = (GOAWAY, last_sid, code, text)
    try:
        packed: bytes = msgpack.packb(fields)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"not expressible in msgpack: {error}") from error
    if len(packed) > MAX_PLAINTEXT:
        raise ValueError(f"{len(packed)} bytes are more than one message can hold ({MAX_PLAINTEXT})")
    return packed


def decode(plaintext: bytes) -> Iterator[Message | Unknown]:
    """The messages of a frame in order.

    Decodes while it is iterated, so that a frame full of tiny messages can be dealt with in parts.
    Raises MalformedMessage for anything else that is not exactly one or more messages.
    """
    unpacker = msgpack.Unpacker(
        max_buffer_size=MAX_PLAINTEXT, max_array_len=MAX_META_ITEMS, max_map_len=MAX_META_ITEMS, max_ext_len=0
    )
    size = len(plaintext)
    if not 0 < size <= MAX_PLAINTEXT:
        raise MalformedMessage(f"a frame holds 1 to {MAX_PLAINTEXT} bytes, not {size}")
    unpacker.feed(plaintext)
    while unpacker.tell() < size:
        try:
            yield _decode_one(unpacker.unpack())
        except msgpack.OutOfData as error:
            raise MalformedMessage("a frame ends in the middle of a message") from error
        except (ValueError, IndexError, msgpack.UnpackException) as error:
            raise MalformedMessage(f"not a message: {str(error) or type(error).__name__}") from error


def _decode_one(fields: object) -> Message | Unknown:
    if type(fields) is not list or not fields or type(fields[0]) is not int or fields[0] < 0:
        raise MalformedMessage("a message is an array that starts with its type")
    return _DECODERS[fields[0]](fields) if fields[0] < len(_DECODERS) else Unknown(fields[0])


def _decode_open(fields: list[Any]) -> Message:
    method = fields[2]
    if type(method) is not str or not 1 <= len(method) <= MAX_TEXT:
        raise MalformedMessage("a method is a short text")
    return Open(_sid(fields[1]), method, _meta(fields[3]))


def _decode_data(fields: list[Any]) -> Message:
    data = fields[2]
    if type(data) is not bytes or len(data) > MAX_DATA:
        raise MalformedMessage(f"DATA carries at most {MAX_DATA} bytes")
    return Data(_sid(fields[1]), data)


def _decode_reset(fields: list[Any]) -> Message:
    retry_after_ms = fields[4] if len(fields) > 4 else None
    if retry_after_ms is not None:
        retry_after_ms = _unsigned(retry_after_ms)
    return Reset(_sid(fields[1]), _unsigned(fields[2]), _text(fields[3]), retry_after_ms)


def _decode_credit(fields: list[Any]) -> Message:
    amount = _unsigned(fields[2])
    if amount == 0:
        raise MalformedMessage("a CREDIT of nothing")
    return Credit(_sid(fields[1]), amount)


_DECODERS: Final[tuple[Callable[[list[Any]], Message], ...]] = (
    _decode_open,
    _decode_data,
    lambda fields: End(_sid(fields[1]), _meta(fields[2])),
    _decode_reset,
    _decode_credit,
    lambda fields: Ping(_token(fields[1])),
    lambda fields: Pong(_token(fields[1]), _meta(fields[2])),
    lambda fields: GoAway(_unsigned(fields[1]), _unsigned(fields[2]), _text(fields[3])),
    lambda fields: Head(_sid(fields[1]), _meta(fields[2])),
)


def _sid(value: object) -> int:
    if type(value) is not int or not 1 <= value <= MAX_SID:
        raise MalformedMessage("a stream id is an integer from 1 to 2^31 - 1")
    return value


def _unsigned(value: object) -> int:
    if type(value) is not int or not 0 <= value <= MAX_SID:
        raise MalformedMessage("a number outside 0 to 2^31 - 1")
    return value


def _text(value: object) -> str:
    if type(value) is not str or len(value) > MAX_TEXT:
        raise MalformedMessage(f"a text has at most {MAX_TEXT} characters")
    return value


def _token(value: object) -> Token:
    if (type(value) is int and value >= 0) or (type(value) is bytes and len(value) <= MAX_TOKEN):
        return value
    raise MalformedMessage(f"a token is an unsigned integer or at most {MAX_TOKEN} bytes")


def _meta(value: object) -> Meta:
    if type(value) is not dict:
        raise MalformedMessage("meta is a map")
    problem = _problem(value)
    if problem:
        raise MalformedMessage(problem)
    return value


def _sendable(meta: Meta) -> Meta:
    problem = _problem(meta)
    if problem:
        raise ValueError(problem)
    return meta


def _problem(meta: Meta) -> str | None:
    """Why this is no meta: a map with text keys, of msgpack's plain types, within the caps; else None."""
    items = 0
    level: list[Any] = [meta]
    for _ in range(MAX_META_DEPTH):
        deeper: list[Any] = []
        for container in level:
            items += len(container)
            if items > MAX_META_ITEMS:
                return f"meta has more than {MAX_META_ITEMS} items"
            if isinstance(container, Mapping):
                if not all(type(key) is str for key in container):
                    return "a key of meta is not text"
                values: Any = container.values()
            else:
                values = container
            for value in values:
                if type(value) in (dict, list, tuple):
                    deeper.append(value)
                elif not (value is None or isinstance(value, str | int | float | bytes)):
                    return f"meta holds a value of type {type(value).__name__}"
        if not deeper:
            return None
        level = deeper
    return f"meta is nested deeper than {MAX_META_DEPTH}"
