"""How a simulated engine is set up: the regime, the size of its KV cache, and vLLM's configuration of it."""

from __future__ import annotations

import copy
import json
import random
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from tests.simulator.model import SIZE


@dataclass(frozen=True)
class Settings:
    """One engine.

    Attributes:
        asynchronous: async scheduling, with a batch queue of 2.
        v2: the bookkeeping of Model Runner V2.
        spare_blocks: blocks of the KV cache beyond those that one longest sequence needs.
        budget: tokens in a step; less than a prompt makes chunks of it.
        window: of a second group of layers, with sliding-window attention; None for full attention alone.
        slow_scripts: a turn of a script takes up to so many looks at it.
        reserve_whole: a request is admitted when all of its tokens have room, not only its first chunk.
        watermark: the part of the blocks that must stay free when a request is admitted.
        longest_chunk: tokens of a prompt in one step, while others wait; 0 for no bound.
        few_masks: the table of masks holds no more rows than two steps need.
        throttled: two steps of three put prefills off, as data parallelism does to balance its engines.
        adapters: how many LoRA adapters a step may use; 0 for an engine without LoRA.
        stages: of pipeline parallelism: so many steps are in flight at once without async scheduling, and
            one more with it (Model Runner V2 only).
        drafts: tokens of speculative decoding that each request gets proposed (Model Runner V2 only).
    """

    asynchronous: bool = True
    v2: bool = True
    block_size: int = 4
    spare_blocks: int = 200
    prefix_caching: bool = True
    most_running: int = 8
    budget: int = 256
    context: int = 96
    policy: str = "fcfs"
    window: int | None = None
    slow_scripts: int = 0
    reserve_whole: bool = True
    watermark: float = 0.0
    longest_chunk: int = 0
    log_stats: bool = False
    few_masks: bool = False
    throttled: bool = False
    adapters: int = 0
    stages: int = 1
    drafts: int = 0

    @property
    def num_blocks(self) -> int:
        """Blocks of the KV cache, vLLM's null block included."""
        groups = 1 if self.window is None else 2
        return groups * (-(-self.context // self.block_size)) + 1 + self.spare_blocks


def random_settings(rng: random.Random) -> Settings:
    """Any regime, from a roomy KV cache to one that holds a single sequence."""
    settings = Settings(
        asynchronous=rng.random() < 0.6,
        v2=rng.random() < 0.5,
        block_size=rng.choice([2, 4, 4, 8, 16]),
        spare_blocks=rng.choice([0, 0, 1, 3, 8, 8, 20, 200]),
        prefix_caching=rng.random() < 0.7,
        most_running=rng.choice([1, 2, 3, 8, 16]),
        budget=rng.choice([5, 16, 40, 256, 256]),
        context=rng.choice([48, 96, 96]),
        policy=rng.choice(["fcfs", "fcfs", "priority"]),
        window=rng.choice([None] * 7 + [12]),
        slow_scripts=rng.choice([0, 0, 3]),
        reserve_whole=rng.random() < 0.7,
        watermark=rng.choice([0.0, 0.0, 0.05]),
        longest_chunk=rng.choice([0, 0, 0, 3]),
        log_stats=rng.random() < 0.2,
        few_masks=rng.random() < 0.3,
        throttled=rng.random() < 0.1,
        adapters=rng.choice([0, 0, 1, 2]),
    )
    drafts = _drafts(rng, settings)
    # vLLM asserts a bound on a step's adapters that its own pipelines break.
    may_pipeline = not drafts and not settings.adapters and (settings.v2 or not settings.asynchronous)
    return replace(settings, drafts=drafts, stages=rng.choice([1, 1, 2]) if may_pipeline else 1)


def _drafts(rng: random.Random, settings: Settings) -> int:
    if not settings.v2:
        return 0
    # vLLM asserts that a chunk has room for a token and its drafts.
    return rng.choice([0, 0, 1, 2 if settings.longest_chunk else 3])


@cache
def _base_config() -> Any:
    """vLLM's configuration of a tiny model that nobody loads."""
    from vllm.config import CacheConfig, ModelConfig, ParallelConfig, SchedulerConfig, VllmConfig

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(_MODEL))
        model = ModelConfig(
            model=folder, skip_tokenizer_init=True, max_model_len=64, dtype="float32", enforce_eager=True
        )
        scheduler = SchedulerConfig(
            max_num_seqs=8, max_num_batched_tokens=64, max_model_len=64, is_encoder_decoder=False
        )
        return VllmConfig(
            model_config=model,
            cache_config=CacheConfig(block_size=16, enable_prefix_caching=True),
            scheduler_config=scheduler,
            parallel_config=ParallelConfig(worker_cls="aici_vllm.Worker"),
        )


_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "vocab_size": SIZE,
}


def vllm_config(settings: Settings) -> Any:
    """vLLM's configuration for these settings."""
    from vllm.config import LoRAConfig, SpeculativeConfig

    config = copy.copy(_base_config())
    for name in ("model_config", "cache_config", "scheduler_config", "parallel_config"):
        setattr(config, name, copy.copy(getattr(config, name)))
    config.model_config.max_model_len = settings.context
    config.cache_config.block_size = settings.block_size
    config.cache_config.num_gpu_blocks = settings.num_blocks
    config.cache_config.enable_prefix_caching = settings.prefix_caching
    config.additional_config = {"aici": {"limits": {"branches": 64, "checkpoints": 6}}}
    config.lora_config = LoRAConfig(max_loras=settings.adapters) if settings.adapters else None
    config.parallel_config.pipeline_parallel_size = settings.stages
    scheduler = config.scheduler_config
    scheduler.async_scheduling = settings.asynchronous
    scheduler.max_num_seqs = settings.most_running
    scheduler.max_num_batched_tokens = settings.budget
    scheduler.max_model_len = settings.context
    scheduler.policy = settings.policy
    scheduler.scheduler_reserve_full_isl = settings.reserve_whole
    scheduler.watermark = settings.watermark
    scheduler.long_prefill_token_threshold = settings.longest_chunk
    if settings.drafts:
        config.speculative_config = SpeculativeConfig(
            method="ngram_gpu", num_speculative_tokens=settings.drafts, prompt_lookup_max=2
        )
    return config


def kv_cache_config(settings: Settings) -> Any:
    """One group of layers with full attention, and one with a window if there is one."""
    import torch
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        SlidingWindowSpec,
    )

    shape: dict[str, Any] = {
        "block_size": settings.block_size,
        "num_kv_heads": 1,
        "head_size": 32,
        "dtype": torch.float32,
    }
    groups = [KVCacheGroupSpec(["full"], FullAttentionSpec(**shape))]
    if settings.window is not None:
        windowed = SlidingWindowSpec(**shape, sliding_window=settings.window)
        groups.append(KVCacheGroupSpec(["windowed"], windowed))
    return KVCacheConfig(num_blocks=settings.num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)
