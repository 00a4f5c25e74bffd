"""Two workers for one engine, two engines for one server: the same tokens, forks and checkpoints."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest

import aici_vllm
from tests.engine.conftest import Engines
from tests.engine.exact_scripts import run_exactly
from tests.engine.reference import Reference, compare_with_best
from tests.engine.regimes import REGIMES
from tests.engine.results_of import branches_of
from tests.engine.test_checkpoints import LONG, two_branches, write
from tests.engine.test_server import Server, start_server

CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}

SCRIPT = """
import aici

async def generate(generations, **rule):
    start = len(aici.get_tokens())
    tokens = await aici.gen_tokens(max_tokens=6, **rule)
    pattern = '"regex", "' + rule["regex"] + '"' if rule else '"any", null'
    generations.append("[" + str(start) + ", " + str(len(tokens)) + ", " + pattern + "]")

async def main():
    generations = []
    await aici.FixedTokens(aici.controller_arg())
    await generate(generations)
    index = await aici.fork(3)
    await aici.FixedTokens(" and " + str(index))
    await generate(generations, regex="[a-z ]{3,12}")
    aici.set_var("last" + str(index), "x")
    print("@[" + ", ".join(generations) + "]")

aici.start(main())
"""


def test_tensor_parallel_workers_all_get_the_masks(
    engine: Engines, random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each worker samples for itself: without its masks, its next forward pass would be of another token."""
    for name, value in CORES.items():
        monkeypatch.setenv(name, value)
    two = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "max_num_seqs": 32}
    llm = engine(REGIMES[3], "random", **two, **aici_vllm.engine_args())
    run_exactly(llm, range(700, 710), partial(compare_with_best, Reference(random_folder)))

    (made,) = aici_vllm.run(llm, two_branches, ["Start"], controller_arg=LONG, checkpoint="two")
    for branch in made.branches:
        text = made.prompt_token_ids + branch.token_ids
        (result,) = aici_vllm.run(llm, write, [""], controller_arg=" so", from_checkpoint=branch.checkpoint)
        (fresh,) = aici_vllm.run(llm, write, [{"prompt_token_ids": text}], controller_arg=" so")
        assert result.branches[0].token_ids == fresh.branches[0].token_ids
    assert llm.reset_prefix_cache(), "blocks are still in use"


@pytest.fixture(scope="module")
def server(random_folder: Path) -> Iterator[Server]:
    """Two engines behind two API servers."""
    flags = ["--data-parallel-size", "2", "--api-server-count", "2", "--max-num-seqs", "16"]
    yield from start_server(random_folder, *flags)


def complete(server: Server, words: str = "", rank: int | None = None, **more: Any) -> Any:
    headers = {} if rank is None else {"X-data-parallel-rank": str(rank)}
    names = {name: more.pop(name) for name in list(more) if name.startswith("controller")}
    xargs = {"controller": SCRIPT, "controller_arg": words, **names}
    arguments = {"prompt": "Hello there", "max_tokens": 1500, "temperature": 0.0, **more}
    body = {"vllm_xargs": xargs, "return_token_ids": True}
    client = server.client.with_options(timeout=60)
    return client.completions.create(model="m", extra_body=body, extra_headers=headers, **arguments)


def prompt_of(reference: Reference, text: str) -> list[int]:
    return list(reference.tokenizer(text).input_ids)


def requests_done(server: Server) -> dict[str, float]:
    """Engine → requests that it has finished."""
    lines = server.http.get("/metrics").text.splitlines()
    done: dict[str, float] = {}
    for line in lines:
        if line.startswith("vllm:request_success_total{"):
            rank = line.partition('engine="')[2].partition('"')[0]
            done[rank] = done.get(rank, 0) + float(line.split()[-1])
    return done


def test_data_parallel_engines_both_run_controllers(server: Server, random_folder: Path) -> None:
    reference = Reference(random_folder)
    words = [" The capital of France is", " 12 +", "\n\n-", " she said", LONG, ". Then"]
    with ThreadPoolExecutor(12) as pool:
        outputs = list(pool.map(lambda text: complete(server, text), words * 2))
    compared = 0
    for output in outputs:
        found = branches_of(output)
        assert len(found) == 3
        assert set(output.kv_transfer_params["controller"]["variables"]) == {"last0", "last1", "last2"}
        for branch in found:
            compared += compare_with_best(reference, prompt_of(reference, "Hello there"), branch)
    assert compared > 100
    done = requests_done(server)
    assert set(done) == {"0", "1"} and min(done.values()) > 0


def test_choices_of_one_request_meet_in_one_engine(server: Server) -> None:
    """vLLM sends each choice to the engine that has least to do."""
    with ThreadPoolExecutor(6) as pool:
        outputs = list(pool.map(lambda _: complete(server, " so", n=3, temperature=1.0), range(6)))
    for output in outputs:
        found = branches_of(output)
        assert [choice.token_ids for choice in output.choices] == [branch.token_ids for branch in found]


def test_a_checkpoint_is_gone_on_from_in_its_engine(server: Server, random_folder: Path) -> None:
    made = branches_of(complete(server, LONG, rank=1, controller_checkpoint="kept"))
    assert [branch.checkpoint for branch in made] == ["kept/0", "kept/1", "kept/2"]
    again = branches_of(complete(server, " so", rank=1, prompt="", controller_from="kept/2"))
    text = prompt_of(Reference(random_folder), "Hello there") + made[2].token_ids
    whole = branches_of(complete(server, " so", prompt=text))
    assert [branch.token_ids for branch in again] == [branch.token_ids for branch in whole]
    elsewhere = complete(server, " so", rank=0, prompt="", controller_from="kept/2")
    error = elsewhere.kv_transfer_params["controller"]["branches"][0]["error"]
    assert "there is no checkpoint 'kept/2'" in error
    for names in ({"controller_from": "kept/2", "prompt": ""}, {"controller_checkpoint": "other"}):
        with pytest.raises(openai.BadRequestError, match="X-data-parallel-rank: 0 to 1"):
            complete(server, " so", **names)
