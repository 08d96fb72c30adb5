"""The journal of a chat: goes on from the unfinished message. Pure; see `client_sdk.failover`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from client_sdk.failover import Delta, Journal, ReplayDiverged, Way, count, mapping
from mesh.errors import MalformedMessage

LIMITS = ("max_tokens", "max_completion_tokens", "n_predict")
"""The names under which a chat request may carry its limit of tokens."""
MAX_TOOL_CALLS = 128
"""Tool calls in one answer."""


def limits_of(body: Mapping[str, Any]) -> list[int]:
    """The limits of tokens that a chat request carries; a negative one is none."""
    return [body[key] for key in LIMITS if isinstance(body.get(key), int)]


def prefilled(body: Mapping[str, Any], text: str, written: int) -> dict[str, Any]:
    """The chat request that goes on from `text`, which took `written` tokens of its limit."""
    limits = {key: body[key] for key in LIMITS if isinstance(body.get(key), int) and body[key] > 0}
    return {
        **body,
        "messages": [*body.get("messages", ()), {"role": "assistant", "content": text}],
        "add_generation_prompt": False,
        "continue_final_message": True,
        **{key: max(1, limit - written) for key, limit in limits.items()},
    }


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
        if self.finish_reason is None and any(0 < limit <= self._count for limit in limits_of(self.body)):
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
        self._resent = self._count
        return prefilled(self._first(), self.text, self._count)

    @override
    def _reset_attempt(self) -> None:
        self._resent = 0

    @override
    def _accept(self, event: Mapping[str, Any]) -> Delta | None:
        if event.get("usage"):
            self._take_usage(mapping(event["usage"]))
        if event.get("timings"):
            self.timings = dict(mapping(event["timings"]))
        choices = event.get("choices") or []
        if not isinstance(choices, list):
            raise MalformedMessage("the worker's chat event has the wrong form")
        if not choices:
            return None
        choice = mapping(choices[0])
        fields = mapping(choice.get("delta"))
        delta = self._deliver({key: value for key, value in fields.items() if value and key != "role"})
        if delta is not None:
            written = count(self.timings, "predicted_n") if event.get("timings") else 0
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
            "prompt_tokens": max(0, count(usage, "prompt_tokens") - self._resent),
            "completion_tokens": count(usage, "completion_tokens") + self._resent,
        }

    @override
    def finish(self) -> Delta | None:
        return None

    @override
    def _delivered_raw(self) -> str:
        return self._raw


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
