"""Run a program that must not outlive its parent: `python launch.py [--nice N] [--guard] -- PROGRAM ARG…`

Standard input is the parent-death pipe: the parent holds its other end and never writes.

On Linux the program replaces this process after asking the kernel for SIGKILL at the parent's death
(prctl PR_SET_PDEATHSIG, kept across exec; it follows the parent *thread* that spawned us, so spawn from
a thread that lives as long as the program should). Elsewhere, or with --guard, this process stays as
its guard: when the pipe closes it kills the program. Either way the program reads /dev/null.

Imports nothing but the standard library: it runs under `python -I -S`, before anything else.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> bool:
    """Ask the kernel to kill this process when its parent dies; False where it cannot."""
    if sys.platform != "linux":
        return False
    import ctypes  # noqa: PLC0415 - only where it is of use

    return bool(ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0)


def parent_is_gone() -> bool:
    """Whether the parent already closed the pipe (it may die before the kernel is asked)."""
    readable, _, _ = select.select([0], [], [], 0)
    return bool(readable) and os.read(0, 1) == b""


def guard(program: list[str]) -> int:
    """Run `program`, pass SIGTERM and SIGINT on, kill it when the pipe closes; returns its exit status."""
    child = subprocess.Popen(program, stdin=subprocess.DEVNULL)  # noqa: S603 - the caller chose the program

    def kill_at_end_of_pipe() -> None:
        while os.read(0, 1):
            pass
        child.kill()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, _frame: child.send_signal(got))
    threading.Thread(target=kill_at_end_of_pipe, daemon=True).start()
    return child.wait()


def end_like(status: int) -> int:
    """End this process as the program ended; returns the exit status where it was no signal."""
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def main(argv: list[str]) -> int:
    """Entry point; returns only for a guard or an error."""
    options, program = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    if "--nice" in options:
        os.nice(int(options[options.index("--nice") + 1]))
    if "--guard" in options or not die_with_parent():
        return end_like(guard(program))
    if parent_is_gone():
        return 1
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    try:
        os.execv(program[0], program)  # noqa: S606 - the point
    except OSError as error:
        print(f"cannot execute {program[0]}: {error.strerror}", file=sys.stderr)  # noqa: T201
        return 127 if isinstance(error, FileNotFoundError) else 126


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
