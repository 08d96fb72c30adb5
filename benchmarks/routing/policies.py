"""Whom to ask: QMesh's own choice, and the simple ones that it is compared with."""

from __future__ import annotations

from benchmarks.routing.actors import Client, Request, Worker
from client_sdk.selection import choose


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
