"""A DHT node under datagrams that hold anything. QMESH_FUZZ_ROUNDS and QMESH_FUZZ_SEED as in test_wire."""

from __future__ import annotations

import os
import random

from mesh.dht import limits
from tests.sim.hostile import hostile
from tests.sim.world import World

INPUTS = int(os.environ.get("QMESH_FUZZ_ROUNDS", "20000"))
SEED = int(os.environ.get("QMESH_FUZZ_SEED", "0")) or random.SystemRandom().getrandbits(32)


def test_hostile_datagrams_raise_nothing_and_fill_nothing() -> None:
    world = World(SEED)
    result = world.run(hostile(world, 6, datagrams=INPUTS))
    assert result["still_works"]
    assert result["records"] <= limits.MAX_RECORDS
    assert result["contacts"] <= 6
    assert result["pending"] <= limits.MAX_PENDING
    assert result["tokens"] <= limits.MAX_REMEMBERED_TOKENS
    assert result["silent"] <= limits.MAX_REMEMBERED_FAILURES
    assert result["verifying"] <= limits.MAX_VERIFYING
    assert result["grown_MB"] <= 64
