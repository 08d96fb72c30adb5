"""The pinned release: which llama.cpp `runtime install` takes when nobody names another, and its hashes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from sidecar.errors import ChecksumMismatch, RuntimeFailure
from sidecar.managed.releases import Asset


@dataclass(frozen=True, slots=True)
class Manifest:
    """A tag (None: the newest release) and the sha256 of each of its assets by name."""

    tag: str | None = None
    sha256: dict[str, str] = field(default_factory=dict)

    def hash_of(self, asset: Asset) -> str:
        """The hash that an asset must have: the pinned one, else the one in the release index.

        Raises ChecksumMismatch when the two differ, RuntimeFailure when there is neither: nothing
        is installed unchecked.
        """
        pinned = self.sha256.get(asset.name, "").lower()
        if pinned and asset.sha256 and pinned != asset.sha256.lower():
            raise ChecksumMismatch(f"the index promises another {asset.name} than the manifest pins")
        if not (pinned or asset.sha256):
            raise RuntimeFailure(
                f"neither the index nor a manifest has a sha256 for {asset.name}. Give one with --manifest."
            )
        return pinned or asset.sha256


def read_manifest(path: Path) -> Manifest:
    """Read `{"tag": "b1234", "sha256": {"asset name": "hex"}}`. Raises RuntimeFailure."""
    try:
        content = json.loads(path.read_text())
        return Manifest(content.get("tag"), {str(k): str(v) for k, v in content["sha256"].items()})
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise RuntimeFailure(f"{path} is no manifest: {error}") from error
