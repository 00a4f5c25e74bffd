"""Pipeline parallelism: scripts get the tokens they get on one worker, with several steps in flight."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

import aici_vllm
from tests.engine.conftest import Engines
from tests.engine.exact_scripts import run_exactly
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
    for usage in run_exactly(llm, range(400, 416), partial(compare_with_best, Reference(random_folder))):
        assert usage.forward_passes == usage.sampled_tokens, usage
