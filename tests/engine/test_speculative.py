"""Speculative decoding: scripts get the tokens they get without it, in fewer forward passes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

import aici_vllm
from tests.engine.conftest import Engines, exhaustive
from tests.engine.exact_scripts import run_exactly
from tests.engine.random_model import random_eagle
from tests.engine.reference import Reference, compare_with_best
from tests.engine.regimes import REGIMES

SEEDS = range(300, 312)
DRAFTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "n-gram": ("v2-sync", {"method": "ngram_gpu", "prompt_lookup_min": 1, "prompt_lookup_max": 3}),
    "draft model": ("v2-async", {"method": "draft_model"}),
    "EAGLE": ("v2-async", {"method": "eagle"}),
}


@pytest.mark.parametrize("name", ["draft model", exhaustive("n-gram"), exhaustive("EAGLE")])
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
    usages = run_exactly(llm, SEEDS, partial(compare_with_best, Reference(random_folder)))
    passes, sampled = sum(u.forward_passes for u in usages), sum(u.sampled_tokens for u in usages)
    # Random weights guess nothing: hardly any draft of EAGLE's is accepted.
    assert passes < sampled or name == "EAGLE"
