"""The life of one supervised server as a pure state machine: (machine, event, now) → (machine, effects).

::

    stopped ─► starting ─► loading ─► ready ⇄ degraded
       ▲           ▲          │         │        │
       │           │          ▼         ▼        ▼      crash, hang, out of memory
       │      backing_off ◄───┴─────────┴────────┘
       │           │
       └─ stopping └──► failed (fatal, or the restart budget is used up)

The shell (`sidecar.process`) performs the effects, reports what happens as events, and calls again at
`deadline(machine)`.
"""

from __future__ import annotations

from dataclasses import replace

from sidecar.exits import Cause
from sidecar.states import (
    ALIVE,
    SERVING,
    Answered,
    BecameReady,
    CloseClients,
    Effect,
    Event,
    Exited,
    Failure,
    Fault,
    Goal,
    Kill,
    Machine,
    Plan,
    Policy,
    Progressed,
    RestartRequested,
    Silent,
    Spawn,
    Spawned,
    SpawnFailed,
    StartRequested,
    State,
    StopRequested,
    Terminate,
    Tick,
)

__all__ = ["ALIVE", "SERVING", "Plan", "Policy", "State", "deadline", "new_machine", "step"]

Step = tuple[Machine, tuple[Effect, ...]]


def new_machine(plan: Plan) -> Machine:
    """A stopped machine that will start with `plan`."""
    return Machine(plan=plan, full=plan)


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


def step(machine: Machine, event: Event, now: float, policy: Policy) -> Step:  # noqa: PLR0912 - one per event
    """The one transition function."""
    match event:
        case StartRequested():
            return _start_requested(machine, now)
        case StopRequested():
            return _stop_requested(machine, now, policy)
        case RestartRequested():
            return _restart_requested(machine, now, policy)
        case Spawned() if machine.state is State.STARTING:
            return replace(machine, state=State.LOADING, since=now, mark=(), marked_at=now, waits_for=""), ()
        case SpawnFailed() if machine.state is State.STARTING:
            if event.fatal:
                return _fail(machine, now, Failure(Fault.FATAL, event.message)), ()
            return _crashed(machine, now, policy, Failure(Fault.CRASH, event.message), event.jitter), ()
        case Progressed() if machine.state is State.LOADING:
            marked_at = machine.marked_at if event.mark == machine.mark else now
            return replace(machine, mark=event.mark, marked_at=marked_at, waits_for=event.waits_for), ()
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
    # One silence is never enough: it may be we who slept, and the probe's deadline passed meanwhile.
    if machine.state is State.DEGRADED and now - machine.answered_at >= policy.hang_after:
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


def _exited(machine: Machine, event: Exited, now: float, policy: Policy) -> Step:
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
        oldest = recent[0] if recent else now
        return replace(failed, crashes=recent, retry_at=oldest + policy.restart_window)
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


def _tick(machine: Machine, now: float, policy: Policy) -> Step:
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
            message = f"no sign of progress for {policy.load_stall:.0f} s while loading ({machine.waits_for})"
            return _hung(machine, now, policy, message)
        case _:
            return replace(machine, crashes=()), ()
