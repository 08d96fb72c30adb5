"""Whether a peer is alive, how far away it is, and how much abuse it may still cause. Pure."""

from __future__ import annotations

from enum import Enum

from mesh.limits import DEAD_AFTER_IDLE, PING_AFTER_IDLE


class Health(Enum):
    """What a peer's silence calls for."""

    FINE = "fine"
    ASK = "ask"
    DEAD = "dead"


class Liveness:
    """The silence of a peer and the PINGs that it owes an answer. Times in seconds."""

    __slots__ = ("_asked", "_last_heard", "_next_token", "_sent_at")

    def __init__(self, now: float) -> None:
        self._last_heard = now
        self._asked = False
        self._next_token = 1
        self._sent_at: dict[int, float] = {}

    def heard(self, now: float) -> None:
        """A byte arrived."""
        self._last_heard = now
        self._asked = False

    def silence(self, now: float) -> float:
        """How long nothing arrived."""
        return now - self._last_heard

    def check(self, now: float) -> Health:
        """`ASK` is returned once per silence."""
        silence = self.silence(now)
        if silence >= DEAD_AFTER_IDLE:
            return Health.DEAD
        if silence >= PING_AFTER_IDLE and not self._asked:
            self._asked = True
            return Health.ASK
        return Health.FINE

    def next_check(self) -> float:
        """When `check` may return something else than `FINE`."""
        return self._last_heard + (DEAD_AFTER_IDLE if self._asked else PING_AFTER_IDLE)

    def ping(self, now: float) -> int:
        """The token of a PING that is sent now."""
        token = self._next_token
        self._next_token += 1
        self._sent_at[token] = now
        return token

    def pong(self, token: int, now: float) -> float | None:
        """The round trip of an answered PING; None for a token that nobody waits for."""
        sent_at = self._sent_at.pop(token, None)
        return None if sent_at is None else now - sent_at

    def forget(self, token: int) -> None:
        """Nobody waits for this PONG any more."""
        self._sent_at.pop(token, None)


class TokenBucket:
    """`burst` tokens, refilled at `rate` per second."""

    __slots__ = ("_burst", "_level", "_rate", "_updated")

    def __init__(self, burst: float, rate: float, now: float) -> None:
        self._burst = self._level = burst
        self._rate = rate
        self._updated = now

    def take(self, now: float) -> bool:
        """Take a token; False if there was none."""
        self._level = min(self._burst, self._level + (now - self._updated) * self._rate)
        self._updated = now
        if self._level < 1:
            return False
        self._level -= 1
        return True
