"""What a branch printed, kept within a size per step and in all."""

import threading
from collections import deque

STEPS_KEPT = 64
"""How many full steps of log a branch can hold."""


class Log:
    """Text of one branch. Over `step_bytes` within a step, the step's oldest text is dropped, and over
    `STEPS_KEPT` times that in all, the oldest of all. Scripts write from other threads than the engine's.
    """

    def __init__(self, step_bytes: int):
        self._step_bytes = step_bytes
        self._step: deque[str] = deque()
        self._size = 0
        self._done: deque[str] = deque()
        self._done_size = 0
        self._lock = threading.Lock()

    def write(self, text: str) -> None:
        if len(text) > self._step_bytes:
            text = text[-self._step_bytes :]
        with self._lock:
            self._step.append(text)
            self._size += len(text)
            while self._size > self._step_bytes:
                self._size -= len(self._step.popleft())

    def end_step(self) -> None:
        """What was written so far is no longer the current step's."""
        with self._lock:
            if not self._step:
                return
            self._done.append("".join(self._step))
            self._done_size += self._size
            self._step.clear()
            self._size = 0
            while self._done_size > STEPS_KEPT * self._step_bytes:
                self._done_size -= len(self._done.popleft())

    def __str__(self) -> str:
        with self._lock:
            return "".join(self._done) + "".join(self._step)
