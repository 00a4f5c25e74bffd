"""Random scripts run on an engine, and every token that they sampled compared with the reference."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import aici_vllm
from tests.engine.random_scripts import controller, random_program
from tests.engine.results_of import result_of

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

Compare = Callable[[list[int], Any], int]
"""(prompt, branch) -> how many sampled tokens were compared; asserts that each is the best."""


def run_exactly(
    llm: LLM, seeds: Iterable[int], compare: Compare, params: SamplingParams | None = None
) -> list[Any]:
    """Run the script of each seed, all in one batch; the usage of each."""
    programs = [random_program(random.Random(seed)) for seed in seeds]
    requests = [aici_vllm.request_params(controller, json.dumps(program), params) for program in programs]
    outputs = llm.generate(["Hello there"] * len(requests), requests, use_tqdm=False)
    usages, compared = [], 0
    for program, output in zip(programs, outputs, strict=True):
        result = result_of(output)
        for branch in result.branches:
            assert branch.error is None, (program, branch.error, branch.logs)
            compared += compare(output.prompt_token_ids, branch)
        usages.append(result.usage)
    assert compared > 100
    assert llm.reset_prefix_cache(), "blocks are still in use"
    return usages
