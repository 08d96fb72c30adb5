"""Which web pages may use the gateway. Pure.

A browser lets any page send requests to this machine, and a page whose name is made to point here
(DNS rebinding) may even read the answers. So a request with the `Origin` of another site is refused
unless that site is allowed, and while no key is needed the `Host` must be a name of this machine.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from ipaddress import ip_address
from urllib.parse import urlsplit

ALLOWED_METHODS = "GET, POST, OPTIONS"
EXPOSED = "X-QMesh-Worker, X-QMesh-Path, X-QMesh-Attempts, X-QMesh-Queue-Ms, X-QMesh-Request-Id, Retry-After"
PREFLIGHT_SECONDS = 600


class Origins:
    """The origins that are allowed, in lower case; `*` allows every one."""

    def __init__(self, allowed: Collection[str]) -> None:
        self._allowed = frozenset(allowed)

    def permits(self, origin: str | None, host: str | None) -> bool:
        """Whether a request may be answered, by its `Origin` and `Host`."""
        if origin is None or self._listed(origin):
            return True
        return host is not None and origin.partition("://")[2].lower() == host.lower()

    def headers(self, origin: str | None) -> dict[str, str]:
        """What lets a page of an allowed origin read the answer."""
        if not self._allowed:
            return {}
        headers = {"Vary": "Origin"}
        if origin is not None and self._listed(origin):
            headers |= {"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": EXPOSED}
        return headers

    def preflight(self, origin: str | None, requested: str | None) -> dict[str, str]:
        """The answer to a browser that asks before it sends; `requested` are the headers it names."""
        headers = self.headers(origin)
        if "Access-Control-Allow-Origin" in headers:
            headers["Access-Control-Allow-Methods"] = ALLOWED_METHODS
            headers["Access-Control-Allow-Headers"] = requested or "authorization, content-type"
            headers["Access-Control-Max-Age"] = str(PREFLIGHT_SECONDS)
        return headers

    def _listed(self, origin: str) -> bool:
        return "*" in self._allowed or origin.lower() in self._allowed


@functools.lru_cache(maxsize=64)
def names_this_machine(host: str | None) -> bool:
    """Whether a `Host` header is a loopback name or address; a client without one is no browser."""
    if host is None:
        return True
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False
