"""Every token that a branch ends with is the model's greedy choice from the same prefix."""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import aici_vllm
from tests.engine.conftest import Engines
from tests.engine.random_scripts import controller, random_program
from tests.engine.reference import Reference, compare_with_best
from tests.engine.regimes import Regime

SEEDS = {"embedded": range(12), "random": range(36)}

CHECKED: dict[str, int] = {}
"""Outcomes already compared: the regimes should agree, and then the reference runs once for all four."""


@pytest.fixture(scope="session")
def references(embedded_folder: Path, random_folder: Path) -> Any:
    folders = {"embedded": embedded_folder, "random": random_folder}
    return cache(lambda name: Reference(folders[name]))


def check_branch(reference: Reference, model: str, prompt: list[int], branch: Any) -> int:
    """Compare every sampled token with the reference; how many were compared."""
    outcome = repr((model, prompt, branch.token_ids, branch.sources, branch.logs))
    if outcome not in CHECKED:
        CHECKED[outcome] = compare_with_best(reference, prompt, branch)
    return CHECKED[outcome]


@pytest.mark.parametrize("model", ["embedded", "random"])
def test_random_scripts_are_greedy_exact(
    engine: Engines, regime: Regime, model: str, references: Any
) -> None:
    llm = engine(regime, model, **aici_vllm.engine_args())
    reference = references(model)
    programs = [random_program(random.Random(seed)) for seed in SEEDS[model]]
    params = [aici_vllm.request_params(controller, json.dumps(program)) for program in programs]
    outputs = llm.generate(["Hello there"] * len(params), params, use_tqdm=False)
    compared = 0
    for program, output in zip(programs, outputs, strict=True):
        result = aici_vllm.ControllerResult.from_json(output.kv_transfer_params["controller"])
        for branch in result.branches:
            assert branch.error is None, (program, branch.error, branch.logs)
            compared += check_branch(reference, model, output.prompt_token_ids, branch)
        used = result.usage
        assert used.forward_passes == used.sampled_tokens, (program, used)
    assert compared > 100
    assert llm.reset_prefix_cache(), "blocks are still in use"
