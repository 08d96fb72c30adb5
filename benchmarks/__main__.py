"""`make bench`: every benchmark in turn, each in a process of its own; names after it choose some.

python -m benchmarks [NAME ...]
"""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import benchmarks

LIMIT = 1800
"""Seconds for one benchmark."""


def main(names: list[str]) -> int:
    """Run them; the exit status is the number that failed."""
    known = sorted(
        module.name for module in pkgutil.iter_modules(benchmarks.__path__) if module.name != "__main__"
    )
    unknown = set(names) - set(known)
    if unknown:
        print(
            f"no benchmark is named {', '.join(sorted(unknown))}; there are: {', '.join(known)}",
            file=sys.stderr,
        )
        return 2
    failed = 0
    for name in names or known:
        print(f"\n== {name} ==", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}"]
        try:
            failed += subprocess.run(command, check=False, timeout=LIMIT).returncode != 0
        except subprocess.TimeoutExpired:
            print(f"{name} took longer than {LIMIT} s", file=sys.stderr)
            failed += 1
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
