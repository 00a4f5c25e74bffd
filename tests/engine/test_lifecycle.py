"""Pauses, cache resets, aborts, sleep and shutdown, at whatever instant they come."""

import json
import random
from typing import Any

import psutil
import pytest
from vllm import LLM, SamplingParams

import aici_vllm
from aici_vllm import aici
from tests.engine.conftest import SMALL, Engines, exhaustive
from tests.engine.random_model import TOKENS
from tests.engine.random_scripts import controller, random_program
from tests.engine.regimes import REGIMES, Regime
from tests.engine.results_of import branches_of

BOTH_RUNNERS = pytest.mark.parametrize(
    "chosen", [REGIMES[0], exhaustive(REGIMES[3])], ids=lambda chosen: chosen.name
)
PLAIN = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)

SANDBOXED = """
import aici

async def main():
    await aici.FixedTokens(" I say")
    for _ in range(4):
        await aici.gen_tokens(max_tokens=3)
        await aici.FixedTokens(" and")

aici.start(main())
"""


async def endless() -> None:
    if await aici.fork(2):
        await aici.wait_vars("never")
    while True:
        await aici.gen_tokens(max_tokens=2)
        await aici.FixedTokens(" more")


async def wait_for_the_last() -> None:
    index = await aici.fork(16)
    await aici.gen_tokens(max_tokens=1 + index)
    if index < 15:
        await aici.wait_vars("go")
    else:
        aici.set_var("go", "x")
    await aici.FixedTokens(" then")
    await aici.gen_tokens(max_tokens=2)


def requests() -> list[SamplingParams]:
    """Native scripts, sandboxed ones and plain requests."""
    programs = [json.dumps(random_program(random.Random(seed))) for seed in range(400, 408)]
    native = [aici_vllm.request_params(controller, program) for program in programs]
    return [*native, *[aici_vllm.request_params(SANDBOXED)] * 4, *[PLAIN] * 4]


def begin(llm: LLM, params: list[SamplingParams]) -> list[str]:
    """Send requests; the engine works on them while the caller goes on."""
    return [llm.llm_engine.add_request(str(i), "Hello there", one) for i, one in enumerate(params)]


def finish(llm: LLM) -> dict[int, Any]:
    """Outputs of the requests that ended, by their number."""
    outputs = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                outputs[int(output.request_id)] = output
    return outputs


def tokens(output: Any) -> list[list[int]]:
    if output.kv_transfer_params is None:
        return [list(output.outputs[0].token_ids)]
    return [branch.token_ids for branch in branches_of(output)]


def utility(llm: LLM, name: str, *arguments: Any) -> Any:
    """Call a method of the engine's core in its process."""
    return llm.llm_engine.engine_core.call_utility(name, *arguments)  # type: ignore[attr-defined]


def steps(llm: LLM, count: int) -> dict[int, Any]:
    """Take the outputs of a few steps, so that the next action comes later in the requests' lives."""
    outputs = {}
    for _ in range(count):
        if llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                if output.finished:
                    outputs[int(output.request_id)] = output
    return outputs


CHOSEN = [REGIMES[0], exhaustive(REGIMES[1]), exhaustive(REGIMES[3])]


@pytest.fixture(scope="module", params=CHOSEN, ids=lambda chosen: chosen.name)
def chosen(request: pytest.FixtureRequest) -> Regime:
    regime: Regime = request.param
    return regime


@pytest.fixture
def llm(engine: Engines, chosen: Regime) -> LLM:
    return engine(chosen, "random", **aici_vllm.engine_args())


@pytest.mark.parametrize("clear_cache", [False, True])
def test_a_pause_changes_no_token(llm: LLM, clear_cache: bool) -> None:
    begin(llm, requests())
    expected = {i: tokens(output) for i, output in finish(llm).items()}
    begin(llm, requests())
    outputs = {}
    for mode in ("keep", "wait", "keep"):
        outputs |= steps(llm, 3)
        utility(llm, "pause_scheduler", mode, clear_cache)
        utility(llm, "resume_scheduler")
    outputs |= finish(llm)
    assert {i: tokens(output) for i, output in outputs.items()} == expected
    assert llm.reset_prefix_cache(), "blocks are still in use"


def test_resetting_the_cache_under_running_requests_changes_no_token(llm: LLM) -> None:
    begin(llm, requests())
    expected = {i: tokens(output) for i, output in finish(llm).items()}
    begin(llm, requests())
    outputs = {}
    for _ in range(4):
        outputs |= steps(llm, 2)
        assert utility(llm, "reset_prefix_cache", True)
    outputs |= finish(llm)
    assert {i: tokens(output) for i, output in outputs.items()} == expected
    assert llm.reset_prefix_cache(), "blocks are still in use"


