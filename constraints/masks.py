"""Masks that were computed once: shared by all sequences of a process, bounded in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from itertools import count
from threading import Lock

from constraints.token_set import Row

DEFAULT_BYTES = 256 * 1024 * 1024


class _Kept:
    """A mask, and whether it was asked for since it was last looked at for dropping."""

    __slots__ = ("row", "used")

    def __init__(self, row: Row):
        self.row = row
        self.used = False


class MaskCache:
    """Masks by state key. When `max_bytes` is reached, those not asked for lately go, the oldest first.

    Thread-safe. `misses` counts since the start.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES):
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.misses = 0
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable) -> Row | None:
        # On the path of every token: one look-up and one flag, without the lock.
        kept = self._kept.get(key)
        if kept is None:
            self.misses += 1
            return None
        kept.used = True
        return kept.row

    def put(self, key: Hashable, row: Row) -> Row:
        """Keep `row`, which must be read-only, and return the row that is kept for `key`."""
        with self._lock:
            known = self._kept.get(key)
            if known is not None:
                return known.row
            self._kept[key] = _Kept(row)
            self.num_bytes += row.nbytes
            while self.num_bytes > self.max_bytes and len(self._kept) > 1:
                self._drop_one()
            return row

    def _drop_one(self) -> None:
        """Drop the oldest mask that was not used since it was last spared."""
        while True:
            key, kept = self._kept.popitem(last=False)
            if not kept.used:
                self.num_bytes -= kept.row.nbytes
                return
            kept.used = False
            self._kept[key] = kept

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()
            self.num_bytes = 0


owners = count()
"""Numbers for what masks belong to, so that keys of different constraints differ."""

masks = MaskCache()
"""The cache of this process. State keys name the vocabulary, so one cache serves them all."""
