"""Where the node's log lines go."""

from __future__ import annotations

import logging
import os
import sys

FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


def set_up(*, quiet: bool) -> None:
    """Log to stderr: warnings, with QMESH_DEBUG everything of ours; `quiet` leaves only errors."""
    level = logging.ERROR if quiet else logging.WARNING
    logging.basicConfig(stream=sys.stderr, format=FORMAT, level=level)
    if os.environ.get("QMESH_DEBUG"):
        for name in ("qmesh", "mesh", "node", "sidecar", "client_sdk"):
            logging.getLogger(name).setLevel(logging.DEBUG)
    # These name every unanswered datagram; the DHT counts them itself.
    for name in ("kademlia", "rpcudp"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
