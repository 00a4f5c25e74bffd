"""Penalties count what a branch's text really holds, by arithmetic on the logits of `transformers`."""

import json
import random
from collections import Counter
from pathlib import Path

import torch
from vllm import SamplingParams

import aici_vllm
from tests.engine.conftest import Engines
from tests.engine.random_scripts import controller, random_program
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
    reference = Reference(random_folder)
    params = SamplingParams(temperature=0.0, max_tokens=None, **PENALTIES)
    programs = [random_program(random.Random(seed)) for seed in SEEDS]
    requests = [aici_vllm.request_params(controller, json.dumps(program), params) for program in programs]
    outputs = llm.generate(["Hello there"] * len(requests), requests, use_tqdm=False)
    compared = 0
    for output in outputs:
        result = aici_vllm.ControllerResult.from_json(output.kv_transfer_params["controller"])
        for branch in result.branches:
            assert branch.error is None, branch.error
            compared += compare_with_best(reference, output.prompt_token_ids, branch, penalized)
    assert compared > 100
    assert llm.reset_prefix_cache(), "blocks are still in use"
