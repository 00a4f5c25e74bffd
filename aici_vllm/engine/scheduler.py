"""vLLM's scheduler, which asks controllers what to do with each sampled token and does it.

A step runs as in vLLM: schedule, forward pass, sample, update. While the forward pass runs, the masks
of its rows are made (`get_grammar_bitmask`). When its tokens arrive, each controlled branch takes its
own (`_update_request_with_output`); those that want more than to sample on are settled afterwards:
forked, spliced, parked, resumed, or ended (`_settle`).
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from vllm import envs
from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.utils import remove_all
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from aici_vllm.controller.branch import Branch, Next
from aici_vllm.controller.sampling import Sampling
from aici_vllm.engine.admission import LIVE, is_controlled, operator_limits
from aici_vllm.engine.blocks import can_share, drop_copies, forget_uncomputed, keep_prefix, share_prefix
from aici_vllm.engine.checkpoints import Checkpoints
from aici_vllm.engine.compat import allocation_wrapped, require_supported, send_output_tokens
from aici_vllm.engine.controlled import (
    FINISH,
    Controlled,
    ControlledGroup,
    child_request,
    failed_fork,
    without_prompt_logprobs,
    worker_params,
)
from aici_vllm.engine.grouping import arguments, choice_index, make_group, root_id
from aici_vllm.engine.live import LiveViews
from aici_vllm.engine.logprobs import BranchLogprobs
from aici_vllm.engine.masks import Lanes, MaskTable, table_rows
from aici_vllm.engine.outputs import Outputs, put_first, put_last
from aici_vllm.engine.programs import Programs
from aici_vllm.engine.sharing import Source, best_source
from aici_vllm.engine.telemetry import Telemetry
from aici_vllm.engine.vocabulary import model_vocabulary

require_supported()

SCRIPT_GRACE = 0.0005
"""Seconds that a step waits for scripts in the sandbox while there is other work, at most."""
SCRIPT_GRACE_IDLE = 0.005
"""The same while there is none."""


def check_start(vllm_config: VllmConfig) -> None:
    """Refuse an engine that would run controllers wrongly."""
    if str(vllm_config.parallel_config.worker_cls).split(".")[0] != "aici_vllm":
        raise ValueError(
            "--scheduler-cls aici_vllm.Scheduler sends masks that only its own worker applies: "
            "add --worker-cls aici_vllm.Worker"
        )
    if envs.VLLM_PLUGINS is not None and "aici" not in envs.VLLM_PLUGINS:
        raise ValueError(
            "--scheduler-cls aici_vllm.Scheduler takes only requests that its plugin has checked: "
            "add aici to VLLM_PLUGINS, or leave that unset"
        )


class Scheduler(AsyncScheduler):
    """Use with `--scheduler-cls aici_vllm.Scheduler`, together with `--worker-cls aici_vllm.Worker`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_start(self.vllm_config)
        model_config = self.vllm_config.model_config
        self.limits = operator_limits(self.vllm_config)
        self.vocabulary = model_vocabulary(model_config)
        self.programs = Programs(self.limits)
        self.telemetry = Telemetry(self.vllm_config, self.log_stats)
        self._stats: SchedulerStats | None = None
        self._runs_ahead = bool(self.vllm_config.scheduler_config.async_scheduling)
        # What `AsyncScheduler` adds puts a request into steps before its last token is known. Without async
        # scheduling no worker can compute those, and pipeline parallelism has several steps in flight.
        vllm: Any = super() if self._runs_ahead else super(AsyncScheduler, self)
        self._vllm_update_after_schedule = vllm._update_after_schedule
        self._vllm_update_request_with_output = vllm._update_request_with_output
        self._width = 1 + self.num_spec_tokens
        most = self.max_num_running_reqs * self._width
        self.masks = MaskTable(table_rows(most, self.vocabulary.num_words))
        self.lanes: Lanes[Controlled] = Lanes()
        self.checkpoints = Checkpoints(self.kv_cache_manager, self.limits.checkpoints)
        self.live_views = LiveViews(self.vllm_config.scheduler_config.stream_interval)
        self._groups: dict[str, ControlledGroup] = {}
        self._controlled: dict[str, Controlled] = {}
        self._thinking: set[ControlledGroup] = set()
        self._unsettled: dict[ControlledGroup, None] = {}
        self._outputs = Outputs(self.vocabulary.eos_token_id, self.live_views)
        self._step_lanes: list[int] = []
        self._step_output: ModelRunnerOutput | None = None

    # Requests come and go.

    def add_request(self, request: Request) -> None:
        if not is_controlled(request.sampling_params):
            super().add_request(request)
            return
        group = self._group_of(request)
        if index := choice_index(request):
            group.seats[index] = request
        else:
            self._adopt_root(group, request)
        if len(group.members) + len(group.seats) == group.choices:
            self._begin(group)

    def finish_requests(self, request_ids: Any, finished_status: RequestStatus) -> list[Request]:
        ids = [request_ids] if isinstance(request_ids, str) else request_ids
        ids = list(self._groups) + list(self.requests) if ids is None else list(ids)
        ended = [request for request_id in ids for request in self._forget(request_id, finished_status)]
        return ended + super().finish_requests(ids, finished_status)

    def get_num_unfinished_requests(self) -> int:
        unfinished = super().get_num_unfinished_requests()
        if self.pause_state is PauseState.PAUSED_ALL:
            return unfinished
        # A script that computes, or output that waits to be sent, keeps the engine stepping.
        return unfinished + len(self._thinking) + len(self._outputs)

    def reset_prefix_cache(self, reset_running_requests: bool = False, *args: Any, **kwargs: Any) -> bool:
        while self.checkpoints.free_one() or (reset_running_requests and self._reclaim_blocks(None)):
            pass
        if reset_running_requests:
            drop_copies(self.kv_cache_manager)
        return super().reset_prefix_cache(reset_running_requests, *args, **kwargs)

    def shutdown(self) -> None:
        for group in list(self._groups.values()):
            group.group.abort()
        self.programs.close()
        super().shutdown()

    # A step.

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        if self._thinking:
            self._hear_from_scripts()
            self._wait_for_scripts()
        if not ((self._controlled or self.checkpoints) and self._may_run_out_of_blocks()):
            return super().schedule(*args, **kwargs)
        with allocation_wrapped(self.kv_cache_manager, self._taking_idle_blocks):
            return super().schedule(*args, **kwargs)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        # vLLM hashes a block when it schedules the tokens that fill it. The priority policy may preempt
        # the request later in the same step: then another request would find a block that nobody wrote.
        forget_uncomputed(self.kv_cache_manager, request)
        super()._preempt_request(request, *args, **kwargs)

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        self._step_lanes = lanes = []
        waits_for_token = False
        if self._controlled:
            find, step = self._controlled.get, self.current_step
            for request_id, num_tokens in scheduler_output.num_scheduled_tokens.items():
                if (member := find(request_id)) is not None:
                    lanes.append(member.lane)
                    member.scheduled = step
                    member.forward_passes += 1
                    member.computed_tokens += num_tokens
                    if member.request.num_output_placeholders:
                        waits_for_token = True
            send_output_tokens(scheduler_output, self.requests)
        if lanes:
            self.telemetry.computed(len(lanes))
            # vLLM tells the scheduler of drafts only where somebody's masks depend on them.
            scheduler_output.has_structured_output_requests |= self.num_spec_tokens > 0
        self._vllm_update_after_schedule(scheduler_output)
        # The mask of a row depends on the token that is still being sampled: let the forward pass run
        # and sample once that token is known. vLLM has this for its own structured outputs.
        scheduler_output.pending_structured_output_tokens |= waits_for_token

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> Any:
        grammar = super().get_grammar_bitmask(scheduler_output)
        if not self._step_lanes:
            return grammar
        ahead = None
        if self.num_spec_tokens:
            ahead = self._behind_drafts(scheduler_output.scheduled_spec_decode_tokens)
        rows, lanes = self._step_lanes, len(self.lanes)
        masks = self.masks.step(grammar, rows, lanes, self._sampling_of, ahead, self._width)
        return grammar if masks is None else masks

    def _sampling_of(self, lane: int) -> Sampling | None:
        """What the row of `lane` samples under in the step that vLLM asks for: the one scheduled last.

        None for a row that samples nothing, or was overtaken since then and is dropped later.
        """
        member = self.lanes.owners[lane] if lane < len(self.lanes) else None
        if member is None or member.scheduled != self.current_step or member.request.is_prefill_chunk:
            return None
        return member.branch.sampling

    def _behind_drafts(self, drafts: dict[str, list[int]]) -> dict[int, list[Sampling]]:
        """Lane → what comes behind each of its drafts is sampled under, as far as that can be told."""
        found: dict[int, list[Sampling]] = {}
        for lane in self._step_lanes:
            if (sampling := self._sampling_of(lane)) is None:
                continue
            member = self.lanes.owners[lane]
            if member is not None and (drafted := drafts.get(member.request.request_id)):
                found[lane] = sampling.ahead(drafted)
                member.reach = 1 + len(found[lane])
        return found

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        earlier = self._outputs.take()
        self._step_output = model_runner_output
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        put_first(outputs, earlier)
        unsettled, self._unsettled = self._unsettled, {}
        for group in unsettled:
            if group.unscored:
                self._start(group)
            self._settle(group)
        if self._thinking:
            self._hold_up_for_scripts()
        put_last(outputs, self._outputs.take_all())
        if self._stats is not None:
            self.telemetry.report(self._stats, self)
        return outputs

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        self._stats = super().make_stats(*args, **kwargs)
        return self._stats

    def num_live(self) -> tuple[int, int, int]:
        """Controlled requests, their branches, and requests with a script that computes."""
        return len(self._groups), len(self._controlled), len(self._thinking)

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        member = self._controlled.get(request.request_id)
        if member is None:
            return self._vllm_update_request_with_output(request, new_token_ids, is_stale)
        if self._runs_ahead and not is_stale:
            request.num_output_placeholders -= len(new_token_ids)
        if member.group.unscored:
            self._take_prompt_logprobs(member.group)
            return [], False
        settled: list[int] = []
        branch, tokens, count = member.branch, request._all_token_ids, len(new_token_ids)
        tokens += new_token_ids
        request._output_token_ids += new_token_ids
        if len(tokens) % self.hash_block_size < count:
            request.update_block_hashes()
        if count > member.reach:
            # What follows was sampled under no mask: a splice takes it back.
            new_token_ids = new_token_ids[: member.reach]
            self._unsettled[member.group] = None
        for index, token in enumerate(new_token_ids):
            if member.logprobs is not None:
                self._note_logprobs(member, member.logprobs, index)
            if not branch.accept(token):
                self._unsettled[member.group] = None
                break
        else:
            assert branch.sampling is not None
            self.masks.move(member.lane, branch.sampling.place)
            if member.flows:
                settled = new_token_ids
                member.sent += len(settled)
            elif member.logprobs is not None or self._outputs.has_prompt_logprobs(request):
                self._outputs.send_settled(member)
            elif member.choice and not self.live_views.withholds_tokens(member.group):
                settled = member.take_settled()
                member.flows = branch.settled == len(branch.sequence)
        if member.awaited:
            self._unsettled[member.group] = None
        computed = request.num_computed_tokens - request.num_output_placeholders
        # Only a full block is given its name, and all before these tokens were looked at already.
        if computed % self.hash_block_size < count and request.status is RequestStatus.RUNNING:
            self.kv_cache_manager.cache_blocks(request, computed)
        # What vLLM gets here it sends; whether a branch stops is decided when its group is settled.
        return settled, False

    # What the client asked to be told of the model.

    def _begin(self, group: ControlledGroup) -> None:
        """Start a group whose choices have all arrived, or have its prompt computed first."""
        root = group.root
        if root.params.prompt_logprobs is None:
            self._start(group)
            self._settle(group)
            return
        # A script may take the prompt back before it was computed, so the prompt is computed as a plain
        # request's. The token that comes with its logprobs is not the branch's.
        group.unscored = True
        self._enqueue(root)

    def _take_prompt_logprobs(self, group: ControlledGroup) -> None:
        """Keep the logprobs of the prompt for each choice, and compute the prompt no more."""
        assert self._step_output is not None
        root = group.root
        found = self._step_output.prompt_logprobs_dict.pop(root.request.request_id, None)
        for request in [root.request, *group.seats.values()]:
            if found is not None:
                self._outputs.keep_prompt_logprobs(request, found)
            request.skip_reading_prefix_cache = False
            assert request.sampling_params is not None
            request.sampling_params = without_prompt_logprobs(request.sampling_params)
        assert root.request.sampling_params is not None
        root.params = root.request.sampling_params
        self._unsettled[group] = None

    def _note_logprobs(self, member: Controlled, logprobs: BranchLogprobs, index: int) -> None:
        """Keep what this step says of its token `index`, which the branch is about to accept."""
        output = self._step_output
        assert output is not None and output.logprobs is not None
        at = output.req_id_to_index[member.request.request_id]
        rows = output.logprobs.slice_request(at, index + 1)
        logprobs.add(len(member.branch.sequence), rows.slice_request(index, 1))

    # What branches want, carried out.

    def _start(self, group: ControlledGroup) -> None:
        if group.unscored:
            group.unscored = False
            self._park(group.root)
        if group.refused is not None:
            group.group.root.fail(group.refused)
        else:
            group.group.start(partial(self.programs.make, group.controller, group.group.arg))

    def _settle(self, group: ControlledGroup) -> None:
        """Go on until every branch of the group waits: for a token, its script, a variable, or nothing."""
        going_on = True
        while going_on:
            forking = [branch for branch in group.group.branches if branch.next is Next.FORK]
            for branch in forking:
                self._fork(group, branch)
            going_on = bool(group.group.wake()) or bool(forking)
        group.group.end_deadlock()
        members = list(group.members.values())
        for member in members:
            member.awaited = False
        # Those that have ended go last: a sibling that waits for their KV takes it over before.
        for member in sorted(members, key=lambda member: member.branch.next is Next.END):
            self._carry_out(member)
        if any(branch.next is Next.THINK for branch in group.group.branches):
            self._thinking.add(group)
        else:
            self._thinking.discard(group)
        if group.group.finished:
            self._finish_group(group)

    def _carry_out(self, member: Controlled) -> None:
        if member.finished:
            return
        member.flows = False
        self._outputs.send_settled(member)
        if member.branch.next is Next.END:
            self._finish(member)
        elif member.branch.sampling is None or member.branch.next is not Next.SAMPLE:
            self._park(member)
        else:
            self.masks.move(member.lane, member.branch.sampling.place)
            changed = member.set_sampling(member.branch.sampling)
            if changed or member.parked or member.must_splice():
                self._resubmit(member)

    def _fork(self, group: ControlledGroup, branch: Branch) -> None:
        parent = group.members[branch.index]
        children = group.group.fork(branch)
        self.telemetry.forked(group, branch.index, [child.index for child in children])
        for child in children:
            seat = group.seats.pop(child.index, None)
            if seat is None and child.finish_reason == "fail":
                member = group.members[child.index] = failed_fork(parent, child)
                self.telemetry.branch_ended(member)
                continue
            request = seat or child_request(parent, child, f"{group.root_id}/{child.index}")
            member = self._adopt(group, child, request)
            member.choice = seat is not None
            member.logprobs = parent.logprobs and parent.logprobs.copy()
            self._inherit(parent.request, parent.computed, member)

    def _inherit(self, source: Request, computed: int, child: Controlled) -> None:
        """Give a branch its tokens, and the KV under them from a request that has `computed` of it."""
        request, sequence = child.request, child.branch.sequence
        kept = min(sequence.kept, source.num_tokens)
        request._block_hasher = source._block_hasher
        request.block_hashes = source.block_hashes[: kept // self.hash_block_size]
        sequence.kept = 0
        child.adopt_tokens()
        request.update_block_hashes()
        if child.branch.next is not Next.END:
            shared = max(min(computed, kept, len(sequence) - 1), 0)
            request.num_computed_tokens = share_prefix(self.kv_cache_manager, source, request, shared)

    def _adopt_root(self, group: ControlledGroup, request: Request) -> None:
        member = self._adopt(group, group.group.root, request)
        if group.start is not None:
            self._inherit(group.start, group.start.num_computed_tokens, member)
        if group.drop is not None:
            self.checkpoints.drop(group.drop)

    def _adopt(self, group: ControlledGroup, branch: Branch, request: Request) -> Controlled:
        """Put a request under a branch; it is parked until the branch wants a token."""
        assert request.sampling_params is not None
        # vLLM's priority policy preempts the first of equals: branches must not take turns at that for ever.
        request.arrival_time += branch.index * 1e-6
        member = Controlled(request, branch, group, request.sampling_params)
        member.lane = lane = self.lanes.take(member)
        self.masks.clear(lane)
        request.sampling_params = member.params = worker_params(member.params, lane, branch.index)
        group.members[branch.index] = member
        self._controlled[request.request_id] = member
        self.requests[request.request_id] = request
        if self.log_stats:
            request.record_event(EngineCoreEventType.QUEUED)
        return member

    def _resubmit(self, member: Controlled) -> None:
        """Queue the request with the branch's tokens, computing only what has no KV yet.

        It stays parked while a sibling computes text that both have.
        """
        if not member.parked:
            self._take_out(member)
        request, sequence = member.request, member.branch.sequence
        if member.must_splice():
            self.telemetry.spliced(member)
        computed = min(request.num_computed_tokens, sequence.kept, len(sequence) - 1)
        if computed < request.num_computed_tokens:
            request.num_computed_tokens = keep_prefix(self.kv_cache_manager, request, computed)
        del request.block_hashes[sequence.kept // self.hash_block_size :]
        member.adopt_tokens()
        request.update_block_hashes()
        if (source := self._source_of(member)) is not None:
            if source.promised:
                source.member.awaited = True
                return
            self.kv_cache_manager.free(request)
            request.num_computed_tokens = share_prefix(
                self.kv_cache_manager, source.member.request, request, source.num_tokens
            )
        self._enqueue(member)

    def _enqueue(self, member: Controlled) -> None:
        member.parked = False
        member.request.status = RequestStatus.WAITING
        self._enqueue_waiting_request(member.request)

    def _source_of(self, member: Controlled) -> Source | None:
        siblings = list(member.group.members.values())
        return best_source(member, siblings) if can_share(self.kv_cache_manager) else None

    def _park(self, member: Controlled) -> None:
        """Take the request out of the queues; its KV stays until somebody needs the blocks."""
        if not member.parked:
            self._take_out(member)
            self.telemetry.parked(member)

    def _take_out(self, member: Controlled) -> None:
        """Take the request out of vLLM's queues as it stands, dropping rows of it that are in flight."""
        request = member.request
        self._remove_from_queues(request)
        if request.num_in_flight_tokens:
            # As vLLM does for a streaming session: the row's token was overtaken.
            member.discard_row()
            request.drop_stale_output = True
            request.num_stale_output_tokens = request.num_in_flight_tokens
        request.num_computed_tokens = member.computed
        request.num_output_placeholders = 0
        request.spec_token_ids = []
        request.status = RequestStatus.WAITING
        self._inflight_prefills.discard(request)
        # Model Runner V2 has as many slots as requests may run: one that does not run gives its slot back.
        self.reset_preempted_req_ids.add(request.request_id)
        member.parked = True
        member.scheduled = 0

    def _remove_from_queues(self, request: Request) -> None:
        if request.status == RequestStatus.RUNNING:
            self.running = remove_all(self.running, {request})
            return
        self.waiting.remove_requests([request])
        self.kv_holding_waiting.remove_requests([request])
        self.deferred_waiting.discard(request)

    # Ends.

    def _finish(self, member: Controlled, status: RequestStatus = RequestStatus.FINISHED_STOPPED) -> None:
        """Free a branch that has ended. Its choice closes, except the first, which brings the results."""
        member.finished = True
        member.scheduled = 0
        request = member.request
        member.discard_row()
        self._remove_from_queues(request)
        if member.group.checkpoint is not None and member.branch.finish_reason in FINISH:
            member.checkpoint = f"{member.group.checkpoint}/{member.branch.index}"
            self.checkpoints.take(member.checkpoint, member)
        request.status = status
        self._free_request(request)
        self.masks.clear(member.lane)
        self.lanes.give_back(member.lane)
        self.telemetry.branch_ended(member)
        del self._controlled[request.request_id]
        gone = status is RequestStatus.FINISHED_ABORTED
        if member.choice and member is not member.group.root and not gone:
            self._outputs.close_choice(member)

    def _finish_group(self, group: ControlledGroup) -> None:
        self._outputs.close_group(group)
        self._drop(group)

    def _forget(self, request_id: str, status: RequestStatus) -> list[Request]:
        """The client has gone: end the whole request, or just the choice it gave up.

        Returns the requests that had a choice, for whoever must still tell the client.
        """
        group = self._groups.get(request_id)
        member = self._controlled.get(request_id)
        if group is not None:
            group.group.abort()
            # A choice that no branch has taken is open too, and so is the first: it closes last.
            choices = [m for m in group.members.values() if m.choice and (not m.finished or m is group.root)]
            for member in list(group.members.values()):
                if not member.finished:
                    self._finish(member, status)
            self._drop(group)
            return [member.request for member in choices] + list(group.seats.values())
        if member is not None:
            member.choice = False
            member.branch.end("abort")
            self._finish(member, status)
            self._settle(member.group)
            return [member.request]
        return []

    def _drop(self, group: ControlledGroup) -> None:
        self._thinking.discard(group)
        self._unsettled.pop(group, None)
        self._groups.pop(group.root_id, None)
        self._outputs.forget(group)
        self.live_views.forget(group)
        self.telemetry.ended(group)

    # Small things.

    def _group_of(self, request: Request) -> ControlledGroup:
        """The group a request belongs to; made when the first of its choices arrives."""
        name = root_id(request)
        group = self._groups.get(name)
        if group is None:
            shape = (self.vocabulary, self.limits, self.max_model_len, self.checkpoints)
            group = self._groups[name] = make_group(request, *shape)
            if arguments(request).get(LIVE):
                self.live_views.watch(group)
        return group

    def _hear_from_scripts(self) -> None:
        """Go on with the groups whose scripts have decided."""
        for group in list(self._thinking):
            if group.group.poll():
                self._settle(group)

    def _wait_for_scripts(self) -> None:
        """While there is nothing else to do, wait for scripts; briefly, since requests may come."""
        deadline = time.monotonic() + SCRIPT_GRACE_IDLE
        while self._thinking and not self._has_other_work() and (left := deadline - time.monotonic()) > 0:
            if not self.programs.wait(left):
                break
            self._hear_from_scripts()

    def _hold_up_for_scripts(self) -> None:
        """Give scripts that decide at once the time to be in the next step.

        They take several turns before they need a token: one for each await that needs none.
        """
        deadline = time.monotonic() + SCRIPT_GRACE
        waited = True
        while self._thinking and waited:
            left = deadline - time.monotonic()
            waited = left > 0 and self._has_other_work() and self.programs.hold_up(left)
            self._hear_from_scripts()

    def _has_other_work(self) -> bool:
        return bool(self.running or self.waiting or self.kv_holding_waiting)

    def _may_run_out_of_blocks(self) -> bool:
        """Whether the step about to be scheduled might want more blocks than are free."""
        if self.waiting or self.kv_holding_waiting or self.deferred_waiting:
            return True
        size = self.hash_block_size
        most = (
            len(self.running) * (self.num_lookahead_tokens // size + 2)
            + self.max_num_scheduled_tokens // size
        )
        groups = len(self.kv_cache_config.kv_cache_groups)
        return self.kv_cache_manager.block_pool.get_num_free_blocks() < most * groups

    def _taking_idle_blocks(self, allocate_slots: Callable[..., Any]) -> Callable[..., Any]:
        """`allocate_slots` that takes the blocks of idle branches before it gives up."""

        def allocate(request: Request, *args: Any, **kwargs: Any) -> Any:
            while (blocks := allocate_slots(request, *args, **kwargs)) is None:
                if not self._reclaim_blocks(request):
                    return None
            return blocks

        return allocate

    def _reclaim_blocks(self, wanting: Request | None) -> bool:
        """Free the KV of a checkpoint, or else of one branch that does not run, parked ones first.

        False when there is none. It is computed again, or found in the prefix cache, when the branch goes on.
        """
        if self.checkpoints.free_one():
            return True
        holders = [m for m in self._controlled.values() if m.request.num_computed_tokens and not m.finished]
        # One that this step has passed over, for its LoRA adapter, is in no queue until the step is made.
        queued = {request.request_id for request in self.kv_holding_waiting}
        idle = [m for m in holders if m.parked or m.request.request_id in queued]
        idle = [m for m in idle if m.request is not wanting]
        if not idle:
            return False
        member = min(idle, key=lambda m: not m.parked)
        request = member.request
        self.kv_cache_manager.free(request)
        request.num_computed_tokens = 0
        if not member.parked:
            self.kv_holding_waiting.remove_requests([request])
            self.waiting.prepend_request(request)
        return True
