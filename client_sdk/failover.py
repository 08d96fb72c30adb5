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

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import orjson

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


class Journal(ABC):
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
    @abstractmethod
    def tokens(self) -> int:
        """Tokens that stand behind the delivered text."""

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

    @abstractmethod
    def finish(self) -> Delta | None:
        """The worker ended its answer in order: what was still held back."""

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

    @abstractmethod
    def _choose(self, took: float) -> Way:
        """How the next worker is to go on. Raises StreamInterrupted."""

    @abstractmethod
    def _first(self) -> dict[str, Any]:
        """The request as it was first made."""

    @abstractmethod
    def _continuation(self) -> dict[str, Any]:
        """The request for what is missing."""

    @abstractmethod
    def _accept(self, event: Mapping[str, Any]) -> Delta | None:
        """`accept` for an event that is no error."""

    @abstractmethod
    def _delivered_raw(self) -> str:
        """What a replay is compared with."""

    @abstractmethod
    def _reset_attempt(self) -> None:
        """Forget what belongs to the lost worker alone."""


def mapping(value: object) -> Mapping[str, Any]:
    """A JSON object, {} for null. Raises MalformedMessage."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise MalformedMessage("the worker's event has the wrong form")
    return value


def count(numbers: Mapping[str, Any], key: str) -> int:
    """A number of tokens, 0 where it is absent. Raises MalformedMessage."""
    value = numbers.get(key, 0)
    if not isinstance(value, int) or value < 0:
        raise MalformedMessage(f"the worker's {key} is no number of tokens")
    return value


def _event_error(error: object) -> QMeshError:
    """The exception for an error that came in mid-stream (docs: llama-server's `data: {"error": …}`)."""
    details = error if isinstance(error, Mapping) else {}
    message = str(details.get("message", "the model server failed in mid-answer"))[:200]
    if details.get("type") == "exceed_context_size_error":
        return ContextExceeded(message)
    return BackendFailed(message)
