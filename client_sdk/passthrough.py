"""An endpoint's own bytes, over as many workers as it takes. Pure.

The first worker's bytes are handed on unchanged, event by event. When a worker is lost in mid-stream
the next one is made to say what is missing, and its events are fitted on:

replay   The same request again; sampling is made repeatable by a seed, which is added where the caller
         gave none. What was delivered already is compared (texts, not times or ids) and dropped.
prefill  A chat of which only plain text was delivered goes on from that text as an unfinished message,
         which costs one reading of the prompt instead of writing everything again. With a limit of tokens
         only where it is known how many were delivered: an event is one token, unless the server held text
         back, which it does for stop strings and in the middle of a character that is not ASCII.

Ids and times of the first worker are kept in the events of the later ones, so that the caller sees one
answer. Bodies that are no event streams are held until they are whole: they can always be asked again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from random import Random
from typing import Any

import orjson

from client_sdk.chat_journal import limits_of, prefilled
from client_sdk.events import MAX_EVENT, payloads_of
from client_sdk.failover import REPLAY_WITHIN, ReplayDiverged, Way
from client_sdk.transcript import MAX_JOURNAL, Transcript, decoded
from mesh.errors import BackendFailed, MalformedMessage, StreamInterrupted

MAX_WHOLE = 64 << 20
_SEEDED = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/completion", "/infill", "/v1/messages", "/v1/responses"}
)
_ID = re.compile(r"(chatcmpl|cmpl|resp|msg|call|item|fc|rs|toolu)[-_][A-Za-z0-9_-]{8,}")
_VOLATILE = frozenset(
    {"created", "created_at", "completed_at", "timings", "logprobs", "usage", "tokens_per_second"}
)


class Passthrough:
    """One raw answer. `path` and `body` are the caller's request."""

    def __init__(self, path: str, body: Mapping[str, Any], rng: Random) -> None:
        self.path = path
        self.body = dict(body)
        self.streaming = self.body.get("stream") is True
        self._own_seed = self.body.get("seed") in (None, -1)
        if self.streaming and path in _SEEDED and self._own_seed:
            self.body["seed"] = rng.getrandbits(31)
        self.way = Way.START
        self.digest: bytes | None = None
        self.complete = False
        self._delivered = Transcript(chat=path == "/v1/chat/completions")
        self._rest = bytearray()
        self._replayed = 0
        self._renamed: dict[bytes, bytes] = {}
        self._no_replay = False
        self._holds_back = bool(self.body.get("stop"))
        """Whether the server may put several tokens into one event."""
        self._resent = 0
        """Tokens that the current worker got as part of its prompt."""

    @property
    def started(self) -> bool:
        """Whether anything was delivered."""
        return self._delivered.size > 0

    def next_body(self, took: float) -> bytes:
        """The body for the next worker; writing what was delivered took this many seconds.

        Raises StreamInterrupted where no way is left.
        """
        self._rest.clear()
        self._replayed = 0
        self._resent = 0
        if not self.started:
            self.way = Way.START
            return orjson.dumps(self.body)
        if not self._delivered.kept:
            raise self.lost(f"it is longer than the {MAX_JOURNAL} bytes that are kept for that")
        quick = self.body.get("temperature") == 0 and took <= REPLAY_WITHIN
        text, tokens = self._delivered.text, self._delivered.tokens
        if text and (self._no_replay or (self._own_seed and not quick and self._within_limits)):
            self.way = Way.PREFILL
            self._resent = tokens
            return orjson.dumps(prefilled(self.body, text, tokens))
        if self._no_replay or self.path not in _SEEDED:
            raise self.lost("this kind of answer cannot be repeated exactly")
        self.way = Way.REPLAY
        return orjson.dumps(self.body)

    def feed(self, data: bytes) -> bytes:
        """Take in bytes of the current worker; the bytes to deliver now.

        Raises ReplayDiverged, MalformedMessage for an endless event, BackendFailed for an error that
        the server sent in mid-stream.
        """
        if self._rest or not self.streaming or not data.endswith(b"\n\n"):
            data = self._whole_events(data)
        if not data:
            return b""
        if self.way is Way.START:
            self._keep(data)
            return data
        return b"".join(self._fitted(event) for event in data.split(b"\n\n")[:-1])

    def _whole_events(self, data: bytes) -> bytes:
        self._rest += data
        if not self.streaming:
            if len(self._rest) > MAX_WHOLE:
                raise MalformedMessage(f"the answer is larger than {MAX_WHOLE} bytes")
            return b""
        end = self._rest.rfind(b"\n\n") + 2
        if end < 2:
            if len(self._rest) > MAX_EVENT:
                raise MalformedMessage(f"an event of the answer is larger than {MAX_EVENT} bytes")
            return b""
        whole = bytes(self._rest[:end])
        del self._rest[:end]
        return whole

    def finish(self) -> bytes:
        """The worker ended its answer in order: what was held. Marks the answer complete.

        Raises BackendFailed where a stream ended in the middle of an event.
        """
        if self.streaming:
            if self._rest.strip():
                raise BackendFailed("the answer ended in the middle of an event")
            if self.way is Way.REPLAY and self._replayed < len(self._delivered.payloads):
                raise ReplayDiverged("the replayed answer is shorter than what was delivered")
            self.complete = True
            return b""
        self.complete = True
        return bytes(self._rest)

    def diverged(self) -> None:
        """Replaying gave another text: never try it again for this answer."""
        self._no_replay = True

    def lost(self, reason: str) -> StreamInterrupted:
        """The error for an answer that nobody can continue."""
        return StreamInterrupted(
            f"the answer broke off and cannot be continued: {reason}",
            text=self._delivered.text or "",
            tokens=self._delivered.tokens,
        )

    def _keep(self, whole: bytes) -> None:
        """Remember what is delivered. Raises BackendFailed for the server's own error event instead."""
        if b'"error"' in whole and any(decoded(payload).get("error") for payload in payloads_of(whole)):
            raise BackendFailed("the model server failed in mid-answer")
        self._delivered.add(whole)

    def _fitted(self, event: bytes) -> bytes:
        """An event of a later worker as the caller is to see it; empty where it was delivered before."""
        payload = next(payloads_of(event), None)
        if payload is None:
            return event + b"\n\n"  # a comment
        if self.way is Way.PREFILL:
            return self._fit_prefilled(payload)
        if self._replayed < len(self._delivered.payloads):
            self._compare(payload)
            return b""
        for new, old in self._renamed.items():
            event = event.replace(new, old)
        whole = event + b"\n\n"
        self._keep(whole)
        self._replayed += 1
        return whole

    def _compare(self, payload: bytes) -> None:
        """A replayed event against the one that was delivered in its place; learns which id is which."""
        before = self._delivered.payloads[self._replayed]
        self._replayed += 1
        if payload == before:
            return
        old, new = decoded(before), decoded(payload)
        if not self._alike(old, new):
            raise ReplayDiverged("the replayed answer differs from what was delivered")

    def _alike(self, old: Any, new: Any, key: str = "") -> bool:
        if key in _VOLATILE:
            if isinstance(old, int) and isinstance(new, int) and old != new:
                self._renamed[b'"%s":%d' % (key.encode(), new)] = b'"%s":%d' % (key.encode(), old)
            return True
        if isinstance(old, dict) and isinstance(new, dict):
            return old.keys() == new.keys() and all(self._alike(old[name], new[name], name) for name in old)
        if isinstance(old, list) and isinstance(new, list):
            return len(old) == len(new) and all(map(self._alike, old, new))
        if isinstance(old, str) and isinstance(new, str) and old != new:
            if _ID.fullmatch(old) and _ID.fullmatch(new):
                self._renamed[new.encode()] = old.encode()
                return True
            return False
        return bool(old == new) or (isinstance(old, int | float) and isinstance(new, int | float))

    @property
    def _within_limits(self) -> bool:
        """Whether a limit of tokens can be kept exactly, and is not reached yet."""
        tokens, exact = self._delivered.tokens, self._delivered.ascii and not self._holds_back
        return all(limit < 0 or (exact and tokens < limit) for limit in limits_of(self.body))

    def _fit_prefilled(self, payload: bytes) -> bytes:
        if payload == b"[DONE]":
            whole = b"data: [DONE]\n\n"
        else:
            event = {**decoded(payload), **self._delivered.first}
            usage = event.get("usage")
            if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
                usage["completion_tokens"] += self._resent
                if isinstance(usage.get("prompt_tokens"), int):
                    usage["prompt_tokens"] = max(0, usage["prompt_tokens"] - self._resent)
            choices = event.get("choices") or []
            if choices and set(choices[0].get("delta") or ()) >= {"role"}:
                return b""  # the opening of a message that is open already
            whole = b"data: " + orjson.dumps(event) + b"\n\n"
        self._keep(whole)
        return whole
