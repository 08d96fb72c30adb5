"""The invitations into its private mesh that a node has made: only these it accepts, and only while they last.

`invitations.json` in the data folder has the id and the expiry (unix seconds) of each; their keys follow
from the mesh's secret. A revoked invitation is removed. The running node reads the file whenever a guest
comes, so a change holds at once. Where the file is lost, all of its invitations are over.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

from mesh.errors import ConfigurationError
from mesh.join import INVITATION_ID_SIZE
from mesh.transport.sockets import complain
from node.files import locked, write_private

INVITATIONS_FILE = "invitations.json"


class Invitations:
    """The file of invitations in a data folder. Every method but `good` raises ConfigurationError where it
    is unusable.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / INVITATIONS_FILE

    def current(self) -> dict[str, int]:
        """The expiry of each invitation that is still good, by its id in hex; the oldest first."""
        now = time.time()
        try:
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            return {str(name): int(expires) for name, expires in kept.items() if expires > now}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, OverflowError, TypeError, AttributeError) as error:
            raise ConfigurationError(
                f"{self.path} cannot be read: {error}", "Delete it, and make new invitations."
            ) from error

    def good(self, invitation_id: bytes) -> bool:
        """Whether a guest with this invitation may be admitted now."""
        try:
            return invitation_id.hex() in self.current()
        except ConfigurationError as error:
            complain("no guest is admitted: %s", error)
            return False

    def add(self, expires: int) -> bytes:
        """A new invitation's id, 8 random bytes."""
        invitation_id = secrets.token_bytes(INVITATION_ID_SIZE)
        with locked(self.path):
            self._write({**self.current(), invitation_id.hex(): expires})
        return invitation_id

    def revoke(self, name: str) -> None:
        """Accept this invitation (its id in hex) no more. Raises ConfigurationError also where there is none."""
        with locked(self.path):
            kept = self.current()
            if kept.pop(name.lower(), None) is None:
                raise ConfigurationError(
                    f"this node has made no invitation {name!r} that is still good",
                    "See `qmesh-node invite --list`; only the node that made an invitation can revoke it.",
                )
            self._write(kept)

    def _write(self, kept: Mapping[str, int]) -> None:
        try:
            write_private(self.path, json.dumps(kept))
        except OSError as error:
            raise ConfigurationError(
                f"{self.path} cannot be written: {error.strerror}", "Check the folder's permissions."
            ) from error
