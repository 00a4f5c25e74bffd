"""A batch over threads: one bounded crew for a whole tree of batches, however deep it nests."""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any


class _Batch:
    """The items of one `map` call: what is left to start, and how many are not finished yet."""

    def __init__(self, function: Callable[[Any], Any], items: Sequence[Any], parent: _Batch | None) -> None:
        self.function = function
        self.items = items
        self.parent = parent
        self.results: list[Any] = [None] * len(items)
        self.errors: list[BaseException] = []
        self.todo: deque[int] = deque(range(len(items)))
        self.unfinished = len(items)
        self.context = contextvars.copy_context()

    def serves(self, ancestor: _Batch | None) -> bool:
        """Whether `ancestor` waits for this batch; everything serves None."""
        batch: _Batch | None = self
        while batch is not None and batch is not ancestor:
            batch = batch.parent
        return batch is ancestor

    def work_on(self, index: int) -> None:
        try:
            self.results[index] = self.context.copy().run(self._call, self.items[index])
        except BaseException as error:
            self.errors.append(error)

    def _call(self, item: Any) -> Any:
        _current.set(self)
        return self.function(item)


_current: contextvars.ContextVar[_Batch | None] = contextvars.ContextVar("batch", default=None)


class Crew:
    """Runs batches on at most `width` threads, the calling thread included.

    The caller works on its own batch, and up to `width - 1` helpers join in. A helper whose item opens a
    batch of its own becomes that batch's caller, so nesting adds no threads: a tree of batches of any depth
    stays within `width`. A caller that has run out of items helps the batches that its own is waiting for,
    and sleeps only when there is nothing to start there. So nothing deadlocks, and no thread idles while an
    item that it could help with is waiting. Free helpers take items of the newest batch first: the deepest
    joins finish first.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
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
        batch = _Batch(function, items, _current.get())
        self._enter(batch, width)
        while (found := self._next_item(batch)) is not None:
            self._work(*found)
        if batch.errors:
            raise batch.errors[0]
        return batch.results

    def _enter(self, batch: _Batch, width: int) -> None:
        with self._changed:
            self._open.append(batch)
            wanted = min(len(batch.items), width) - 1
            count = max(0, min(wanted, width - 1 - self._helpers))
            self._helpers += count
            self._changed.notify_all()
        for _ in range(count):
            threading.Thread(target=self._help, name="rlm-batch", daemon=True).start()

    def _help(self) -> None:
        while (found := self._take(None)) is not None:
            self._work(*found)

    def _work(self, batch: _Batch, index: int) -> None:
        batch.work_on(index)
        with self._changed:
            batch.unfinished -= 1
            if not batch.unfinished:
                self._open.remove(batch)
                self._changed.notify_all()

    def _next_item(self, batch: _Batch) -> tuple[_Batch, int] | None:
        """An item that `batch` needs done, as soon as there is one; None once the batch is finished."""
        with self._changed:
            while batch.unfinished:
                found = self._find(batch)
                if found is not None:
                    return found
                self._changed.wait()
            if batch in self._open:
                self._open.remove(batch)
            return None

    def _take(self, ancestor: _Batch | None) -> tuple[_Batch, int] | None:
        with self._changed:
            found = self._find(ancestor)
            if found is None:
                self._helpers -= 1
            return found

    def _find(self, ancestor: _Batch | None) -> tuple[_Batch, int] | None:
        for batch in reversed(self._open):
            if batch.todo and batch.serves(ancestor):
                return batch, batch.todo.popleft()
        return None
