"""Which worker to ask: the least expected time to the end of the answer. Pure.

The expected time is what the answer would take if it were given to the worker now::

    round trip + queue wait + prompt tokens / prompt speed + answer tokens / generation speed

scaled up by poor health. Among workers that are nearly as good as the best, the less loaded of two random
ones is taken (the power of two choices, Mitzenmacher 2001), so that many clients with the same view do not
herd, and a burst spreads although measurements of equal workers differ. A conversation stays with the
worker that holds its prefix in its cache: rendezvous hashing names that worker, and bounded loads
(Mirrokni, Thorup, Zadimoghaddam 2018) let it overflow to the next, as it does where the worker is much
slower than the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from random import Random

from client_sdk.scoreboard import Scoreboard
from mesh.records import WorkerRecord

NEAR = 1.25
"""Workers within this factor of the best are as good as equal."""
NEAR_SECONDS = 0.005
EXPLORE = 0.02
"""Share of requests given to any worker at random, so that old measurements are renewed."""
LOAD_BOUND = 1.25
"""A conversation leaves its worker when that one's load is over this factor of the mean."""
HOME_NEAR = 2.0
HOME_SECONDS = 0.25
"""And when it is expected to take longer than this factor of the best one's time and these seconds: a
cached prefix does not make up for a slow worker."""
DEFAULT_GENERATION_SPEED = 20.0
DEFAULT_PROMPT_SPEED = 200.0
DEFAULT_RTT = 0.05
SLOWEST = 0.01
"""Tokens/s that any worker is taken to reach, so that no claim makes a cost infinite."""


@dataclass(frozen=True, slots=True)
class Need:
    """What is known of a request before it is sent."""

    prompt_tokens: int = 64
    answer_tokens: int = 256
    prefix: bytes | None = None
    """Names the conversation whose prefix a worker may have cached."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker with the cost it was given: seconds until the answer would be complete."""

    record: WorkerRecord
    cost: float
    first_token: float
    """Seconds until it would begin."""
    load: float
    """Requests per slot, this client's own included."""

    @property
    def id(self) -> bytes:
        """The worker's node id."""
        return self.record.node_id


@dataclass(frozen=True, slots=True)
class Choice:
    """The worker to ask, why, and all that were weighed, best first."""

    chosen: Candidate
    reason: str
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Speeds:
    """What a worker is taken to reach of which nothing is known, in tokens/s."""

    generation: float = DEFAULT_GENERATION_SPEED
    prompt: float = DEFAULT_PROMPT_SPEED


def usual_speeds(records: Sequence[WorkerRecord], board: Scoreboard, now: float) -> Speeds:
    """The median of the workers that are known: a newcomer is as good as they are until it was tried."""
    generation = [board[one.node_id].generation_speed.blend(one.generation_speed, now) for one in records]
    prompt = [board[one.node_id].prompt_speed.blend(one.prompt_speed, now) for one in records]
    return Speeds(_median(generation, DEFAULT_GENERATION_SPEED), _median(prompt, DEFAULT_PROMPT_SPEED))


def _median(speeds: Sequence[float], otherwise: float) -> float:
    known = sorted(speed for speed in speeds if speed > 0)
    return known[len(known) // 2] if known else otherwise


def expected(
    record: WorkerRecord,
    board: Scoreboard,
    need: Need,
    now: float,
    usual: Speeds = Speeds(),
) -> Candidate:
    """The cost of giving the request to this worker now."""
    score = board[record.node_id]
    slots = max(1, score.slots or record.slots)
    generation = score.generation_speed.blend(record.generation_speed, now) or usual.generation
    prompt = score.prompt_speed.blend(record.prompt_speed, now) or usual.prompt
    prompt, generation = max(prompt, SLOWEST), max(generation, SLOWEST)
    service = need.prompt_tokens / prompt + need.answer_tokens / generation
    requests = score.foreign_load(now) + score.in_flight
    # A request that finds every slot busy waits for (waiting + 1) of them to become free, one each service/slots.
    wait = max(0.0, requests - slots + 1) * service / slots
    # Busy neighbours slow a slot down even where it does not wait.
    strain = (1 + 0.25 * min(requests, slots) / slots) * (2 - record.health / 100)
    # A worker that was slow to speak is so for reasons that its speeds do not tell.
    slow = max(0.0, score.first_token.faded(now) - need.prompt_tokens / prompt)
    ready = (score.rtt.blend(DEFAULT_RTT, now) + wait + need.prompt_tokens / prompt + slow) * strain
    first_token = max(ready, score.silence(now))
    cost = first_token + need.answer_tokens / generation * strain
    return Candidate(record, cost, first_token, requests / slots)


def choose(
    records: Sequence[WorkerRecord],
    board: Scoreboard,
    need: Need,
    *,
    now: float,
    rng: Random,
    exclude: Collection[bytes] = (),
    banned: bool = False,
) -> Choice | None:
    """The worker to ask next, or None where every one is excluded, unwell, full or banned. With `banned`
    even those are asked that failed lately.
    """
    usual = usual_speeds(records, board, now)
    candidates = sorted(
        (
            expected(record, board, need, now, usual)
            for record in records
            if record.node_id not in exclude
            and record.health > 0
            and board.available(record.node_id, now, banned=banned)
        ),
        key=lambda candidate: candidate.cost,
    )
    if not candidates:
        return None
    chosen, reason = _pick(candidates, need, rng)
    return Choice(chosen, reason, tuple(candidates))


def _pick(candidates: Sequence[Candidate], need: Need, rng: Random) -> tuple[Candidate, str]:
    if len(candidates) == 1:
        return candidates[0], "the only one"
    if need.prefix is not None:
        home = _home(candidates, need.prefix)
        if home is not None:
            return home, "holds the conversation's prefix"
    if rng.random() < EXPLORE:
        return rng.choice(candidates), "exploration"
    best = candidates[0]
    near = [
        candidate
        for candidate in candidates
        if _near(candidate.cost, best.cost) and _near(candidate.first_token, best.first_token)
    ]
    if len(near) == 1:
        return near[0], "least expected time"
    first, second = rng.sample(near, 2)
    less = min(first, second, key=lambda candidate: (candidate.load, candidate.cost))
    return less, "the less loaded of two among the best"


def _near(seconds: float, best: float) -> bool:
    return seconds <= best * NEAR + NEAR_SECONDS


def _home(candidates: Sequence[Candidate], prefix: bytes) -> Candidate | None:
    """The first worker in rendezvous order whose load and time are within their bounds."""
    longest = HOME_NEAR * candidates[0].cost + HOME_SECONDS
    mean = sum(candidate.load for candidate in candidates) / len(candidates)
    ranked = sorted(candidates, key=lambda candidate: hashlib.blake2b(prefix + candidate.id).digest())
    for candidate in ranked:
        if candidate.load <= max(LOAD_BOUND * mean, 0.75) and candidate.cost <= longest:
            return candidate
    return None
