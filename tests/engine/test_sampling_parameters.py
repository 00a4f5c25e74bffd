"""What a client sets beside a controller: logprobs, prompt logprobs and stops, as for plain requests."""

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams

import aici_vllm
from aici_vllm import aici
from tests.engine.conftest import Engines
from tests.engine.random_model import TOKENS
from tests.engine.random_scripts import controller, random_program
from tests.engine.reference import Reference
from tests.engine.regimes import Regime
from tests.engine.results_of import result_of

CLOSE = 2e-3
"""How far logprobs of `transformers` and of vLLM may be apart."""
WORDS = list(range(259, TOKENS))
"""Tokens of the random model with text of their own: neither special, nor single bytes, nor padding."""
LONG = " one two three four five six seven eight nine ten" * 6
"""Over a block of the CPU backend."""

reference_of = cache(Reference)


async def generate(arg: str) -> None:
    await aici.gen_tokens(max_tokens=int(arg))


async def take_the_prompt_back(arg: str) -> None:
    start = aici.Label()
    await aici.FixedTokens("Anew", following=start)
    await aici.gen_tokens(max_tokens=2)


async def fixed(arg: str) -> None:
    await aici.FixedTokens(arg)
    await aici.gen_tokens(max_tokens=8)


async def fixed_in_branches(arg: str) -> None:
    index = await aici.fork(3)
    await aici.FixedTokens(f" branch {index} of three.")
    await aici.gen_tokens(max_tokens=2)


@pytest.fixture
def llm(engine: Engines, regime: Regime) -> LLM:
    return engine(regime, "random", **aici_vllm.engine_args())


def run(llm: LLM, script: Callable[..., Any], prompt: str, arg: str = "", **params: Any) -> Any:
    """vLLM's output of one controlled request."""
    merged = SamplingParams(**{"temperature": 0.0, "max_tokens": 200, **params})
    [output] = llm.generate([prompt], aici_vllm.request_params(script, arg, merged), use_tqdm=False)
    return output


def branches(output: Any) -> list[Any]:
    return result_of(output).branches


def plain(llm: LLM, prompt: str, **params: Any) -> Any:
    """vLLM's output of one plain request."""
    return llm.generate([prompt], SamplingParams(**{"temperature": 0.0, **params}), use_tqdm=False)[0]


def check_logprobs(reference: Reference, prompt: list[int], branch: Any, reported: Any, best: int) -> int:
    """Compare what one choice reports with log-softmax of `transformers`; how many were sampled."""
    tokens = prompt + branch.token_ids
    origins = [kind for kind, count in branch.sources for _ in range(count)]
    expected = reference.logits(tokens).log_softmax(-1)
    assert len(reported) == len(origins) == len(branch.logprobs)
    for at, (origin, entry, chosen) in enumerate(zip(origins, reported, branch.logprobs, strict=True)):
        token, row = branch.token_ids[at], expected[len(prompt) + at - 1]
        assert entry[token].logprob == chosen
        if origin == "spliced":
            assert chosen == 0.0 and list(entry) == [token] and entry[token].rank == 1
            continue
        assert abs(chosen - row[token].item()) < CLOSE
        assert len(entry) in (best, best + 1)
        top = sorted((other.logprob for other in entry.values()), reverse=True)[:best]
        assert top == pytest.approx(row.topk(best).values.tolist(), abs=CLOSE)
    return origins.count("sampled")


def test_logprobs_stay_with_their_tokens(llm: LLM, random_folder: Path) -> None:
    """Through splices, backtracks and forks, in every choice, beside requests that want more and none."""
    reference = reference_of(random_folder)
    programs = [random_program(random.Random(seed)) for seed in range(300, 312)]
    wanted = [SamplingParams(temperature=1.0, seed=7, n=1 + i % 3, logprobs=i % 4) for i in range(12)]
    for params in wanted:
        params.max_tokens = None
    requests = [
        aici_vllm.request_params(controller, json.dumps(program), params)
        for program, params in zip(programs, wanted, strict=True)
    ]
    more = [SamplingParams(max_tokens=20, logprobs=9), SamplingParams(max_tokens=20)]
    outputs = llm.generate(["Hello there"] * 14, requests + more, use_tqdm=False)
    sampled = 0
    for params, output in zip(wanted, outputs, strict=False):
        found = branches(output)
        for choice in output.outputs:
            if choice.index >= len(found):
                assert not choice.token_ids and not choice.logprobs
                continue
            branch = found[choice.index]
            assert choice.token_ids == branch.token_ids
            assert choice.cumulative_logprob == pytest.approx(sum(branch.logprobs), abs=1e-4)
            prompt = output.prompt_token_ids
            sampled += check_logprobs(reference, prompt, branch, choice.logprobs, params.logprobs)
        for branch in found:
            assert branch.error is None and len(branch.logprobs) == len(branch.token_ids)
    assert sampled > 100
    assert llm.reset_prefix_cache(), "blocks are still in use"


