"""Who takes part in a simulation: a virtual clock, workers, clients, their requests."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from client_sdk.hedging import Hedging
from client_sdk.scoreboard import Reservation, Scoreboard
from client_sdk.selection import Need
from mesh.identity import NodeId
from mesh.records import WorkerRecord
from node.admission import Admission, Ticket

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
    spread: float = 0.8
    """Of the lengths of prompts and answers: the standard deviation of their logarithm."""
    alike: bool = False
    """Whether all workers are the same."""
    one_slow: float | None = None
    """One of the workers is ten times slower, after so many seconds another one."""


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


@dataclass(eq=False)
class Client:
    """One client: its own view of some workers."""

    rng: Random
    board: Scoreboard = field(default_factory=Scoreboard)
    hedging: Hedging = field(default_factory=Hedging)
    known: list[Worker] = field(default_factory=list)
    by_id: dict[bytes, Worker] = field(default_factory=dict)
    turn: int = 0


def service_time(worker: Worker, prompt: int, answer: int) -> float:
    """Seconds that a request takes there, usually."""
    return CROWD * (prompt / worker.prompt_speed + answer / worker.speed)


def hobbyist(number: int, dice: Random) -> Worker:
    """A machine of a hobbyist: old laptops, good desktops, a few with a large GPU."""
    speed = dice.choice((8.0, 8.0, 25.0, 25.0, 60.0, 150.0)) * dice.uniform(0.8, 1.25)
    slots = dice.choice((1, 2, 4))
    claim = dice.lognormvariate(0, 0.3)  # what it says of itself is not quite true
    return _worker(number, speed, slots, claim, dice.uniform(0.005, 0.08))


def desktop(number: int) -> Worker:
    """One of several machines that are alike."""
    return _worker(number, 60.0, 4, 1.0, 0.01)


def _worker(number: int, speed: float, slots: int, claim: float, rtt: float) -> Worker:
    record = WorkerRecord(
        node_id=NodeId(number.to_bytes(32, "big")), seq=1, expires=1 << 40, addresses=("127.0.0.1:1",),
        model="m", digest=bytes(16), health=100, slots=slots, context=4096,
        generation_speed=speed * claim, prompt_speed=speed * 12 * claim, flags=frozenset(), software="simulated",
    )  # fmt: skip
    return Worker(record, speed, speed * 12, rtt, Admission(slots))
