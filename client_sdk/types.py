"""What the SDK gives back: tokens, completions, workers, models, and why a worker was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Timeouts:
    """The deadlines of a request, in seconds; None waits for ever."""

    connect: float = 5.0
    """TCP and handshake, over all addresses of one worker."""
    first_token: float | None = 120.0
    """From sending a request to the first token, the worker's queue included."""
    between_tokens: float | None = 60.0
    """The longest silence within an answer."""
    total: float | None = None
    """The whole answer, over all workers."""
    find: float = 5.0
    """Asking one entry node for workers or models."""
    silence: float = 3.0
    """After this long without a byte the worker's node is pinged; no reply within as long again
    counts as its loss."""


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of an answer as it streams: usually one token, more where one alone is no text.

    `message` holds the fields of a chat delta (`content`, `reasoning_content`, `tool_calls`).
    """

    text: str
    worker: str
    """The id of the worker that wrote it."""
    ids: tuple[int, ...] = ()
    message: Mapping[str, Any] | None = None
    spliced: bool = False
    """True on the first piece after the answer moved to another worker."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One worker that was asked, and how it ended (`error` is None for the one that finished)."""

    worker: str
    way: str
    error: str | None = None


@dataclass(frozen=True, slots=True)
class RouteEvent:
    """Something that happened to a request on its way, told as it happens.

    ``retry``   the worker failed, and another one is asked
    ``hedge``   the worker is late with its first token, and a second one is asked as well
    ``splice``  this worker goes on with an answer that another one began
    """

    kind: Literal["retry", "hedge", "splice"]
    model: str
    worker: str
    """Its id."""
    detail: str


@dataclass(slots=True)
class Explanation:
    """Why an answer came from where it came from. Times in seconds, speeds in tokens/s."""

    worker: str | None = None
    path: str | None = None
    """How the worker was reached: its address."""
    rtt: float | None = None
    reason: str | None = None
    candidates: list[dict[str, Any]] = field(default_factory=list)
    """Every worker weighed for the last choice: id, expected seconds, load."""
    attempts: list[Attempt] = field(default_factory=list)
    splices: int = 0
    hedged: int = 0
    """How often a second worker was asked and was the first to speak."""
    queue: float | None = None
    first_token: float | None = None
    speed: float | None = None

    @property
    def asked(self) -> int:
        """Workers that were asked, the one that answers included."""
        return 1 + sum(attempt.error is not None for attempt in self.attempts)

    def adopt(self, other: Explanation) -> None:
        """Take over how `other` chose and reached its worker."""
        self.worker, self.path, self.rtt = other.worker, other.path, other.rtt
        self.reason, self.candidates = other.reason, other.candidates


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer."""

    text: str
    model: str
    finish_reason: str | None
    usage: Mapping[str, int]
    explain: Explanation
    message: Mapping[str, Any] | None = None
    """For chat: the assistant's message, to be appended to the history."""
    timings: Mapping[str, Any] = field(default_factory=dict)
    """The last worker's own: `cache_n` prompt tokens from its cache, `prompt_n` read, `predicted_n` written."""


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker as the mesh announces it and as this client has measured it."""

    id: str
    model: str
    digest: str
    """The first 16 bytes of the model file's SHA-256, as hex."""
    addresses: tuple[str, ...]
    health: int
    slots: int
    context: int
    software: str
    expires: int
    """Unix seconds."""
    expected: float
    """Seconds that a usual request would take there now."""
    load: float
    """Requests per slot, as far as this client knows."""
    rtt: float | None
    banned: bool


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model on the mesh."""

    name: str
    workers: int
