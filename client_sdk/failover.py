"""An answer that survives its worker: what was delivered, and how another worker goes on. Pure.

The journal holds what the caller has been given. When a worker is lost, the next one gets a request
that makes it say exactly what is missing:

===========  ==========================================  ==================================
way          request                                     when
===========  ==========================================  ==================================
from start   the first request again                     nothing was delivered yet
replay       the first request again; what was already   sampling with a seed; greedy, where the
             delivered is compared and dropped           delivered part was quickly written; chat
                                                         deltas of tools or reasoning
ids          the prompt followed by the token ids that   plain text, otherwise
             were generated
prefill      the conversation with the unfinished        chat with only text delivered, otherwise
             answer as its last message
===========  ==========================================  ==================================

All ways continue exactly what was delivered. A replay moreover gives the very text that the lost worker
would have written: it evaluates the same tokens in the same batches, where `ids` and `prefill` evaluate
them as one prompt, whose last digits differ and may flip a close call later on. It costs the time that
the delivered part took, so it is taken where that was short.

Only a worker with the same model file (digest) may go on. Ids whose text was still incomplete (half a
UTF-8 sequence) are generated again; stop strings are matched here, over the whole text, and not by the
worker. Where no way is left `StreamInterrupted` says what was delivered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import orjson
from typing_extensions import override

from client_sdk.events import StopMatcher
from mesh.errors import (
    BackendFailed,
    BadRequest,
    ContextExceeded,
    MalformedMessage,
    QMeshError,
    StreamInterrupted,
)

REPLAY_WITHIN = 2.0
"""Seconds that writing the delivered part again may take, where it need not be written again."""


LIMITS = ("max_tokens", "max_completion_tokens", "n_predict")
"""The names under which a chat request may carry its limit of tokens."""
MAX_TOOL_CALLS = 128
"""Tool calls in one answer."""


class Way(StrEnum):
    """How a worker is asked to go on."""

    START = "from start"
    REPLAY = "replay"
    IDS = "ids"
    PREFILL = "prefill"


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of the answer. For chat, `message` holds the fields of the delta as they came."""

    text: str
    ids: tuple[int, ...] = ()
    message: Mapping[str, Any] | None = None


class ReplayDiverged(QMeshError):
    """A replayed answer differs from what was delivered; another way has to be taken."""


