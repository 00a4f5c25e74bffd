"""Which mask row each sequence samples under, and which rows the workers must still be sent.

The table lives twice: here its keys, on every worker's device its rows. A step sends the rows that are
new and one number per sequence.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from constraints.place import Place

if TYPE_CHECKING:
    from aici_vllm.controller.sampling import Sampling

LANE = "controller_lane"
"""Set in a controlled request's `extra_args` for the workers: which of a step's slots is its own."""

NO_LANE = np.iinfo(np.int32).max
"""The lane of a plain request: beyond every other."""

NO_MASK = -1
"""The slot of a sequence that may sample any token."""

UNKNOWN = -2
"""In place of the slot of a lane whose row must be looked for."""

Owner = TypeVar("Owner")

TABLE_BYTES = 64 << 20


def request_lane(params: Any) -> int | None:
    """The lane of a controlled request; None for a plain request, and for what cannot be a lane."""
    lane = params.extra_args.get(LANE) if params.extra_args else None
    return lane if type(lane) is int and 0 <= lane < NO_LANE else None


def table_rows(max_rows: int, words: int) -> int:
    """Rows of the table of an engine whose steps mask up to `max_rows` rows of logits."""
    return max(2 * max_rows, TABLE_BYTES // (4 * words))


class Lanes(Generic[Owner]):
    """Small numbers for the requests of live branches, so that a step's slots are an array.

    A number may be given again once the request that had it will not be sent to the workers any more.
    """

    def __init__(self) -> None:
        self.owners: list[Owner | None] = []
        """Who has which number."""
        self._free: list[int] = []

    def __len__(self) -> int:
        """One more than the highest number in use."""
        return len(self.owners)

    def take(self, owner: Owner) -> int:
        """The lowest number that nobody has."""
        owners = self.owners
        while self._free:
            lane = heappop(self._free)
            if lane < len(owners) and owners[lane] is None:
                owners[lane] = owner
                return lane
        owners.append(owner)
        return len(owners) - 1

    def give_back(self, lane: int) -> None:
        """Its request is over."""
        self.owners[lane] = None
        heappush(self._free, lane)
        while self.owners and self.owners[-1] is None:
            self.owners.pop()


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
    """Keys of the device table, and which of its rows each lane samples under.

    A lane changes rows when its token arrives (`move`), so that a step looks only for the rows of lanes
    that went where nobody was before. When the table is full, the rows that no step has used for longest go.

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
        self._lanes: list[int] = []
        """lane → slot, NO_MASK or UNKNOWN."""

    def move(self, lane: int, place: Place | None) -> None:
        """The sequence of `lane` has gone to `place`; None when only its sampling knows where."""
        keys = self._keys
        if place is not None and (slot := place.slot) < len(keys) and keys[slot] is place.key:
            self._lanes[lane] = slot
        else:
            self._lanes[lane] = UNKNOWN

    def clear(self, lane: int) -> None:
        """Nobody in `lane` wants a mask: somebody takes it, or leaves it."""
        while len(self._lanes) <= lane:
            self._lanes.append(NO_MASK)
        self._lanes[lane] = NO_MASK

    def step(
        self,
        grammar: Any,
        rows: list[int],
        lanes: int,
        sampling_of: "Callable[[int], Sampling | None]",
        ahead: "dict[int, list[Sampling]] | None" = None,
        width: int = 1,
    ) -> StepMasks | None:
        """Masks of a step, for which the table rows of some lanes are found or made; None when it needs none.

        Args:
            rows: the lanes of the sequences in the step.
            lanes: more than the highest lane.
            sampling_of: what the sequence of a lane samples under; None when no mask is wanted.
            ahead: lane → what comes behind each of its drafts is sampled under.
            width: slots of a lane: one for the token that comes next, and one behind each draft.
        """
        self._steps = step = self._steps + 1
        stands, used = self._lanes, self._used
        slots = [NO_MASK] * ((lanes + 1) * width)
        unknown: list[int] = []
        masked = 0
        for lane in rows:
            slot = stands[lane]
            if slot >= 0:
                used[slot] = step
                slots[lane * width] = slot
                masked += 1
            elif slot == UNKNOWN:
                unknown.append(lane)
        # Only now is it known which rows of the table may be given away.
        new_slots: list[int] = []
        new_rows: list[np.ndarray] = []
        for lane in unknown:
            if (sampling := sampling_of(lane)) is not None:
                slots[lane * width] = stands[lane] = self._find(sampling, new_slots, new_rows)
                masked += 1
        for lane, samplings in (ahead or {}).items():
            for at, sampling in enumerate(samplings, lane * width + 1):
                slots[at] = self._find(sampling, new_slots, new_rows)
                masked += 1
        self.built += len(new_slots)
        self.reused += masked - len(new_slots)
        if not masked:
            return None
        stacked = np.stack(new_rows) if new_rows else None
        by_lane = np.array(slots, np.int32)
        return StepMasks(grammar, by_lane if width == 1 else by_lane.reshape(-1, width), new_slots, stacked)

    def _find(self, sampling: "Sampling", new_slots: list[int], new_rows: list[np.ndarray]) -> int:
        key = sampling.mask_key()
        slot = None if key is None else self._slots.get(key)
        if slot is None:
            slot = self._take_slot(key)
            new_slots.append(slot)
            new_rows.append(sampling.mask_row())
        self._used[slot] = self._steps
        if (place := sampling.place) is not None and key is not None:
            # The table's own key, so that `move` need not compare keys but only ask whether it is this one.
            place.key, place.slot = self._keys[slot], slot
        return slot

    def _take_slot(self, key: Hashable | None) -> int:
        if len(self._keys) < self.capacity:
            slot = len(self._keys)
            self._keys.append(key)
            self._used.append(0)
        else:
            slot = self._idle_slot()
            if self._keys[slot] is not None:
                del self._slots[self._keys[slot]]
            # Lanes of sequences that were in no step of late may still stand there.
            self._lanes[:] = [UNKNOWN if stood == slot else stood for stood in self._lanes]
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
