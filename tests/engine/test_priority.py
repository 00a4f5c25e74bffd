"""Branches have the priority of the request that they came from."""

from vllm import SamplingParams

import aici_vllm
from aici_vllm import aici
from tests.engine.conftest import Engines
from tests.engine.regimes import REGIMES


async def two_branches() -> None:
    await aici.FixedTokens(" The License is")
    await aici.gen_tokens(max_tokens=4)
    index = await aici.fork(2)
    await aici.FixedTokens(f" and {index}")
    await aici.gen_tokens(max_tokens=6)


def test_requests_end_in_the_order_of_their_priorities(engine: Engines) -> None:
    """Two can run at once, so the branches of one request fill the engine."""
    arguments = {"scheduling_policy": "priority", "max_num_seqs": 2, **aici_vllm.engine_args()}
    llm = engine(REGIMES[0], "random", **arguments)
    plain = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    for _ in range(2):
        llm.llm_engine.add_request("blocker", "Hello", plain, priority=-1)
    priorities = [5, 2, 4, 1, 3]
    for priority in priorities:
        params = aici_vllm.request_params(two_branches)
        llm.llm_engine.add_request(str(priority), "Hello there", params, priority=priority)
    ended = []
    while llm.llm_engine.has_unfinished_requests():
        ended += [output.request_id for output in llm.llm_engine.step() if output.finished]
    assert [request_id for request_id in ended if request_id != "blocker"] == ["1", "2", "3", "4", "5"]
    assert llm.reset_prefix_cache(), "blocks are still in use"
