"""The simulator sees each fault that is planted in the scheduler: its checks can fail, and do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import aici_vllm.engine.blocks as blocks
import aici_vllm.engine.scheduler as scheduler_module
from aici_vllm.controller.group import Group
from aici_vllm.controller.sequence import Sequence
from aici_vllm.engine.controlled import Controlled
from aici_vllm.engine.masks import Lanes, MaskTable
from aici_vllm.engine.scheduler import Scheduler
from tests.simulator.schedules import run_schedule
from tests.simulator.settings import Settings

SCHEDULES = 250
"""How many schedules may pass before a fault shows. Most show within ten."""

ROOMY = Settings()
TIGHT = Settings(spare_blocks=4, most_running=4)
PIPELINE = replace(ROOMY, asynchronous=False, v2=False, stages=2)
DRAFTS = replace(ROOMY, drafts=3)
PREEMPTING = replace(DRAFTS, drafts=1, asynchronous=False, policy="priority", reserve_whole=False)
PREEMPTING = replace(PREEMPTING, block_size=2, spare_blocks=0, most_running=3, context=48)
VLLM_ASSERTS = "^$"
"""vLLM's own assertions say nothing."""

Patch = pytest.MonkeyPatch


def wrapped(patch: Patch, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    patch.setattr(owner, name, make(getattr(owner, name)))


def stale_hashes_after_a_splice(patch: Patch) -> None:
    def make(resubmit: Any) -> Any:
        def resubmit_with_old_hashes(self: Scheduler, member: Controlled) -> None:
            old = list(member.request.block_hashes)
            resubmit(self, member)
            hashes = member.request.block_hashes
            hashes[:] = [*old[: len(hashes)], *hashes[len(old) :]]

        return resubmit_with_old_hashes

    wrapped(patch, Scheduler, "_resubmit", make)


def partial_block_shared_without_a_copy(patch: Patch) -> None:
    def share(group: Any, source: Any) -> Any:
        group.block_pool.touch([source])
        return source

    patch.setattr(blocks, "_copy_block", share)


def copy_read_from_a_copy_not_made_yet(patch: Patch) -> None:
    def copy_block(group: Any, source: Any) -> Any:
        if group.block_pool.get_num_free_blocks() < 1:
            return None
        copy = group.block_pool.get_new_blocks(1)[0]
        group.block_pool.touch([source, copy])
        group._pending_cow_copies.append((source, copy))
        return copy

    patch.setattr(blocks, "_copy_block", copy_block)


def source_of_a_copy_not_held(patch: Patch) -> None:
    def make(copy_block: Any) -> Any:
        def copy_and_let_go(group: Any, source: Any) -> Any:
            copy = copy_block(group, source)
            if copy is not None:
                group.block_pool.free_blocks([group._pending_cow_copies[-1][0]])
            return copy

        return copy_and_let_go

    wrapped(patch, blocks, "_copy_block", make)


def blocks_past_the_cut_kept(patch: Patch) -> None:
    patch.setattr(scheduler_module, "keep_prefix", lambda manager, request, num_tokens: num_tokens)


def hashed_block_written_again(patch: Patch) -> None:
    from vllm.v1.core.block_pool import BlockPool

    patch.setattr(BlockPool, "is_block_writable", lambda self, block: True)


def blocks_of_an_ended_branch_forgotten(patch: Patch) -> None:
    def forget(self: Scheduler, request: Any, delay_free_blocks: bool = False) -> tuple[None, None]:
        self.finished_req_ids.add(request.request_id)
        del self.requests[request.request_id]
        return None, None

    patch.setattr(Scheduler, "_free_request", forget)


def overtaken_row_delivered(patch: Patch) -> None:
    def make(take_out: Any) -> Any:
        def take_out_and_deliver(self: Scheduler, member: Controlled) -> None:
            take_out(self, member)
            member.request.drop_stale_output = False

        return take_out_and_deliver

    wrapped(patch, Scheduler, "_take_out", make)


def one_token_too_many_counted_as_computed(patch: Patch) -> None:
    def make(take_out: Any) -> Any:
        def take_out_and_add(self: Scheduler, member: Controlled) -> None:
            take_out(self, member)
            if member.request.num_computed_tokens:
                member.request.num_computed_tokens += 1

        return take_out_and_add

    wrapped(patch, Scheduler, "_take_out", make)


def parked_branch_left_among_the_running(patch: Patch) -> None:
    patch.setattr(Scheduler, "_park", lambda self, member: None)


def slot_of_a_parked_branch_kept(patch: Patch) -> None:
    def make(take_out: Any) -> Any:
        def take_out_and_keep(self: Scheduler, member: Controlled) -> None:
            before = set(self.reset_preempted_req_ids)
            take_out(self, member)
            self.reset_preempted_req_ids = before

        return take_out_and_keep

    wrapped(patch, Scheduler, "_take_out", make)


def masks_not_sent(patch: Patch) -> None:
    patch.setattr(Scheduler, "get_grammar_bitmask", lambda self, output: None)


def masks_made_before_the_token_is_known(patch: Patch) -> None:
    def make(update: Any) -> Any:
        def update_at_once(self: Scheduler, output: Any) -> None:
            update(self, output)
            output.pending_structured_output_tokens = False

        return update_at_once

    wrapped(patch, Scheduler, "_update_after_schedule", make)


def waiting_branches_not_woken(patch: Patch) -> None:
    patch.setattr(Group, "wake", lambda self: [])


def blocks_of_idle_branches_not_reclaimed(patch: Patch) -> None:
    patch.setattr(Scheduler, "_reclaim_blocks", lambda self, wanting: False)


def output_not_sent_with_a_queued_request(patch: Patch) -> None:
    patch.setattr("aici_vllm.engine.scheduler.send_output_tokens", lambda output, requests: None)


def output_not_sent_while_no_request_runs(patch: Patch) -> None:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    unfinished = AsyncScheduler.get_num_unfinished_requests
    patch.setattr(Scheduler, "get_num_unfinished_requests", unfinished)


def discarded_rows_counted_as_passes(patch: Patch) -> None:
    patch.setattr(Controlled, "discard_row", lambda self: None)


def two_branches_in_one_lane(patch: Patch) -> None:
    def make(take: Any) -> Any:
        return lambda self, owner: 0 * take(self, owner)

    wrapped(patch, Lanes, "take", make)


def mask_row_given_away_while_it_is_used(patch: Patch) -> None:
    def make(slot_of: Any) -> Any:
        def always_the_first(self: MaskTable, key: Any) -> int:
            return 0 if self._keys else int(slot_of(self, key))

        return always_the_first

    wrapped(patch, MaskTable, "_take_slot", make)


def taking_back_not_told_to_who_watches(patch: Patch) -> None:
    def make(note: Any) -> Any:
        return lambda self, change, tokens: None if change == "taken_back" else note(self, change, tokens)

    wrapped(patch, Sequence, "_note", make)


def adapter_lost_in_a_fork(patch: Patch) -> None:
    def make(child_request: Any) -> Any:
        def without_adapter(*args: Any) -> Any:
            request = child_request(*args)
            request.lora_request = None
            return request

        return without_adapter

    wrapped(patch, scheduler_module, "child_request", make)


def checkpoint_gone_on_from_under_any_adapter(patch: Patch) -> None:
    patch.setattr("aici_vllm.engine.checkpoints._weights_and_tenant", lambda request: request.cache_salt)


def tokens_behind_drafts_sampled_under_no_mask(patch: Patch) -> None:
    def make(behind_drafts: Any) -> Any:
        def forgotten(self: Scheduler, drafts: Any) -> Any:
            behind_drafts(self, drafts)
            return {}

        return forgotten

    wrapped(patch, Scheduler, "_behind_drafts", make)


def hashes_of_preempted_tokens_kept(patch: Patch) -> None:
    patch.setattr(scheduler_module, "forget_uncomputed", lambda manager, request: None)


def rows_scheduled_before_their_token_is_known(patch: Patch) -> None:
    def make(init: Any) -> Any:
        def init_running_ahead(self: Scheduler, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            self._runs_ahead = True
            self._vllm_update_after_schedule = super(Scheduler, self)._update_after_schedule
            self._vllm_update_request_with_output = super(Scheduler, self)._update_request_with_output

        return init_running_ahead

    wrapped(patch, Scheduler, "__init__", make)


FAULTS: list[tuple[Callable[[Patch], None], Settings, str]] = [
    (stale_hashes_after_a_splice, ROOMY, "stale hash|reads block"),
    (partial_block_shared_without_a_copy, ROOMY, f"{VLLM_ASSERTS}|reads block"),
    (copy_read_from_a_copy_not_made_yet, replace(ROOMY, block_size=16), "reads block"),
    (source_of_a_copy_not_held, TIGHT, "is counted"),
    (blocks_past_the_cut_kept, ROOMY, "stale hash|reads block"),
    (hashed_block_written_again, ROOMY, VLLM_ASSERTS),
    (blocks_of_an_ended_branch_forgotten, ROOMY, "is over and holds"),
    (overtaken_row_delivered, ROOMY, "came to"),
    (one_token_too_many_counted_as_computed, replace(ROOMY, asynchronous=False), "reads block"),
    (parked_branch_left_among_the_running, ROOMY, "was scheduled and wants"),
    (slot_of_a_parked_branch_kept, replace(ROOMY, most_running=2), "no free slot"),
    (masks_not_sent, ROOMY, "came to"),
    (masks_made_before_the_token_is_known, ROOMY, "came to"),
    (two_branches_in_one_lane, ROOMY, "came to"),
    (mask_row_given_away_while_it_is_used, ROOMY, "came to"),
    (taking_back_not_told_to_who_watches, ROOMY, "events told"),
    (waiting_branches_not_woken, ROOMY, "sleeps"),
    (
        blocks_of_idle_branches_not_reclaimed,
        replace(TIGHT, spare_blocks=0, block_size=16),
        "computed nothing",
    ),
    (output_not_sent_with_a_queued_request, replace(ROOMY, v2=False), "is to be computed"),
    (output_not_sent_while_no_request_runs, ROOMY, "sleeps"),
    (discarded_rows_counted_as_passes, ROOMY, "counts"),
    (adapter_lost_in_a_fork, replace(ROOMY, adapters=2), "came to|reads block|stale hash"),
    (checkpoint_gone_on_from_under_any_adapter, replace(ROOMY, adapters=2), "came to|reads block|went on"),
    (tokens_behind_drafts_sampled_under_no_mask, DRAFTS, "came to"),
    (rows_scheduled_before_their_token_is_known, PIPELINE, "only the device knew"),
    (hashes_of_preempted_tokens_kept, PREEMPTING, "stale hash"),
]


@pytest.mark.parametrize(
    ("plant", "settings", "says"), FAULTS, ids=[plant.__name__ for plant, _, _ in FAULTS]
)
def test_planted_fault_is_seen(
    plant: Callable[[Patch], None], settings: Settings, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError), match=says):
        for seed in range(SCHEDULES):
            run_schedule(seed, settings)
