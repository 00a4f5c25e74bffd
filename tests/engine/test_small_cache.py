"""A KV cache too small for its requests: branches are preempted and reclaimed, and end the same."""

import json
import random

import pytest
from vllm import LLM, SamplingParams

import aici_vllm
from tests.engine.conftest import SMALL, Engines, exhaustive
from tests.engine.random_scripts import controller, random_program
from tests.engine.regimes import REGIMES, Regime
from tests.engine.results_of import branches_of


@pytest.mark.parametrize("chosen", [REGIMES[0], exhaustive(REGIMES[3])], ids=lambda chosen: chosen.name)
def test_scripts_end_the_same_when_blocks_are_short(engine: Engines, chosen: Regime) -> None:
    programs = [json.dumps(random_program(random.Random(seed))) for seed in range(100, 124)]
    roomy = engine(chosen, "random", **aici_vllm.engine_args())
    params = [aici_vllm.request_params(controller, program) for program in programs]
    expected = _token_ids(roomy, params)
    small = engine(chosen, "random", **SMALL, **aici_vllm.engine_args())
    assert _token_ids(small, params) == expected
    assert small.reset_prefix_cache(), "blocks are still in use"


def _token_ids(llm: LLM, params: list[SamplingParams]) -> list[list[list[int]]]:
    outputs = llm.generate(["Hello there"] * len(params), params, use_tqdm=False)
    return [[branch.token_ids for branch in branches_of(output)] for output in outputs]
