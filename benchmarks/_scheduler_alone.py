"""vLLM's scheduler, ours or its own, driven as the engine core does it, with nobody computing."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections import deque
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mistral_common
import numpy as np
import torch
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from vllm.config import CacheConfig, ModelConfig, ParallelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

import aici_vllm.engine.scheduler as scheduler_module
from aici_vllm.engine.masks import StepMasks, request_lane
from aici_vllm.offline import request_params
from constraints import Vocabulary

BLOCK = 16
CONTEXT = 65536
TOKEN = 5000
"""What plain requests sample: any token but the end."""

Clock = Callable[[], int]
Controller = Callable[..., Any]


@cache
def tekken() -> Vocabulary:
    """The 131,072 tokens of Mistral's tekken."""
    folder = Path(mistral_common.__file__).parent / "data"
    return Vocabulary.from_tokenizer(Tekkenizer.from_file(folder / "tekken_240911.json"))


class SchedulerAlone:
    """A scheduler whose steps take no time but its own.

    Attributes:
        seconds: host time of each step: scheduling, masks and output together.
        masks: what was sent to the workers for each step.
    """

    def __init__(
        self,
        scheduler_class: type,
        most: int,
        tokens: int,
        branches: int,
        clock: Clock = time.thread_time_ns,
    ) -> None:
        init_none_hash(sha256)
        self.seconds: list[float] = []
        self.masks: list[StepMasks | None] = []
        self.scheduler = _scheduler(scheduler_class, most, tokens, branches)
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        self._clock = clock
        self._queue: deque[tuple[Any, ModelRunnerOutput]] = deque()
        self._random = random.Random(0)
        self._rows: dict[int, np.ndarray] = {}
        self._allowed: dict[int, list[int]] = {}
        self._lanes: dict[str, int | None] = {}
        self._added = 0

    @property
    def splices(self) -> int:
        """How many there were so far."""
        return int(self.scheduler.telemetry.counts.splices)

    def add(
        self, controller: Controller | None, max_tokens: int, *, prompt_len: int = 16, arg: str = ""
    ) -> str:
        """Queue a request; without a controller, a plain one."""
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        if controller is not None:
            params = request_params(controller, arg, params)
        request_id = f"request-{self._added:06d}-0123456789abcdef"
        self._added += 1
        prompt = [self._random.randrange(1000, 100_000) for _ in range(prompt_len)]
        request = Request(request_id, prompt, params, None, block_hasher=self._hasher)
        self.scheduler.add_request(request)
        return request_id

    def step(self) -> float:
        """One turn of the engine core's loop under async scheduling; the host seconds it took."""
        clock, scheduler = self._clock, self.scheduler
        began = clock()
        output = scheduler.schedule()
        deferred = output.pending_structured_output_tokens
        spent = clock() - began
        self._learn_lanes(output)
        if not deferred:
            spent += self._sample(output)
        if self._queue and (deferred or len(self._queue) == 2):
            finished, result = self._queue.pop()
            began = clock()
            scheduler.update_from_output(finished, result)
            spent += clock() - began
        if deferred:
            spent += self._sample(output)
        self.seconds.append(spent / 1e9)
        return spent / 1e9

    def _sample(self, output: Any) -> int:
        if not output.total_num_scheduled_tokens:
            return 0
        began = self._clock()
        masks = self.scheduler.get_grammar_bitmask(output)
        spent = self._clock() - began
        step = masks if isinstance(masks, StepMasks) else None
        self.masks.append(step)
        ids = list(output.num_scheduled_tokens)
        tokens = [[self._token(step, request_id)] for request_id in ids]
        index = {request_id: at for at, request_id in enumerate(ids)}
        self._queue.appendleft((output, ModelRunnerOutput(ids, index, sampled_token_ids=tokens)))
        return spent

    def _learn_lanes(self, output: Any) -> None:
        for data in output.scheduled_new_reqs:
            self._lanes[data.req_id] = request_lane(data.sampling_params)

    def _token(self, step: StepMasks | None, request_id: str) -> int:
        lane = self._lanes[request_id]
        if step is None or lane is None:
            return TOKEN
        for slot, row in zip(step.new_slots, [] if step.new_rows is None else step.new_rows, strict=True):
            self._allowed.pop(slot, None)
            self._rows[slot] = row
        slot = int(step.slots[min(lane, len(step.slots) - 1)])
        if slot < 0:
            return TOKEN
        if slot not in self._allowed:
            bits = np.unpackbits(self._rows[slot].view(np.uint8), bitorder="little")
            bits[list(tekken().eos_token_ids)] = 0
            found = np.flatnonzero(bits).tolist()
            self._allowed[slot] = found or list(tekken().eos_token_ids)
        allowed = self._allowed[slot]
        # Ids are ranks: tokens are drawn as text has them, each half as often as the one of half its rank.
        return allowed[int(len(allowed) ** self._random.random()) - 1]


def ours(most: int, tokens: int, branches: int = 16) -> SchedulerAlone:
    """The plugin's scheduler, for up to `most` sequences of up to `tokens` tokens."""
    return SchedulerAlone(scheduler_module.Scheduler, most, tokens, branches)


def vllms(most: int, tokens: int) -> SchedulerAlone:
    """vLLM's own scheduler."""
    return SchedulerAlone(AsyncScheduler, most, tokens, 1)


class _NoGrammars:
    """Stands for vLLM's manager of structured outputs, which no request here uses."""

    def accept_tokens(self, request: Request, tokens: list[int]) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


def _scheduler(scheduler_class: type, most: int, tokens: int, branches: int) -> Any:
    config = _vllm_config(most, branches)
    blocks = most * (-(-tokens // BLOCK) + 2) + 1
    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32)
    real = scheduler_module.model_vocabulary
    scheduler_module.model_vocabulary = lambda config: tekken()
    try:
        scheduler = scheduler_class(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["all"], spec)]
            ),
            structured_output_manager=_NoGrammars(),
            block_size=BLOCK,
        )
    finally:
        scheduler_module.model_vocabulary = real
    scheduler.use_v2_model_runner = True
    return scheduler


def _vllm_config(most: int, branches: int) -> VllmConfig:
    model = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT,
        "vocab_size": 131072,
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(model))
        model_config = ModelConfig(
            model=folder, skip_tokenizer_init=True, max_model_len=CONTEXT, dtype="float32", enforce_eager=True
        )
        config = VllmConfig(
            model_config=model_config,
            cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
            scheduler_config=SchedulerConfig(
                max_num_seqs=most,
                max_num_batched_tokens=CONTEXT,
                max_model_len=CONTEXT,
                is_encoder_decoder=False,
            ),
            parallel_config=ParallelConfig(worker_cls="aici_vllm.Worker"),
        )
    config.additional_config = {"aici": {"functions": True, "limits": {"branches": branches}}}
    config.scheduler_config.async_scheduling = True
    return config
