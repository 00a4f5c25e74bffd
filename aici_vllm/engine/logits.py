"""Masks of controlled requests applied behind the logits-processor interfaces of both model runners."""

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from aici_vllm.controller.errors import BadRequestError
from aici_vllm.engine.device_masks import DeviceMasks
from aici_vllm.engine.masks import LANE, NO_LANE, NO_MASK, StepMasks, request_lane, table_rows


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
        max_rows = vllm_config.scheduler_config.max_num_seqs
        # V1: by batch index. V2: by request slot.
        self._lanes = np.full(max_rows, NO_LANE, np.int32)
        self._lane_of_row: dict[int, int] = {}
        self._slots: np.ndarray | None = None
        self._masks: DeviceMasks | None = None
        if str(vllm_config.parallel_config.worker_cls).startswith("aici_vllm"):
            # Allocated now, so that vLLM counts it before it sizes the KV cache.
            words = -(-vllm_config.model_config.get_vocab_size() // 32)
            width = 1 + vllm_config.num_speculative_tokens
            capacity = table_rows(max_rows * width, words)
            self._masks = DeviceMasks(torch.device(device), capacity, words, max_rows, width)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a client's own lane, of a plain request too: it would sample under somebody else's mask.

        vLLM asks in the front-end of every engine; lanes are given behind it.

        Raises:
            BadRequestError: the request names a lane.
        """
        if LANE in (sampling_params.extra_args or {}):
            raise BadRequestError(f"{LANE} is set by the engine: leave it out of vllm_xargs and extra_args")

    def install(self, step: StepMasks | None) -> None:
        """Take the masks of the step that is about to sample; None for a step without any."""
        if step is None:
            self._slots = None
            return
        assert self._masks is not None
        if step.new_rows is not None:
            self._masks.write(step.new_slots, step.new_rows)
        self._slots = step.slots

    # Model Runner V1: rows are batch indices.

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None or self._masks is None:
            return
        process_dict_updates(self._lane_of_row, batch_update, lambda params, *_: request_lane(params))
        self._lanes.fill(NO_LANE)
        for row, lane in self._lane_of_row.items():
            self._lanes[row] = lane

    # Model Runner V2: rows belong to request slots.

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        lane = request_lane(sampling_params) if self._masks is not None else None
        self._lanes[req_idx] = NO_LANE if lane is None else lane
        return lane is not None

    def apply(self, logits: torch.Tensor, ctx: LogitsContext | None = None) -> torch.Tensor:
        if self._slots is None:
            return logits
        if self._slots.ndim > 1:
            self._apply_to_drafts(logits, ctx)
            return logits
        lanes = self._lanes[: len(logits)] if ctx is None else self._lanes[ctx.idx_mapping_np]
        # A lane that the message does not know is clipped to its last slot, which is NO_MASK.
        slots = self._slots.take(lanes, mode="clip")
        if (slots != NO_MASK).any():
            assert self._masks is not None
            self._masks.apply(logits, slots)
        return logits

    def _apply_to_drafts(self, logits: torch.Tensor, ctx: LogitsContext | None) -> None:
        """With speculative decoding a request has a row behind each draft; which, only the device knows."""
        assert self._masks is not None and self._slots is not None and ctx is not None
        slots = self._slots.take(self._lanes, axis=0, mode="clip")
        if (slots[ctx.idx_mapping_np] != NO_MASK).any():
            self._masks.apply_by_position(logits, slots, ctx.expanded_idx_mapping, ctx.expanded_local_pos)
