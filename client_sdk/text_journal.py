"""The journal of a plain completion: goes on by token ids. Pure; see `client_sdk.failover`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from client_sdk.events import StopMatcher
from client_sdk.failover import Delta, Journal, ReplayDiverged, Way, count, mapping
from mesh.errors import MalformedMessage


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
            self.timings = dict(mapping(event.get("timings")))
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
        seen = count(self.timings, "prompt_n") + count(self.timings, "cache_n")
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


def _one(prompt: list[int | str]) -> str | list[int | str]:
    """A prompt of one text goes as that text: the common case stays readable in logs of others."""
    return prompt[0] if len(prompt) == 1 and isinstance(prompt[0], str) else prompt
