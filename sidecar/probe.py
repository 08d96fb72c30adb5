"""Asks a server process whether it is ours, ready, and making progress."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sidecar.child import Child
from sidecar.errors import AccessDenied, SidecarError
from sidecar.states import Answered, Silent

_WORK = ("tokens_predicted_total", "prompt_tokens_total", "n_decode_total")


@dataclass(frozen=True, slots=True)
class Probing:
    """How often the server is asked, in seconds."""

    loading_first: float = 0.02
    loading_most: float = 0.5
    progress: float = 1.0
    """Between two samples of progress while loading."""
    tell: float = 5.0
    """Between two lines for people while loading."""
    idle: float = 4.0
    busy: float = 2.0
    degraded: float = 1.0
    timeout: float = 2.0


@dataclass(frozen=True, slots=True)
class Info:
    """What a ready server says of itself. `context` is in tokens per slot."""

    model: str
    context: int
    slots: int
    build: str
    chat_template: str


async def introduce(child: Child, name: str, timeout: float) -> Info | str:
    """What the server says of itself once it is ready and ours; until then what is missing, in words.

    Ours is proved by the random key: it is accepted, and another one is not. A foreign server that
    took our port, or one without any key, fails this.
    """
    client = child.client
    try:
        if not await client.health(timeout=timeout):
            return "/health does not say 200"
        props = await client.props(timeout=timeout)
        async with await client.request("GET", "/props", timeout=timeout, api_key="not the key") as other:
            ours = other.status == 401
    except AccessDenied:
        ours = False
    except SidecarError as error:
        return error.message
    return _info(props, name) if ours else "another server answers on our port"


async def examine(
    child: Child, last: Mapping[str, float], probing: Probing
) -> tuple[Answered | Silent, Mapping[str, float]]:
    """One probe of a serving process: the event for the lifecycle, and the newest metrics.

    One request to /metrics does for both questions; /health is asked only when that is silent, since
    a long prompt keeps /metrics waiting and /health does not queue behind it.
    """
    client = child.client
    in_flight = client.in_flight > 0
    try:
        last = metrics = await client.metrics(timeout=probing.timeout)
        busy = metrics.get("requests_processing", 0) + metrics.get("requests_deferred", 0) > 0
    except SidecarError:
        try:
            if not await client.health(timeout=probing.timeout):
                return Silent("/health does not say 200"), last
        except SidecarError as error:
            return Silent(error.message), last
        busy = in_flight
    work = tuple(int(last.get(name, 0)) for name in _WORK)
    return Answered(busy, work, computing=child.computed() > 0.2 * probing.busy), last


def _info(props: Mapping[str, Any], name: str) -> Info:
    settings = props.get("default_generation_settings") or {}
    return Info(
        model=name,
        context=int(settings.get("n_ctx") or 0),
        slots=int(props.get("total_slots") or 1),
        build=str(props.get("build_info") or ""),
        chat_template=str(props.get("chat_template") or ""),
    )
