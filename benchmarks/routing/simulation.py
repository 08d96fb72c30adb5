"""A discrete-event simulation of clients and workers, with QMesh's own choice of workers under test.

The clock is virtual and the dice are seeded: a run is the same on every machine. Real are the client's
selection, scoreboard and hedging and the worker's admission queue; simulated are the workers' speeds, the
network and the accidents. Every policy meets the same requests and the same accidents, and handles a
failure in the same way (another worker, and a ban); they differ in whom they ask.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from client_sdk.hedging import Hedging
from client_sdk.scoreboard import Reservation, Scoreboard
from client_sdk.selection import Need, choose
from mesh.identity import NodeId
from mesh.records import WorkerRecord
from node.admission import Admission, Ticket

SEEN = 16
"""Workers that a client knows of at a time."""
REFRESH = 30.0
PROBED = 4
PROBE_EVERY = 10.0
HUNG_AFTER = 6.0
"""Seconds until a client gives up a worker that neither answers nor refuses."""
CANCEL = 0.011
"""Seconds in which llama-server frees the slot of a cancelled stream."""
NAP = 0.25
CROWD = 1.25
"""How much longer an answer takes in a usual crowd of neighbours."""


@dataclass(frozen=True)
class Scenario:
    """A mesh and what it has to bear. Times in seconds."""

    name: str
    workers: int
    clients: int
    duration: float
    load: float = 0.5
    """Mean demand as a share of what all workers together can do."""
    burst: float = 3.0
    """Demand is this many times higher for 5 s of every minute."""
    crashes: float = 0.02
    """Share of the workers that die each minute, for a minute; half of them hang instead of refusing."""
    stalls: float = 0.05
    """Share of the workers that become ten times slower each minute, for 20 s."""
    seed: int = 1


class Clock:
    """Events in order of time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, when: float, do: Callable[[], None]) -> None:
        """Do it then, or now where that has passed."""
        heapq.heappush(self._queue, (max(when, self.now), next(self._order), do))

    def run(self, until: float) -> None:
        """Do everything that is due until then."""
        while self._queue and self._queue[0][0] <= until:
            self.now, _, do = heapq.heappop(self._queue)
            do()


@dataclass(eq=False)
class Worker:
    """One worker: what it is, what it says of itself, and its queue."""

    record: WorkerRecord
    speed: float
    prompt_speed: float
    rtt: float
    admission: Admission
    alive: bool = True
    hangs: bool = False
    slow: float = 1.0
    running: dict[Ticket, Copy] = field(default_factory=dict)
    busy_time: float = 0.0
    answered: int = 0


@dataclass(eq=False)
class Copy:
    """One request at one worker."""

    request: Request
    worker: Worker
    ticket: Ticket
    sent: float
    reservation: Reservation
    over: bool = False
    lost: bool = False
    """Its worker is gone: nothing comes of it any more."""
    speaks_at: float = math.inf


@dataclass(eq=False)
class Request:
    """One request of a client, over as many workers as it takes."""

    client: Client
    prompt: int
    answer: int
    arrived: float
    exclude: set[bytes] = field(default_factory=set)
    copies: list[Copy] = field(default_factory=list)
    first_token: float | None = None
    done: float | None = None
    asked: int = 0

    @property
    def need(self) -> Need:
        """What the choice of a worker depends on."""
        return Need(self.prompt, self.answer)


class Policy:
    """Whom to ask. This one is QMesh's own."""

    name = "QMesh"
    hedges = True

    def choose(self, client: Client, request: Request, now: float) -> Worker | None:
        """The worker to ask, None where there is none at present."""
        choice = choose(
            [worker.record for worker in client.known], client.board, request.need,
            now=now, rng=client.rng, exclude=request.exclude,
        )  # fmt: skip
        return None if choice is None else client.by_id[choice.chosen.id]

    def _usable(self, client: Client, request: Request, now: float) -> list[Worker]:
        return [
            worker
            for worker in client.known
            if worker.record.node_id not in request.exclude
            and client.board.available(worker.record.node_id, now)
        ]


class WithoutHedging(Policy):
    """QMesh's choice, but nobody is asked twice."""

    name = "QMesh, no hedging"
    hedges = False


class RandomChoice(Policy):
    """Anybody."""

    name = "random"
    hedges = False

    def choose(self, client: Client, request: Request, now: float) -> Worker | None:
        """As its name says."""
        usable = self._usable(client, request, now)
        return client.rng.choice(usable) if usable else None


