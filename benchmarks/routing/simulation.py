"""A discrete-event simulation of clients and workers, with QMesh's own choice of workers under test.

The clock is virtual and the dice are seeded: a run is the same on every machine. Real are the client's
selection, scoreboard and hedging and the worker's admission queue; simulated are the workers' speeds, the
network and the accidents. Every policy meets the same requests and the same accidents, and handles a
failure in the same way (another worker, and a ban); they differ in whom they ask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from benchmarks.routing.actors import (
    Client,
    Clock,
    Copy,
    Request,
    Scenario,
    Worker,
    desktop,
    hobbyist,
    service_time,
)
from benchmarks.routing.policies import Policy
from client_sdk.selection import expected
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
SLOWER = 10.0


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
        self.workers = [
            desktop(number) if scenario.alike else hobbyist(number, dice)
            for number in range(scenario.workers)
        ]
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
        rate = scenario.load * sum(w.admission.slots / service_time(w, 200, 150) for w in self.workers)
        when = 0.0
        while when < scenario.duration:
            bursting = when % 60 >= 55
            when += dice.expovariate(rate * (scenario.burst if bursting else 1.0))
            request = Request(
                dice.choice(self.clients),
                int(dice.lognormvariate(5.0, scenario.spread)) + 1,
                min(2000, int(dice.lognormvariate(4.7, scenario.spread)) + 1),
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

        if scenario.one_slow is not None:
            for when in _every(scenario.one_slow, scenario.duration):
                slow = dice.choice(self.workers)
                self.clock.at(when, lambda slow=slow: self._make_slow(slow))  # type: ignore[misc]

    def _make_slow(self, slow: Worker) -> None:
        for worker in self.workers:
            worker.slow = SLOWER if worker is slow else 1.0

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

        worker.slow = SLOWER
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
        board = request.client.board
        due = now + expected(worker.record, board, request.need, now).first_token
        copy = Copy(request, worker, ticket, now, board.reserve(worker.record.node_id, now, due))
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


def _every(step: float, duration: float) -> list[float]:
    return [step * number for number in range(math.ceil(duration / step) + 1)]