class Journal:
    """One answer, over as many workers as it takes. Subclasses know the endpoint's form."""

    path: str
    """The worker's endpoint."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.body = dict(body)
        self.text = ""
        """What the caller was given, after stop strings."""
        self.finish_reason: str | None = None
        self.usage: dict[str, int] = {}
        self.timings: dict[str, Any] = {}
        self.way = Way.START
        self.digest: bytes | None = None
        """The model file that the delivered part came from."""
        self.splices = 0
        self._to_drop = ""
        self._no_replay = False

    @property
    def started(self) -> bool:
        """Whether anything was delivered."""
        return bool(self.text)

    @property
    def tokens(self) -> int:
        """Tokens that stand behind the delivered text."""
        raise NotImplementedError

    @property
    def complete(self) -> bool:
        """Whether the delivered text is already the whole answer."""
        return self.finish_reason is not None

    @property
    def satisfied(self) -> bool:
        """Whether the worker need not go on, although it has not ended yet."""
        return False

    @property
    def seeded(self) -> bool:
        """Whether the request asks for reproducible sampling."""
        return self.body.get("seed", -1) not in (-1, None) and not self.greedy

    @property
    def greedy(self) -> bool:
        """Whether the request asks for greedy decoding."""
        temperature = self.body.get("temperature")
        return temperature is not None and temperature <= 0

    def next_request(self, took: float) -> dict[str, Any]:
        """The body for the next worker; writing what was delivered took this many seconds.

        Raises StreamInterrupted where no way is left.
        """
        self._reset_attempt()
        self._to_drop = ""
        if not self.started:
            self.way = Way.START
            return self._first()
        self.splices += 1
        self.way = self._choose(took)
        if self.way is Way.REPLAY:
            self._to_drop = self._delivered_raw()
            return self._first()
        return self._continuation()

    def next_body(self, took: float) -> bytes:
        """As `next_request`, as JSON. Raises BadRequest for values that JSON cannot hold."""
        try:
            return orjson.dumps(self.next_request(took))
        except TypeError as error:
            raise BadRequest(f"the request cannot be written as JSON: {error}") from error

    def accept(self, event: Mapping[str, Any]) -> Delta | None:
        """Take in one event of the current worker; the piece to deliver, if any.

        Raises BackendFailed or ContextExceeded for an error event, ReplayDiverged, MalformedMessage.
        """
        error = event.get("error")
        if error:
            raise _event_error(error)
        return self._accept(event)

    def finish(self) -> Delta | None:
        """The worker ended its answer in order: what was still held back."""
        raise NotImplementedError

    def lost(self, reason: str) -> StreamInterrupted:
        """The error for an answer that nobody can continue."""
        return StreamInterrupted(
            f"the answer broke off after {self.tokens} tokens and cannot be continued: {reason}",
            text=self.text,
            tokens=self.tokens,
        )

    def diverged(self) -> None:
        """Replaying did not give the same text: never try it again for this answer."""
        self._no_replay = True

    def _ended(self, reason: str) -> None:
        """The worker says that the answer is whole. Raises ReplayDiverged where it cannot be."""
        if self._to_drop:
            raise ReplayDiverged("the replayed answer ended before what was delivered")
        if self.finish_reason is None:
            self.finish_reason = reason

    def _drop(self, text: str) -> str:
        """Remove what was delivered before from a replayed piece."""
        if not self._to_drop:
            return text
        length = min(len(text), len(self._to_drop))
        if text[:length] != self._to_drop[:length]:
            raise ReplayDiverged("the replayed answer differs from what was delivered")
        self._to_drop = self._to_drop[length:]
        return text[length:]

    def _replay(self, took: float) -> bool:
        """Whether the first request can be repeated, and had better be."""
        return not self._no_replay and (self.seeded or (self.greedy and took <= REPLAY_WITHIN))

    def _choose(self, took: float) -> Way:
        raise NotImplementedError

    def _first(self) -> dict[str, Any]:
        raise NotImplementedError

    def _continuation(self) -> dict[str, Any]:
        raise NotImplementedError

    def _accept(self, event: Mapping[str, Any]) -> Delta | None:
        raise NotImplementedError

    def _delivered_raw(self) -> str:
        raise NotImplementedError

    def _reset_attempt(self) -> None:
        """Forget what belongs to the lost worker alone."""


class TextJournal(Journal):
    """Plain completion over llama-server's `/completion`, with token ids."""

    path = "/completion"

    def __init__(self, prompt: str | Sequence[int | str], body: Mapping[str, Any]) -> None:
        super().__init__(body)
        self._prompt: list[int | str] = [prompt] if isinstance(prompt, str) else list(prompt)
        stops = self.body.pop("stop", None) or []
        self._stops = StopMatcher([stops] if isinstance(stops, str) else list(stops))
        self._raw = ""
        """The text of `_ids`, before stop strings."""
        self._ids: list[int] = []
        self._pending: list[int] = []
        """Ids whose text is not complete yet."""
        self._resent = 0
        """Generated ids that the current worker got as part of its prompt."""
        self._limit: int | None = self.body.get("n_predict")

    @property
    @override
    def started(self) -> bool:
        return bool(self._raw)

    @property
    @override
    def tokens(self) -> int:
        return len(self._ids)

    @property
    def ids(self) -> tuple[int, ...]:
        """The generated token ids."""
        return tuple(self._ids)

    @override
    def _choose(self, took: float) -> Way:
        return Way.REPLAY if self._replay(took) else Way.IDS

    @override
    def _first(self) -> dict[str, Any]:
        return {**self.body, "prompt": _one(self._prompt), "stream": True, "return_tokens": True}

    @override
    def _continuation(self) -> dict[str, Any]:
        body = self._first()
        body["prompt"] = [*self._prompt, *self._ids]
        self._resent = len(self._ids)
        if self._limit is not None and self._limit >= 0:
            body["n_predict"] = self._limit - len(self._ids)
        return body

    @property
    @override
    def satisfied(self) -> bool:
        return self._stops.matched is not None

    @property
    @override
    def complete(self) -> bool:
        if self._limit is not None and 0 <= self._limit <= len(self._ids) and self.finish_reason is None:
            self.finish_reason = "length"
        return self.finish_reason is not None

    @override
    def _accept(self, event: Mapping[str, Any]) -> Delta | None:
        content, ids = event.get("content", ""), event.get("tokens") or []
        if (
            not isinstance(content, str)
            or not isinstance(ids, list)
            or not all(isinstance(one, int) for one in ids)
        ):
            raise MalformedMessage("the worker's completion event has the wrong form")
        delta = self._deliver(content, ids)
        if event.get("stop") is True:
            self.timings = dict(_mapping(event.get("timings")))
            self._ended("length" if event.get("stop_type") == "limit" else "stop")
        return delta

    def _deliver(self, content: str, ids: list[int]) -> Delta | None:
        self._pending += ids
        if not content:
            return None
        fresh, self._pending = tuple(self._pending), []
        if self._to_drop:
            if self._drop(content):
                raise ReplayDiverged("the replayed answer was cut elsewhere")
            return None
        self._ids += fresh
        self._raw += content
        shown = self._stops.feed(content)
        self.text += shown
        if self._stops.matched is not None:
            self.finish_reason = "stop"
        return Delta(shown, fresh) if shown else None

    @override
    def finish(self) -> Delta | None:
        shown = self._stops.flush()
        self.text += shown
        seen = _count(self.timings, "prompt_n") + _count(self.timings, "cache_n")
        self.usage = {
            "prompt_tokens": max(0, seen - self._resent),
            "completion_tokens": len(self._ids),
        }
        return Delta(shown) if shown else None

    @override
    def _delivered_raw(self) -> str:
        return self._raw

    @override
    def _reset_attempt(self) -> None:
        self._pending = []
        self._resent = 0


