"""Which workers and models there are: asked of the mesh over TCP, verified here, cached for a while."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from client_sdk.pool import Address, Pool
from mesh.address import format_address, usable_addresses
from mesh.errors import ConnectFailed, NoWorkers, ProtocolError, QMeshError
from mesh.identity import NodeId
from mesh.records import WorkerRecord, open_record
from mesh.tasks import TaskOwner
from mesh.transport import Connection

FRESH = 30.0
"""Seconds for which an answer about workers is used again."""
WANT = 16
MAX_KNOWN = 64


@dataclass(frozen=True, slots=True)
class EntryNode:
    """A node to ask; where its id is known nobody else can pose as it."""

    address: Address
    peer: NodeId | None = None


class Directory:
    """Answers from the mesh. Identical questions at the same time are asked once."""

    def __init__(self, pool: Pool, entries: list[EntryNode], *, timeout: float) -> None:
        if not entries:
            raise ValueError("at least one entry node is needed")
        self._pool = pool
        self._entries = entries
        self._timeout = timeout
        self._cache: dict[str, tuple[float, list[WorkerRecord]]] = {}
        self._known: dict[NodeId, EntryNode] = {}
        """Workers seen in answers: other ways in when the entry nodes are gone."""
        self._models: tuple[float, dict[str, int]] = (0.0, {})
        self._tasks = TaskOwner()

    async def workers(self, model: str, *, fresh: bool = False) -> list[WorkerRecord]:
        """Valid records of a model's workers, at most 30 s old unless `fresh`.

        Raises ConnectFailed where no entry node can be reached.
        """
        cached = self._cache.get(model)
        now = time.monotonic()
        if cached is not None and not fresh and now - cached[0] < FRESH:
            return [record for record in cached[1] if record.expires > time.time()]
        return await self._tasks.shared(model, lambda: self._find(model))

    async def models(self) -> dict[str, int]:
        """Every model on the mesh with the number of its workers. Raises ConnectFailed."""
        trailer = await self._ask("models", {}, lambda answer: answer.get("models"))
        models = trailer.get("models")
        if not isinstance(models, Mapping):
            raise ProtocolError("the node's answer about models has the wrong form")
        counts = {
            name: count for name, count in models.items() if isinstance(name, str) and isinstance(count, int)
        }
        self._models = (time.monotonic(), counts)
        return counts

    async def status(self) -> Mapping[str, Any]:
        """The status of the first entry node that answers."""
        return await self._ask("status", {}, bool)

    async def default_model(self) -> str:
        """The model that most workers have. Raises NoWorkers where the mesh has none."""
        at, models = self._models
        if not models or time.monotonic() - at > FRESH:
            models = await self._tasks.shared(None, self.models)
        if not models:
            raise NoWorkers("the mesh has no worker yet; start one with `qmesh-node run`")
        return max(sorted(models), key=lambda name: models[name])

    async def close(self) -> None:
        """Stop what is being asked."""
        await self._tasks.close()

    async def _find(self, model: str) -> list[WorkerRecord]:
        wanted = {"model": model, "want": WANT}
        trailer = await self._ask("find", wanted, lambda answer: answer.get("records"))
        newest: dict[NodeId, WorkerRecord] = {}
        found = trailer.get("records")
        for item in found if isinstance(found, list) else ():
            try:
                key, blob = item
                record = open_record(blob, self._pool.network, key, time.time())
            except (QMeshError, TypeError, ValueError):
                continue  # A liar's record is worth as much as none.
            if record.model != model or record.health <= 0:
                continue
            known = newest.get(record.node_id)
            if known is None or known.seq < record.seq:
                newest[record.node_id] = record
        records = list(newest.values())
        if records:
            self._cache[model] = (time.monotonic(), records)
        else:
            self._cache.pop(model, None)
        for record in records:
            addresses = usable_addresses(record.addresses)
            if len(self._known) < MAX_KNOWN and addresses:
                self._known[record.node_id] = EntryNode(addresses[0], record.node_id)
        return records

    async def _ask(
        self, method: str, meta: Mapping[str, Any], useful: Callable[[Mapping[str, Any]], Any]
    ) -> Mapping[str, Any]:
        """One question to the entry nodes in turn, until an answer is useful: a node that has just
        started knows nobody yet. Raises ConnectFailed where none answers at all.
        """
        failures: list[str] = []
        answer: Mapping[str, Any] | None = None
        async for connection in self._ways_in(failures):
            try:
                async with asyncio.timeout(self._timeout):
                    stream = await connection.open(method, meta)
                    async with stream:
                        while await stream.read() is not None:
                            pass
                        answer = stream.trailer or {}
            except (QMeshError, OSError, TimeoutError) as error:
                if isinstance(error, TimeoutError):
                    with contextlib.suppress(
                        QMeshError
                    ):  # where it is gone, the next question finds that out
                        await self._pool.verify(connection, self._timeout)
                failures.append(f"{format_address(*connection.remote_address[:2])}: {_reason(error)}")
                continue
            if useful(answer):
                return answer
        if answer is None:
            raise ConnectFailed("no entry node can be reached (" + "; ".join(failures) + ")")
        return answer

    async def _ways_in(self, failures: list[str]) -> AsyncIterator[Connection]:
        """Connections to ask, those that are open first."""
        entries = [*self._entries, *self._known.values()]
        tried: set[NodeId] = set()
        for entry in entries:
            connection = None if entry.peer is None else self._pool.peek(entry.peer)
            if connection is not None:
                tried.add(connection.peer_id)
                yield connection
        for index, entry in enumerate(entries):
            if entry.peer in tried:
                continue
            try:
                connection = await self._pool.enter(entry.address, entry.peer)
            except (QMeshError, OSError) as error:
                failures.append(f"{format_address(*entry.address)}: {_reason(error)}")
                continue
            if entry.peer is None:
                # Trust on first use: from now on only this node is accepted at the address.
                self._entries[index] = EntryNode(entry.address, connection.peer_id)
            if connection.peer_id not in tried:
                tried.add(connection.peer_id)
                yield connection


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__
