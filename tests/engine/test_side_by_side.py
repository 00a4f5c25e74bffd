"""Plain requests get what the unmodified engine gives them, in one batch with controllers."""

import json
import random
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

import aici_vllm
from tests.engine.conftest import Engines, exhaustive
from tests.engine.random_scripts import controller, random_program
from tests.engine.regimes import REGIMES, Regime
from tests.engine.results_of import branches_of

SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 4}}, "required": ["name"]}
GRAMMARS = [
    StructuredOutputsParams(regex="[a-f]{3}-[0-9]{2,4}"),
    StructuredOutputsParams(choice=["Paris", "Rome", "Oslo"]),
    StructuredOutputsParams(json=SCHEMA),
]


def plain_requests() -> list[SamplingParams]:
    """Structured outputs, seeds, several choices, penalties, stops and logprobs."""
    structured = [SamplingParams(temperature=0.0, max_tokens=24, structured_outputs=g) for g in GRAMMARS]
    seeded = [SamplingParams(temperature=1.0, seed=seed, max_tokens=16) for seed in (1, 2)]
    return [
        *structured,
        *seeded,
        SamplingParams(temperature=0.9, top_p=0.8, seed=3, n=3, max_tokens=16),
        SamplingParams(temperature=0.0, presence_penalty=1.0, frequency_penalty=0.5, max_tokens=16),
        SamplingParams(
            temperature=0.0, max_tokens=16, min_tokens=4, stop=["e"], logprobs=1, prompt_logprobs=1
        ),
    ]


def choices(output: Any) -> list[Any]:
    return [(choice.text, choice.token_ids, choice.finish_reason) for choice in output.outputs]


@pytest.mark.parametrize("chosen", [REGIMES[0], exhaustive(REGIMES[3])], ids=lambda chosen: chosen.name)
def test_plain_requests_do_not_notice_controllers(engine: Engines, chosen: Regime) -> None:
    plain = plain_requests()
    unmodified = engine(chosen, "random")
    expected = [choices(o) for o in unmodified.generate(["Hello there"] * len(plain), plain, use_tqdm=False)]
    texts = [found[0][0] for found in expected]
    assert texts[1] in ("Paris", "Rome", "Oslo") and json.loads(texts[2])["name"] is not None

    llm = engine(chosen, "random", **aici_vllm.engine_args())
    programs = [json.dumps(random_program(random.Random(seed))) for seed in range(500, 508)]
    scripts = [aici_vllm.request_params(controller, program) for program in programs]
    alone = _results(llm, scripts)
    mixed = [request for pair in zip(plain, scripts, strict=True) for request in pair]
    outputs = llm.generate(["Hello there"] * len(mixed), mixed, use_tqdm=False)
    assert [choices(output) for output in outputs[::2]] == expected
    assert [_branches(output) for output in outputs[1::2]] == alone
    assert llm.reset_prefix_cache(), "blocks are still in use"


def _results(llm: LLM, params: list[SamplingParams]) -> list[Any]:
    return [
        _branches(output) for output in llm.generate(["Hello there"] * len(params), params, use_tqdm=False)
    ]


def _branches(output: Any) -> list[Any]:
    return [branch.token_ids for branch in branches_of(output)]
