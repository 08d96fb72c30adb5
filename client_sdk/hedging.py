"""When a second worker is asked as well: the first to speak wins. Pure.

A request that has waited longer for its first token than 95 % of the model's requests did is probably
with a slow or stuck worker (Dean and Barroso, "The Tail at Scale", 2013). The budget keeps the extra
load at 5 % of the requests, however bad things are.
"""

from __future__ import annotations

from collections import deque

SAMPLES = 128
LEAST_SAMPLES = 16
QUANTILE = 0.95
LEAST_DELAY = 0.01
SHARE = 0.05
RESERVE = 2.0
PATIENT = 2.0
"""With less than this reserve left a hedge waits so many times longer: the last one is for a worker that is
really stuck, not for the usual tail."""
MOST_SAVED = 8.0
"""Hedges that quiet times may save up for bad ones."""


class Hedging:
    """First-token times of one kind of request, and the budget for asking twice: `share` of the requests,
    never where that is 0.
    """

    __slots__ = ("_budget", "_delay", "_fresh", "_samples", "_share")

    def __init__(self, share: float = SHARE) -> None:
        self._samples: deque[float] = deque(maxlen=SAMPLES)
        self._share = share
        self._budget = 0.0
        self._delay: float | None = None
        self._fresh = 0

    def delay(self) -> float | None:
        """Seconds after which to ask a second worker; None while too little is known."""
        if self._delay is None or self._budget >= RESERVE:
            return self._delay
        return PATIENT * self._delay

    def requested(self) -> None:
        """A request was sent: it earns its share of a hedge."""
        self._budget = min(MOST_SAVED, self._budget + self._share)

    def answered(self, first_token: float) -> None:
        """A first token came, this many seconds after the request was sent."""
        self._samples.append(first_token)
        self._fresh += 1
        if len(self._samples) < LEAST_SAMPLES:
            return
        if self._delay is None or self._fresh >= LEAST_SAMPLES:
            self._fresh = 0
            ordered = sorted(self._samples)
            self._delay = max(LEAST_DELAY, ordered[int(QUANTILE * (len(ordered) - 1))])

    def take(self) -> bool:
        """Whether the budget allows a hedge now; if so it is spent."""
        if self._budget < 1:
            return False
        self._budget -= 1
        return True
