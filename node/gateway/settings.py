"""What can be set of the gateway: the table `[api]` of qmesh.toml."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class GatewaySettings(BaseModel):
    """Every setting of the gateway but its address. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

    default_model: str | None = Field(default=None, min_length=1, max_length=255)
    """The model of requests that name none; the one that most workers have where absent."""
    aliases: dict[str, str] = Field(default_factory=dict, max_length=256)
    """Other names for models: `{"gpt-4o" = "qmesh-demo"}`."""
    tls_certificate: Path | None = None
    """A PEM file with the certificate chain: serve HTTPS."""
    tls_key: Path | None = None
    """The certificate's private key, PEM."""
    cors_origins: tuple[str, ...] = ()
    """Web pages that may use the gateway from a browser, as `https://host[:port]`; `*` allows all."""
    wait_seconds: float = Field(default=120.0, ge=0, le=3600)
    """How long a request waits for a worker while none is ready."""
    max_body_mb: int = Field(default=32, ge=1, le=32)
    """The largest request body."""

    @field_validator("tls_certificate", "tls_key")
    @classmethod
    def _expand(cls, path: Path | None) -> Path | None:
        return path.expanduser() if path is not None else None

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not origin.startswith(("http://", "https://")):
                raise ValueError(f"{origin!r} is no origin; write it like https://chat.example.org")
        return tuple(origin.rstrip("/").lower() for origin in origins)

    @model_validator(mode="after")
    def _both(self) -> GatewaySettings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together")
        return self
