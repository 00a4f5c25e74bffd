"""The mask table sends each row once, and each number goes to the row of logits that it is for."""

from collections.abc import Hashable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import (
    BatchUpdate,
    MoveDirectionality,
    validate_logits_processors_parameters,
)
from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors_params_validator

from aici_vllm.engine.logits import AiciLogitsProcessor
from aici_vllm.engine.masks import LANE, NO_MASK, Lanes, MaskTable, StepMasks, table_rows
from constraints.place import Place, Places


class State:
    """A sampling whose mask is known by its key."""

    temperature = top_p = None
    finished = False
    follow_below = 0

    def __init__(self, key: Hashable | None, row: np.ndarray, place: Place | None = None):
        self._key, self._row, self.place = key, row, place

    def mask_key(self) -> Hashable | None:
        return self._key

    def mask_row(self) -> np.ndarray:
        return self._row


def masks_of(table: MaskTable, states: dict[int, Any], lanes: int, grammar: Any = None) -> StepMasks:
    """A step of sequences that have all gone on since the step before."""
    for lane, state in states.items():
        table.clear(lane)
        table.move(lane, state.place)
    found = table.step(grammar, list(states), lanes, states.__getitem__)
    assert found is not None
    return found


def test_a_known_state_costs_one_number() -> None:
    table = MaskTable(capacity=8)
    row = np.array([5, 6], np.int32)
    first = masks_of(table, {0: State("s", row), 2: State("s", row)}, lanes=3)
    slot = first.slots[0]
    assert first.slots.dtype == np.int32 and first.slots.tolist() == [slot, NO_MASK, slot, NO_MASK]
    assert first.new_slots == [slot]
    assert first.new_rows is not None and first.new_rows.tolist() == [[5, 6]]
    second = masks_of(table, {0: State("s", row)}, 1, "grammar")
    assert second.slots.tolist() == [slot, NO_MASK]
    assert second.new_slots == [] and second.new_rows is None and second.grammar == "grammar"
    assert (table.built, table.reused) == (1, 2)


def test_who_goes_to_a_place_that_is_known_is_not_asked() -> None:
    table, places = MaskTable(capacity=8), Places()
    row = np.array([5, 6], np.int32)
    slot = masks_of(table, {0: State("s", row, places.at(1))}, 1).slots[0]
    table.clear(1)
    table.move(1, places.at(1))
    table.move(0, places.at(2))
    asked: list[int] = []

    def sampling_of(lane: int) -> Any:
        asked.append(lane)
        return State("t", row, places.at(2))

    found = table.step(None, [0, 1], 2, sampling_of)
    assert found is not None
    assert asked == [0] and found.new_slots == [found.slots[0]] and found.slots[1] == slot != found.slots[0]


def test_two_tables_do_not_take_each_others_slots_for_theirs() -> None:
    place, row = Places().at(1), np.array([5, 6], np.int32)
    one, two = MaskTable(capacity=8), MaskTable(capacity=8)
    masks_of(one, {0: State("other", row)}, 1)
    masks_of(one, {0: State("s", row, place)}, 1)
    assert masks_of(two, {0: State("s", row, place)}, 1).new_slots == [0]
    assert masks_of(one, {0: State("s", row, place)}, 1).slots[0] == 1


def test_a_row_given_away_is_not_used_by_who_stood_there() -> None:
    table, places = MaskTable(capacity=2), Places()
    states = {name: State(name, np.array([ord(name)], np.int32), places.at(name)) for name in "abc"}
    masks_of(table, {0: states["a"]}, 1)
    for name in "bc":
        masks_of(table, {1: states[name]}, 2)
    again = table.step(None, [0], 2, lambda lane: states["a"])  # type: ignore[return-value]
    assert again is not None
    assert again.new_rows is not None and again.new_rows.tolist() == [[ord("a")]]


