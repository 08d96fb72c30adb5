"""One server process: how it is spawned, signalled, watched and reaped. The supervisor owns it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import signal
import socket
import sys
from pathlib import Path
from typing import Self

import psutil

from sidecar import orphans
from sidecar.client import SidecarClient
from sidecar.config import SidecarConfig, server_arguments
from sidecar.errors import BackendUnreachable
from sidecar.modes import Settings
from sidecar.output import OutputPump, RotatingFile
from sidecar.runtime import Server
from sidecar.states import Plan

LAUNCHER = (sys.executable, "-I", "-S", str(Path(__file__).with_name("launch.py")))
"""How every server is started: so that it dies with us."""
_LAST_OUTPUT_TIMEOUT = 1.0


class Child:
    """A running server, its client and its output. Made by `spawn`; `reap` frees everything."""

    def __init__(
        self, process: asyncio.subprocess.Process, port: int, key: str, pump: OutputPump, record: Path
    ) -> None:
        self.process, self.port, self.pump, self._record = process, port, pump, record
        self.client = SidecarClient(f"http://127.0.0.1:{port}", key)
        self._memory_kills = _memory_kills()
        self._cpu_seconds = 0.0

    @classmethod
    async def spawn(cls, config: SidecarConfig, server: Server, plan: Plan, settings: Settings) -> Self:
        """Start the server on a free loopback port with a random key of its own. Raises OSError.

        Call it from a thread that lives as long as the server should (see `sidecar.launch`).
        """
        port, key, nonce = free_port(), secrets.token_hex(16), secrets.token_hex(16)
        arguments = server_arguments(config, plan, settings, port=port)
        environment = {**server.environment(), "LLAMA_API_KEY": key, orphans.NONCE_VARIABLE: nonce}
        pump = OutputPump(RotatingFile(config.log_dir / f"{config.file_name}.log"))
        try:
            process = await asyncio.create_subprocess_exec(
                *(*LAUNCHER, "--nice", str(settings.nice), "--", *server.argv, *arguments),
                stdin=asyncio.subprocess.PIPE,  # the parent-death pipe
                stdout=pump.write_fd,
                stderr=pump.write_fd,
                env=environment,
                start_new_session=True,
            )
        except BaseException:
            pump.abandon()
            raise
        pump.start()
        record = record_path(config)
        with contextlib.suppress(psutil.NoSuchProcess, OSError):  # gone already, or no place to write
            orphans.write_record(record, process.pid, nonce)
        return cls(process, port, key, pump, record)

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to the server and all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    @property
    def ended(self) -> bool:
        """Whether the process is gone."""
        return self.process.returncode is not None

    async def reap(self) -> int:
        """Wait for the end of the process, end its children, free everything; returns its exit code."""
        code = await self.process.wait()
        self.signal_group(signal.SIGKILL)
        if self.process.stdin:
            self.process.stdin.close()
        await self.client.aclose(BackendUnreachable("the server's process ended", started=True))
        await asyncio.to_thread(self.pump.finish, _LAST_OUTPUT_TIMEOUT)
        orphans.remove_record(self._record)
        return code

    def killed_for_memory(self) -> bool | None:
        """Whether the kernel killed any process for memory since the spawn; None where it does not say."""
        now = _memory_kills()
        return None if now is None or self._memory_kills is None else now > self._memory_kills

    def port_taken(self) -> bool:
        """Whether anybody listens on the server's port; after its end that is somebody else."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # its old connections do not count
            try:
                probe.bind(("127.0.0.1", self.port))
            except OSError as error:
                return error.errno == errno.EADDRINUSE
            return False

    def progress(self) -> tuple[int, ...]:
        """Log bytes, CPU seconds, MiB read and MiB resident: any of them moves while a model loads."""
        cpu = read = resident = 0.0
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                cpu += self._cpu(process)
                resident += process.memory_info().rss
                if hasattr(process, "io_counters"):
                    read += process.io_counters().read_bytes
        return self.pump.total, int(cpu), int(read) >> 20, int(resident) >> 20

    def computed(self) -> float:
        """CPU seconds used since the last call."""
        now = 0.0
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                now += self._cpu(process)
        before, self._cpu_seconds = self._cpu_seconds, now
        return now - before

    def _family(self) -> list[psutil.Process]:
        """The server itself, or where a guard stands before it, both (see `sidecar.launch`)."""
        try:
            process = psutil.Process(self.process.pid)
            return [process] if sys.platform == "linux" else [process, *process.children(recursive=True)]
        except psutil.Error:
            return []

    @staticmethod
    def _cpu(process: psutil.Process) -> float:
        times = process.cpu_times()
        return times.user + times.system


def record_path(config: SidecarConfig) -> Path:
    """Where the running server is remembered for the case that the node is killed."""
    return config.log_dir / f"{config.file_name}.pid.json"


def _memory_kills() -> int | None:
    try:
        text = Path("/proc/vmstat").read_text()
    except OSError:
        return None
    counts = (line.split()[1] for line in text.splitlines() if line.startswith("oom_kill "))
    return next(map(int, counts), None)


def free_port() -> int:
    """A port that was free a moment ago; a server that finds it taken is started on another one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
