"""How much of the machine a server may take: `mode` → threads, niceness, slots and memory. Pure.

| mode | threads | nice | slots | context per slot | share of memory |
|---|---|---|---|---|---|
| efficiency | a quarter of the cores | 10 | 2 | 4096 | 25 % |
| balanced | half of the cores | 5 | 4 | 8192 | 50 % |
| performance | all cores | 0 | 8 | 16384 | 85 % |

Cores are physical ones. Slots and context shrink until the estimate fits the memory share. What the
configuration names explicitly always wins.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from sidecar.gguf import GgufHeader
from sidecar.states import Plan

SMALL_MODEL_BYTES = 64 << 20
"""Below this, one thread is faster than two: the threads wait for each other longer than they compute."""
_LEAST_CONTEXT = 512


class Mode(StrEnum):
    """What the person at the machine wants of it."""

    EFFICIENCY = "efficiency"
    BALANCED = "balanced"
    PERFORMANCE = "performance"


@dataclass(frozen=True, slots=True)
class Share:
    """One row of the table above."""

    cores: float
    nice: int
    slots: int
    context: int
    memory: float


SHARES = {
    Mode.EFFICIENCY: Share(cores=0.25, nice=10, slots=2, context=4096, memory=0.25),
    Mode.BALANCED: Share(cores=0.5, nice=5, slots=4, context=8192, memory=0.5),
    Mode.PERFORMANCE: Share(cores=1.0, nice=0, slots=8, context=16384, memory=0.85),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """What a server is started with."""

    plan: Plan
    threads: int
    nice: int
    pooling: str | None = None
    """How token vectors become one, where the model itself does not say."""


def settle(
    mode: Mode,
    model: GgufHeader,
    *,
    cores: int,
    memory: int,
    context: int | None = None,
    slots: int | None = None,
    gpu_layers: int | None = None,
    threads: int | None = None,
    embeddings: bool = False,
) -> Settings:
    """The settings for a model on a machine with `cores` physical cores and `memory` bytes.

    `context` (tokens per slot), `slots`, `gpu_layers` and `threads` are the user's own words, or None.
    A model that is to embed and names no pooling gets `mean`.
    """
    share = SHARES[mode]
    if threads is None:
        threads = 1 if model.file_bytes < SMALL_MODEL_BYTES else max(1, round(cores * share.cores))
    room = int(memory * share.memory)
    plan = Plan(
        context=context or min(share.context, model.train_context or share.context),
        slots=slots or share.slots,
        gpu_layers=gpu_layers,
        layers=model.layers or None,
    )
    while model.memory(plan.context * plan.slots) > room:
        if slots is None and plan.slots > 1:
            plan = Plan(plan.context, plan.slots // 2, gpu_layers, plan.layers)
        elif context is None and plan.context > _LEAST_CONTEXT:
            plan = Plan(plan.context // 2, plan.slots, gpu_layers, plan.layers)
        else:
            break
    pooling = "mean" if embeddings and f"{model.architecture}.pooling_type" not in model.metadata else None
    return Settings(plan, threads, share.nice, pooling)