class ChatJournal(Journal):
    """A chat answer over `/v1/chat/completions`."""

    path = "/v1/chat/completions"

    def __init__(self, messages: Sequence[Mapping[str, Any]], body: Mapping[str, Any]) -> None:
        super().__init__(body)
        self._messages = [dict(message) for message in messages]
        self._only_text = True
        self._raw = ""
        """All delta fields in order of arrival: what a replay is compared with."""
        self._count = 0
        """Tokens behind what was delivered: as the server counts them, else one for each delta."""
        self._resent = 0
        """Those of them that the current worker got as part of its prompt."""

    @property
    @override
    def started(self) -> bool:
        return bool(self._raw)

    @property
    @override
    def tokens(self) -> int:
        return self._count

    @property
    @override
    def complete(self) -> bool:
        limits = [self.body[key] for key in LIMITS if isinstance(self.body.get(key), int)]
        if self.finish_reason is None and any(0 < limit <= self._count for limit in limits):
            self.finish_reason = "length"
        return self.finish_reason is not None

    @override
    def _choose(self, took: float) -> Way:
        if self._replay(took):
            return Way.REPLAY
        if self._only_text:
            return Way.PREFILL
        if self.greedy and not self._no_replay:
            return Way.REPLAY
        raise self.lost("tool calls or reasoning were sampled without a seed")

    @override
    def _first(self) -> dict[str, Any]:
        options = {**(self.body.get("stream_options") or {}), "include_usage": True}
        return {
            "timings_per_token": True,  # a delta may be several tokens
            **self.body,
            "messages": self._messages,
            "stream": True,
            "stream_options": options,
        }

    @override
    def _continuation(self) -> dict[str, Any]:
        body = self._first()
        body["messages"] = [*self._messages, {"role": "assistant", "content": self.text}]
        body["add_generation_prompt"] = False
        body["continue_final_message"] = True
        self._resent = self._count
        for key in LIMITS:
            if isinstance(body.get(key), int) and body[key] > 0:
                body[key] = max(1, body[key] - self._count)
        return body

    @override
    def _reset_attempt(self) -> None:
        self._resent = 0

    @override
    def _accept(self, event: Mapping[str, Any]) -> Delta | None:
        if event.get("usage"):
            self._take_usage(_mapping(event["usage"]))
        if event.get("timings"):
            self.timings = dict(_mapping(event["timings"]))
        choices = event.get("choices") or []
        if not isinstance(choices, list):
            raise MalformedMessage("the worker's chat event has the wrong form")
        if not choices:
            return None
        choice = _mapping(choices[0])
        fields = _mapping(choice.get("delta"))
        delta = self._deliver({key: value for key, value in fields.items() if value and key != "role"})
        if delta is not None:
            written = _count(self.timings, "predicted_n") if event.get("timings") else 0
            self._count = self._resent + written if written else self._count + 1
        if choice.get("finish_reason"):
            self._ended(str(choice["finish_reason"]))
        return delta

    def _deliver(self, delta: dict[str, Any]) -> Delta | None:
        if not delta:
            return None
        content = delta.get("content") or ""
        if not isinstance(content, str) or not _tool_calls_are_sound(delta.get("tool_calls") or []):
            raise MalformedMessage("the worker's chat event has the wrong form")
        if self._to_drop:
            key = _flat(delta)
            fresh = self._drop(key)
            if not fresh:
                return None
            if fresh != key:
                # The replayed chunk was cut elsewhere; only plain text can be split.
                if set(delta) != {"content"}:
                    raise ReplayDiverged("the replayed answer was cut in the middle of a tool call")
                content = fresh
                delta = {"content": fresh}
        self._only_text &= set(delta) == {"content"}
        self._raw += _flat(delta)
        self.text += content
        return Delta(content, message=delta)

    def _take_usage(self, usage: Mapping[str, Any]) -> None:
        self.usage = {
            "prompt_tokens": max(0, _count(usage, "prompt_tokens") - self._resent),
            "completion_tokens": _count(usage, "completion_tokens") + self._resent,
        }

    @override
    def finish(self) -> Delta | None:
        return None

    @override
    def _delivered_raw(self) -> str:
        return self._raw


