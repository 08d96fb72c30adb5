"""From the configuration to the pool of models: which models, under which names, on which server."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import psutil

from mesh.errors import ConfigurationError
from node.config import DEMO_MODEL, ModelSettings, NodeConfig
from sidecar.changes import Change
from sidecar.client import SidecarClient
from sidecar.config import SidecarConfig
from sidecar.errors import BinaryNotFound, SidecarError
from sidecar.gguf import read_header
from sidecar.pool import ModelEntry, ModelPool, memory_limit
from sidecar.runtime import Server, find_server

EXIT_MODEL = 4
EXIT_SERVER = 7
BACKEND_PATIENCE = 10.0


async def named_models(config: NodeConfig) -> dict[str, ModelSettings]:
    """The models to serve by name: those of the configuration, else the demo model. A server of
    somebody else is asked what it serves where nobody named it. Raises ConfigurationError.
    """
    settings = list(config.models)
    if config.backend_url is not None:
        settings.append(ModelSettings(backend_url=config.backend_url))
    named: dict[str, ModelSettings] = {}
    for one in settings or [ModelSettings(path=DEMO_MODEL)]:
        name = one.name or await _ask_name(one)
        if name in named:
            raise ConfigurationError(f"two models are named {name!r}", "Give one another alias.")
        named[name] = one
    return named


def choose_server(config: NodeConfig, models: Mapping[str, ModelSettings]) -> Server | None:
    """The llama.cpp server to run, once it is known that the model files are some; None where only
    servers of others are used. Blocks. Raises ConfigurationError.
    """
    files = [one.path for one in models.values() if one.path is not None]
    for path in files:
        try:
            read_header(path)
        except (SidecarError, OSError) as error:
            raise ConfigurationError(
                f"the model {path} cannot be used: {error}",
                "Name a GGUF file, or leave the model out to serve the built-in demo model.",
                exit_code=EXIT_MODEL,
            ) from error
    if not files:
        return None
    try:
        return find_server(config.llama_server)
    except BinaryNotFound as error:
        raise ConfigurationError(
            str(error).removesuffix("."),
            "Name a llama-server with --llama-server, or leave that out to take the one that is found.",
            exit_code=EXIT_SERVER,
        ) from error


def model_pool(
    config: NodeConfig,
    models: Mapping[str, ModelSettings],
    server: Server | None,
    on_change: Callable[[str, Change], None],
) -> ModelPool:
    """The pool that loads and unloads the models."""
    entries = [
        ModelEntry(
            SidecarConfig(
                model=one.path,
                backend_url=one.backend_url,
                backend_key=one.backend_key,
                alias=name,
                context=one.context,
                slots=one.slots or config.slots,
                gpu_layers=one.gpu_layers,
                mode=config.mode,
                embeddings=one.embeddings,
                extra_args=one.extra_args,
                log_dir=config.data_dir / "logs",
            ),
            ttl=one.ttl,
        )
        for name, one in models.items()
    ]
    limit = memory_limit(config.mode, psutil.virtual_memory().total)
    return ModelPool(entries, server, limit, on_change=on_change)


async def _ask_name(one: ModelSettings) -> str:
    key = one.backend_key.get_secret_value() if one.backend_key else None
    async with SidecarClient(str(one.backend_url).rstrip("/").removesuffix("/v1"), key) as client:
        try:
            return str((await client.models(timeout=BACKEND_PATIENCE))[0]["id"])
        except (SidecarError, LookupError, TypeError) as error:
            raise ConfigurationError(
                f"the server at {one.backend_url} does not tell its model: {error}",
                "Check the URL and that it runs, or give the model an alias in the configuration.",
                exit_code=EXIT_SERVER,
            ) from error
