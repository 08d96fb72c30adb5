"""An owner for background tasks: keeps the reference, reports the end, cancels what is left.

`asyncio.TaskGroup` fits where one `async with` block spans the work; this fits objects with `start`
and `close`, which may be called from different tasks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, TypeVar

from mesh.errors import ConnectionClosed

T = TypeVar("T")
log = logging.getLogger(__name__)


class TaskOwner:
    """Owns tasks until they end or `close` cancels them.

    A task that ends with an exception is a bug: it is logged with its traceback and handed to
    `on_failure`, unless the one who spawned it awaits the task and so takes the exception.
    """

    def __init__(self, on_failure: Callable[[BaseException], None] | None = None) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._shared: dict[Hashable, asyncio.Task[Any]] = {}
        self._on_failure = on_failure

    def spawn(
        self, coroutine: Coroutine[Any, Any, T], *, name: str, awaited: bool = False
    ) -> asyncio.Task[T]:
        """Start a task. `awaited` says that somebody awaits it and takes its exception."""
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._taken if awaited else self._ended)
        return task

    def __len__(self) -> int:
        return len(self._tasks)

    def _taken(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # marks it as retrieved: every awaiter may have been cancelled

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            log.error("task %s failed", task.get_name(), exc_info=error)
            if self._on_failure is not None:
                self._on_failure(error)

    async def shared(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of `work`, done once for all who ask for the same key while it runs.

        One of them giving up takes nothing from the others. Raises ConnectionClosed where `close` ended it.
        """
        task = self._shared.get(key)
        if task is None:
            task = self._shared[key] = self.spawn(work(), name=f"shared {key}", awaited=True)
            task.add_done_callback(lambda _: self._shared.pop(key))
        try:
            result: T = await asyncio.shield(task)
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if caller is not None and caller.cancelling():
                raise
            raise ConnectionClosed("closed while this was under way") from None
        return result

    async def close(self) -> None:
        """Cancel every task and wait until all have ended."""
        while self._tasks:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._tasks.difference_update(tasks)
