"""A node's settings and where each comes from: flags > `QMESH_*` > qmesh.toml > defaults.

Unknown keys are refused wherever they stand, with the nearest known key as a hint.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Self

import platformdirs
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from mesh.address import parse_address
from mesh.admission import AdmissionPolicy, IPNetwork
from mesh.errors import ConfigurationError
from mesh.identity import NodeId, parse_node_id
from mesh.limits import DEFAULT_PORT
from mesh.network import OPEN_NETWORK
from node.gateway.settings import GatewaySettings
from node.logs import Style
from sidecar.modes import Mode

CONFIG_FILE = "qmesh.toml"
ENV_PREFIX = "QMESH_"
DEFAULT_LISTEN = f"[::]:{DEFAULT_PORT}"
DEFAULT_GATEWAY = f"127.0.0.1:{DEFAULT_PORT + 1}"
DEMO_MODEL = Path(__file__).resolve().parent.parent / "sidecar" / "assets" / "qmesh-demo.gguf"

NOT_SETTINGS = frozenset({"QMESH_CONFIG", "QMESH_DEBUG", "QMESH_FUZZ_ROUNDS", "QMESH_FUZZ_SEED"})
"""Variables with the prefix that are no settings of a node; nor are those of the tests."""
TEST_PREFIX = "QMESH_TEST_"


def default_data_dir() -> Path:
    """The per-user folder for a node's files, by the platform's convention."""
    return Path(platformdirs.user_data_path("qmesh", appauthor=False))


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)


class ModelSettings(_Strict):
    """One model that the node serves: a GGUF file, or a server that somebody else runs."""

    path: Path | None = None
    """The GGUF file."""
    backend_url: str | None = Field(default=None, pattern=r"^https?://")
    """An OpenAI-compatible server to use instead of supervising one."""
    backend_key: SecretStr | None = None
    """The API key of that server."""
    alias: str | None = Field(default=None, min_length=1, max_length=64)
    """The name on the mesh; where absent the file's name without `.gguf`, or what the server says."""
    context: int | None = Field(default=None, ge=64)
    """Tokens of context per slot; chosen by `mode` where absent."""
    slots: int | None = Field(default=None, ge=1, le=256)
    """Requests answered at the same time; the node's `slots` where absent."""
    gpu_layers: int | None = Field(default=None, ge=0)
    """Layers on the GPU; llama.cpp decides where absent."""
    embeddings: bool = False
    """Serve embeddings instead of text."""
    extra_args: tuple[str, ...] = ()
    """More arguments for llama-server, as they are."""
    autostart: bool = True
    """Load it when the node starts; else when it is first asked for."""
    ttl: float | None = Field(default=None, gt=0)
    """Seconds without use after which it is unloaded; never where absent."""

    @field_validator("path")
    @classmethod
    def _expand(cls, path: Path | None) -> Path | None:
        return path.expanduser() if path is not None else None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.backend_url is None):
            raise ValueError("a model needs either `path` or `backend_url`")
        return self

    @property
    def name(self) -> str | None:
        """The model's name on the mesh; None where a server still has to be asked for it."""
        return self.alias or (self.path.name.removesuffix(".gguf") if self.path is not None else None)


class PeerSettings(_Strict):
    """Whom the node serves, and how much of it: the table `[peers]` of qmesh.toml.

    The lists hold on the wire (TCP), where answers are given; the DHT stays open to all who find it.
    """

    allow: tuple[str, ...] | None = None
    """Ids of the only nodes and clients that are served; everybody where absent."""
    deny: tuple[str, ...] = ()
    """Ids, addresses or networks (`192.0.2.0/24`) that are not served."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Requests of one peer; no limit where absent."""
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Tokens, of prompts and answers, of one peer; no limit where absent."""

    @field_validator("allow")
    @classmethod
    def _ids(cls, texts: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for text in texts or ():
            parse_node_id(text)
        return texts

    @field_validator("deny")
    @classmethod
    def _ids_or_networks(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        for text in texts:
            _network(text) or parse_node_id(text)
        return texts

    def policy(self, own_id: NodeId) -> AdmissionPolicy:
        """The lists for a listener. The node's own gateway is let in whatever they say."""
        allow = None if self.allow is None else frozenset({own_id, *map(parse_node_id, self.allow)})
        networks = {text: _network(text) for text in self.deny}
        return AdmissionPolicy(
            allow=allow,
            deny=frozenset(parse_node_id(text) for text, network in networks.items() if network is None)
            - {own_id},
            deny_networks=tuple(network for network in networks.values() if network is not None),
        )


def _network(text: str) -> IPNetwork | None:
    try:
        return ip_network(text, strict=False)
    except ValueError:
        return None