def turn_around(worker: Any) -> None:
    """Have the model say what it thought least likely; twice, and it is as before."""
    worker.get_model().model.norm.weight.data.neg_()


async def write_much() -> None:
    await aici.FixedTokens(" so")
    await aici.gen_tokens(max_tokens=300)


def test_weights_updated_in_a_pause_hold_from_there(llm: LLM) -> None:
    request = aici_vllm.request_params(write_much)
    begin(llm, [request])
    (old,) = tokens(finish(llm)[0])
    begin(llm, [request])
    outputs = steps(llm, 3)
    utility(llm, "pause_scheduler", "keep", True)
    llm.collective_rpc(turn_around)
    utility(llm, "resume_scheduler")
    outputs |= finish(llm)
    try:
        (found,) = tokens(outputs[0])
        before = next(at for at, pair in enumerate(zip(found, old, strict=True)) if pair[0] != pair[1])
        text = {"prompt_token_ids": outputs[0].prompt_token_ids + found[:before]}
        # What a script may write: no special token, and no row of the output that is no token.
        plain = SamplingParams(temperature=0.0, max_tokens=len(found) - before)
        plain.allowed_token_ids = list(range(3, TOKENS))
        (fresh,) = llm.generate([text], plain, use_tqdm=False)
        assert 1 < before < len(found)
        assert list(fresh.outputs[0].token_ids) == found[before:]
    finally:
        llm.collective_rpc(turn_around)
        assert llm.reset_prefix_cache(), "blocks are still in use"


def test_aborts_at_any_instant_free_everything_and_harm_nobody(llm: LLM) -> None:
    begin(llm, requests())
    expected = {i: tokens(output) for i, output in finish(llm).items()}
    rng = random.Random(0)
    for instant in range(6):
        ids = begin(llm, [*requests(), aici_vllm.request_params(endless)])
        outputs = steps(llm, instant)
        gone = {0, 3, 9, 13, 16, *rng.sample(range(16), 4)}
        llm.llm_engine.abort_request([ids[i] for i in gone], internal=True)
        outputs |= finish(llm)
        kept = {i: found for i, found in expected.items() if i not in gone}
        assert {i: tokens(o) for i, o in outputs.items() if i not in gone} == kept
        assert llm.reset_prefix_cache(), "blocks are still in use"


def test_a_pause_that_aborts_tells_every_choice(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, n=4, max_tokens=None)
    begin(llm, [aici_vllm.request_params(endless, sampling_params=params), PLAIN])
    steps(llm, 3)
    utility(llm, "pause_scheduler", "abort", True)
    outputs = finish(llm)
    assert {choice.finish_reason for choice in outputs[0].outputs} == {"abort"}
    utility(llm, "resume_scheduler")
    assert llm.generate(["Hello"], PLAIN, use_tqdm=False)[0].outputs[0].finish_reason == "length"
    assert llm.reset_prefix_cache(), "blocks are still in use"


def test_sleep_and_wake(llm: LLM) -> None:
    (before,) = aici_vllm.run(llm, SANDBOXED, ["Hello"])
    llm.sleep(level=1)
    llm.wake_up()
    (after,) = aici_vllm.run(llm, SANDBOXED, ["Hello"])
    assert after.branches[0].token_ids == before.branches[0].token_ids


@BOTH_RUNNERS
def test_more_branches_may_wait_than_can_run(engine: Engines, chosen: Regime) -> None:
    llm = engine(chosen, "random", **SMALL, **aici_vllm.engine_args())
    results = aici_vllm.run(llm, wait_for_the_last, ["Hello"] * 4)
    for result in results:
        assert [branch.error for branch in result.branches] == [None] * 16
    assert llm.reset_prefix_cache(), "blocks are still in use"


def test_a_shutdown_ends_live_scripts_and_leaves_no_process(engine: Engines) -> None:
    llm = engine(REGIMES[0], "random", max_num_seqs=8, **aici_vllm.engine_args())
    forever = SANDBOXED.replace("range(4)", "range(10**9)")
    begin(llm, [*[aici_vllm.request_params(forever)] * 3, aici_vllm.request_params(endless)])
    steps(llm, 10)
    (core,) = llm.llm_engine.engine_core.resources.engine_manager.processes  # type: ignore[attr-defined]
    process = psutil.Process(core.pid)
    tree = [process, *process.children(recursive=True)]
    assert len(tree) > 1, "no worker of the sandbox runs"
    engine.stop(llm)
    _, alive = psutil.wait_procs(tree, timeout=30)
    assert not alive
