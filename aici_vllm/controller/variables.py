"""The variables that the branches of one request share."""

import threading

from aici_vllm.controller.errors import LimitError

MOST_WRITES = 4096
"""Writes that are noted until they are taken."""

NOTED = 4
"""How many times the limit of all variables the values of those writes may hold."""


class Variables:
    """Name → bytes. Safe to use from several threads; every call is one atomic change."""

    def __init__(self, limit_bytes: int):
        self._limit = limit_bytes
        self._values: dict[str, bytes] = {}
        self._held = 0
        self._noted = 0
        self._writes: list[tuple[int, str, bytes, str]] | None = None
        self._lock = threading.Lock()

    def get(self, name: str) -> bytes | None:
        return self._values.get(name)

    def get_all(self, names: tuple[str, ...]) -> list[bytes] | None:
        """The values in order; None while one is missing."""
        values = [value for name in names if (value := self._values.get(name)) is not None]
        return values if len(values) == len(names) else None

    def set(self, name: str, value: bytes, writer: int = 0) -> None:
        """Set or replace a variable; `writer` is the index of the branch that does.

        Raises:
            LimitError: all variables together would be over the limit, or too much was written in one step of
                a request that somebody watches.
        """
        with self._lock:
            self._check_writes(name, value)
            self._store(name, value)
            self._note(writer, name, value, "Set")

    def append(self, name: str, value: bytes, writer: int = 0) -> None:
        """Add to the end of a variable; a missing one starts empty.

        Raises:
            LimitError: as for `set`.
        """
        with self._lock:
            self._check_writes(name, value)
            self._store(name, self._values.get(name, b"") + value)
            self._note(writer, name, value, "Append")

    def missing(self, names: tuple[str, ...]) -> list[str]:
        """Those of `names` that are not set."""
        return [name for name in names if name not in self._values]

    def snapshot(self) -> dict[str, bytes]:
        """A copy of everything."""
        with self._lock:
            return dict(self._values)

    def watch(self) -> None:
        """Note every write from here on for `take_writes`."""
        self._writes = []

    def take_writes(self) -> list[tuple[int, str, bytes, str]]:
        """The writes since the last call, in order: (writer, name, value, "Set" | "Append")."""
        with self._lock:
            writes, self._writes = self._writes or [], None if self._writes is None else []
            self._noted = 0
        return writes

    def _check_writes(self, name: str, value: bytes) -> None:
        if self._writes is None:
            return
        most = NOTED * self._limit
        if len(self._writes) >= MOST_WRITES or self._noted + len(name) + len(value) > most:
            raise LimitError(
                f"while a client watches, variables may be written {MOST_WRITES} times in a step, "
                f"with {most} bytes in all"
            )

    def _note(self, writer: int, name: str, value: bytes, operation: str) -> None:
        if self._writes is not None:
            self._writes.append((writer, name, value, operation))
            self._noted += len(name) + len(value)

    def _store(self, name: str, value: bytes) -> None:
        before = self._values.get(name)
        held = self._held + len(value) + (len(name) if before is None else -len(before))
        if held > self._limit:
            raise LimitError(f"the variables of a request may hold {self._limit} bytes together")
        self._held = held
        self._values[name] = value