def test_a_step_of_rows_that_sample_nothing_needs_no_masks() -> None:
    table = MaskTable(capacity=2)
    table.clear(0)
    assert table.step(None, [0], 1, lambda lane: None) is None
    table.move(0, None)
    assert table.step(None, [0], 1, lambda lane: None) is None


def test_the_oldest_row_makes_room_and_comes_back_when_asked() -> None:
    table = MaskTable(capacity=2)
    rows = {name: np.array([i], np.int32) for i, name in enumerate("abc")}
    slots = {name: masks_of(table, {0: State(name, rows[name])}, 1).slots[0] for name in "abc"}
    assert slots["c"] == slots["a"] != slots["b"]
    again = masks_of(table, {0: State("a", rows["a"])}, 1)
    assert again.new_rows is not None and again.slots[0] == slots["b"]


def test_a_state_without_a_name_is_sent_every_time() -> None:
    table = MaskTable(capacity=4)
    state = State(None, np.array([1], np.int32))
    assert all(masks_of(table, {0: state}, 1).new_slots for _ in range(10))


def test_the_table_holds_a_step_of_any_vocabulary() -> None:
    assert table_rows(256, 4096) == 4096
    assert table_rows(256, 1 << 20) == 512


def test_lanes_are_the_lowest_free_numbers_and_their_array_shrinks() -> None:
    lanes: Lanes[str] = Lanes()
    assert [lanes.take(name) for name in "abcd"] == [0, 1, 2, 3]
    lanes.give_back(1)
    lanes.give_back(3)
    assert len(lanes) == 3 and lanes.owners == ["a", None, "c"]
    assert [lanes.take(name) for name in "efg"] == [1, 3, 4]
    for lane in (0, 4, 3, 2, 1):
        lanes.give_back(lane)
    assert len(lanes) == 0
    assert [lanes.take(name) for name in "hijkl"] == [0, 1, 2, 3, 4]


def processor(worker_cls: str = "aici_vllm.Worker", drafts: int = 0) -> Any:
    config: Any = SimpleNamespace(
        num_speculative_tokens=drafts,
        scheduler_config=SimpleNamespace(max_num_seqs=6),
        parallel_config=SimpleNamespace(worker_cls=worker_cls),
        model_config=SimpleNamespace(get_vocab_size=lambda: 40),
    )
    return AiciLogitsProcessor(config, torch.device("cpu"))


def controlled(lane: Any) -> SamplingParams:
    return SamplingParams(extra_args={LANE: lane})


NO_LANES = ["x", "0", 0.0, True, None, [0], -1, 1 << 31]


