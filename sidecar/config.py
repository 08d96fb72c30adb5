"""What a server is to be started with, and the command line that follows from it. Pure."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from sidecar.modes import Mode, Settings
from sidecar.states import Plan


class SidecarConfig(BaseModel):
    """One model and how to serve it. Unknown keys are refused. None means: chosen by `mode`.

    `context` is in tokens per slot. Either `model` (a GGUF file that we serve) or `backend_url` (any
    running OpenAI-compatible server, which we only watch) is given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Path | None = None
    alias: str | None = None
    context: int | None = Field(default=None, ge=64)
    slots: int | None = Field(default=None, ge=1, le=256)
    gpu_layers: int | None = Field(default=None, ge=0)
    threads: int | None = Field(default=None, ge=1)
    mode: Mode = Mode.BALANCED
    embeddings: bool = False
    extra_args: tuple[str, ...] = ()
    server: Path | None = None
    log_dir: Path
    backend_url: str | None = Field(default=None, pattern=r"^https?://")
    backend_key: SecretStr | None = None

    @model_validator(mode="after")
    def _one_source(self) -> SidecarConfig:
        if (self.model is None) == (self.backend_url is None):
            raise ValueError("give either a model file or a backend URL")
        return self

    @property
    def name(self) -> str:
        """The model's name towards others: the alias, else the file's stem, else the URL."""
        if self.alias:
            return self.alias
        return self.model.stem if self.model else str(self.backend_url)

    @property
    def file_name(self) -> str:
        """The name with all that is unusual in file names replaced."""
        return re.sub(r"[^\w.-]", "_", self.name)[:80]


def server_arguments(config: SidecarConfig, plan: Plan, settings: Settings, *, port: int) -> list[str]:
    """llama-server's arguments. The API key goes by LLAMA_API_KEY, never here: argv is public."""
    arguments = ["--model", str(config.model), "--alias", config.name]
    arguments += ["--host", "127.0.0.1", "--port", str(port)]
    # llama-server divides --ctx-size by an explicit --parallel
    arguments += ["--ctx-size", str(plan.context * plan.slots), "--parallel", str(plan.slots)]
    arguments += ["--threads", str(settings.threads), "--metrics"]
    if plan.gpu_layers is not None:
        arguments += ["--n-gpu-layers", str(plan.gpu_layers)]
    if config.embeddings:
        arguments += ["--embeddings"]
    if settings.pooling:
        arguments += ["--pooling", settings.pooling]
    return [*arguments, *config.extra_args]
