"""`qmesh-node`, with records that live for seconds instead of minutes."""

from __future__ import annotations

from unittest import mock

from node import announcer
from node.cli import main

TTL = 6.0

if __name__ == "__main__":
    with mock.patch.multiple(
        announcer, RECORD_TTL=TTL, ANNOUNCE_INTERVAL=TTL / 3, MIN_ANNOUNCE_INTERVAL=TTL / 18
    ):
        main()
