"""Penalties count what a branch's text really holds, by arithmetic on the logits of `transformers`."""

from collections import Counter
from functools import partial
from pathlib import Path

import torch
from vllm import SamplingParams

import aici_vllm
from tests.engine.conftest import Engines
from tests.engine.exact_scripts import run_exactly
from tests.engine.reference import Reference, compare_with_best
from tests.engine.regimes import Regime

PENALTIES = {"presence_penalty": 1.2, "frequency_penalty": 0.7, "repetition_penalty": 1.4}
SEEDS = range(200, 212)


def penalized(logits: torch.Tensor, prompt: list[int], output: list[int]) -> torch.Tensor:
    """Logits after the three penalties: repetition counts the prompt too, the others do not."""
    logits = logits.clone()
    for token in {*prompt, *output}:
        factor = PENALTIES["repetition_penalty"]
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token, count in Counter(output).items():
        logits[token] -= PENALTIES["frequency_penalty"] * count + PENALTIES["presence_penalty"]
    return logits


def test_penalties_see_the_true_history_after_splices_and_backtracks(
    engine: Engines, regime: Regime, random_folder: Path
) -> None:
    llm = engine(regime, "random", **aici_vllm.engine_args())
    params = SamplingParams(temperature=0.0, max_tokens=None, **PENALTIES)
    compare = partial(compare_with_best, Reference(random_folder), scores=penalized)
    run_exactly(llm, SEEDS, compare, params)
