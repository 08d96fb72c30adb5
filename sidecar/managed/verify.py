"""Proves that an installed server works here: its version, its devices, one token of the demo model."""

from __future__ import annotations

import asyncio
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sidecar.config import SidecarConfig
from sidecar.errors import RuntimeFailure, SidecarError
from sidecar.managed.gpu import Gpu
from sidecar.process import Supervisor
from sidecar.runtime import Server, check_binary

DEMO_MODEL = Path(__file__).parent.parent / "assets" / "qmesh-demo.gguf"
_LIST_TIMEOUT = 60.0
_TOKEN_TIMEOUT = 120.0


@dataclass(frozen=True, slots=True)
class Proof:
    """What a working server said: version, accelerator devices (none: CPU only), one token."""

    version: str
    devices: list[str]
    token: str


async def verify(binary: Path) -> Proof:
    """Run all three checks. Raises BinaryNotFound or RuntimeFailure with what went wrong."""
    version = await asyncio.to_thread(check_binary, binary)
    server = Server("explicit", (str(binary),), version, "to be verified")
    devices = await asyncio.to_thread(list_devices, server)
    with tempfile.TemporaryDirectory(prefix="qmesh-verify-") as folder:
        config = SidecarConfig(model=DEMO_MODEL, context=512, slots=1, log_dir=Path(folder))
        try:
            async with Supervisor(config, server) as supervisor:
                client = await supervisor.ensure_ready(_TOKEN_TIMEOUT)
                answer = await client.completion({"prompt": "Once", "n_predict": 1}, timeout=_TOKEN_TIMEOUT)
        except SidecarError as error:
            raise RuntimeFailure(f"{binary} cannot run the demo model: {error}") from error
    return Proof(version, devices, str(answer["content"]))


def list_devices(server: Server) -> list[str]:
    """The accelerators that a server sees, as it names them. Blocks. Raises RuntimeFailure."""
    try:
        done = subprocess.run(  # noqa: S603 - a server that was just installed or named
            [*server.argv, "--list-devices"],
            env=server.environment(),
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=_LIST_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeFailure(f"{server.argv[0]} --list-devices failed: {error}") from error
    _, _, listed = (done.stdout + done.stderr).partition("Available devices:")
    lines = (line.strip() for line in listed.splitlines())
    return [line for line in lines if re.match(r"[A-Za-z]+\d*:", line) and not line.startswith("CPU")]


def sees(devices: list[str], gpu: Gpu) -> bool:
    """Whether a server uses the machine's GPU: true where there is none to use."""
    return gpu is Gpu.NONE or bool(devices)
