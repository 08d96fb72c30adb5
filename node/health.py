"""A worker's health score, 0 to 100: how good an idea it is to send it a request now. Pure.

The score is 100 × the product of its parts, each between 0 and 1, so that one bad part is enough to
steer work away, and every part is monotone in its input. 0 means: the model cannot answer.

==========  =============================================================================
slots       1 with every slot free, 0.5 with all of them busy
queue       1 with an empty queue, 0.2 with a full one
cpu         1 up to 60 % load by *other* programs, then down to 0.5 at 100 %
gpu         1 up to 60 % load of the GPU by other programs, then down to 0.5 at 100 %
memory      1 down to 15 % of memory available, then down to 0.3 with none
crashes     0.7 for each crash of the last ten minutes
loaded      0.4 where the model has to be loaded before it can answer
==========  =============================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HealthInputs:
    """What the score is made of. Fractions are between 0 and 1."""

    ready: bool
    """Whether a request would be answered."""
    loaded: bool
    """Whether it would be answered without loading the model first."""
    slots: int
    busy: int
    queue: int
    queue_limit: int
    foreign_cpu: float
    """Fraction of all cores that other programs than this node and its servers use."""
    foreign_gpu: float
    """Fraction of the GPU that other programs use; 0 where the model does not use one."""
    memory_available: float
    """Fraction of the machine's memory that is available."""
    recent_crashes: int
    """Crashes of the served models within the last ten minutes."""


@dataclass(frozen=True, slots=True)
class Health:
    """The score and its parts by name."""

    score: int
    parts: Mapping[str, float]


def health(inputs: HealthInputs) -> Health:
    """The score for these inputs, as the table above defines it."""
    parts = {
        "slots": 1 - 0.5 * _fraction(inputs.busy, inputs.slots),
        "queue": 1 - 0.8 * _fraction(inputs.queue, inputs.queue_limit),
        "cpu": 1 - 0.5 * _ramp(inputs.foreign_cpu, 0.6, 1.0),
        "gpu": 1 - 0.5 * _ramp(inputs.foreign_gpu, 0.6, 1.0),
        "memory": 1 - 0.7 * _ramp(1 - inputs.memory_available, 0.85, 1.0),
        "crashes": 0.7 ** max(0, inputs.recent_crashes),
        "loaded": 1.0 if inputs.loaded else 0.4,
    }
    if not inputs.ready:
        return Health(0, parts)
    product = 1.0
    for part in parts.values():
        product *= part
    # A worker that can answer never scores 0: that value means it can not.
    return Health(max(1, round(100 * product)), parts)


def _fraction(part: int, whole: int) -> float:
    return min(1.0, max(0.0, part / whole)) if whole > 0 else 1.0


def _ramp(value: float, start: float, end: float) -> float:
    """0 up to `start`, then linearly up to 1 at `end`."""
    return min(1.0, max(0.0, (value - start) / (end - start)))
