"""How long the engine holds up a step for a script: briefly, and for a small share of all time."""

import time

SHARE = 0.05
"""Of all time, the most that one script may have others wait for it."""

SAVED = 0.002
"""Seconds of waiting that a script which asked for none has saved up, at most."""


class Patience:
    """What a script has left of it. It comes back with time."""

    __slots__ = ("_at", "_left")

    def __init__(self, left: float = SAVED) -> None:
        self._left = left
        self._at = time.monotonic()

    def left(self) -> float:
        """Seconds; none when it is 0 or less."""
        now = time.monotonic()
        self._left = min(SAVED, self._left + SHARE * (now - self._at))
        self._at = now
        return self._left

    def spend(self, seconds: float) -> None:
        """A step was held up for so long."""
        self._left -= seconds

    def copy(self) -> "Patience":
        """The same for a fork of the script."""
        return Patience(self.left())
