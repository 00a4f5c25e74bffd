"""`aici_vllm.run` on an in-process engine, in every regime, beside plain requests."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

import aici_vllm
from aici_vllm import aici
from tests.engine.conftest import Engines
from tests.engine.regimes import REGIMES, Regime
from tests.engine.results_of import result_of

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
LONG = " one two three four five six seven eight nine ten" * 30
"""Over two blocks of the CPU backend, which holds 128 tokens in one."""


async def shout(arg: str) -> None:
    await aici.FixedTokens(arg)
    await aici.gen_tokens(max_tokens=4)


async def take_back_twice() -> None:
    await aici.FixedTokens(LONG)
    here = aici.Label()
    for word in (" Paris", " London"):
        await aici.FixedTokens(word + LONG, following=here)
        await aici.gen_tokens(max_tokens=3, store_var=word.strip())


async def many_branches() -> None:
    await aici.FixedTokens(LONG)
    index = await aici.fork(8)
    await aici.FixedTokens(f" {index}")
    await aici.gen_tokens(max_tokens=3)


async def fork_first() -> None:
    await aici.fork(8)
    await aici.gen_tokens(max_tokens=3)


async def wait_for_the_first_child() -> None:
    await aici.FixedTokens(LONG)
    if await aici.fork(2) == 0:
        (found,) = await aici.wait_vars("found")
        await aici.FixedTokens(f" again {len(found)}")
        await aici.gen_tokens(max_tokens=2)
    else:
        await aici.FixedTokens(" first")
        await aici.gen_tokens(max_tokens=4, store_var="found")
        # Ends after the waiting branch has gone on, so that its KV is still there to share.
        await aici.gen_tokens(max_tokens=1)


async def pause() -> None:
    await aici.FixedTokens(" one")
    await aici.Noop()
    await aici.gen_tokens(max_tokens=2)
    await aici.Noop()


def controlled(engine: Engines, regime: Regime) -> LLM:
    return engine(regime, "random", **aici_vllm.engine_args())


def test_plain_and_controlled_requests_mix_in_one_batch(engine: Engines, regime: Regime) -> None:
    llm = controlled(engine, regime)
    prompts = [f"prompt number {i}" for i in range(6)]
    alone = [llm.generate([p], GREEDY, use_tqdm=False)[0].outputs[0].token_ids for p in prompts]
    (single,) = aici_vllm.run(llm, shout, [prompts[0]], controller_arg=" loud")
    params = [GREEDY, aici_vllm.request_params(shout, " loud")] * 3
    outputs = llm.generate([p for i, p in enumerate(prompts)], params, use_tqdm=False)
    for i in (0, 2, 4):
        assert outputs[i].outputs[0].token_ids == alone[i]
    results = [result_of(outputs[i]) for i in (1, 3, 5)]
    (again,) = aici_vllm.run(llm, shout, [prompts[1]], controller_arg=" loud")
    assert results[0].branches[0].token_ids == again.branches[0].token_ids
    assert single.text.startswith(" loud")
    assert llm.reset_prefix_cache(), "blocks are still in use"


def test_backtracking_leaves_no_stale_hash(engine: Engines, regime: Regime) -> None:
    """What a prefix gives must not depend on what was written and taken back behind it before."""
    llm = controlled(engine, regime)
    prompts = ["Start" + LONG + word + LONG for word in (" Paris", " London", " Rome")]
    llm.reset_prefix_cache()
    fresh = [llm.generate([p], GREEDY, use_tqdm=False)[0].outputs[0].token_ids for p in prompts]
    assert llm.reset_prefix_cache()
    (result,) = aici_vllm.run(llm, take_back_twice, ["Start"])
    assert result.branches[0].error is None
    cached = [llm.generate([p], GREEDY, use_tqdm=False)[0].outputs[0].token_ids for p in prompts]
    assert cached == fresh
    assert llm.reset_prefix_cache(), "blocks are still in use"


def prefixes(result: aici_vllm.ControllerResult) -> set[tuple[int, ...]]:
    """Every text that some branch went on from: what must have been computed at least once."""
    sequences = [result.prompt_token_ids + branch.token_ids for branch in result.branches]
    return {tuple(tokens[:end]) for tokens in sequences for end in range(1, len(tokens))}


@pytest.mark.parametrize("controller", [many_branches, wait_for_the_first_child])
def test_branches_compute_what_they_share_once(
    engine: Engines, regime: Regime, controller: Callable[[], Awaitable[None]]
) -> None:
    llm = controlled(engine, regime)
    assert llm.reset_prefix_cache()
    (result,) = aici_vllm.run(llm, controller, ["Start"])
    assert all(branch.error is None for branch in result.branches)
    usage = result.usage
    assert usage.forward_passes == usage.sampled_tokens
    assert usage.computed_tokens - usage.discarded_rows == len(prefixes(result))
    assert llm.reset_prefix_cache(), "blocks are still in use"


def test_a_new_branch_computes_one_token_and_not_the_prompt(engine: Engines, regime: Regime) -> None:
    llm = controlled(engine, regime)
    assert llm.reset_prefix_cache()
    (result,) = aici_vllm.run(llm, fork_first, [LONG])
    usage = result.usage
    assert usage.forward_passes == usage.sampled_tokens == 8 * 3
    # The first branch computes the prompt; then every branch one token for each that it samples.
    assert usage.computed_tokens - usage.discarded_rows == len(result.prompt_token_ids) + 2 + 7 * 3
    assert llm.reset_prefix_cache(), "blocks are still in use"


def test_an_empty_prompt_works(engine: Engines, regime: Regime) -> None:
    (result,) = aici_vllm.run(controlled(engine, regime), shout, [""], controller_arg="hi")
    assert result.branches[0].error is None
    assert len(result.prompt_token_ids) == 1


def test_a_round_that_changes_nothing(engine: Engines) -> None:
    (result,) = aici_vllm.run(controlled(engine, REGIMES[0]), pause, ["Start"])
    assert result.branches[0].error is None
    assert result.branches[0].finish_reason == "stop"
    assert result.usage.sampled_tokens == 2


def test_a_script_can_be_a_path_or_text(engine: Engines, tmp_path: Path) -> None:
    llm = controlled(engine, REGIMES[0])
    source = "import aici\nasync def f():\n    await aici.FixedTokens('Hello')\naici.start(f)\n"
    path = tmp_path / "script.py"
    path.write_text(source)
    texts = [aici_vllm.run(llm, script, ["x"])[0].text for script in (source, path, str(path))]
    assert texts == ["Hello"] * 3


def test_a_seed_makes_branches_differ_and_runs_agree(engine: Engines, regime: Regime) -> None:
    llm = controlled(engine, regime)
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=2000)
    first, second = (aici_vllm.run(llm, many_branches, ["Start"], params)[0] for _ in range(2))
    assert [b.token_ids for b in first.branches] == [b.token_ids for b in second.branches]
    assert len({tuple(b.token_ids[-3:]) for b in first.branches}) > 1


def test_errors_come_before_anything_runs(engine: Engines) -> None:
    llm = controlled(engine, REGIMES[0])
    with pytest.raises(VLLMValidationError, match="line 1"):
        aici_vllm.run(llm, "def f(:\n  pass\n", ["x"])
    with pytest.raises(TypeError, match="async function"):
        aici_vllm.run(llm, lambda: None, ["x"])
    with pytest.raises(VLLMValidationError, match="no_such"):
        aici_vllm.run(llm, "no_such_controller", ["x"])


def test_an_engine_without_the_flags_says_so(engine: Engines) -> None:
    plain = engine(REGIMES[0], "random")
    with pytest.raises(VLLMValidationError, match="--scheduler-cls"):
        aici_vllm.run(plain, shout, ["x"])
    assert plain.generate(["x"], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
