"""What this client has seen of each worker: speeds, round trips, load, failures. Pure.

Measurements are exponentially weighted means. A worker's own words (its record) are the prior; what
was measured replaces them with use and fades with age.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

SMOOTHING = 0.3
PRIOR_WEIGHT = 2.0
"""A worker's own words count as this many measurements."""
FADE = 300.0
"""Seconds after which a measurement counts 1/e."""
LOAD_FADE = 15.0
"""Seconds after which a load report counts 1/e."""
AS_LONG_AGAIN = 2.0
"""What has been silent for a while can be expected to be silent for as long again."""
BAN = 15.0
MAX_BAN = 600.0


@dataclass(slots=True)
class Mean:
    """An exponentially weighted mean with an age."""

    value: float = 0.0
    count: int = 0
    at: float = 0.0

    def add(self, sample: float, now: float) -> None:
        """Take in one measurement."""
        self.value = sample if not self.count else self.value + SMOOTHING * (sample - self.value)
        self.count += 1
        self.at = now

    def blend(self, prior: float, now: float) -> float:
        """The mean, drawn towards `prior` while measurements are few or old."""
        if not self.count:
            return prior
        if prior <= 0:
            return self.value
        trust = self.count / (self.count + PRIOR_WEIGHT) * math.exp(-(now - self.at) / FADE)
        return prior + (self.value - prior) * trust

    def faded(self, now: float) -> float:
        """The mean, drawn towards 0 as it gets older; 0 where nothing was measured."""
        return self.value * math.exp(-(now - self.at) / FADE) if self.count else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Reservation:
    """A request that was given to a worker at this time, and when its first bytes should come."""

    worker: bytes
    at: float
    due: float


@dataclass(slots=True)
class Score:
    """One worker, as this client knows it. Speeds in tokens/s, times in seconds."""

    generation_speed: Mean = field(default_factory=Mean)
    prompt_speed: Mean = field(default_factory=Mean)
    first_token: Mean = field(default_factory=Mean)
    rtt: Mean = field(default_factory=Mean)
    in_flight: int = 0
    """This client's own requests: counted from the moment of choice."""
    foreign: float = 0.0
    """Requests of others, when the worker last reported its load."""
    slots: int = 0
    reported_at: float = -math.inf
    failures: int = 0
    """Failures in a row."""
    banned_until: float = -math.inf
    full_until: float = -math.inf
    """It refuses requests until then, as it said itself."""
    places: float = 0.0
    """But this many of this client's own it may have, by a report that came after the refusal."""
    probing: bool = False
    """One request is testing a worker whose ban has ended."""
    unanswered: list[Reservation] = field(default_factory=list)
    """Own requests that wait for their first bytes, the oldest first."""

    def foreign_load(self, now: float) -> float:
        """Requests of others, fading with the age of the report."""
        if self.reported_at == -math.inf:
            return 0.0
        return self.foreign * math.exp(-max(0.0, now - self.reported_at) / LOAD_FADE)

    def silence(self, now: float) -> float:
        """Seconds to the first bytes that a new request must expect of a worker that is late with another's."""
        late = (now - one.at for one in self.unanswered if now > one.due)
        return AS_LONG_AGAIN * next(late, 0.0)


class Scoreboard:
    """The scores of all workers, by node id. Every method takes `now` in seconds, monotonic."""

    def __init__(self, capacity: int = 4096) -> None:
        self._capacity = capacity
        self._scores: dict[bytes, Score] = {}

    def __getitem__(self, worker: bytes) -> Score:
        score = self._scores.get(worker)
        if score is None:
            if len(self._scores) >= self._capacity:
                self._evict()
            score = self._scores[worker] = Score()
        return score

    def reserve(self, worker: bytes, now: float, due: float = math.inf) -> Reservation:
        """A request was given to the worker: it counts at once, so that bursts spread. `due` is when its
        first bytes should come; silence before that tells nothing.
        """
        score, reservation = self[worker], Reservation(worker, now, due)
        score.in_flight += 1
        score.unanswered.append(reservation)
        if score.failures and now >= score.banned_until:
            score.probing = True
        return reservation

    def spoke(self, reservation: Reservation) -> None:
        """The worker began to answer: others need not wait for the end of that."""
        score = self[reservation.worker]
        score.probing = False
        if reservation in score.unanswered:
            score.unanswered.remove(reservation)

    def release(self, reservation: Reservation) -> None:
        """The request has ended, however it did."""
        self.spoke(reservation)
        self[reservation.worker].in_flight -= 1

    def available(self, worker: bytes, now: float, *, banned: bool = False) -> bool:
        """Whether the worker may be asked: not full, and not banned or being probed after a ban, except
        where even the `banned` may be.
        """
        score = self._scores.get(worker)
        if score is None:
            return True
        if now < score.full_until and score.in_flight >= score.places:
            return False
        return banned or (now >= score.banned_until and not score.probing)

    def full_for(self, worker: bytes, now: float) -> float:
        """Seconds for which the worker said that it takes no requests; 0 where it does."""
        score = self._scores.get(worker)
        return 0.0 if score is None else max(0.0, score.full_until - now)

    def report(self, worker: bytes, busy: int, queue: int, slots: int, now: float) -> None:
        """The worker told its load (PONG or END)."""
        score = self[worker]
        score.foreign = max(0, busy + queue - score.in_flight)
        score.slots = slots
        score.reported_at = now
        # Room for as many waiting requests as it has slots: all that it refused would pile up on the first one
        # that has room again, while the others are about to have some.
        score.places = 2 * slots - score.foreign

    def succeeded(self, worker: bytes, now: float, *, first_token: float | None, speed: float | None) -> None:
        """An answer came through: `first_token` in seconds and `speed` in tokens/s where they could be told."""
        score = self[worker]
        score.failures = 0
        score.banned_until = -math.inf
        if first_token is not None:
            score.first_token.add(first_token, now)
        if speed is not None:
            score.generation_speed.add(speed, now)

    def late(self, worker: bytes, now: float, waited: float) -> None:
        """Another worker spoke first: this one has been silent for `waited` seconds."""
        self[worker].first_token.add(AS_LONG_AGAIN * waited, now)

    def failed(self, worker: bytes, now: float) -> None:
        """The worker failed: it is banned for 15 s, doubling with each failure in a row."""
        score = self[worker]
        score.failures += 1
        score.banned_until = now + min(MAX_BAN, BAN * 2 ** (score.failures - 1))

    def busy_until(self, worker: bytes, until: float) -> None:
        """The worker is overloaded and named a time before which asking again is useless."""
        score = self[worker]
        score.full_until = max(score.full_until, until)
        score.places = 0.0

    def _evict(self) -> None:
        """Forget the idle worker that was heard of least recently."""
        idle = [
            (score.first_token.at, worker) for worker, score in self._scores.items() if not score.in_flight
        ]
        if idle:
            del self._scores[min(idle)[1]]
