"""Masks that were computed once: shared by all sequences of a process, bounded in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from itertools import count
from threading import Lock

from constraints.token_set import Row

DEFAULT_BYTES = 256 * 1024 * 1024


class MaskCache:
    """Masks by state key. The least recently used go first when `max_bytes` is reached.

    Thread-safe. `hits` and `misses` count since the start.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES):
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.hits = 0
        self.misses = 0
        self._rows: OrderedDict[Hashable, Row] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: Hashable) -> Row | None:
        with self._lock:
            row = self._rows.get(key)
            if row is None:
                self.misses += 1
                return None
            self.hits += 1
            self._rows.move_to_end(key)
            return row

    def put(self, key: Hashable, row: Row) -> Row:
        """Keep `row`, which must be read-only, and return the row that is kept for `key`."""
        with self._lock:
            kept = self._rows.setdefault(key, row)
            if kept is row:
                self.num_bytes += row.nbytes
            while self.num_bytes > self.max_bytes and len(self._rows) > 1:
                _, dropped = self._rows.popitem(last=False)
                self.num_bytes -= dropped.nbytes
            return kept

    def clear(self) -> None:
        with self._lock:
            self._rows.clear()
            self.num_bytes = 0


owners = count()
"""Numbers for what masks belong to, so that keys of different constraints differ."""

masks = MaskCache()
"""The cache of this process. State keys name the vocabulary, so one cache serves them all."""
