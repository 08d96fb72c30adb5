"""W3C trace context (https://www.w3.org/TR/trace-context/): read, continue, begin. Pure but for chance."""

from __future__ import annotations

import re
import secrets

_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?", re.ASCII)


def continue_trace(header: str | None) -> str:
    """A `traceparent` with a span of our own: within the caller's trace, or in a new one where the
    caller sent none that is valid.
    """
    span = secrets.token_hex(8)
    match = _FORM.fullmatch(header) if header is not None and len(header) <= 512 else None
    if match is not None:
        version, trace, parent, flags = match.groups()
        if version != "ff" and trace.strip("0") and parent.strip("0"):
            return f"00-{trace}-{span}-{flags}"
    return f"00-{secrets.token_hex(16)}-{span}-00"


def trace_id(traceparent: str) -> str:
    """The trace that a `traceparent` belongs to."""
    return traceparent[3:35]
