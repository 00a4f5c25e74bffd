"""The mask table sends each row once, and the device applies exactly the bits of its rows."""

from collections.abc import Hashable

import numpy as np
import pytest
import torch

from aici_vllm.engine.logits import DeviceMasks
from aici_vllm.engine.masks import MaskTable


class State:
    """A sampling whose mask is known by its key."""

    temperature = top_p = None
    finished = False

    def __init__(self, key: Hashable | None, row: np.ndarray):
        self._key, self._row = key, row

    def mask_key(self) -> Hashable | None:
        return self._key

    def mask_row(self) -> np.ndarray:
        return self._row


def test_a_known_state_costs_one_number() -> None:
    table = MaskTable(capacity=8, words=2)
    row = np.array([5, 6], np.int32)
    first = table.step(None, {"a": State("s", row), "b": State("s", row)})
    assert first.rows["a"] == first.rows["b"]
    assert len(first.new_slots) == 1
    assert first.new_rows is not None and first.new_rows.tolist() == [[5, 6]]
    second = table.step("grammar", {"a": State("s", row)})
    assert second.rows == {"a": first.rows["a"]}
    assert second.new_slots == [] and second.new_rows is None and second.grammar == "grammar"
    assert (table.built, table.reused) == (1, 2)


def test_the_oldest_row_makes_room_and_comes_back_when_asked() -> None:
    table = MaskTable(capacity=2, words=1)
    rows = {name: np.array([i], np.int32) for i, name in enumerate("abc")}
    slots = {name: table.step(None, {"r": State(name, rows[name])}).rows["r"] for name in "abc"}
    assert slots["c"] == slots["a"] != slots["b"]
    again = table.step(None, {"r": State("a", rows["a"])})
    assert again.new_rows is not None and again.rows["r"] == slots["b"]


def test_a_state_without_a_name_is_sent_every_time() -> None:
    table = MaskTable(capacity=4, words=1)
    state = State(None, np.array([1], np.int32))
    assert all(table.step(None, {"r": state}).new_slots for _ in range(10))


@pytest.mark.parametrize("vocabulary", [32, 100, 750])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_logits_equal_brute_force(vocabulary: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    words = (vocabulary + 31) // 32
    rows = rng.integers(-(2**31), 2**31, (5, words), dtype=np.int64).astype(np.int32)
    masks = DeviceMasks(torch.device("cpu"))
    masks.write([0, 1, 2, 7, 90], torch.from_numpy(rows))
    logits = torch.randn(6, vocabulary).to(dtype)
    expected = logits.clone()
    for row, content in ((1, rows[3]), (4, rows[4]), (5, rows[0])):
        for token in range(vocabulary):
            if not (int(content[token // 32]) >> (token % 32)) & 1:
                expected[row, token] = float("-inf")
    masks.apply(logits, [1, 4, 5], [7, 90, 0])
    assert torch.equal(logits, expected)


def test_logits_wider_than_the_vocabulary_are_never_allowed() -> None:
    masks = DeviceMasks(torch.device("cpu"))
    masks.write([0], torch.tensor([[-1]], dtype=torch.int32))
    logits = torch.zeros(1, 40)
    masks.apply(logits, [0], [0])
    assert torch.isinf(logits[0, 32:]).all() and not torch.isinf(logits[0, :32]).any()