class RoundRobin(Policy):
    """Everybody in turn."""

    name = "round robin"
    hedges = False

    def choose(self, client: Client, request: Request, now: float) -> Worker | None:
        """As its name says."""
        usable = self._usable(client, request, now)
        client.turn += 1
        return usable[client.turn % len(usable)] if usable else None


class LeastConnections(Policy):
    """Whoever has the fewest requests per slot, as far as this client knows."""

    name = "least connections"
    hedges = False

    def choose(self, client: Client, request: Request, now: float) -> Worker | None:
        """As its name says."""

        def load(worker: Worker) -> float:
            score = client.board[worker.record.node_id]
            return (score.in_flight + score.foreign_load(now)) / worker.record.slots

        usable = self._usable(client, request, now)
        client.rng.shuffle(usable)
        return min(usable, key=load, default=None)


POLICIES = (Policy, WithoutHedging, LeastConnections, RoundRobin, RandomChoice)


@dataclass(eq=False)
class Client:
    """One client: its own view of some workers."""

    rng: Random
    board: Scoreboard = field(default_factory=Scoreboard)
    hedging: Hedging = field(default_factory=Hedging)
    known: list[Worker] = field(default_factory=list)
    by_id: dict[bytes, Worker] = field(default_factory=dict)
    turn: int = 0


@dataclass
class Result:
    """What a policy achieved. Times in seconds."""

    policy: str
    first_tokens: list[float]
    answers: list[float]
    utilisation: float
    extra: float
    """Requests sent a second time by hedging, as a share of all."""
    imbalance: float
    """Share of its time in which the busiest tenth of the workers is busy, over the mean."""
    unfinished: int


