"""The iterative walk towards a key: some requests always in flight, no rounds, nobody waited for long."""

from __future__ import annotations

import asyncio
import bisect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from mesh.dht import limits
from mesh.dht.addresses import Address, Neighbour, may_introduce, unpack_neighbours
from mesh.dht.protocol import MeshProtocol
from mesh.dht.rpc import Reply
from mesh.errors import MalformedMessage

_DISTRUST_AFTER = 3


class _State(Enum):
    NEW = auto()
    ASKED = auto()
    SLOW = auto()
    ANSWERED = auto()
    DEAD = auto()


@dataclass(slots=True, eq=False)
class _Candidate:
    contact_id: bytes
    distance: int
    address: Address
    hops: int
    """How many answers led to it: 0 for a contact of our own table."""
    tellers: list[_Candidate] = field(default_factory=list)
    state: _State = _State.NEW
    told_dead: int = 0
    """Of those that it told of, how many did not answer, and how many did."""
    told_alive: int = 0

    @property
    def distrusted(self) -> bool:
        """Whether everybody who told of it told of dead contacts only."""
        return bool(self.tellers) and all(
            t.told_dead >= _DISTRUST_AFTER and not t.told_alive for t in self.tellers
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """Who answered, and the reply behind its node id and token."""

    contact_id: bytes
    address: Address
    reply: Reply


class Crawl:
    """One walk to the contacts nearest to `target`, asking each with `method` and `arguments()`.

    `on_answer` sees each answer as it comes (its neighbours are taken care of) and returns True to
    end the walk. The walk ends when the nearest `width` contacts have answered, or nobody is left.
    """

    def __init__(
        self,
        protocol: MeshProtocol,
        target: bytes,
        start: Iterable[Neighbour],
        *,
        method: str = "find_node",
        arguments: Callable[[], list[Any]] = list,
        on_answer: Callable[[Answer], bool] | None = None,
        width: int = limits.BUCKET_SIZE,
    ) -> None:
        self.requests = 0
        self.hops = 0
        """The longest chain of answers that was followed."""
        self._protocol = protocol
        self._target = target
        self._number = int.from_bytes(target)
        self._method = method
        self._arguments = arguments
        self._on_answer = on_answer
        self._width = width
        self._known: dict[bytes, _Candidate] = {}
        self._addresses: set[Address] = set()
        self._order: list[tuple[int, _Candidate]] = []
        self._answers: dict[bytes, Answer] = {}
        self._in_flight = 0
        self._slow = 0
        self._over = asyncio.get_running_loop().create_future()
        self._stepping = False
        for contact_id, address in start:
            self._learn(contact_id, address, None)

    async def run(self, deadline: float = limits.CRAWL_DEADLINE) -> list[Answer]:
        """The nearest contacts that answered within `deadline` seconds, the nearest first."""
        try:
            async with asyncio.timeout(deadline):
                self._step()
                await self._over
        except TimeoutError:
            pass
        finally:
            self._finish()
        nearest = (candidate.contact_id for _, candidate in self._order)
        return [self._answers[i] for i in nearest if i in self._answers][: self._width]

    def _finish(self) -> None:
        if not self._over.done():
            self._over.set_result(None)

    def _learn(self, contact_id: bytes, address: Address, teller: _Candidate | None) -> None:
        known = self._known.get(contact_id)
        if contact_id == self._protocol.source_node.id:
            self._protocol.met_own_id(address)
            return
        if known is not None:
            if teller is not None and known.state is _State.NEW and teller not in known.tellers:
                known.tellers.append(teller)
            return
        if (
            len(self._known) >= limits.MAX_CANDIDATES
            or address in self._addresses
            or self._protocol.is_silent(address)
            or not self._protocol.reachable(address)
        ):
            return
        distance = int.from_bytes(contact_id) ^ self._number
        hops = 0 if teller is None else teller.hops + 1
        candidate = _Candidate(contact_id, distance, address, hops, [] if teller is None else [teller])
        self._known[contact_id] = candidate
        self._addresses.add(address)
        bisect.insort(self._order, (distance, candidate), key=lambda item: item[0])

    def _step(self) -> None:
        # A request that cannot be sent fails at once and calls back into here.
        if self._stepping or self._over.done():
            return
        self._stepping = True
        try:
            while (candidate := self._next()) is not None:
                self._ask(candidate)
        finally:
            self._stepping = False
        if not self._in_flight:
            self._finish()

    def _next(self) -> _Candidate | None:
        if self._over.done() or self._in_flight >= min(limits.PARALLEL + self._slow, limits.MAX_PARALLEL):
            return None
        if self.requests >= limits.MAX_CRAWL_REQUESTS:
            return None
        nearer = 0
        for _, candidate in self._order:
            if candidate.state in (_State.DEAD, _State.SLOW) or (
                candidate.state is _State.NEW and candidate.distrusted
            ):
                continue
            if candidate.state is _State.NEW:
                return candidate
            nearer += 1
            if nearer >= self._width:
                break
        return None

    def _ask(self, candidate: _Candidate) -> None:
        candidate.state = _State.ASKED
        self.requests += 1
        self._in_flight += 1
        self._protocol.request(
            candidate.address,
            self._method,
            [self._target, *self._arguments()],
            lambda reply: self._replied(candidate, reply),
            contact_id=candidate.contact_id,
            slow=lambda: self._is_slow(candidate),
        )

    def _is_slow(self, candidate: _Candidate) -> None:
        candidate.state = _State.SLOW
        self._in_flight -= 1
        self._slow += 1
        for teller in candidate.tellers:
            teller.told_dead += 1
        self._step()

    def _replied(self, candidate: _Candidate, reply: Reply | None) -> None:
        if candidate.state is _State.ASKED:
            self._in_flight -= 1
        late = candidate.state is _State.SLOW
        neighbours: list[Neighbour] | None = None
        if reply is not None:
            try:
                neighbours = _neighbours(reply)
            except MalformedMessage:
                neighbours = None
        if reply is None or neighbours is None:
            candidate.state = _State.DEAD
            if not late:
                for teller in candidate.tellers:
                    teller.told_dead += 1
        else:
            candidate.state = _State.ANSWERED
            for teller in candidate.tellers:
                teller.told_alive += 1
            self._answered(candidate, reply, neighbours)
        self._step()

    def _answered(self, candidate: _Candidate, reply: Reply, neighbours: list[Neighbour]) -> None:
        if self._over.done():
            return
        self.hops = max(self.hops, candidate.hops)
        for contact_id, address in neighbours[: limits.BUCKET_SIZE]:
            if may_introduce(candidate.address[0], address[0]):
                self._learn(contact_id, address, candidate)
        answer = Answer(candidate.contact_id, candidate.address, reply)
        self._answers[candidate.contact_id] = answer
        if self._on_answer is not None and self._on_answer(answer):
            self._finish()


def _neighbours(reply: Reply) -> list[Neighbour]:
    if len(reply) < 3 or not isinstance(reply[2], bytes):
        raise MalformedMessage("a reply without neighbours")
    return unpack_neighbours(reply[2])
