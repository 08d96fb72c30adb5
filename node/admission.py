"""Who may use the model's slots, in which order: a bounded queue, fair across peers. Pure.

At most `slots` requests run; the others wait in one queue per (priority, peer). Higher priorities go
first. Within a priority the next slot goes to the peer that holds the fewest, and among those the peers
take turns by deficit round robin (Shreedhar and Varghese, 1996) weighed by the tokens they ask for, so
that a peer with many large requests cannot crowd out one with few small ones. The queue holds
`queue_limit` requests in all; a peer may fill it only while others do not ask: with the queue full, a
newcomer with fewer waiting requests displaces the last request of the peer with the most.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

QUANTUM = 256.0
"""Tokens of credit that a peer gains with each turn."""
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


@dataclass(slots=True)
class _Peer:
    waiting: deque[Ticket] = field(default_factory=deque)
    deficit: float = 0.0


class Admission:
    """The queue of one model. Every method takes `now` in seconds on one monotonic clock."""

    def __init__(self, slots: int, queue_limit: int | None = None) -> None:
        if slots < 1:
            raise ValueError("a model has at least one slot")
        self.slots = slots
        self.queue_limit = 4 * slots if queue_limit is None else queue_limit
        self.running: set[Ticket] = set()
        self._queues: dict[int, OrderedDict[bytes, _Peer]] = {}
        self._waiting = 0
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
            self._start(ticket, now)
            return True, None
        displaced = None
        if self._waiting >= self.queue_limit:
            displaced = self._displace(ticket)
            if displaced is None:
                return False, None
        queue = self._queues.setdefault(ticket.priority, OrderedDict())
        queue.setdefault(ticket.peer, _Peer()).waiting.append(ticket)
        self._waiting += 1
        return True, displaced

    def release(self, ticket: Ticket, now: float) -> list[Ticket]:
        """A running request has ended: returns the tickets that start now."""
        self.running.remove(ticket)
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
        queue = self._queues.get(ticket.priority, OrderedDict())
        peer = queue.get(ticket.peer)
        if peer is None or ticket not in peer.waiting:
            return False
        peer.waiting.remove(ticket)
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
        assert all(peer.waiting for queue in self._queues.values() for peer in queue.values())
        assert not (tickets and len(self.running) < self.slots)

    def _start(self, ticket: Ticket, now: float) -> None:
        ticket.started = now
        self.running.add(ticket)

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
        fewest = min(held[name] for name in queue)
        alone = sum(held[name] == fewest for name in queue) == 1
        while True:
            name, peer = next(iter(queue.items()))
            if held[name] > fewest:
                queue.move_to_end(name)
                continue
            ticket = peer.waiting[0]
            if peer.deficit >= ticket.cost or alone:
                peer.deficit = max(0.0, peer.deficit - ticket.cost)
                peer.waiting.popleft()
                self._waiting -= 1
                self._forget_empty(priority, name)
                return ticket
            peer.deficit += QUANTUM
            queue.move_to_end(name)

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
            for peer in self._queues[priority].values():
                yield from peer.waiting

    def _forget_empty(self, priority: int, name: bytes) -> None:
        queue = self._queues[priority]
        if not queue[name].waiting:
            del queue[name]
        if not queue:
            del self._queues[priority]