def only(token: int) -> np.ndarray:
    row = np.zeros(2, np.int32)
    row[token // 32] = 1 << token % 32
    return row


def step(*slots: int) -> StepMasks:
    """Lanes under masks that allow the token of their slot's number alone."""
    return StepMasks(None, np.array([*slots, NO_MASK], np.int32), [0, 1, 2], np.stack([*map(only, range(3))]))


def allowed(logits: torch.Tensor) -> list[list[int] | str]:
    found: list[list[int] | str] = []
    for row in logits:
        tokens = torch.isfinite(row).nonzero().flatten().tolist()
        found.append("all" if len(tokens) == logits.shape[1] else tokens)
    return found


def test_rows_follow_the_batch_of_model_runner_v1() -> None:
    masked = processor()
    plain = SamplingParams()
    added: Any = [(0, controlled(1), [], []), (1, plain, [], []), (2, controlled(0), [], [])]
    masked.update_state(BatchUpdate(batch_size=3, removed=[], added=added, moved=[]))
    masked.install(step(0, 1))
    assert allowed(masked.apply(torch.zeros(3, 40))) == [[1], "all", [0]]
    swap = [(0, 1, MoveDirectionality.SWAP)]
    masked.update_state(BatchUpdate(batch_size=3, removed=[2], added=[], moved=swap))
    masked.install(step(2, 0))
    assert allowed(masked.apply(torch.zeros(2, 40))) == ["all", [0]]
    masked.update_state(None)
    masked.install(None)
    assert allowed(masked.apply(torch.zeros(2, 40))) == ["all", "all"]


def test_rows_follow_the_slots_of_model_runner_v2() -> None:
    masked = processor()
    assert masked.add_request(4, controlled(0)) and masked.add_request(2, controlled(2))
    assert not masked.add_request(0, SamplingParams())
    context: Any = SimpleNamespace(idx_mapping_np=np.array([2, 0, 4]))
    masked.install(step(1, NO_MASK, 2))
    assert allowed(masked.apply(torch.zeros(3, 40), context)) == [[2], "all", [1]]
    masked.add_request(4, SamplingParams())
    assert allowed(masked.apply(torch.zeros(3, 40), context)) == [[2], "all", "all"]


def test_a_lane_that_the_step_does_not_know_has_no_mask() -> None:
    masked = processor()
    masked.add_request(0, controlled(5))
    masked.install(step(1))
    context: Any = SimpleNamespace(idx_mapping_np=np.array([0]))
    assert allowed(masked.apply(torch.zeros(1, 40), context)) == ["all"]


def test_rows_behind_drafts_follow_their_requests() -> None:
    masked = processor(drafts=2)
    masked.add_request(4, controlled(0))
    masked.add_request(2, controlled(1))
    masked.add_request(0, SamplingParams())
    slots = [[1, 0, NO_MASK], [2, NO_MASK, NO_MASK], [NO_MASK] * 3]
    masked.install(replace(step(), slots=np.array(slots, np.int32)))
    # Slot 4 has two drafts, slot 0 has one, slot 2 none.
    context: Any = SimpleNamespace(
        idx_mapping_np=np.array([4, 0, 2]),
        expanded_idx_mapping=torch.tensor([4, 4, 4, 0, 0, 2]),
        expanded_local_pos=torch.tensor([0, 1, 2, 0, 1, 0], dtype=torch.int32),
    )
    found = allowed(masked.apply(torch.zeros(6, 40), context))
    assert found == [[1], [0], "all", "all", "all", [2]]


@pytest.mark.parametrize("lane", NO_LANES, ids=repr)
def test_what_is_no_lane_has_no_mask(lane: Any) -> None:
    v1, v2 = processor(), processor()
    added: Any = [(0, controlled(lane), [], []), (1, controlled(1), [], [])]
    v1.update_state(BatchUpdate(batch_size=2, removed=[], added=added, moved=[]))
    v1.install(step(0, 1))
    assert allowed(v1.apply(torch.zeros(2, 40))) == ["all", [1]]
    assert not v2.add_request(0, controlled(lane))
    v2.install(step(0, 1))
    context: Any = SimpleNamespace(idx_mapping_np=np.array([0]))
    assert allowed(v2.apply(torch.zeros(1, 40), context)) == ["all"]


@pytest.mark.parametrize("lane", [0, *NO_LANES], ids=repr)
def test_a_client_that_names_a_lane_is_refused_in_the_front_end(lane: Any) -> None:
    for validate in (
        partial(validate_logits_processors_parameters, None),
        build_custom_logits_processors_params_validator(None),
    ):
        validate(SamplingParams(extra_args={"other": 1}))
        validate(SamplingParams())
        with pytest.raises(VLLMValidationError, match=f"{LANE} is set by the engine"):
            validate(controlled(lane))


@pytest.mark.parametrize("worker_cls", ["auto", "vllm.v1.worker.gpu_worker.Worker"])
def test_an_engine_without_controllers_holds_no_table_and_reads_no_lane(worker_cls: str) -> None:
    masked = processor(worker_cls=worker_cls)
    assert masked._masks is None
    for row, params in enumerate([SamplingParams(), controlled("x"), controlled(0)]):
        assert not masked.add_request(row, params)
        masked.update_state(BatchUpdate(batch_size=1, removed=[], added=[(0, params, [], [])], moved=[]))
        assert masked._lane_of_row == {}
    assert allowed(masked.apply(torch.zeros(1, 40))) == ["all"]
