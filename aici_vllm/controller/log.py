"""What a branch printed, kept within a size per step and in all."""

import threading
from collections import deque

STEPS_KEPT = 16
"""How many full steps of log a branch can hold."""


class Log:
    """Text of one branch. Over `step_bytes` within a step, the step's oldest text is dropped, and over
    `STEPS_KEPT` times that in all, the oldest of all. Scripts write from other threads than the engine's.

    Sizes are bytes of UTF-8; what UTF-8 cannot hold becomes "?".
    """

    def __init__(self, step_bytes: int):
        self._step_bytes = step_bytes
        self._step: deque[bytes] = deque()
        self._size = 0
        self._done: deque[bytes] = deque()
        self._done_size = 0
        self._new = 0
        self._lock = threading.Lock()

    def write(self, text: str) -> None:
        data = text.encode(errors="replace")
        with self._lock:
            self._step.append(data)
            self._size += len(data)
            while (excess := self._size - self._step_bytes) > 0:
                oldest = self._step.popleft()
                self._size -= len(oldest)
                if rest := _without_start(oldest, excess):
                    self._step.appendleft(rest)
                    self._size += len(rest)

    def end_step(self) -> None:
        """What was written so far is no longer the current step's."""
        with self._lock:
            if not self._step:
                return
            self._done.append(b"".join(self._step))
            self._new += 1
            self._done_size += self._size
            self._step.clear()
            self._size = 0
            while self._done_size > STEPS_KEPT * self._step_bytes:
                self._done_size -= len(self._done.popleft())

    def take_new(self) -> str:
        """What the steps that ended since the last call wrote, as far as it was kept."""
        with self._lock:
            new, self._new = min(self._new, len(self._done)), 0
            return b"".join(list(self._done)[len(self._done) - new :]).decode() if new else ""

    def __str__(self) -> str:
        with self._lock:
            return b"".join([*self._done, *self._step]).decode()


def _without_start(data: bytes, count: int) -> bytes:
    """`data` without its first `count` bytes and without the rest of a character that this cuts."""
    while count < len(data) and data[count] & 0xC0 == 0x80:
        count += 1
    return data[count:]