class Simulation:
    """One policy in one scenario."""

    def __init__(self, scenario: Scenario, policy: Policy) -> None:
        self.scenario = scenario
        self.policy = policy
        self.clock = Clock()
        self.requests: list[Request] = []
        self.hedged = 0
        dice = Random(scenario.seed)
        self.workers = [_worker(number, dice) for number in range(scenario.workers)]
        self.clients = [Client(Random(dice.random())) for _ in range(scenario.clients)]
        self._noise = Random(dice.random())
        self._plan(dice)

    def run(self) -> Result:
        """Let it happen, and some time more in which everything can end."""
        duration = self.scenario.duration
        self.clock.run(duration)
        spent = sum(worker.busy_time for worker in self.workers)
        for worker in self.workers:
            spent += sum(self.clock.now - (ticket.started or 0.0) for ticket in worker.admission.running)
        capacity = sum(worker.admission.slots for worker in self.workers) * duration
        busy = sorted((worker.busy_time / worker.admission.slots for worker in self.workers), reverse=True)
        tenth = busy[: max(1, len(busy) // 10)]
        self.clock.run(duration + 300)
        done = [request for request in self.requests if request.done is not None]
        return Result(
            self.policy.name,
            [one.first_token - one.arrived for one in done if one.first_token is not None],
            [one.done - one.arrived for one in done if one.done is not None],
            spent / capacity,
            self.hedged / max(1, len(self.requests)),
            (sum(tenth) / len(tenth)) / max(1e-9, sum(busy) / len(busy)),
            len(self.requests) - len(done),
        )

    # --- the plan: arrivals and accidents, the same for every policy

    def _plan(self, dice: Random) -> None:
        scenario = self.scenario
        for client in self.clients:
            for when in _every(REFRESH, scenario.duration):
                self.clock.at(when, lambda client=client: self._refresh(client))  # type: ignore[misc]
            for when in _every(PROBE_EVERY, scenario.duration):
                self.clock.at(when, lambda client=client: self._probe(client))  # type: ignore[misc]
        rate = scenario.load * sum(w.admission.slots / _seconds(w, 200, 150) for w in self.workers)
        when = 0.0
        while when < scenario.duration:
            bursting = when % 60 >= 55
            when += dice.expovariate(rate * (scenario.burst if bursting else 1.0))
            request = Request(
                dice.choice(self.clients),
                int(dice.lognormvariate(5.0, 0.8)) + 1,
                min(2000, int(dice.lognormvariate(4.7, 0.8)) + 1),
                when,
            )
            self.clock.at(when, lambda request=request: self._arrive(request))  # type: ignore[misc]
        minutes = scenario.duration / 60
        for share, accident in ((scenario.crashes, self._crash), (scenario.stalls, self._stall)):
            for _ in range(round(share * minutes * len(self.workers))):
                worker, moment, coin = (
                    dice.choice(self.workers),
                    dice.uniform(0, scenario.duration),
                    dice.random(),
                )
                self.clock.at(moment, lambda a=accident, w=worker, c=coin: a(w, c))  # type: ignore[misc]

    def _crash(self, worker: Worker, coin: float) -> None:
        if not worker.alive:
            return
        worker.alive, worker.hangs = False, coin < 0.5
        for copy in [*worker.running.values()]:
            self._lose(copy, HUNG_AFTER if worker.hangs else worker.rtt)
        worker.running.clear()
        worker.admission = Admission(worker.admission.slots)

        def recover() -> None:
            worker.alive = True

        self.clock.at(self.clock.now + 60, recover)

    def _stall(self, worker: Worker, coin: float) -> None:
        def recover() -> None:
            worker.slow = 1.0

        worker.slow = 10.0
        self.clock.at(self.clock.now + 20, recover)

    # --- the client

    def _refresh(self, client: Client) -> None:
        """The DHT names some workers: those that die stay in it for a while."""
        client.known = client.rng.sample(self.workers, min(SEEN, len(self.workers)))
        client.by_id = {worker.record.node_id: worker for worker in client.known}

    def _probe(self, client: Client) -> None:
        for worker in client.rng.sample(client.known, min(PROBED, len(client.known))):
            if worker.alive:
                client.board[worker.record.node_id].rtt.add(worker.rtt, self.clock.now)
                self._report(client, worker)
            else:
                client.board.failed(worker.record.node_id, self.clock.now)

    def _report(self, client: Client, worker: Worker) -> None:
        admission = worker.admission
        client.board.report(
            worker.record.node_id, admission.busy, admission.waiting, admission.slots, self.clock.now
        )

    def _arrive(self, request: Request) -> None:
        self.requests.append(request)
        request.client.hedging.requested()
        self._ask(request)

    def _ask(self, request: Request) -> None:
        client, now = request.client, self.clock.now
        worker = self.policy.choose(client, request, now)
        if worker is None:
            request.exclude.clear()
            self.clock.at(now + NAP, lambda: self._ask(request))
            return
        copy = self._send(request, worker)
        delay = client.hedging.delay()
        if self.policy.hedges and delay is not None and request.first_token is None:
            self.clock.at(now + delay, lambda: self._hedge(request, copy))

    def _hedge(self, request: Request, late: Copy) -> None:
        if late.over or request.first_token is not None or len(request.copies) != 1:
            return
        if not request.client.hedging.take():
            return
        request.exclude.add(late.worker.record.node_id)
        worker = self.policy.choose(request.client, request, self.clock.now)
        if worker is not None:
            self.hedged += 1
            self._send(request, worker)

    def _send(self, request: Request, worker: Worker) -> Copy:
        now = self.clock.now
        request.asked += 1
        cost = max(1.0, float(request.answer))
        ticket = Ticket(id(request.client).to_bytes(8, "big"), cost, 0, math.inf)
        copy = Copy(request, worker, ticket, now, request.client.board.reserve(worker.record.node_id, now))
        request.copies.append(copy)
        self.clock.at(now + worker.rtt / 2, lambda: self._reach(copy))
        return copy

    def _lose(self, copy: Copy, after: float) -> None:
        """The worker is lost to this request; the client finds out after so many seconds."""
        if not copy.over:
            copy.lost = True
            self.clock.at(self.clock.now + after, lambda: self._failed(copy))

    def _failed(self, copy: Copy) -> None:
        if copy.over:
            return
        self._close(copy)
        request, worker = copy.request, copy.worker.record.node_id
        request.client.board.failed(worker, self.clock.now)
        request.exclude.add(worker)
        if not request.copies and request.done is None:
            self._ask(request)

    def _refused(self, copy: Copy) -> None:
        if copy.over:
            return
        self._close(copy)
        request, worker = copy.request, copy.worker
        retry = min(60.0, worker.admission.retry_after(self.clock.now))
        request.client.board.busy_until(worker.record.node_id, self.clock.now + retry)
        request.exclude.add(worker.record.node_id)
        if not request.copies:
            self._ask(request)

    def _close(self, copy: Copy) -> None:
        copy.over = True
        copy.request.copies.remove(copy)
        copy.request.client.board.release(copy.reservation)

    def _spoke(self, copy: Copy) -> None:
        """The first token reaches the client."""
        request = copy.request
        if copy.over or copy.lost:
            return
        if request.first_token is None:
            request.first_token = self.clock.now
            request.client.hedging.answered(self.clock.now - request.copies[0].sent)
        request.client.board.spoke(copy.reservation)
        for other in [one for one in request.copies if one is not copy]:
            request.client.board.late(
                other.worker.record.node_id, self.clock.now, self.clock.now - other.sent
            )
            self._close(other)
            self.clock.at(
                self.clock.now + other.worker.rtt / 2 + CANCEL,
                lambda other=other: self._leave(other),  # type: ignore[misc]
            )
        copy.speaks_at = self.clock.now

    def _ended(self, copy: Copy) -> None:
        """The end of the answer reaches the client."""
        if copy.over or copy.lost:
            return
        request, client, now = copy.request, copy.request.client, self.clock.now
        request.done = now
        writing = max(1e-6, now - copy.speaks_at)
        client.board.succeeded(
            copy.worker.record.node_id, now,
            first_token=copy.speaks_at - copy.sent, speed=request.answer / writing,
        )  # fmt: skip
        self._report(client, copy.worker)
        self._close(copy)
        copy.worker.answered += 1

    # --- the worker

    def _reach(self, copy: Copy) -> None:
        worker = copy.worker
        if copy.over:
            return
        if not worker.alive:
            self._lose(copy, HUNG_AFTER if worker.hangs else worker.rtt / 2)
            return
        accepted, displaced = worker.admission.offer(copy.ticket, self.clock.now)
        if displaced is not None:
            other = worker.running.pop(displaced)
            self.clock.at(self.clock.now + worker.rtt / 2, lambda: self._refused(other))
        if not accepted:
            self.clock.at(self.clock.now + worker.rtt / 2, lambda: self._refused(copy))
            return
        worker.running[copy.ticket] = copy
        if copy.ticket.started is not None:
            self._start(copy)

    def _start(self, copy: Copy) -> None:
        worker, request = copy.worker, copy.request
        # Neighbours in the batch slow each other down, less than proportionally.
        crowd = 1 + 0.5 * (worker.admission.busy - 1) / worker.admission.slots
        slow = worker.slow * crowd * self._noise.lognormvariate(0, 0.2)
        first = self.clock.now + slow * request.prompt / worker.prompt_speed
        end = first + slow * request.answer / worker.speed
        self.clock.at(first + worker.rtt / 2, lambda: self._spoke(copy))
        self.clock.at(end + worker.rtt / 2, lambda: self._ended(copy))
        self.clock.at(end, lambda: self._leave(copy))

    def _leave(self, copy: Copy) -> None:
        """The request no longer is at the worker; those who waited start."""
        worker = copy.worker
        if worker.running.pop(copy.ticket, None) is None:
            return
        if copy.ticket.started is None:
            worker.admission.withdraw(copy.ticket)
            return
        worker.busy_time += self.clock.now - copy.ticket.started
        for ticket in worker.admission.release(copy.ticket, self.clock.now):
            self._start(worker.running[ticket])


def _seconds(worker: Worker, prompt: int, answer: int) -> float:
    return CROWD * (prompt / worker.prompt_speed + answer / worker.speed)


def _every(step: float, duration: float) -> list[float]:
    return [step * number for number in range(math.ceil(duration / step) + 1)]


def _worker(number: int, dice: Random) -> Worker:
    """A machine of a hobbyist: old laptops, good desktops, a few with a large GPU."""
    speed = dice.choice((8.0, 8.0, 25.0, 25.0, 60.0, 150.0)) * dice.uniform(0.8, 1.25)
    slots = dice.choice((1, 2, 4))
    claim = dice.lognormvariate(0, 0.3)  # what it says of itself is not quite true
    record = WorkerRecord(
        node_id=NodeId(number.to_bytes(32, "big")), seq=1, expires=1 << 40, addresses=("127.0.0.1:1",),
        model="m", digest=bytes(16), health=100, slots=slots, context=4096,
        generation_speed=speed * claim, prompt_speed=speed * 12 * claim, flags=frozenset(), software="simulated",
    )  # fmt: skip
    return Worker(record, speed, speed * 12, dice.uniform(0.005, 0.08), Admission(slots))
