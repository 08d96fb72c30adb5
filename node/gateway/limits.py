"""How much one API key may use: requests and tokens per minute. Pure; `now` is in seconds.

Each limit is a bucket that holds one minute's worth and refills evenly. A request takes its estimated
tokens at the start; the difference to what it really used is settled at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

MINUTE = 60.0
MAX_KEYS = 4096


@dataclass(slots=True)
class Bucket:
    """`limit` per minute. May go below zero when an answer took more than was estimated."""

    limit: int
    level: float
    at: float

    def refill(self, now: float) -> None:
        """Bring the level up to `now`."""
        self.level = min(self.limit, self.level + max(0.0, now - self.at) * self.limit / MINUTE)
        self.at = now

    def wait(self, amount: float) -> float:
        """Seconds until `amount` can be taken; a full bucket gives any amount."""
        return max(0.0, min(amount, self.limit) - self.level) * MINUTE / self.limit

    def reset(self) -> float:
        """Seconds until the bucket is full."""
        return max(0.0, self.limit - self.level) * MINUTE / self.limit


class Allowance:
    """What is left to one key. A limit of None is none."""

    def __init__(self, requests: int | None, tokens: int | None, now: float) -> None:
        self.requests = Bucket(requests, requests, now) if requests else None
        self.tokens = Bucket(tokens, tokens, now) if tokens else None

    def take(self, tokens: float, now: float) -> float:
        """Take a request of so many tokens. Returns 0, or the seconds to wait where it is refused."""
        for bucket in (self.requests, self.tokens):
            if bucket is not None:
                bucket.refill(now)
        wait = max(
            self.requests.wait(1) if self.requests else 0.0, self.tokens.wait(tokens) if self.tokens else 0.0
        )
        if wait > 0:
            return wait
        if self.requests:
            self.requests.level -= 1
        if self.tokens:
            self.tokens.level -= tokens
        return 0.0

    def settle(self, estimated: float, used: float, now: float) -> None:
        """The request used other than was estimated."""
        if self.tokens:
            self.tokens.refill(now)
            self.tokens.level = min(self.tokens.limit, self.tokens.level + estimated - used)

    def headers(self) -> dict[str, str]:
        """The usual headers (https://platform.openai.com/docs/guides/rate-limits)."""
        headers = {}
        for name, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                headers[f"x-ratelimit-limit-{name}"] = str(bucket.limit)
                headers[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level)))
                headers[f"x-ratelimit-reset-{name}"] = f"{bucket.reset():.3f}s"
        return headers


class Allowances:
    """The allowance of every key, by the key's id."""

    def __init__(self) -> None:
        self._by_key: dict[str, tuple[int | None, int | None, Allowance]] = {}

    def of(self, key: str, requests: int | None, tokens: int | None, now: float) -> Allowance:
        """The key's allowance; a fresh one where its limits have changed."""
        known = self._by_key.get(key)
        if known is not None and known[:2] == (requests, tokens):
            return known[2]
        if len(self._by_key) >= MAX_KEYS:
            self._by_key.clear()
        allowance = Allowance(requests, tokens, now)
        self._by_key[key] = (requests, tokens, allowance)
        return allowance


def estimated_tokens(body_size: int, number: Callable[[str], object]) -> float:
    """Tokens that a request will take, before it is known. `number` looks a field of the body up."""
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict"):
        value = number(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return body_size / 4 + value
    return body_size / 4 + 256
