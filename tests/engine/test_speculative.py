"""Speculative decoding: scripts get the tokens they get without it, in fewer forward passes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import aici_vllm
from tests.engine.conftest import Engines
from tests.engine.random_model import random_eagle
from tests.engine.random_scripts import controller, random_program
from tests.engine.reference import Reference, compare_with_best
from tests.engine.regimes import REGIMES

SEEDS = range(300, 312)
DRAFTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "n-gram": ("v2-sync", {"method": "ngram_gpu", "prompt_lookup_min": 1, "prompt_lookup_max": 3}),
    "draft model": ("v2-async", {"method": "draft_model"}),
    "EAGLE": ("v2-async", {"method": "eagle"}),
}


EXHAUSTIVE = [pytest.param(name, marks=pytest.mark.exhaustive) for name in ("n-gram", "EAGLE")]


@pytest.mark.parametrize("name", ["draft model", *EXHAUSTIVE])
def test_random_scripts_are_greedy_exact_with_drafts(
    engine: Engines, name: str, random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The front-end asks too which model runner it is.
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    chosen, drafter = DRAFTERS[name]
    (regime,) = [regime for regime in REGIMES if regime.name == chosen]
    drafter = {"num_speculative_tokens": 3, **drafter}
    if drafter["method"] == "draft_model":
        # The model drafts for itself: without a mask every draft is right.
        drafter["model"] = str(random_folder)
    elif drafter["method"] == "eagle":
        drafter["model"] = str(random_eagle(tmp_path))
    llm = engine(regime, "random", speculative_config=drafter, **aici_vllm.engine_args())
    reference = Reference(random_folder)
    programs = [random_program(random.Random(seed)) for seed in SEEDS]
    params = [aici_vllm.request_params(controller, json.dumps(program)) for program in programs]
    outputs = llm.generate(["Hello there"] * len(params), params, use_tqdm=False)
    compared = passes = sampled = 0
    for program, output in zip(programs, outputs, strict=True):
        result = aici_vllm.ControllerResult.from_json(output.kv_transfer_params["controller"])
        for branch in result.branches:
            assert branch.error is None, (program, branch.error, branch.logs)
            compared += compare_with_best(reference, output.prompt_token_ids, branch)
        passes += result.usage.forward_passes
        sampled += result.usage.sampled_tokens
    assert compared > 100
    # Random weights guess nothing: hardly any draft of EAGLE's is accepted.
    assert passes < sampled or name == "EAGLE"
    assert llm.reset_prefix_cache(), "blocks are still in use"