@pytest.mark.parametrize("script", [generate, take_the_prompt_back, fixed_in_branches])
def test_prompt_logprobs_are_those_of_a_plain_request(llm: LLM, script: Callable[..., Any]) -> None:
    prompt = "Start" + LONG
    expected = plain(llm, prompt, max_tokens=1, prompt_logprobs=2).prompt_logprobs
    alone = run(llm, script, prompt, "4", temperature=0.7, seed=3)
    for n in (1, 3):
        output = run(llm, script, prompt, "4", temperature=0.7, seed=3, n=n, prompt_logprobs=2)
        assert [branch.error for branch in branches(output)] == [None] * len(branches(output))
        assert len(output.prompt_logprobs) == len(expected) == len(output.prompt_token_ids)
        assert output.prompt_logprobs[0] is None
        for found, wanted in zip(output.prompt_logprobs[1:], expected[1:], strict=True):
            assert list(found) == list(wanted)
            for token, entry in found.items():
                assert entry.rank == wanted[token].rank
                assert entry.logprob == pytest.approx(wanted[token].logprob, abs=CLOSE)
        if script is take_the_prompt_back:
            assert branches(output)[0].text.startswith("Anew")
    assert [len(b.token_ids) for b in branches(alone)] == [len(b.token_ids) for b in branches(output)]
    assert llm.reset_prefix_cache(), "blocks are still in use"


def stopped_alike(llm: LLM, prompt: str, **params: Any) -> Any:
    """Run a plain request and a generation; everything a client sees of them must be the same."""
    params = {"max_tokens": 40, "allowed_token_ids": WORDS, **params}
    expected = plain(llm, prompt, **params).outputs[0]
    output = run(llm, generate, prompt, "100", **params)
    found = output.outputs[0]
    assert found.token_ids == expected.token_ids
    assert found.text == expected.text
    assert (found.finish_reason, found.stop_reason) == (expected.finish_reason, expected.stop_reason)
    [branch] = branches(output)
    assert branch.text.strip() == expected.text.strip()
    assert branch.stop_reason == expected.stop_reason
    return found


@pytest.mark.parametrize("shown", [False, True])
def test_stops_end_a_generation_as_they_end_a_plain_request(llm: LLM, shown: bool) -> None:
    prompt = "The License"
    whole = plain(llm, prompt, max_tokens=40, allowed_token_ids=WORDS).outputs[0]
    text = whole.text
    assert len(text) > 60
    stops = [[text[10:13]], [text[30:38], "never"], ["nor this", text[21], text[19:22]], [text[-2:]]]
    ends = 0
    for stop in stops:
        for min_tokens in (0, 12):
            found = stopped_alike(
                llm, prompt, stop=stop, min_tokens=min_tokens, include_stop_str_in_output=shown
            )
            ends += found.finish_reason == "stop"
    assert ends >= len(stops)
    for min_tokens in (0, 12):
        tokens = [whole.token_ids[9], whole.token_ids[20]]
        found = stopped_alike(
            llm, prompt, stop_token_ids=tokens, min_tokens=min_tokens, include_stop_str_in_output=shown
        )
        assert found.stop_reason in tokens
    assert llm.reset_prefix_cache(), "blocks are still in use"


def test_a_stop_string_counts_in_fixed_text(llm: LLM) -> None:
    output = run(llm, fixed, "Start", " the quick brown fox jumps", stop=["ck br", "fox"], logprobs=1)
    found, [branch] = output.outputs[0], branches(output)
    assert branch.text == found.text == " the qui"
    assert (found.finish_reason, found.stop_reason) == ("stop", "ck br")
    assert (branch.finish_reason, branch.stop_reason) == ("stop", "ck br")
    assert branch.sources == [("spliced", len(branch.token_ids))]
    assert len(found.logprobs) == len(found.token_ids) == len(branch.token_ids)
    shown = run(llm, fixed, "Start", " the quick brown", stop=["ck br"], include_stop_str_in_output=True)
    assert shown.outputs[0].text == branches(shown)[0].text == " the quick br"


def test_a_stop_ends_the_branch_that_holds_it_and_no_other(llm: LLM) -> None:
    output = run(llm, fixed_in_branches, "Start", temperature=1.0, seed=1, n=3, stop=["1 of"])
    texts = [choice.text for choice in output.outputs]
    assert texts[1] == " branch "
    assert texts[0].startswith(" branch 0 of three.") and texts[2].startswith(" branch 2 of three.")
    assert [choice.stop_reason for choice in output.outputs] == [None, "1 of", None]
    assert llm.reset_prefix_cache(), "blocks are still in use"
