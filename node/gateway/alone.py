"""A gateway without a node: for a machine that uses the mesh and serves no model."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from mesh.errors import ConfigurationError
from node.config import DEFAULT_GATEWAY, Loaded
from node.gateway.server import Gateway, mesh_client
from node.gateway.settings import GatewaySettings
from node.logs import log_file
from node.membership import resolve


def with_flags(settings: GatewaySettings, flags: Mapping[str, Any]) -> GatewaySettings:
    """The settings with the flags that were given. Raises ConfigurationError."""
    given = {key: value for key, value in flags.items() if value is not None}
    try:
        return GatewaySettings.model_validate({**settings.model_dump(), **given})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the gateway's settings"
        raise ConfigurationError(f"{where}: {first['msg'].lower()}", "Give it another value.") from None


async def run_alone(loaded: Loaded, settings: GatewaySettings, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; the first lets running answers end, a second does not.

    Raises ConfigurationError for whatever the user has to mend, and a TransportError where the node that
    made a join token does not answer.
    """
    config = loaded.config
    network = config.network if loaded.explicit("network") else None
    start = await resolve(config.data_dir, join=config.join, network=network)
    if not start.addresses:
        raise ConfigurationError(
            "a gateway needs a node to start from", "Name one with --join HOST:PORT or a join token."
        )
    mesh = mesh_client(start.addresses, start.network, None)
    gateway = Gateway(
        config.gateway or DEFAULT_GATEWAY,
        mesh,
        config.data_dir,
        settings=settings,
        or_next=not loaded.explicit("gateway"),
    )
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def asked_to_stop() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked_to_stop)
    with log_file(config.data_dir, "gateway.log"):
        try:
            await gateway.start()
            ready(gateway.url)
            await stop.wait()
        finally:
            await _close(gateway, config.drain_seconds, hurry)


async def _close(gateway: Gateway, grace: float, hurry: asyncio.Event) -> None:
    async with asyncio.TaskGroup() as group:
        hurried = group.create_task(hurry.wait())
        closing = group.create_task(gateway.close(grace))
        await asyncio.wait({hurried, closing}, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if not closing.done():
            await gateway.close(0)
