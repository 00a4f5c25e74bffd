"""Every token that a branch ends with is the model's greedy choice from the same prefix."""

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

import aici_vllm
from tests.engine.conftest import Engines
from tests.engine.exact_scripts import run_exactly
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
    compare = partial(check_branch, references(model), model)
    for usage in run_exactly(llm, SEEDS[model], compare):
        assert usage.forward_passes == usage.sampled_tokens, usage
