"""The rules of the lifecycle, with a clock made of numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar import states as s
from sidecar.exits import Cause, Exit
from sidecar.lifecycle import deadline, new_machine, step
from sidecar.states import Fault, Goal, Machine, Plan, Policy, State

POLICY = Policy()
PLAN = Plan(context=4096, slots=4, layers=10)


class Run:
    """Feeds events to a machine and keeps its clock and effects."""

    def __init__(self, *events: s.Event) -> None:
        self.machine, self.now, self.effects = new_machine(PLAN), 0.0, list[s.Effect]()
        self.feed(*events)

    def feed(self, *events: s.Event, after: float = 0.0) -> list[s.Effect]:
        self.now += after
        self.effects = []
        for event in events:
            self.machine, effects = step(self.machine, event, self.now, POLICY)
            self.effects += effects
        return self.effects

    def tick_at_deadline(self) -> list[s.Effect]:
        due = deadline(self.machine, POLICY)
        assert due is not None
        return self.feed(s.Tick(), after=due - self.now)

    def state(self) -> State:
        return self.machine.state


def ready() -> Run:
    return Run(s.StartRequested(), s.Spawned(), s.BecameReady())


def exited(cause: Cause = Cause.CRASH, jitter: float = 0.5) -> s.Exited:
    return s.Exited(Exit(cause, "it ended"), jitter)


def test_start_loads_and_becomes_ready() -> None:
    run = Run()
    assert run.feed(s.StartRequested()) == [s.Spawn(PLAN)]
    assert run.state() is State.STARTING
    run.feed(s.Spawned())
    assert run.state() is State.LOADING
    run.feed(s.BecameReady())
    assert run.state() is State.READY
    assert run.feed(s.StartRequested()) == []  # idempotent


def test_crash_backs_off_then_spawns_again() -> None:
    run = ready()
    assert run.feed(exited()) == []
    assert run.state() is State.BACKING_OFF
    assert run.machine.failure == s.Failure(Fault.CRASH, "it ended")
    assert run.tick_at_deadline() == [s.Spawn(PLAN)]
    run.feed(s.Spawned(), s.BecameReady())
    assert run.machine.failure is None
    assert run.machine.restarts == 1


def test_backoff_grows_and_is_jittered() -> None:
    pauses = []
    for jitter in (0.0, 0.999):
        run = ready()
        for _ in range(3):
            run.feed(exited(jitter=jitter))
            pauses.append((deadline(run.machine, POLICY) or 0) - run.now)
            run.tick_at_deadline()
            run.feed(s.Spawned())
    assert pauses[:3] == pytest.approx([0.1, 0.4, 1.6])
    assert all(2.9 < high / low < 3.0 for low, high in zip(pauses[:3], pauses[3:], strict=True))


def test_three_restarts_in_ten_minutes_then_failed_until_the_window_moved_on() -> None:
    run = ready()
    for _ in range(3):
        run.feed(exited(), after=1)
        assert run.state() is State.BACKING_OFF
        run.tick_at_deadline()
        run.feed(s.Spawned())
    first_crash = run.machine.crashes[0]
    run.feed(exited(), after=1)
    assert run.state() is State.FAILED
    assert run.machine.failure is not None
    assert "3 restarts" in run.machine.failure.message
    assert deadline(run.machine, POLICY) == first_crash + POLICY.restart_window
    assert run.feed(s.StartRequested()) == []
    assert run.tick_at_deadline() == [s.Spawn(PLAN)]


def test_a_minute_of_health_clears_the_budget() -> None:
    run = ready()
    run.feed(exited())
    run.tick_at_deadline()
    run.feed(s.Spawned(), s.BecameReady())
    assert run.machine.crashes
    run.feed(s.Tick(), after=59)
    assert run.machine.crashes
    run.feed(s.Tick(), after=1)
    assert not run.machine.crashes
    assert deadline(run.machine, POLICY) is None


def test_fatal_exit_is_not_retried() -> None:
    run = Run(s.StartRequested(), s.Spawned(), exited(Cause.FATAL))
    assert run.state() is State.FAILED
    assert deadline(run.machine, POLICY) is None
    assert run.machine.restarts == 0


def test_restart_by_hand_leaves_failed_with_a_fresh_budget() -> None:
    run = Run(s.StartRequested(), s.Spawned(), exited(Cause.FATAL))
    assert run.feed(s.RestartRequested()) == [s.Spawn(PLAN)]
    assert run.machine.crashes == ()
    assert run.machine.failure is None


def test_memory_steps_down_until_nothing_is_left() -> None:
    run = Run(s.StartRequested(), s.Spawned())
    plans = [PLAN]
    while True:
        run.feed(exited(Cause.MEMORY))
        if run.state() is State.FAILED:
            break
        (effect,) = run.tick_at_deadline()
        assert isinstance(effect, s.Spawn)
        assert effect.plan not in plans  # never with the same arguments
        plans.append(effect.plan)
        run.feed(s.Spawned())
    assert plans[-1] == Plan(context=1024, slots=1, gpu_layers=0, layers=10)
    assert run.machine.failure == s.Failure(Fault.MEMORY, "it ended")
    assert deadline(run.machine, POLICY) is None


def test_loading_stalls_only_without_progress() -> None:
    run = Run(s.StartRequested(), s.Spawned())
    for i in range(100):
        run.feed(s.Progressed((i, 0)), after=30)
        run.feed(s.Tick())
        assert run.state() is State.LOADING
    run.feed(s.Progressed((99, 0)), after=59)  # the same mark
    assert run.state() is State.LOADING
    assert run.feed(s.Tick(), after=1) == [s.CloseClients(), s.Kill()]
    assert run.machine.failure is not None
    assert run.machine.failure.fault is Fault.HANG
    run.feed(exited())
    assert run.state() is State.BACKING_OFF


def test_silence_degrades_then_kills() -> None:
    run = ready()
    run.feed(s.Silent("no answer"), after=5)
    assert run.state() is State.DEGRADED
    run.feed(s.Answered(busy=False, work=(1,)))
    assert run.state() is State.READY
    run.feed(s.Silent("no answer"), after=5)
    assert run.feed(s.Silent("no answer"), after=5) == [s.CloseClients(), s.Kill()]
    run.feed(exited())
    assert run.state() is State.BACKING_OFF
    assert run.machine.failure == s.Failure(Fault.HANG, "no answer for 10 s")


def test_one_silence_after_a_long_sleep_of_ours_is_no_hang() -> None:
    run = ready()
    assert run.feed(s.Silent("no answer"), after=3600) == []
    assert run.state() is State.DEGRADED
    run.feed(s.Answered(busy=False, work=(1,)))
    assert run.state() is State.READY


@pytest.mark.parametrize(("computing", "limit"), [(False, 60.0), (True, 600.0)])
def test_no_token_while_work_is_queued_is_a_hang(computing: bool, limit: float) -> None:
    run = ready()
    run.feed(s.Answered(busy=True, work=(7,), computing=computing))
    run.feed(s.Answered(busy=True, work=(7,), computing=computing), after=limit - 1)
    assert run.state() is State.READY
    effects = run.feed(s.Answered(busy=True, work=(7,), computing=computing), after=1)
    assert effects == [s.CloseClients(), s.Kill()]


def test_moving_tokens_or_an_idle_server_are_no_hang() -> None:
    run = ready()
    for i in range(20):
        run.feed(s.Answered(busy=True, work=(i,)), after=50)
    for _ in range(20):
        run.feed(s.Answered(busy=False, work=(0,)), after=50)
    assert run.state() is State.READY


def test_stop_closes_clients_then_term_term_kill() -> None:
    run = ready()
    assert run.feed(s.StopRequested()) == [s.CloseClients(), s.Terminate()]
    start = run.now
    assert run.tick_at_deadline() == [s.Terminate()]
    assert run.now - start == 5
    assert run.tick_at_deadline() == [s.Kill()]
    assert run.now - start == 8
    assert run.tick_at_deadline() == [s.Kill()]  # again, until it is reaped
    run.feed(exited())
    assert run.state() is State.STOPPED


def test_the_last_request_wins_while_stopping() -> None:
    run = ready()
    run.feed(s.StopRequested(), s.StartRequested())
    assert run.feed(exited()) == [s.Spawn(PLAN)]
    run = ready()
    run.feed(s.RestartRequested(), s.StopRequested())
    assert run.feed(exited()) == []
    assert run.state() is State.STOPPED


def test_stop_while_backing_off_or_failed_just_stops() -> None:
    run = ready()
    run.feed(exited(), s.StopRequested())
    assert run.state() is State.STOPPED
    assert deadline(run.machine, POLICY) is None


def test_spawn_that_fails() -> None:
    run = Run(s.StartRequested(), s.SpawnFailed("no such file", fatal=True))
    assert run.state() is State.FAILED
    run = Run(s.StartRequested(), s.SpawnFailed("no more processes", fatal=False))
    assert run.state() is State.BACKING_OFF


PLANS = st.builds(
    Plan,
    context=st.integers(64, 1 << 20),
    slots=st.integers(1, 64),
    gpu_layers=st.none() | st.integers(0, 200),
    layers=st.none() | st.integers(0, 200),
)


@given(PLANS)
def test_stepping_down_always_ends_and_never_grows(plan: Plan) -> None:
    for _ in range(64):
        smaller = plan.smaller()
        if smaller is None:
            return
        before, after = (replace(p, gpu_layers=0) for p in (plan, smaller))
        assert (after.context, after.slots) <= (before.context, before.slots) or after == before
        assert smaller != plan
        plan = smaller
    pytest.fail("no end")


EVENTS = st.one_of(
    st.sampled_from(
        [
            s.StartRequested(),
            s.StopRequested(),
            s.RestartRequested(),
            s.Spawned(),
            s.BecameReady(),
            s.Silent("x"),
            s.Tick(),
            s.SpawnFailed("x", fatal=True),
            s.SpawnFailed("x", fatal=False),
        ]
    ),
    st.builds(s.Progressed, st.tuples(st.integers(0, 3))),
    st.builds(s.Answered, st.booleans(), st.tuples(st.integers(0, 3)), st.booleans()),
    st.builds(exited, st.sampled_from(Cause)),
)


@given(st.lists(st.tuples(EVENTS, st.floats(0, 700)), max_size=60))
def test_whatever_happens_the_machine_is_consistent(history: list[tuple[s.Event, float]]) -> None:
    machine, now, processes = new_machine(PLAN), 0.0, 0
    for event, pause in history:
        now += pause
        if isinstance(event, s.Exited | s.Spawned | s.SpawnFailed) and not processes:
            continue  # the shell cannot report these without a spawn
        starting = machine.state is State.STARTING
        if isinstance(event, s.Exited) and starting:
            continue  # a spawn is reported first
        if isinstance(event, s.SpawnFailed) and not starting:
            continue
        if isinstance(event, s.Exited | s.SpawnFailed):
            processes -= 1
        machine, effects = step(machine, event, now, POLICY)
        processes += sum(isinstance(effect, s.Spawn) for effect in effects)
        check(machine, processes, now)


def check(machine: Machine, processes: int, now: float) -> None:
    assert processes == (machine.state in s.ALIVE), "exactly one process while alive, none otherwise"
    due = deadline(machine, POLICY)
    if machine.state in (State.BACKING_OFF, State.STOPPING, State.LOADING):
        assert due is not None, "no wait without an end"
    if machine.state is State.FAILED:
        assert machine.failure is not None
    if machine.state is State.STOPPING and machine.goal is not Goal.RETRY:
        assert machine.signals in (1, 2, 3)
    assert len([t for t in machine.crashes if now - t < POLICY.restart_window]) <= POLICY.max_restarts
