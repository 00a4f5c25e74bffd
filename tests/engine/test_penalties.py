"""Penalties count what a branch's text really holds, by arithmetic on the logits of `transformers`."""

import json
import random
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams

import aici_vllm
from tests.engine.conftest import Engines
from tests.engine.random_scripts import controller, random_program
from tests.engine.reference import Reference
from tests.engine.regimes import Regime

PENALTIES = {"presence_penalty": 1.2, "frequency_penalty": 0.7, "repetition_penalty": 1.4}
SEEDS = range(200, 212)

reference_of = cache(Reference)


def penalized(logits: torch.Tensor, prompt: list[int], output: list[int]) -> torch.Tensor:
    """Logits after the three penalties: repetition counts the prompt too, the others do not."""
    logits = logits.clone()
    for token in {*prompt, *output}:
        factor = PENALTIES["repetition_penalty"]
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token, count in Counter(output).items():
        logits[token] -= PENALTIES["frequency_penalty"] * count + PENALTIES["presence_penalty"]
    return logits


def check(reference: Reference, prompt: list[int], branch: Any) -> int:
    """Every sampled token is the best after penalties; how many there were."""
    tokens = prompt + branch.token_ids
    origins = [kind for kind, count in branch.sources for _ in range(count)]
    (generations,) = [json.loads(line[1:]) for line in branch.logs.splitlines() if line.startswith("@")]
    logits = reference.logits(tokens)
    compared = 0
    for start, count, kind, value in generations:
        allowed = reference.allowed_by(kind, value)
        for at in range(start, start + count):
            if origins[at - len(prompt)] != "sampled":
                continue
            text = b"".join(map(reference.token_bytes, tokens[start:at]))
            scores = penalized(logits[at - 1], prompt, tokens[len(prompt) : at])
            best = reference.best(scores, lambda token, a=allowed, t=text: a(t, token))
            assert tokens[at] in best, (at, kind, value, text, tokens[at], best)
            compared += 1
    return compared


def test_penalties_see_the_true_history_after_splices_and_backtracks(
    engine: Engines, regime: Regime, random_folder: Path
) -> None:
    llm = engine(regime, "random", **aici_vllm.engine_args())
    reference = reference_of(random_folder)
    params = SamplingParams(temperature=0.0, max_tokens=None, **PENALTIES)
    programs = [random_program(random.Random(seed)) for seed in SEEDS]
    requests = [aici_vllm.request_params(controller, json.dumps(program), params) for program in programs]
    outputs = llm.generate(["Hello there"] * len(requests), requests, use_tqdm=False)
    compared = 0
    for output in outputs:
        result = aici_vllm.ControllerResult.from_json(output.kv_transfer_params["controller"])
        for branch in result.branches:
            assert branch.error is None, branch.error
            compared += check(reference, output.prompt_token_ids, branch)
    assert compared > 100
    assert llm.reset_prefix_cache(), "blocks are still in use"
