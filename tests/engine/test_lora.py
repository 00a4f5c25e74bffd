"""Branches run with the LoRA adapter of their request, and share nothing with those of another one."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

import aici_vllm
from aici_vllm import aici
from tests.engine.conftest import SMALL, Engines, exhaustive
from tests.engine.random_adapter import merged_model, random_adapter
from tests.engine.random_model import TOKENS
from tests.engine.random_scripts import controller, random_program
from tests.engine.reference import Reference
from tests.engine.regimes import REGIMES, Regime
from tests.engine.results_of import branches_of, result_of
from tests.engine.test_exactness import check_branch

ENGINE = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8}
"""A place more than there are adapters: on a CPU, vLLM uses the last place for rows without an adapter."""
LONG = " one two three four five six seven eight nine ten" * 30
"""Several blocks of the CPU backend."""
WORDS = list(range(259, TOKENS))
"""Tokens with text of their own."""

BOTH_RUNNERS = pytest.mark.parametrize(
    "chosen", [exhaustive(REGIMES[0]), REGIMES[3]], ids=lambda chosen: chosen.name
)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[LoRARequest | None]:
    """No adapter, and two."""
    folder = tmp_path_factory.mktemp("adapters")
    made = [random_adapter(folder / f"a{i}", seed=i) for i in (1, 2)]
    return [None, *(LoRARequest(f"a{i}", i, str(path)) for i, path in enumerate(made, 1))]


@pytest.fixture(scope="module")
def references(
    random_folder: Path, adapters: list[LoRARequest | None], tmp_path_factory: pytest.TempPathFactory
) -> list[Reference]:
    """What the model says without and with each adapter, by `transformers`, which is shown merged weights."""
    folder = tmp_path_factory.mktemp("merged")
    merged = [merged_model(random_folder, Path(a.lora_path), folder / a.lora_name) for a in adapters if a]
    return [Reference(random_folder), *map(Reference, merged)]


@BOTH_RUNNERS
def test_random_scripts_are_greedy_exact_under_their_adapters(
    engine: Engines, chosen: Regime, adapters: list[LoRARequest | None], references: list[Reference]
) -> None:
    """Without an adapter, with one, and with another, in one batch."""
    llm = engine(chosen, "random", **ENGINE, **aici_vllm.engine_args())
    programs = [json.dumps(random_program(random.Random(seed))) for seed in range(600, 618)]
    which = [i % 3 for i in range(len(programs))]
    params = [aici_vllm.request_params(controller, program) for program in programs]
    outputs = llm.generate(
        ["Hello there"] * len(params), params, use_tqdm=False, lora_request=[adapters[i] for i in which]
    )
    compared = [0, 0, 0]
    for i, output in zip(which, outputs, strict=True):
        for branch in branches_of(output):
            compared[i] += check_branch(references[i], f"adapter {i}", output.prompt_token_ids, branch)
    assert min(compared) > 30
    assert llm.reset_prefix_cache(), "blocks are still in use"


async def generate(arg: str) -> None:
    """Fixed text, 6 tokens, 3 branches, fixed text, 6 tokens."""
    await aici.FixedTokens(arg)
    await aici.gen_tokens(max_tokens=6)
    index = await aici.fork(3)
    await aici.FixedTokens(f" branch {index}")
    await aici.gen_tokens(max_tokens=6)


def run(llm: LLM, adapter: LoRARequest | None, prompt: Any, arg: str, **names: str) -> Any:
    merged = SamplingParams(temperature=0.0, max_tokens=None, allowed_token_ids=WORDS)
    params = aici_vllm.request_params(generate, arg, merged, **names)
    return llm.generate([prompt], params, use_tqdm=False, lora_request=adapter)[0]


def plain(llm: LLM, adapter: LoRARequest | None, tokens: list[int], **more: Any) -> Any:
    """What vLLM says after `tokens` by itself."""
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, allowed_token_ids=WORDS, **more)
    return llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False, lora_request=adapter)[0]


def check_as_plain(llm: LLM, adapter: LoRARequest | None, prompt: list[int], output: Any) -> None:
    """Every run of sampled tokens is what a plain request of the text before it gives, computed anew."""
    found = branches_of(output)
    assert len(found) == 3
    for branch in found:
        tokens = list(prompt)
        at = 0
        for kind, count in branch.sources:
            run_of = branch.token_ids[at : at + count]
            if kind == "sampled":
                assert llm.reset_prefix_cache()
                assert plain(llm, adapter, tokens).outputs[0].token_ids == run_of
            tokens += run_of
            at += count


@BOTH_RUNNERS
def test_branches_say_what_plain_requests_of_their_text_say(
    engine: Engines, chosen: Regime, adapters: list[LoRARequest | None]
) -> None:
    llm = engine(chosen, "random", **ENGINE, **aici_vllm.engine_args())
    said = set()
    for adapter in adapters:
        assert llm.reset_prefix_cache()
        output = run(llm, adapter, "Hello there", LONG)
        check_as_plain(llm, adapter, output.prompt_token_ids, output)
        said |= {tuple(branch.token_ids) for branch in branches_of(output)}
    assert len(said) == 9, "the adapters change nothing"


@BOTH_RUNNERS
def test_prefixes_are_cached_for_their_adapter_alone(
    engine: Engines, chosen: Regime, adapters: list[LoRARequest | None]
) -> None:
    """Whoever comes first: what a controller fixed under one adapter serves no request under another."""
    llm = engine(chosen, "random", **ENGINE, **aici_vllm.engine_args())
    for first in adapters:
        assert llm.reset_prefix_cache()
        output = run(llm, first, "Hello there", LONG)
        text = output.prompt_token_ids + branches_of(output)[0].token_ids
        for other in adapters:
            cached = plain(llm, other, text).num_cached_tokens
            assert cached >= 256 if other is first else cached == 0
        assert llm.reset_prefix_cache()
        plain(llm, first, text)
        other = adapters[adapters.index(first) - 1]
        output = run(llm, other, "Hello there", LONG)
        check_as_plain(llm, other, output.prompt_token_ids, output)


@BOTH_RUNNERS
def test_a_checkpoint_is_gone_on_from_under_its_adapter_alone(
    engine: Engines, chosen: Regime, adapters: list[LoRARequest | None]
) -> None:
    llm = engine(chosen, "random", **ENGINE, **aici_vllm.engine_args())
    changed = LoRARequest("a1", 3, adapters[2].lora_path)  # type: ignore[union-attr]
    for made_with in adapters:
        assert llm.reset_prefix_cache()
        made = run(llm, made_with, "Hello there", LONG, checkpoint="kept")
        text = made.prompt_token_ids + branches_of(made)[1].token_ids
        for other in (*adapters, changed):
            output = run(llm, other, {"prompt_token_ids": []}, " so", from_checkpoint="kept/1")
            if other is made_with:
                check_as_plain(llm, other, text, output)
            else:
                assert [branch.error for branch in result_of(output).branches] == [
                    "checkpoint 'kept/1' was made with another LoRA adapter or cache_salt"
                ]
    assert llm.reset_prefix_cache(), "blocks are still in use"


@pytest.mark.exhaustive
def test_more_adapters_than_fit_take_turns_in_a_small_cache(
    engine: Engines, adapters: list[LoRARequest | None], references: list[Reference]
) -> None:
    """Branches that wait for their adapter's turn lose their blocks to those that run."""
    llm = engine(REGIMES[3], "random", **{**ENGINE, **SMALL, "max_loras": 1}, **aici_vllm.engine_args())
    programs = [json.dumps(random_program(random.Random(seed))) for seed in range(600, 618)]
    which = [1 + i % 2 for i in range(len(programs))]
    params = [aici_vllm.request_params(controller, program) for program in programs]
    outputs = llm.generate(
        ["Hello there"] * len(params), params, use_tqdm=False, lora_request=[adapters[i] for i in which]
    )
    compared = 0
    for i, output in zip(which, outputs, strict=True):
        for branch in branches_of(output):
            compared += check_branch(references[i], f"adapter {i}", output.prompt_token_ids, branch)
    assert compared > 100
    assert llm.reset_prefix_cache(), "blocks are still in use"
