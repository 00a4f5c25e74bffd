"""Deadlines: a point in time after which a call is left behind."""

from __future__ import annotations

import contextvars
import queue
import threading
import time
from collections.abc import Callable
from typing import Any


class DeadlineExceeded(Exception):
    """A call was still running when its deadline passed."""


class Deadline:
    """A moment on the monotonic clock, or never."""

    def __init__(self, seconds: float | None) -> None:
        self._at = None if seconds is None else time.monotonic() + seconds

    @property
    def remaining(self) -> float | None:
        """Seconds left, at least 0; None when there is no limit."""
        return None if self._at is None else max(0.0, self._at - time.monotonic())

    @property
    def passed(self) -> bool:
        return self.remaining == 0.0

    def narrowed(self, seconds: float | None) -> float | None:
        """The shorter of `seconds` and what is left here: the limit a child may have."""
        limits = [limit for limit in (seconds, self.remaining) if limit is not None]
        return min(limits) if limits else None


NEVER = Deadline(None)


def call_within(deadline: Deadline, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `function`, and leave it behind when the deadline passes.

    A thread cannot be stopped from outside, so the call runs to its own end in a daemon thread and its
    result is dropped. Without a deadline the call is made directly.

    Raises:
        DeadlineExceeded: the deadline passed first.
    """
    if deadline.remaining is None:
        return function(*args, **kwargs)
    outcome: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    context = contextvars.copy_context()

    def work() -> None:
        try:
            outcome.put((context.run(function, *args, **kwargs), None))
        except BaseException as error:
            outcome.put((None, error))

    if deadline.passed:
        raise DeadlineExceeded
    threading.Thread(target=work, name="rlm-call", daemon=True).start()
    try:
        value, error = outcome.get(timeout=deadline.remaining)
    except queue.Empty:
        raise DeadlineExceeded from None
    if error is not None:
        raise error
    return value
