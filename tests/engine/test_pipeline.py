"""Pipeline parallelism: scripts get the tokens they get on one worker, with several steps in flight."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import aici_vllm
from tests.engine.conftest import Engines
from tests.engine.random_scripts import controller, random_program
from tests.engine.reference import Reference, compare_with_best
from tests.engine.regimes import REGIMES

# On a CPU, vLLM's Model Runner V1 fails at the second stage, without controllers too: it is simulated.
V2_ASYNC = REGIMES[3]


def test_random_scripts_are_greedy_exact_in_a_pipeline(
    engine: Engines, random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    stages: dict[str, Any] = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
    llm = engine(V2_ASYNC, "random", max_num_seqs=32, **stages, **aici_vllm.engine_args())
    reference = Reference(random_folder)
    programs = [random_program(random.Random(seed)) for seed in range(400, 416)]
    params = [aici_vllm.request_params(controller, json.dumps(program)) for program in programs]
    outputs = llm.generate(["Hello there"] * len(params), params, use_tqdm=False)
    compared = 0
    for program, output in zip(programs, outputs, strict=True):
        result = aici_vllm.ControllerResult.from_json(output.kv_transfer_params["controller"])
        for branch in result.branches:
            assert branch.error is None, (program, branch.error, branch.logs)
            compared += compare_with_best(reference, output.prompt_token_ids, branch)
        assert result.usage.forward_passes == result.usage.sampled_tokens, (program, result.usage)
    assert compared > 100
    assert llm.reset_prefix_cache(), "blocks are still in use"
