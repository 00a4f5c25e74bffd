"""Which mask row each sequence samples under, and which rows the workers must still be sent.

The table lives twice: here its keys, on every worker's device its rows. A step sends the rows that are
new and one number per sequence.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from aici_vllm.controller.sampling import Sampling

LANE = "controller_lane"
"""Set in a controlled request's `extra_args` for the workers: which of a step's slots is its own."""

NO_MASK = -1
"""The slot of a sequence that may sample any token."""

TABLE_BYTES = 64 << 20


def request_lane(params: Any) -> int | None:
    """The lane of a controlled request; None for a plain request."""
    return params.extra_args.get(LANE) if params.extra_args else None


def table_rows(max_rows: int, words: int) -> int:
    """Rows of the table of an engine whose steps have up to `max_rows` sequences."""
    return max(2 * max_rows, TABLE_BYTES // (4 * words))


class Lanes:
    """Small numbers for the requests of live branches, so that a step's slots are an array.

    A number may be given again once the request that had it will not be sent to the workers any more.
    """

    def __init__(self) -> None:
        self._taken: list[bool] = []
        self._free: list[int] = []

    def __len__(self) -> int:
        """One more than the highest number in use."""
        return len(self._taken)

    def take(self) -> int:
        """The lowest number that nobody has."""
        while self._free:
            lane = heappop(self._free)
            if lane < len(self._taken) and not self._taken[lane]:
                self._taken[lane] = True
                return lane
        self._taken.append(True)
        return len(self._taken) - 1

    def give_back(self, lane: int) -> None:
        """Its request is over."""
        self._taken[lane] = False
        heappush(self._free, lane)
        while self._taken and not self._taken[-1]:
            self._taken.pop()


@dataclass(slots=True)
class StepMasks:
    """What the workers need to mask one step.

    Attributes:
        grammar: vLLM's own structured-output masks, passed on untouched.
        slots: lane → row of the table, or NO_MASK, int32[lanes + 1]. The last one is NO_MASK and stands
            for every lane beyond.
        new_slots: the rows to write first, [k].
        new_rows: their content, int32[k, words].
    """

    grammar: Any
    slots: np.ndarray
    new_slots: list[int] = field(default_factory=list)
    new_rows: np.ndarray | None = None


class MaskTable:
    """Keys of the device table, least recently used first.

    Args:
        capacity: rows; at least the number of sequences of one step.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.built = 0
        self.reused = 0
        self._slots: OrderedDict[Hashable, int] = OrderedDict()
        self._unnamed = 0

    def step(self, grammar: Any, samplings: "dict[int, Sampling]", lanes: int) -> StepMasks:
        """Find or make the row of each sequence.

        Args:
            samplings: lane → what the sequence samples under.
            lanes: more than the highest lane.
        """
        slots = [NO_MASK] * (lanes + 1)
        known = self._slots
        new_slots: list[int] = []
        new_rows: list[np.ndarray] = []
        for lane, sampling in samplings.items():
            key = sampling.mask_key()
            slot = known.get(key) if key is not None else None
            if slot is not None:
                known.move_to_end(key)
            else:
                slot = self._take_slot(key)
                new_slots.append(slot)
                new_rows.append(sampling.mask_row())
            slots[lane] = slot
        self.built += len(new_slots)
        self.reused += len(samplings) - len(new_slots)
        stacked = np.stack(new_rows) if new_rows else None
        return StepMasks(grammar, np.array(slots, np.int32), new_slots, stacked)

    def _take_slot(self, key: Hashable | None) -> int:
        if key is None:
            # A name of its own, so that it ages out like any other row.
            self._unnamed += 1
            key = ("unnamed", self._unnamed)
        if len(self._slots) < self.capacity:
            slot = len(self._slots)
        else:
            _, slot = self._slots.popitem(last=False)
        self._slots[key] = slot
        return slot
