"""A batch over threads: one bounded crew for a whole tree of batches, however deep it nests."""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any


class _Batch:
    """The items of one `map` call: what is left to start, and what is not finished yet."""

    def __init__(self, function: Callable[[Any], Any], items: Sequence[Any]) -> None:
        self.function = function
        self.items = items
        self.results: list[Any] = [None] * len(items)
        self.errors: list[BaseException] = []
        self.todo: deque[int] = deque(range(len(items)))
        self.unfinished = len(items)
        self.finished = threading.Condition()
        self.context = contextvars.copy_context()

    def take(self) -> int | None:
        try:
            return self.todo.popleft()
        except IndexError:
            return None

    def work_on(self, index: int) -> None:
        try:
            self.results[index] = self.context.copy().run(self.function, self.items[index])
        except BaseException as error:
            self.errors.append(error)
        with self.finished:
            self.unfinished -= 1
            if not self.unfinished:
                self.finished.notify_all()

    def wait(self) -> None:
        with self.finished:
            while self.unfinished:
                self.finished.wait()


class Crew:
    """Runs batches on at most `width` threads, the calling thread included.

    The caller works on its own batch, and up to `width - 1` helpers join in. A helper whose item opens a
    batch of its own becomes that batch's caller, so nesting adds no threads: a tree of batches of any depth
    stays within `width`. It cannot deadlock, because whoever waits for a batch waits only for items that
    some thread is already working on. Free helpers take items of the newest batch first, so that the
    deepest joins finish first.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[_Batch] = []
        self._helpers = 0

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], width: int) -> list[Any]:
        """`function` of every item, in the order of `items`.

        Raises:
            ValueError: `width` is below 1.
            BaseException: the first error that `function` raised, after all items have finished.
        """
        if width < 1:
            raise ValueError(f"a batch needs at least 1 worker, got {width}; raise max_batch_workers")
        batch = _Batch(function, items)
        self._join_in(batch, width)
        while (index := batch.take()) is not None:
            batch.work_on(index)
        batch.wait()
        with self._lock:
            if batch in self._open:
                self._open.remove(batch)
        if batch.errors:
            raise batch.errors[0]
        return batch.results

    def _join_in(self, batch: _Batch, width: int) -> None:
        with self._lock:
            self._open.append(batch)
            wanted = max(0, min(len(batch.items), width) - 1)
            count = min(wanted, max(0, width - 1 - self._helpers))
            self._helpers += count
        for _ in range(count):
            threading.Thread(target=self._help, name="rlm-batch", daemon=True).start()

    def _help(self) -> None:
        while True:
            with self._lock:
                found = self._next_item()
                if found is None:
                    self._helpers -= 1
                    return
            batch, index = found
            batch.work_on(index)

    def _next_item(self) -> tuple[_Batch, int] | None:
        for batch in reversed(self._open):
            index = batch.take()
            if index is not None:
                return batch, index
        return None
