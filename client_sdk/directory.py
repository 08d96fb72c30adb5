"""Which workers and models there are: asked of the mesh over TCP, verified here, cached for a while."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from client_sdk.pool import Address, Pool
from mesh.address import format_address, usable_addresses
from mesh.errors import ConnectFailed, NoWorkers, ProtocolError, QMeshError
from mesh.identity import NodeId
from mesh.records import WorkerRecord, open_record
from mesh.tasks import TaskOwner

FRESH = 30.0
"""Seconds for which an answer about workers is used again."""
STAGGER = 0.3
"""Seconds that the first entry node has for its answer before the second is asked too."""
WANT = 16
MAX_KNOWN = 64


@dataclass(slots=True)
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
        """One question to the entry nodes until an answer is useful: a node that has just started knows
        nobody yet. The next is asked at once when one fails, and otherwise `STAGGER` later, then twice as
        long later, so that neither a dead node is waited for nor a slow answer asked of everybody.

        Raises ConnectFailed where none answers at all.
        """
        failures: list[str] = []
        answer: Mapping[str, Any] | None = None
        asked: set[NodeId] = set()
        waiting = deque(self._ways_in())
        running: dict[asyncio.Task[Mapping[str, Any] | None], EntryNode] = {}
        pause = STAGGER
        try:
            while waiting or running:
                if waiting:
                    entry = waiting.popleft()
                    running[asyncio.create_task(self._ask_one(entry, asked, method, meta))] = entry
                done, _ = await asyncio.wait(
                    running, timeout=pause if waiting else None, return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    pause *= 2
                for task in done:
                    entry = running.pop(task)
                    try:
                        told = task.result()
                    except (QMeshError, OSError) as error:
                        failures.append(f"{format_address(*entry.address)}: {_reason(error)}")
                        continue
                    if told is not None:
                        answer = told
                        if useful(told):
                            return told
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        if answer is None:
            raise ConnectFailed("no entry node can be reached (" + "; ".join(failures) + ")")
        return answer

    async def _ask_one(
        self, entry: EntryNode, asked: set[NodeId], method: str, meta: Mapping[str, Any]
    ) -> Mapping[str, Any] | None:
        """The answer of one entry node, or None if it is among the `asked` already."""
        connection = await self._pool.enter(entry.address, entry.peer)
        # Trust on first use: from now on only this node is accepted at the address.
        entry.peer = connection.peer_id
        if connection.peer_id in asked:
            return None
        asked.add(connection.peer_id)
        try:
            async with asyncio.timeout(self._timeout), await connection.open(method, meta) as stream:
                while await stream.read() is not None:
                    pass
                return stream.trailer or {}
        except TimeoutError:
            with contextlib.suppress(QMeshError):  # where it is gone, the next question finds that out
                await self._pool.verify(connection, self._timeout)
            raise

    def _ways_in(self) -> list[EntryNode]:
        """Whom to ask, those with an open connection first."""
        entries = [*self._entries, *self._known.values()]
        return sorted(entries, key=lambda entry: entry.peer is None or self._pool.peek(entry.peer) is None)


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__
