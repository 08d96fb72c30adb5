"""What a node takes from outside besides the network: time and chance. Simulations bring their own."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Environment:
    """`clock` is monotonic, `wall` unix time, both in seconds; `rng` also makes tokens and ids."""

    clock: Callable[[], float]
    wall: Callable[[], float]
    rng: random.Random
