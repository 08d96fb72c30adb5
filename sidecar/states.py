"""The vocabulary of the lifecycle: states, settings, events and effects. Pure.

Times are seconds on any clock that only moves forward. The rules are in `sidecar.lifecycle`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from sidecar.exits import Exit


class State(StrEnum):
    """Where a server is in its life."""

    STOPPED = "stopped"
    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    DEGRADED = "degraded"
    STOPPING = "stopping"
    BACKING_OFF = "backing_off"
    FAILED = "failed"


SERVING = frozenset({State.READY, State.DEGRADED})
ALIVE = SERVING | {State.STARTING, State.LOADING, State.STOPPING}


class Goal(StrEnum):
    """What follows once a process that is being ended is gone."""

    STOP = "stop"
    START = "start"
    RETRY = "retry"


class Fault(StrEnum):
    """The kind of a failure; the shell has one exception for each."""

    FATAL = "fatal"
    MEMORY = "memory"
    CRASH = "crash"
    HANG = "hang"


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong last."""

    fault: Fault
    message: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The settings that decide how much memory the server takes. Context is in tokens per slot."""

    context: int
    slots: int
    gpu_layers: int | None = None
    layers: int | None = None
    """Layers of the model, where known: the start for stepping GPU layers down from 'all'."""

    def smaller(self) -> Plan | None:
        """The next plan to try when memory ran out, or None when there is nothing left to give up."""
        if self.slots > 1:
            return replace(self, slots=self.slots // 2)
        if self.context > 1024:
            return replace(self, context=max(1024, self.context // 2))
        on_gpu = self.gpu_layers if self.gpu_layers is not None else self.layers or 0
        if on_gpu > 0:
            return replace(self, gpu_layers=on_gpu // 2)
        return None


@dataclass(frozen=True, slots=True)
class Policy:
    """Every limit of the machine, in seconds unless it says otherwise."""

    load_stall: float = 60.0
    backoff_first: float = 0.2
    backoff_factor: float = 4.0
    max_restarts: int = 3
    restart_window: float = 600.0
    healthy_after: float = 60.0
    hang_after: float = 10.0
    """Silence of /health after which a server that answered before is taken for hung."""
    stall_after: float = 60.0
    """No token and no decode while work is queued and the process does not even compute."""
    stall_computing_after: float = 600.0
    """The same while it computes: a long prompt on a slow CPU shows no token for minutes."""
    term_again: float = 5.0
    kill_after: float = 3.0


@dataclass(frozen=True, slots=True)
class Machine:
    """The whole state. Fields are meaningful in the states their comment names."""

    plan: Plan
    full: Plan
    state: State = State.STOPPED
    since: float = 0.0
    crashes: tuple[float, ...] = ()  # restarts within the window
    restarts: int = 0  # in all
    failure: Failure | None = None
    retry_at: float | None = None  # backing_off, failed
    goal: Goal = Goal.STOP  # stopping
    signals: int = 0  # stopping: how many were sent
    signal_at: float = 0.0  # stopping: when the next is due
    mark: tuple[int, ...] = ()  # loading: the last sign of progress
    marked_at: float = 0.0
    waits_for: str = ""  # loading: what is missing
    answered_at: float = 0.0  # ready, degraded
    work: tuple[int, ...] = ()  # ready, degraded: counters that move while tokens flow
    moved_at: float = 0.0


# ── events ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class StartRequested:
    """Someone needs the server."""


@dataclass(frozen=True, slots=True)
class StopRequested:
    """The server is to end and stay down."""


@dataclass(frozen=True, slots=True)
class RestartRequested:
    """The server is to be started anew, with full settings and a fresh budget."""


@dataclass(frozen=True, slots=True)
class Spawned:
    """The process exists."""


@dataclass(frozen=True, slots=True)
class SpawnFailed:
    """The process could not be made; `fatal` when trying again cannot help."""

    message: str
    fatal: bool
    jitter: float = 0.5


@dataclass(frozen=True, slots=True)
class Progressed:
    """A sample of log bytes, CPU seconds, bytes read and memory while the model loads.

    `waits_for` says in words what is missing to be ready.
    """

    mark: tuple[int, ...]
    waits_for: str = ""


@dataclass(frozen=True, slots=True)
class BecameReady:
    """/health says 200 and our key, and no other, is accepted."""


@dataclass(frozen=True, slots=True)
class Answered:
    """The server answered a probe.

    `busy`: requests are in it. `work`: counters that move with every token. `computing`: it used CPU
    since the last probe.
    """

    busy: bool
    work: tuple[int, ...]
    computing: bool = False


@dataclass(frozen=True, slots=True)
class Silent:
    """A probe got no answer; `detail` says what was tried."""

    detail: str


@dataclass(frozen=True, slots=True)
class Exited:
    """The process is gone and reaped. `jitter` is a random number in [0, 1)."""

    verdict: Exit
    jitter: float = 0.5


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    StartRequested
    | StopRequested
    | RestartRequested
    | Spawned
    | SpawnFailed
    | Progressed
    | BecameReady
    | Answered
    | Silent
    | Exited
    | Tick
)


# ── effects ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start the process with this plan."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class CloseClients:
    """Close our connections to the server: with one open it ignores SIGTERM."""


@dataclass(frozen=True, slots=True)
class Terminate:
    """Send SIGTERM to the process group."""


@dataclass(frozen=True, slots=True)
class Kill:
    """Send SIGKILL to the process group."""


Effect = Spawn | CloseClients | Terminate | Kill
