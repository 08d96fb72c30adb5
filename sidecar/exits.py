"""Why a server's process ended, judged from its exit code and last lines. Pure.

Sources: llama.cpp's exit codes and messages as measured (docs/sidecar.md, "Exit codes").
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

SIGILL, SIGKILL, SIGTERM = 4, 9, 15
"""POSIX numbers; written out because `signal` lacks some of them on Windows."""

_OUT_OF_MEMORY = re.compile(
    r"out of memory|failed to allocate|cudaMalloc failed|unable to allocate|bad_alloc|OutOfDeviceMemory"
    r"|insufficient memory|cannot allocate memory|OutOfMemory",
    re.IGNORECASE,
)
_PORT_TAKEN = re.compile(r"couldn't bind|address already in use", re.IGNORECASE)


class Cause(StrEnum):
    """What the supervisor must do about an exit."""

    FATAL = "fatal"  # the same start would fail again
    MEMORY = "memory"  # start again, but smaller
    PORT = "port"  # start again on another port
    CRASH = "crash"  # start again


@dataclass(frozen=True, slots=True)
class Exit:
    """The judgement on one exit: what to do, and why in words."""

    cause: Cause
    message: str


def judge(
    code: int, tail: Sequence[str], *, was_ready: bool, memory_kill: bool | None, port_taken: bool
) -> Exit:
    """Judge an exit that nobody asked for.

    `code` is negative for a signal, as in `subprocess`. `memory_kill` says whether the kernel killed
    a process for memory meanwhile; None where the platform cannot tell. `port_taken`: somebody listens on
    the port that the server was given; its own words about that are sometimes lost with it.
    """
    text = "\n".join(tail)
    if code == -SIGKILL and (memory_kill or (memory_kill is None and not was_ready)):
        return Exit(Cause.MEMORY, "killed by the system for its memory use")
    if _OUT_OF_MEMORY.search(text):
        return Exit(Cause.MEMORY, f"out of memory ({describe(code)})")
    if was_ready:
        return Exit(Cause.CRASH, describe(code))
    if code == 1:
        if port_taken or _PORT_TAKEN.search(text):
            return Exit(Cause.PORT, "its port was taken by another program")
        if not text.strip():
            # A refusal comes with its reason; silence means that something ended it before it could speak.
            return Exit(Cause.CRASH, "it ended without a word (exit code 1)")
        return Exit(Cause.FATAL, "the server refused its arguments or its model (exit code 1)")
    if code in (126, 127):
        return Exit(Cause.FATAL, f"the server's program cannot be executed (exit code {code})")
    if code == -SIGILL:
        return Exit(Cause.FATAL, "the server was built for another CPU (illegal instruction)")
    return Exit(Cause.CRASH, describe(code))


def describe(code: int) -> str:
    """An exit code in words: `exit code 3` or `killed by signal 9`."""
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
