"""Requests that go on from branches of earlier requests."""

import json

import pytest
from vllm import LLM
from vllm.exceptions import VLLMValidationError

import aici_vllm
from aici_vllm import aici
from tests.engine.conftest import Engines
from tests.engine.regimes import REGIMES, Regime
from tests.engine.results_of import branches_of, result_of

LONG = " one two three four five six seven eight nine ten" * 30


async def write(words: str) -> None:
    await aici.FixedTokens(words)
    await aici.gen_tokens(max_tokens=4)


async def two_branches(words: str) -> None:
    await aici.FixedTokens(words)
    await aici.fork(2)
    await aici.gen_tokens(max_tokens=2, temperature=1.0)


async def read_prompt() -> None:
    aici.set_var("prompt", json.dumps(await aici.GetPrompt()))


async def fail() -> None:
    await aici.FixedTokens("x")
    raise ValueError("on purpose")


def controlled(engine: Engines, regime: Regime, **limits: int) -> LLM:
    llm = engine(regime, "random", **aici_vllm.engine_args(**limits))
    assert llm.reset_prefix_cache()
    return llm


def test_a_request_goes_on_token_by_token(engine: Engines, regime: Regime) -> None:
    llm = controlled(engine, regime)

    async def both(words: str) -> None:
        await write(LONG)
        await write(words)

    (whole,) = aici_vllm.run(llm, both, ["Start"], controller_arg=" and then")
    assert llm.reset_prefix_cache()
    (first,) = aici_vllm.run(llm, write, ["Start"], controller_arg=LONG, checkpoint="chat")
    assert first.branches[0].checkpoint == "chat/0"
    (second,) = aici_vllm.run(llm, write, [""], controller_arg=" and then", from_checkpoint="chat/0")
    assert first.branches[0].token_ids + second.branches[0].token_ids == whole.branches[0].token_ids
    # The last token of a branch has no KV yet; then come the fixed text and all samples but the last.
    words = second.usage.spliced_tokens
    assert second.usage.computed_tokens - second.usage.discarded_rows == 1 + words + 3
    assert llm.reset_prefix_cache(), "blocks are still in use"


def test_each_branch_can_be_gone_on_from_more_than_once(engine: Engines, regime: Regime) -> None:
    llm = controlled(engine, regime)
    (made,) = aici_vllm.run(llm, two_branches, ["Start"], controller_arg=LONG, checkpoint="two")
    texts = [made.prompt_token_ids + branch.token_ids for branch in made.branches]
    for _ in range(2):
        for index, text in enumerate(texts):
            (result,) = aici_vllm.run(llm, write, [""], controller_arg=" so", from_checkpoint=f"two/{index}")
            (fresh,) = aici_vllm.run(llm, write, [{"prompt_token_ids": text}], controller_arg=" so")
            assert result.branches[0].token_ids == fresh.branches[0].token_ids
    assert llm.reset_prefix_cache(), "blocks are still in use"


def test_a_checkpoint_is_the_prompt_and_outlives_its_kv(engine: Engines) -> None:
    llm = controlled(engine, REGIMES[0])
    (made,) = aici_vllm.run(llm, write, ["Start"], controller_arg=LONG, checkpoint="kept")
    assert llm.reset_prefix_cache(), "the KV of checkpoints is free for whoever needs it"
    (result,) = aici_vllm.run(llm, read_prompt, [""], from_checkpoint="kept/0")
    assert json.loads(result.variables["prompt"]) == made.prompt_token_ids + made.branches[0].token_ids


def test_a_checkpoint_is_there_until_it_is_dropped_or_others_take_its_place(engine: Engines) -> None:
    llm = controlled(engine, REGIMES[0], checkpoints=3)
    for name in ("a", "b", "bc"):
        aici_vllm.run(llm, write, ["Start"], controller_arg=" x", checkpoint=name)
    drop = aici_vllm.request_params(read_prompt, from_checkpoint="b/0", drop_checkpoints="b")
    (last,) = llm.generate([{"prompt_token_ids": []}], drop, use_tqdm=False)
    branches_of(last)
    assert _error(llm, "b/0") == (
        "there is no checkpoint 'b/0': it was never made, was dropped, or 3 newer ones took its place; send "
        "the text again"
    )
    assert _error(llm, "bc/0") is None
    aici_vllm.run(llm, two_branches, ["Start"], controller_arg=" x", checkpoint="d")
    assert "no checkpoint 'a/0'" in (_error(llm, "a/0") or "")
    assert _error(llm, "bc/0") is None
    assert llm.reset_prefix_cache(), "blocks are still in use"


def test_failed_branches_leave_no_checkpoint(engine: Engines) -> None:
    llm = controlled(engine, REGIMES[0])
    (failed,) = aici_vllm.run(llm, fail, ["Start"], checkpoint="failed")
    assert failed.branches[0].checkpoint is None
    assert _error(llm, "failed/0") is not None


def test_what_cannot_be_asked_for_is_refused(engine: Engines) -> None:
    llm = controlled(engine, REGIMES[0])
    with pytest.raises(VLLMValidationError, match="controller_from brings its own text"):
        aici_vllm.run(llm, write, ["Some text"], from_checkpoint="a/0")
    with pytest.raises(VLLMValidationError, match="1 to 200 characters"):
        aici_vllm.run(llm, write, ["Start"], checkpoint="a" * 201)
    with pytest.raises(ValueError, match="names the branches of one prompt, not of 2"):
        aici_vllm.run(llm, write, ["Start", "Stop"], checkpoint="a")
    aici_vllm.run(llm, write, ["Start"], checkpoint="mine")
    params = aici_vllm.request_params(read_prompt, from_checkpoint="mine/0")
    prompt = {"prompt_token_ids": [], "cache_salt": "another tenant"}
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    assert "another LoRA adapter or cache_salt" in (result_of(output).branches[0].error or "")


def _error(llm: LLM, name: str) -> str | None:
    (result,) = aici_vllm.run(llm, read_prompt, [""], from_checkpoint=name)
    return result.branches[0].error
