"""Work that several callers want at the same time: done once, and stopped when nobody waits any more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass
class _Job(Generic[T]):
    task: asyncio.Task[T]
    waiting: int = 0


class SharedWork(Generic[T]):
    """Coroutines by key. Equal keys in flight are one; with `keep`, results stay for later callers too."""

    def __init__(self, *, keep: bool = False) -> None:
        self._jobs: dict[Hashable, _Job[T]] = {}
        self._keep = keep

    async def run(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> tuple[T, bool]:
        """The result of `work`, and whether this call was the one that started it.

        A caller that is cancelled leaves; the last one to leave cancels the work.
        """
        started = key not in self._jobs
        if started:
            task = asyncio.create_task(work())
            self._jobs[key] = _Job(task)
            task.add_done_callback(lambda done: self._ended(key, done))
        job = self._jobs[key]
        job.waiting += 1
        try:
            return await asyncio.shield(job.task), started
        finally:
            job.waiting -= 1
            if not job.waiting and not job.task.done():
                self._jobs.pop(key, None)
                job.task.cancel()

    def _ended(self, key: Hashable, task: asyncio.Task[T]) -> None:
        failed = task.cancelled() or task.exception() is not None
        job = self._jobs.get(key)
        if job is not None and job.task is task and (failed or not self._keep):
            del self._jobs[key]
