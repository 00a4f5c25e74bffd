"""Which mask row each sequence samples under, and which rows the workers must still be sent.

The table lives twice: here its keys, on every worker's device its rows. A step sends the rows that are
new and one number per sequence.
"""

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
    """Rows of the table of an engine whose steps mask up to `max_rows` rows of logits."""
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
            for every lane beyond. With speculative decoding int32[lanes + 1, width]: a lane has a slot for
            the token that comes next and one behind each draft.
        new_slots: the rows to write first, [k].
        new_rows: their content, int32[k, words].
    """

    grammar: Any
    slots: np.ndarray
    new_slots: list[int] = field(default_factory=list)
    new_rows: np.ndarray | None = None


class MaskTable:
    """Keys of the device table. When it is full, the rows that no step has used for longest go.

    Args:
        capacity: rows; at least those of logits that one step masks.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.built = 0
        self.reused = 0
        self._slots: dict[Hashable, int] = {}
        self._keys: list[Hashable] = []
        self._used: list[int] = []
        """The last step that used a slot."""
        self._idle: list[tuple[int, int]] = []
        """Slots to give away next, the last one first, unless they were used after the step noted here."""
        self._steps = 0

    def step(self, grammar: Any, samplings: "dict[int, Sampling]", lanes: int, width: int = 1) -> StepMasks:
        """Find or make the row of each sequence.

        Args:
            samplings: `width` times the lane, and the number of a draft → what comes there is sampled under.
            lanes: more than the highest lane.
            width: slots of a lane.
        """
        slots = [NO_MASK] * ((lanes + 1) * width)
        self._steps = step = self._steps + 1
        find, used = self._slots.get, self._used
        new_slots: list[int] = []
        new_rows: list[np.ndarray] = []
        for place, sampling in samplings.items():
            key = sampling.mask_key()
            slot = None if key is None else find(key)
            if slot is None:
                slot = self._take_slot(key)
                new_slots.append(slot)
                new_rows.append(sampling.mask_row())
            used[slot] = step
            slots[place] = slot
        self.built += len(new_slots)
        self.reused += len(samplings) - len(new_slots)
        stacked = np.stack(new_rows) if new_rows else None
        by_lane = np.array(slots, np.int32)
        return StepMasks(grammar, by_lane if width == 1 else by_lane.reshape(-1, width), new_slots, stacked)

    def _take_slot(self, key: Hashable | None) -> int:
        if len(self._keys) < self.capacity:
            slot = len(self._keys)
            self._keys.append(key)
            self._used.append(self._steps)
        else:
            slot = self._idle_slot()
            if self._keys[slot] is not None:
                del self._slots[self._keys[slot]]
            self._keys[slot] = key
        if key is not None:
            self._slots[key] = slot
        return slot

    def _idle_slot(self) -> int:
        while True:
            if not self._idle:
                # One sort serves for an eighth of the table, so that a use need not keep an order.
                by_use = sorted(range(self.capacity), key=self._used.__getitem__)
                oldest = by_use[: max(self.capacity // 8, 1)]
                self._idle = [(slot, self._used[slot]) for slot in reversed(oldest)]
            slot, used = self._idle.pop()
            if self._used[slot] == used:
                return slot