class NodeConfig(_Strict):
    """Every setting of `qmesh-node run`. Field names are the keys of qmesh.toml and, in capitals
    behind `QMESH_`, the environment's variables; lists are separated by commas there.
    """

    data_dir: Path = Field(default_factory=default_data_dir)
    """Everything the node writes is under this folder."""
    listen: str = DEFAULT_LISTEN
    """`HOST:PORT` of the wire (TCP) and the DHT (UDP); ``[::]`` is all addresses, IPv4 ones too. The
    default port may move up if taken."""
    advertise: tuple[str, ...] = ()
    """`HOST:PORT` that peers should use, where it differs from what the node sees of itself."""
    join: tuple[str, ...] = ()
    """Nodes to start from: `HOST:PORT`, `ID@HOST:PORT` or a join token."""
    network: str = OPEN_NETWORK
    """The mesh's name; nodes of different names never talk to each other."""
    gateway: str | None = DEFAULT_GATEWAY
    """`HOST:PORT` of the local OpenAI API; none with `--no-gateway`."""
    api: GatewaySettings = GatewaySettings()
    """What the OpenAI API does: the table `[api]` of qmesh.toml."""
    peers: PeerSettings = PeerSettings()
    """Whom the node serves, and how much of it."""
    mdns: bool = True
    """Whether to look for peers on the local network."""
    llama_server: Path | None = None
    """The llama-server to use instead of the one that is found."""
    backend_url: str | None = Field(default=None, pattern=r"^https?://")
    """An OpenAI-compatible server to use instead of supervising one."""
    mode: Mode = Mode.BALANCED
    """How much of the machine the models may take: efficiency, balanced or performance."""
    slots: int | None = Field(default=None, ge=1, le=256)
    """Requests answered at the same time per model; chosen by `mode` where absent."""
    models: tuple[ModelSettings, ...] = ()
    """The models to serve; the demo model where empty."""
    drain_seconds: float = Field(default=10.0, ge=0, le=3600)
    """How long running answers may go on after the first signal to stop."""

    log_format: Style = "console"
    """How log lines on stderr look: `console` or `json`."""

    @field_validator("data_dir", "llama_server")
    @classmethod
    def _expand(cls, path: Path | None) -> Path | None:
        return path.expanduser() if path is not None else None

    @field_validator("listen", "gateway")
    @classmethod
    def _address(cls, text: str | None) -> str | None:
        if text is not None:
            parse_address(text)
        return text

    @field_validator("advertise")
    @classmethod
    def _addresses(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        for text in texts:
            parse_address(text)
        return texts


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration with the place each value came from (`flag`, `env`, `file` or `default`)."""

    config: NodeConfig
    origin: Mapping[str, str]

    def explicit(self, key: str) -> bool:
        """Whether somebody set this key, rather than leaving it to its default."""
        return self.origin[key] != "default"

    @classmethod
    def of(
        cls,
        flags: Mapping[str, Any],
        *,
        file: Path | None,
        gateway_off: bool = False,
        environ: Mapping[str, str] | None = None,
    ) -> Self:
        """Merge all sources. Flags that are None count as not given; `gateway_off` is --no-gateway.

        Raises ConfigurationError for unknown keys, wrong values and an unreadable file.
        """
        environ = os.environ if environ is None else environ
        flags = {key: value for key, value in flags.items() if value is not None}
        if gateway_off:
            flags["gateway"] = None
        env = _from_environment(environ)
        folder = Path(flags.get("data_dir") or env.get("data_dir") or default_data_dir()).expanduser()
        named = file or (Path(environ["QMESH_CONFIG"]) if environ.get("QMESH_CONFIG") else None)
        path = named or folder / CONFIG_FILE
        values: dict[str, Any] = {}
        origin = dict.fromkeys(NodeConfig.model_fields, "default")
        sources = ((f"{path}", _from_file(path, required=named is not None)), ("env", env), ("flag", flags))
        for source, mapping in sources:
            for key, value in mapping.items():
                values[key] = value
                origin[key] = source
        try:
            config = NodeConfig.model_validate(values)
        except ValidationError as error:
            raise _explain(error, origin) from None
        return cls(config, origin)


def _from_file(path: Path, *, required: bool) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        if not required:
            return {}
        raise ConfigurationError(f"there is no configuration file {path}", "Check --config.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path} is not valid TOML: {error}", "Mend that line.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}", "Check its permissions.") from error


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    simple = NodeConfig.model_fields.keys() - {"models", "api", "peers"}  # tables have no place in a variable
    for variable, text in environ.items():
        if (
            not variable.startswith(ENV_PREFIX)
            or variable.startswith(TEST_PREFIX)
            or variable in NOT_SETTINGS
        ):
            continue
        key = variable.removeprefix(ENV_PREFIX).lower()
        if key not in simple:
            raise _unknown(variable, [ENV_PREFIX + name.upper() for name in simple])
        if key in {"join", "advertise"}:
            values[key] = [part.strip() for part in text.split(",") if part.strip()]
        elif key == "gateway" and text.lower() in {"", "off", "none", "0"}:
            values[key] = None
        else:
            values[key] = text
    return values


def _explain(error: ValidationError, origin: Mapping[str, str]) -> ConfigurationError:
    """One sentence for the first thing that is wrong."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    source = origin.get(str(first["loc"][0]), "default") if first["loc"] else "default"
    if first["type"] == "extra_forbidden":
        tables: dict[str, type[BaseModel]] = {
            "models": ModelSettings,
            "api": GatewaySettings,
            "peers": PeerSettings,
        }
        table = tables.get(str(first["loc"][0]), NodeConfig)
        return _unknown(str(first["loc"][-1]), list(table.model_fields), source)
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return ConfigurationError(f"{where} (from {source}) is missing", "Add it.")
    return ConfigurationError(
        f"{where} (from {source}) is {first['input']!r}: {reason[:1].lower()}{reason[1:]}",
        "Give it another value.",
    )


def _unknown(key: str, known: list[str], source: str | None = None) -> ConfigurationError:
    near = difflib.get_close_matches(key, known, n=1)
    place = f" in {source}" if source else ""
    hint = f"Did you mean {near[0]!r}?" if near else f"Known are: {', '.join(sorted(known))}."
    return ConfigurationError(f"unknown setting {key!r}{place}", hint)
