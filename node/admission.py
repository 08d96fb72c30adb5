"""Who may use the model's slots, in which order: a bounded queue, fair across peers. Pure.

At most `slots` requests run; the others wait in one queue per (priority, peer). Higher priorities go
first. Within a priority the next slot goes to the peer that holds the fewest, and among those by weighted
fair queueing (Demers, Keshav and Shenker 1989): to the one that would have been given the fewest tokens with
its next request. So a peer with many large requests cannot crowd out one with few small ones, and one that
asks now and then waits for the end of a running request, not for a round of all others. The queue holds
`queue_limit` requests in all; a peer may fill it only while others do not ask: with the queue full, a
newcomer with fewer waiting requests displaces the last request of the peer with the most.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass

_SMOOTHING = 0.2


@dataclass(slots=True, eq=False)
class Ticket:
    """One request's place: waiting, running, or refused."""

    peer: bytes
    cost: float
    """Tokens that the request may take; at least 1."""
    priority: int
    """Larger goes first."""
    deadline: float
    """When waiting ends, on the clock of `now`, in seconds."""
    started: float | None = None
    displaced: bool = False


class Admission:
    """The queue of one model. Every method takes `now` in seconds on one monotonic clock."""

    def __init__(self, slots: int, queue_limit: int | None = None) -> None:
        if slots < 1:
            raise ValueError("a model has at least one slot")
        self.slots = slots
        self.queue_limit = 4 * slots if queue_limit is None else queue_limit
        self.running: set[Ticket] = set()
        self._queues: dict[int, dict[bytes, deque[Ticket]]] = {}
        self._waiting = 0
        self._virtual = 0.0
        """The virtual time: tokens given to a peer that has competed for slots ever since the beginning."""
        self._given: dict[bytes, float] = {}
        """The same for each peer. Who begins to compete is taken to have had as much as those who did."""
        self._service_time: float | None = None

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._waiting

    @property
    def busy(self) -> int:
        """Slots in use."""
        return len(self.running)

    def offer(self, ticket: Ticket, now: float) -> tuple[bool, Ticket | None]:
        """Take a request in. Returns (accepted, displaced).

        An accepted ticket either runs already (`started` is set) or waits. `displaced` is another
        peer's ticket that lost its place in the full queue to this one.
        """
        if len(self.running) < self.slots and not self._waiting:
            self._join(ticket.peer)
            self._start(ticket, now)
            return True, None
        displaced = None
        if self._waiting >= self.queue_limit:
            displaced = self._displace(ticket)
            if displaced is None:
                return False, None
        self._join(ticket.peer)
        self._queues.setdefault(ticket.priority, {}).setdefault(ticket.peer, deque()).append(ticket)
        self._waiting += 1
        return True, displaced

    def release(self, ticket: Ticket, now: float) -> list[Ticket]:
        """A running request has ended: returns the tickets that start now."""
        self._virtual += ticket.cost / len(self._competing())
        self.running.remove(ticket)
        competing = self._competing()
        self._given = {
            peer: given for peer, given in self._given.items() if peer in competing or given > self._virtual
        }
        if ticket.started is not None:
            took = max(0.0, now - ticket.started)
            self._service_time = (
                took
                if self._service_time is None
                else self._service_time + _SMOOTHING * (took - self._service_time)
            )
        return self._fill(now)

    def withdraw(self, ticket: Ticket) -> bool:
        """A waiting request is no longer wanted. False if it was not waiting."""
        waiting = self._queues.get(ticket.priority, {}).get(ticket.peer, deque())
        if ticket not in waiting:
            return False
        waiting.remove(ticket)
        self._waiting -= 1
        self._forget_empty(ticket.priority, ticket.peer)
        return True

    def expire(self, now: float) -> list[Ticket]:
        """Remove and return the waiting requests whose deadline has passed."""
        late = [ticket for ticket in self._tickets() if ticket.deadline <= now]
        for ticket in late:
            self.withdraw(ticket)
        return late

    def resize(self, slots: int, now: float) -> list[Ticket]:
        """The model now has another number of slots: returns the tickets that start."""
        self.slots = slots
        return self._fill(now)

    def retry_after(self, now: float) -> float:
        """Seconds after which a refused request can expect a place: the measured time per request
        over the slots, for the half of the queue that must drain first. Before any request has ended, the
        oldest running one is expected to take as long again as it has taken.
        """
        per_request = self._service_time
        if per_request is None:
            per_request = 2 * max((now - (one.started or now) for one in self.running), default=0.0)
        return max(0.05, per_request * (1 + self._waiting / 2) / self.slots)

    def validate(self) -> None:
        """Assert every invariant; for tests."""
        tickets = list(self._tickets())
        assert len(tickets) == self._waiting <= max(self.queue_limit, 0)
        assert not self.running & set(tickets)
        assert all(ticket.started is None for ticket in tickets)
        assert all(ticket.started is not None for ticket in self.running)
        assert all(waiting for queue in self._queues.values() for waiting in queue.values())
        assert self._competing() <= self._given.keys()
        assert not (tickets and len(self.running) < self.slots)

    def _competing(self) -> set[bytes]:
        """The peers that have a slot or wait for one."""
        return {ticket.peer for ticket in self.running}.union(*self._queues.values())

    def _join(self, peer: bytes) -> None:
        """Who did not compete gets nothing for that time; who was given much before is not forgiven."""
        if peer not in self._competing():
            self._given[peer] = max(self._virtual, self._given.get(peer, 0.0))

    def _start(self, ticket: Ticket, now: float) -> None:
        ticket.started = now
        self.running.add(ticket)
        self._given[ticket.peer] += ticket.cost

    def _fill(self, now: float) -> list[Ticket]:
        started = []
        while len(self.running) < self.slots and self._waiting:
            ticket = self._next()
            self._start(ticket, now)
            started.append(ticket)
        return started

    def _next(self) -> Ticket:
        """The ticket whose turn it is. Only called while something waits."""
        priority = max(self._queues)
        queue = self._queues[priority]
        held = Counter(ticket.peer for ticket in self.running)
        name = min(queue, key=lambda peer: (held[peer], self._given[peer] + queue[peer][0].cost))
        ticket = queue[name].popleft()
        self._waiting -= 1
        self._forget_empty(priority, name)
        return ticket

    def _displace(self, newcomer: Ticket) -> Ticket | None:
        counts: dict[bytes, int] = {}
        for ticket in self._tickets():
            counts[ticket.peer] = counts.get(ticket.peer, 0) + 1
        if not counts:
            return None
        greediest = max(counts, key=lambda peer: counts[peer])
        if counts[greediest] <= counts.get(newcomer.peer, 0) + 1:
            return None
        *_, victim = (ticket for ticket in self._tickets() if ticket.peer == greediest)
        self.withdraw(victim)
        victim.displaced = True
        return victim

    def _tickets(self) -> Iterator[Ticket]:
        """Waiting tickets, highest priority first and in order of arrival within a peer."""
        for priority in sorted(self._queues, reverse=True):
            for waiting in self._queues[priority].values():
                yield from waiting

    def _forget_empty(self, priority: int, name: bytes) -> None:
        queue = self._queues[priority]
        if not queue[name]:
            del queue[name]
        if not queue:
            del self._queues[priority]