def _one(prompt: list[int | str]) -> str | list[int | str]:
    """A prompt of one text goes as that text: the common case stays readable in logs of others."""
    return prompt[0] if len(prompt) == 1 and isinstance(prompt[0], str) else prompt


def _mapping(value: object) -> Mapping[str, Any]:
    """A JSON object, {} for null. Raises MalformedMessage."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise MalformedMessage("the worker's event has the wrong form")
    return value


def _count(numbers: Mapping[str, Any], key: str) -> int:
    """A number of tokens, 0 where it is absent. Raises MalformedMessage."""
    value = numbers.get(key, 0)
    if not isinstance(value, int) or value < 0:
        raise MalformedMessage(f"the worker's {key} is no number of tokens")
    return value


def _tool_calls_are_sound(pieces: object) -> bool:
    """Whether the pieces of tool calls have the form of OpenAI's streaming deltas."""
    return isinstance(pieces, list) and all(
        isinstance(piece, Mapping)
        and isinstance(piece.get("index", 0), int)
        and 0 <= piece.get("index", 0) < MAX_TOOL_CALLS
        and isinstance(piece.get("function") or {}, Mapping)
        and all(isinstance(text, str | None) for text in (piece.get("function") or {}).values())
        for piece in pieces
    )


def _flat(delta: Mapping[str, Any]) -> str:
    """A delta's text, whichever field it is in, as one comparable string."""
    parts = []
    for key in sorted(delta):
        value = delta[key]
        parts.append(value if isinstance(value, str) else repr(value))
    return "".join(parts)


def _event_error(error: object) -> QMeshError:
    """The exception for an error that came in mid-stream (docs: llama-server's `data: {"error": …}`)."""
    details = error if isinstance(error, Mapping) else {}
    message = str(details.get("message", "the model server failed in mid-answer"))[:200]
    if details.get("type") == "exceed_context_size_error":
        return ContextExceeded(message)
    return BackendFailed(message)
