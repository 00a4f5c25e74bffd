"""Masks applied to logits: one implementation behind the interfaces of both model runners."""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from aici_vllm.engine.masks import NO_MASK, StepMasks, request_key


class DeviceMasks:
    """The mask table on one device, packed 32 tokens to an int32."""

    def __init__(self, device: torch.device):
        self._device = device
        self._table = torch.empty((0, 0), dtype=torch.int32, device=device)
        self._bits = torch.arange(32, dtype=torch.int32, device=device)

    def write(self, slots: list[int], rows: torch.Tensor) -> None:
        """Put `rows`, int32[k, words], into `slots`; the table grows to hold them."""
        needed = max(slots) + 1
        if needed > self._table.shape[0]:
            grown = torch.zeros(
                (max(needed, 2 * self._table.shape[0], 64), rows.shape[1]),
                dtype=torch.int32,
                device=self._device,
            )
            if self._table.numel():
                grown[: self._table.shape[0]] = self._table
            self._table = grown
        index = torch.tensor(slots, dtype=torch.int64)
        self._table[index.to(self._device, non_blocking=True)] = rows.to(self._device, non_blocking=True)

    def apply(self, logits: torch.Tensor, rows: list[int], slots: list[int]) -> None:
        """Set `logits[rows[i]]` to -inf wherever table row `slots[i]` has no bit. In place.

        Tokens past the end of a row, the padding of a vocabulary, are never allowed.
        """
        row_index = torch.tensor(rows, dtype=torch.int64).to(self._device, non_blocking=True)
        slot_index = torch.tensor(slots, dtype=torch.int64).to(self._device, non_blocking=True)
        words = self._table.index_select(0, slot_index)
        allowed = (words.unsqueeze(-1) >> self._bits).bitwise_and_(1).bool().flatten(1)
        picked = logits.index_select(0, row_index)
        width = min(allowed.shape[1], picked.shape[1])
        picked[:, :width].masked_fill_(~allowed[:, :width], float("-inf"))
        picked[:, width:] = float("-inf")
        logits.index_copy_(0, row_index, picked)


class AiciLogitsProcessor(LogitsProcessor, LogitsProcessorV2):
    """Masks the rows of controlled requests; every other row is left alone.

    Registered by entry point, so it exists in engines that run no controller too: there it holds
    nothing and does nothing.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        state: torch.device | LogitsProcRequestState,
        is_pin_memory: bool = False,
    ):
        device = state if isinstance(state, (torch.device, str)) else state.device
        self._masks = DeviceMasks(torch.device(device))
        # V1: batch index -> request key. V2: request slot -> request key.
        self._keys: dict[int, str] = {}
        self._rows: dict[str, int] = {}

    def install(self, step: StepMasks | None) -> None:
        """Take the masks of the step that is about to sample; None for a step without any."""
        if step is None:
            self._rows = {}
            return
        if step.new_rows is not None:
            self._masks.write(step.new_slots, torch.from_numpy(step.new_rows))
        self._rows = step.rows

    # Model Runner V1: rows are batch indices.

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._keys, batch_update, lambda params, prompt, output: request_key(params))

    # Model Runner V2: rows belong to request slots.

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        key = request_key(sampling_params)
        if key is None:
            self._keys.pop(req_idx, None)
            return False
        self._keys[req_idx] = key
        return True

    def apply(self, logits: torch.Tensor, ctx: LogitsContext | None = None) -> torch.Tensor:
        if not self._rows:
            return logits
        if ctx is None:
            owners: Any = self._keys.items()
        else:
            owners = ((row, self._keys.get(slot)) for row, slot in enumerate(ctx.idx_mapping_np.tolist()))
        rows, slots = [], []
        for row, key in owners:
            slot = self._rows.get(key, NO_MASK)
            if slot != NO_MASK:
                rows.append(row)
                slots.append(slot)
        if rows:
            self._masks.apply(logits, rows, slots)
        return logits
