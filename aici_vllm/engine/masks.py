"""Which mask row each sequence samples under, and which rows the workers must still be sent.

The table lives twice: here its keys, on every worker's device its rows. A step sends the rows that are
new and one number per sequence.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from aici_vllm.controller.sampling import Sampling

KEY = "controller_key"
"""Set in a controlled request's `extra_args` for the workers: the name under which its masks arrive."""

NO_MASK = -1
"""The row of a sequence that may sample any token."""


def request_key(params: Any) -> str | None:
    """The name under which a controlled request's masks arrive; None for a plain request."""
    return params.extra_args.get(KEY) if params.extra_args else None


@dataclass(slots=True)
class StepMasks:
    """What the workers need to mask one step.

    Attributes:
        grammar: vLLM's own structured-output masks, passed on untouched.
        rows: request id → row of the table.
        new_slots: the rows to write first, [k].
        new_rows: their content, int32[k, words].
    """

    grammar: Any
    rows: dict[str, int]
    new_slots: list[int] = field(default_factory=list)
    new_rows: np.ndarray | None = None


class MaskTable:
    """Keys of the device table, least recently used first.

    Args:
        capacity: rows; at least the number of sequences of one step.
        words: int32 words in a row.
    """

    def __init__(self, capacity: int, words: int):
        self.capacity = capacity
        self.words = words
        self.built = 0
        self.reused = 0
        self._slots: OrderedDict[Hashable, int] = OrderedDict()
        self._unnamed = 0

    def step(self, grammar: Any, samplings: "dict[str, Sampling]") -> StepMasks:
        """Find or make the row of each sequence."""
        masks = StepMasks(grammar, {})
        new_rows: list[np.ndarray] = []
        for request_id, sampling in samplings.items():
            key = sampling.mask_key()
            slot = self._slots.get(key) if key is not None else None
            if slot is not None:
                self._slots.move_to_end(key)
                self.reused += 1
            else:
                slot = self._take_slot(key)
                masks.new_slots.append(slot)
                new_rows.append(sampling.mask_row())
                self.built += 1
            masks.rows[request_id] = slot
        if new_rows:
            masks.new_rows = np.stack(new_rows)
        return masks

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
