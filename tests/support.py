"""What tests of every part share."""

from __future__ import annotations

import os

_FACTOR = float(os.environ.get("QMESH_TEST_TIMEOUT_FACTOR", "1"))


def seconds(value: float) -> float:
    """A test's deadline, scaled by QMESH_TEST_TIMEOUT_FACTOR for slow machines."""
    return value * _FACTOR
