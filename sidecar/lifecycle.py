"""The life of one supervised server as a pure state machine: (machine, event, now) → (machine, effects).

::

    stopped ─► starting ─► loading ─► ready ⇄ degraded
       ▲           ▲          │         │        │
       │           │          ▼         ▼        ▼      crash, hang, out of memory
       │      backing_off ◄───┴─────────┴────────┘
       │           │
       └─ stopping └──► failed (fatal, or the restart budget is used up)

The shell (`sidecar.process`) performs the effects, reports what happens as events, and calls again at
`deadline(machine)`. Times are seconds on any clock that only moves forward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from sidecar.exits import Cause, Exit


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
    answered_at: float = 0.0  # ready, degraded
    work: tuple[int, ...] = ()  # ready, degraded: counters that move while tokens flow
    moved_at: float = 0.0


def new_machine(plan: Plan) -> Machine:
    """A stopped machine that will start with `plan`."""
    return Machine(plan=plan, full=plan)


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
    """A sample of log bytes, CPU seconds, bytes read and memory while the model loads."""

    mark: tuple[int, ...]


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
Step = tuple[Machine, tuple[Effect, ...]]


def deadline(machine: Machine, policy: Policy) -> float | None:
    """When `Tick` is due, or None when only an event can change anything."""
    match machine.state:
        case State.BACKING_OFF | State.FAILED:
            return machine.retry_at
        case State.STOPPING:
            return machine.signal_at
        case State.LOADING:
            return machine.marked_at + policy.load_stall
        case State.READY | State.DEGRADED if machine.crashes:
            return machine.since + policy.healthy_after
        case _:
            return None


def step(machine: Machine, event: Event, now: float, policy: Policy) -> Step:  # noqa: PLR0911, PLR0912 - one per event
    """The one transition function."""
    match event:
        case StartRequested():
            return _start_requested(machine, now)
        case StopRequested():
            return _stop_requested(machine, now, policy)
        case RestartRequested():
            return _restart_requested(machine, now, policy)
        case Spawned() if machine.state is State.STARTING:
            return replace(machine, state=State.LOADING, since=now, mark=(), marked_at=now), ()
        case SpawnFailed() if machine.state is State.STARTING:
            if event.fatal:
                return _fail(machine, now, Failure(Fault.FATAL, event.message)), ()
            return _crashed(machine, now, policy, Failure(Fault.CRASH, event.message), event.jitter), ()
        case Progressed() if machine.state is State.LOADING and event.mark != machine.mark:
            return replace(machine, mark=event.mark, marked_at=now), ()
        case BecameReady() if machine.state is State.LOADING:
            return _ready(machine, now), ()
        case Answered() if machine.state in SERVING:
            return _answered(machine, event, now, policy)
        case Silent() if machine.state in SERVING:
            return _silent(machine, event, now, policy)
        case Exited():
            return _exited(machine, event, now, policy)
        case Tick():
            return _tick(machine, now, policy)
        case _:
            return machine, ()  # an event of a process or state that is over


def _start_requested(machine: Machine, now: float) -> Step:
    if machine.state is State.STOPPED:
        return _spawn(machine, now)
    if machine.state is State.STOPPING and machine.goal is Goal.STOP:
        return replace(machine, goal=Goal.START), ()
    return machine, ()


def _stop_requested(machine: Machine, now: float, policy: Policy) -> Step:
    if machine.state is State.STOPPING:
        return replace(machine, goal=Goal.STOP), ()
    if machine.state in ALIVE:
        return _terminate(machine, now, policy, Goal.STOP)
    return replace(machine, state=State.STOPPED, since=now, retry_at=None), ()


def _restart_requested(machine: Machine, now: float, policy: Policy) -> Step:
    machine = replace(machine, plan=machine.full, crashes=(), failure=None)
    if machine.state is State.STOPPING:
        return replace(machine, goal=Goal.START), ()
    if machine.state in ALIVE:
        return _terminate(machine, now, policy, Goal.START)
    return _spawn(machine, now)


def _spawn(machine: Machine, now: float) -> Step:
    return replace(machine, state=State.STARTING, since=now, retry_at=None), (Spawn(machine.plan),)


def _ready(machine: Machine, now: float) -> Machine:
    return replace(
        machine, state=State.READY, since=now, failure=None, answered_at=now, moved_at=now, work=()
    )


def _answered(machine: Machine, event: Answered, now: float, policy: Policy) -> Step:
    moved = not event.busy or event.work != machine.work
    moved_at = now if moved else machine.moved_at
    machine = replace(machine, answered_at=now, work=event.work, moved_at=moved_at, state=State.READY)
    patience = policy.stall_computing_after if event.computing else policy.stall_after
    if now - moved_at >= patience:
        waited = f"no token for {now - moved_at:.0f} s while requests are in the server"
        return _hung(machine, now, policy, waited)
    return machine, ()


def _silent(machine: Machine, event: Silent, now: float, policy: Policy) -> Step:
    if now - machine.answered_at >= policy.hang_after:
        return _hung(machine, now, policy, f"{event.detail} for {now - machine.answered_at:.0f} s")
    return replace(machine, state=State.DEGRADED), ()


def _hung(machine: Machine, now: float, policy: Policy, message: str) -> Step:
    machine = replace(machine, failure=Failure(Fault.HANG, message))
    return _kill(machine, now, policy)


def _kill(machine: Machine, now: float, policy: Policy) -> Step:
    """End a process that would not listen to SIGTERM; it counts as a crash."""
    machine = replace(
        machine,
        state=State.STOPPING,
        since=now,
        goal=Goal.RETRY,
        signals=3,
        signal_at=now + policy.kill_after,
    )
    return machine, (CloseClients(), Kill())


def _terminate(machine: Machine, now: float, policy: Policy, goal: Goal) -> Step:
    machine = replace(
        machine, state=State.STOPPING, since=now, goal=goal, signals=1, signal_at=now + policy.term_again
    )
    return machine, (CloseClients(), Terminate())


def _exited(machine: Machine, event: Exited, now: float, policy: Policy) -> Step:  # noqa: PLR0911 - one per case
    if machine.state is State.STOPPING:
        if machine.goal is Goal.START:
            return _spawn(machine, now)
        if machine.goal is Goal.STOP:
            return replace(machine, state=State.STOPPED, since=now), ()
        failure = machine.failure or Failure(Fault.CRASH, event.verdict.message)
        return _crashed(machine, now, policy, failure, event.jitter), ()
    if machine.state not in ALIVE:
        return machine, ()
    match event.verdict.cause:
        case Cause.FATAL:
            return _fail(machine, now, Failure(Fault.FATAL, event.verdict.message)), ()
        case Cause.MEMORY:
            return _out_of_memory(machine, now, policy, event), ()
        case Cause.PORT | Cause.CRASH:
            failure = Failure(Fault.CRASH, event.verdict.message)
            return _crashed(machine, now, policy, failure, event.jitter), ()


def _out_of_memory(machine: Machine, now: float, policy: Policy, event: Exited) -> Machine:
    smaller = machine.plan.smaller()
    if smaller is None:
        return _fail(machine, now, Failure(Fault.MEMORY, event.verdict.message))
    return replace(
        machine,
        plan=smaller,
        state=State.BACKING_OFF,
        since=now,
        restarts=machine.restarts + 1,
        retry_at=now + policy.backoff_first * (0.5 + event.jitter),
        failure=Failure(Fault.MEMORY, event.verdict.message),
    )


def _crashed(machine: Machine, now: float, policy: Policy, failure: Failure, jitter: float) -> Machine:
    recent = tuple(t for t in machine.crashes if now - t < policy.restart_window)
    if len(recent) >= policy.max_restarts:
        message = (
            f"{failure.message}; {len(recent)} restarts within {policy.restart_window:.0f} s did not help"
        )
        failed = _fail(machine, now, Failure(failure.fault, message))
        # The budget is a rate: when its window has moved on, one more try is due.
        return replace(failed, crashes=recent, retry_at=recent[0] + policy.restart_window)
    pause = policy.backoff_first * policy.backoff_factor ** len(recent) * (0.5 + jitter)
    return replace(
        machine,
        state=State.BACKING_OFF,
        since=now,
        crashes=(*recent, now),
        restarts=machine.restarts + 1,
        retry_at=now + pause,
        failure=failure,
    )


def _fail(machine: Machine, now: float, failure: Failure) -> Machine:
    return replace(machine, state=State.FAILED, since=now, failure=failure, retry_at=None)


def _tick(machine: Machine, now: float, policy: Policy) -> Step:  # noqa: PLR0911 - one per state
    due = deadline(machine, policy)
    if due is None or now < due:
        return machine, ()
    match machine.state:
        case State.BACKING_OFF:
            return _spawn(machine, now)
        case State.FAILED:
            recent = tuple(t for t in machine.crashes if now - t < policy.restart_window)
            return _spawn(replace(machine, crashes=(*recent, now), restarts=machine.restarts + 1), now)
        case State.STOPPING if machine.signals == 1:
            return replace(machine, signals=2, signal_at=now + policy.kill_after), (Terminate(),)
        case State.STOPPING:
            return replace(machine, signals=3, signal_at=now + policy.kill_after), (Kill(),)
        case State.LOADING:
            message = f"no sign of progress for {policy.load_stall:.0f} s while loading"
            return _hung(machine, now, policy, message)
        case _:
            return replace(machine, crashes=()), ()
