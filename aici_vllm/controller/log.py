"""What a branch printed, kept within a size per step."""

from collections import deque


class Log:
    """Lines of one branch. Over `step_bytes` within a step, the oldest text of the step is dropped."""

    def __init__(self, step_bytes: int):
        self._step_bytes = step_bytes
        self._step: deque[str] = deque()
        self._size = 0
        self._done: list[str] = []

    def write(self, text: str) -> None:
        if len(text) > self._step_bytes:
            text = text[-self._step_bytes :]
        self._step.append(text)
        self._size += len(text)
        while self._size > self._step_bytes:
            self._size -= len(self._step.popleft())

    def end_step(self) -> None:
        """What was written so far can no longer be dropped."""
        if self._step:
            self._done.append("".join(self._step))
            self._step.clear()
            self._size = 0

    def __str__(self) -> str:
        return "".join(self._done) + "".join(self._step)
