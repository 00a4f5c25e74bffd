"""A worker without a device: it keeps what each slot of the KV cache would hold, and sees wrong reads.

It follows the bookkeeping of vLLM's model runners: what each remembers of a request between steps, which
tokens only the device knows, which rows sample. Steps run when they are dispatched, in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aici_vllm.engine.masks import StepMasks, request_lane
from tests.simulator.model import PLAIN_TOKENS, Prefix, allowed_by, next_token

Drafter = Callable[[str, Prefix, list[int]], list[int]]
"""(request id, the sequence, its tokens sampled last) → what may come next."""

RootOf = Callable[[str], Prefix]
"""Request id → the empty sequence that its tokens follow: other salts and adapters share no KV."""


UNKNOWN = -1
"""A draft that is none."""


class WorkerError(AssertionError):
    """The scheduler had the worker do what would give wrong tokens, or break it."""


@dataclass
class Row:
    """What a model runner remembers of a request.

    Attributes:
        tokens: all it would compute from, sampled ones too.
        prompt_len: how many of them came as the prompt.
        prefill_len: how many came from the scheduler, for Model Runner V2.
        hidden: positions of sampled tokens that only the device knows (Model Runner V1): with async
            scheduling for good, else until the scheduler has taken them.
        blocks: for each group of layers, the ids of the blocks in order.
        computed: tokens computed before this step.
        drafts: what the drafter thinks comes next.
    """

    root: Prefix
    tokens: list[int]
    prompt_len: int
    prefill_len: int
    blocks: list[list[int]]
    computed: int
    lane: int | None
    drafts: list[int] = field(default_factory=list)
    hidden: set[int] = field(default_factory=set)
    _prefixes: list[Prefix] = field(default_factory=list)

    def prefixes(self, count: int) -> list[Prefix]:
        """What the first `count` slots must hold."""
        known = self._prefixes
        last = known[-1] if known else self.root
        for token in self.tokens[len(known) : count]:
            last = last.then(token)
            known.append(last)
        return known[:count]

    def set_tokens(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self._prefixes.clear()


@dataclass
class Step:
    """A step that has run and may still have to sample.

    Attributes:
        samples: row id → its length, for those that sample.
        drafts: row id → the drafts that were computed behind it.
    """

    order: list[str]
    samples: dict[str, int]
    drafts: dict[str, list[int]]


class Worker:
    """What both model runners do alike.

    Attributes:
        rows_run: request id → rows computed. Kept for ever.
        rows_partial: those of them that did not sample.
    """

    def __init__(
        self, num_blocks: int, block_size: int, windows: list[int | None], most: int, root_of: RootOf
    ):
        self.slots: list[list[Prefix | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.owner: list[int] = [-1] * num_blocks
        """Block id → the group of layers that wrote it last."""
        self.rows: dict[str, Row] = {}
        self.rows_run: dict[str, int] = {}
        self.rows_partial: dict[str, int] = {}
        self._block_size = block_size
        self._windows = windows
        self._most = most
        self._root_of = root_of
        self._masks: dict[int, list[int]] = {}
        self.draft: Drafter | None = None
        self._step: Step | None = None

    # The two calls of an executor.

    def execute_model(self, output: Any) -> None:
        """Take the step's changes over and run its forward pass."""
        if self._step is not None:
            raise WorkerError("a step was dispatched before the last one sampled")
        self._take_changes(output)
        drafts = {
            request_id: self._drafts(request_id, self.rows[request_id], len(scheduled))
            for request_id, scheduled in output.scheduled_spec_decode_tokens.items()
        }
        for request_id, count in output.num_scheduled_tokens.items():
            self._write(request_id, self.rows[request_id], count, drafts.get(request_id, []))
        for request_id, count in output.num_scheduled_tokens.items():
            self._read(request_id, self.rows[request_id], count, drafts.get(request_id, []))
        samples = {}
        for request_id, count in output.num_scheduled_tokens.items():
            row = self.rows[request_id]
            row.computed += count - len(drafts.get(request_id, []))
            self.rows_run[request_id] = self.rows_run.get(request_id, 0) + 1
            if self._samples(row):
                samples[request_id] = row.computed
            else:
                self.rows_partial[request_id] = self.rows_partial.get(request_id, 0) + 1
        if output.total_num_scheduled_tokens:
            self._step = Step(list(output.num_scheduled_tokens), samples, drafts)

    def sample_tokens(self, masks: Any) -> tuple[list[str], list[list[int]]]:
        """Sample the step that ran last; its request ids and what each got."""
        step, self._step = self._step, None
        assert step is not None
        allowed = self._install(masks)
        sampled = []
        for request_id in step.order:
            if (length := step.samples.get(request_id)) is None:
                sampled.append(list[int]())
                continue
            row = self.rows[request_id]
            if length != len(row.tokens):
                raise WorkerError(f"{request_id} samples after {length} of {len(row.tokens)} tokens")
            sampled.append(self._verify(row, step.drafts.get(request_id, []), allowed))
            if self.draft is not None:
                row.drafts = self.draft(request_id, row.prefixes(len(row.tokens))[-1], sampled[-1])
        self._sampled(step)
        return step.order, sampled

    def delivered(self, request_ids: list[str]) -> None:
        """The scheduler has taken what these requests sampled."""

    # What the runners differ in.

    def _take_changes(self, output: Any) -> None:
        raise NotImplementedError

    def _drafts(self, request_id: str, row: Row, count: int) -> list[int]:
        """The drafts that are computed behind a row's tokens."""
        raise WorkerError(f"{request_id} has {count} drafts, and this runner takes none")

    def _samples(self, row: Row) -> bool:
        """Whether the row reached the end of what it has to compute."""
        raise NotImplementedError

    def _input(self, request_id: str, row: Row, position: int) -> None:
        """Check that the runner knows the token at `position`."""

    def _sampled(self, step: Step) -> None:
        """The step's tokens are on the device."""

    # What they share.

    def _copy_blocks(self, output: Any) -> None:
        copies = output.kv_cache_block_copies or []
        held = [(self.slots[copy.src_block_id].copy(), self.owner[copy.src_block_id]) for copy in copies]
        for copy, (slots, owner) in zip(copies, held, strict=True):
            self.slots[copy.dst_block_id], self.owner[copy.dst_block_id] = slots, owner

    def _new_row(self, data: Any, tokens: list[int]) -> Row:
        return Row(
            root=self._root_of(data.req_id),
            tokens=list(tokens),
            prompt_len=len(data.prompt_token_ids),
            prefill_len=len(tokens),
            blocks=[list(ids) for ids in data.block_ids],
            computed=data.num_computed_tokens,
            lane=request_lane(data.sampling_params),
        )

    def _verify(self, row: Row, drafts: list[int], allowed: dict[tuple[int, int], list[int]]) -> list[int]:
        """Sample after the row's tokens, and go on behind each draft that is what the model says."""
        sampled: list[int] = []
        for place in range(len(drafts) + 1):
            prefix = row.prefixes(len(row.tokens))[-1]
            token = next_token(prefix, allowed.get((row.lane or 0, place), PLAIN_TOKENS))
            if row.lane is None:
                token = next_token(prefix, PLAIN_TOKENS)
            row.tokens.append(token)
            sampled.append(token)
            if place == len(drafts) or token != drafts[place]:
                break
        row.computed += len(sampled) - 1
        return sampled

    def _write(self, request_id: str, row: Row, count: int, drafts: list[int]) -> None:
        end = row.computed + count
        if end > len(row.tokens) + len(drafts):
            raise WorkerError(
                f"{request_id}: token {end - 1} is to be computed and there are {len(row.tokens)}"
            )
        prefixes = _with_drafts(row, end, drafts)
        for group, blocks in enumerate(row.blocks):
            for position in range(row.computed, end):
                if group == 0:
                    self._input(request_id, row, position)
                block = self._block(request_id, blocks, position)
                self.owner[block] = group
                self.slots[block][position % self._block_size] = prefixes[position]

    def _read(self, request_id: str, row: Row, count: int, drafts: list[int]) -> None:
        end = row.computed + count
        prefixes = _with_drafts(row, end, drafts)
        size = self._block_size
        for group, blocks in enumerate(row.blocks):
            window = self._windows[group]
            first = 0 if window is None else max(row.computed + 1 - window, 0)
            for start in range(first // size * size, end, size):
                block = self._block(request_id, blocks, start)
                low, high = max(start, first), min(start + size, end)
                found = self.slots[block][low - start : high - start]
                if self.owner[block] != group or found != prefixes[low:high]:
                    raise WorkerError(
                        f"{request_id} reads block {block} of group {group} for tokens {low} to {high - 1}: "
                        f"it holds {found} of group {self.owner[block]}, and needs {prefixes[low:high]}"
                    )

    def _block(self, request_id: str, blocks: list[int], position: int) -> int:
        index = position // self._block_size
        if index >= len(blocks) or blocks[index] == 0:
            raise WorkerError(f"{request_id} has no block for token {position}")
        return blocks[index]

    def _install(self, masks: Any) -> dict[tuple[int, int], list[int]]:
        """Lane and place → the tokens allowed in this step, from the rows that were sent by now."""
        if not isinstance(masks, StepMasks):
            return {}
        if masks.new_rows is not None:
            for slot, row in zip(masks.new_slots, np.asarray(masks.new_rows), strict=True):
                self._masks[slot] = allowed_by(row)
        slots = masks.slots.reshape(len(masks.slots), -1)
        return {place: self._masks[slot] for place, slot in np.ndenumerate(slots) if slot >= 0}


def _with_drafts(row: Row, end: int, drafts: list[int]) -> list[Prefix]:
    """What the first `end` slots must hold when `drafts` follow the row's tokens."""
    prefixes = list(row.prefixes(min(end, len(row.tokens))))
    for draft in drafts[: end - len(prefixes)]:
        prefixes.append(prefixes[-1].then(draft))
    return prefixes


class WorkerV1(Worker):
    """Model Runner V1 under our worker: it keeps a request until it is finished, and takes it back as sent.

    By itself it takes a queued request back only as a prompt; `OutputTokens` gives it the output too.
    """

    def __init__(self, *args: Any, asynchronous: bool) -> None:
        super().__init__(*args)
        self._async = asynchronous
        self._batch: set[str] = set()
        self._last_sampled: set[str] = set()
        """Requests whose last token the device has at hand for the next step."""

    def _take_changes(self, output: Any) -> None:
        for request_id in output.finished_req_ids:
            self.rows.pop(request_id, None)
            self._remove(request_id)
        self._copy_blocks(output)
        cached = output.scheduled_cached_reqs
        for request_id in self._batch - (output.num_scheduled_tokens.keys() - cached.resumed_req_ids):
            self._remove(request_id)
        for data in output.scheduled_new_reqs:
            self._remove(data.req_id)
            self.rows[data.req_id] = self._new_row(data, data.prefill_token_ids or data.prompt_token_ids)
            self._batch.add(data.req_id)
        for index, request_id in enumerate(cached.req_ids):
            self._take_cached(cached, index, request_id)

    def _remove(self, request_id: str) -> None:
        self._batch.discard(request_id)
        self._last_sampled.discard(request_id)

    def _take_cached(self, cached: Any, index: int, request_id: str) -> None:
        row = self.rows[request_id]
        row.computed = cached.num_computed_tokens[index]
        if cached.new_token_ids:
            # The first stage of a pipeline learns from them what the last one sampled.
            sent = cached.new_token_ids[index]
            if sent != row.tokens[row.computed :][: len(sent)]:
                raise WorkerError(f"{request_id}: the scheduler sends {sent} for {row.tokens}")
        blocks, outputs = cached.new_block_ids[index], cached.num_output_tokens[index]
        if outputs < len(row.tokens) - row.prompt_len:
            row.set_tokens(row.tokens[: row.prompt_len + outputs])
        if request_id in cached.resumed_req_ids:
            row.blocks = [list(ids) for ids in blocks]
        elif blocks is not None:
            for known, new in zip(row.blocks, blocks, strict=True):
                known.extend(new)
        if request_id not in self._batch:
            if self._async and outputs > 0:
                sent = cached.all_token_ids[request_id][-outputs:]
                row.set_tokens(row.tokens[: row.prompt_len] + list(sent))
                row.hidden.clear()
            self._batch.add(request_id)

    def _samples(self, row: Row) -> bool:
        return row.computed >= len(row.tokens)

    def _input(self, request_id: str, row: Row, position: int) -> None:
        at_hand = request_id in self._last_sampled and position == len(row.tokens) - 1
        if position in row.hidden and not at_hand:
            raise WorkerError(f"{request_id}: only the device knew token {position}, and it is gone")

    def _sampled(self, step: Step) -> None:
        if self._async:
            self._last_sampled = set(step.samples)
        for request_id in step.samples:
            self.rows[request_id].hidden.add(len(self.rows[request_id].tokens) - 1)

    def delivered(self, request_ids: list[str]) -> None:
        if not self._async:
            for row in map(self.rows.get, request_ids):
                if row is not None:
                    row.hidden.clear()


class WorkerV2(Worker):
    """Model Runner V2: requests have slots, as many as may run; a preempted one loses its slot."""

    most_drafts = 0

    def _drafts(self, request_id: str, row: Row, count: int) -> list[int]:
        # Behind text that came from the scheduler nothing was drafted: the rows are there for their number.
        return row.drafts[:count] if row.computed >= row.prefill_len else [UNKNOWN] * count

    def _take_changes(self, output: Any) -> None:
        for request_id in output.finished_req_ids | (output.preempted_req_ids or set()):
            self.rows.pop(request_id, None)
        for data in output.scheduled_new_reqs:
            self.rows.pop(data.req_id, None)
            if len(self.rows) >= self._most:
                raise WorkerError(
                    f"no free slot for {data.req_id}: {sorted(self.rows)} have all {self._most}"
                )
            self.rows[data.req_id] = self._new_row(data, data.prefill_token_ids)
        cached = output.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            row = self.rows[request_id]
            # The scheduler counts drafts of a step whose output it has not seen as computed.
            ahead = cached.num_computed_tokens[index] - row.computed
            if ahead not in (range(self.most_drafts + 1) if self.most_drafts else (0,)):
                raise WorkerError(
                    f"{request_id}: the scheduler counts {cached.num_computed_tokens[index]} computed tokens"
                    f", the device {row.computed}"
                )
            for known, new in zip(row.blocks, cached.new_block_ids[index] or (), strict=False):
                known.extend(new)
        self._copy_blocks(output)

    def _samples(self, row: Row) -> bool:
        return row.computed >= row.prefill_len
