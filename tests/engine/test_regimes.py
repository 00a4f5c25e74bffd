"""The regimes are what they say, and an unmodified vLLM gives the same greedy text in each."""

from __future__ import annotations

from typing import Any

from vllm import SamplingParams

from tests.engine.conftest import Engines
from tests.engine.regimes import Regime

QUESTION: list[Any] = [
    {"role": "user", "content": "What is the capital of Italy? Answer in one short sentence."}
]


def inside(worker: Any) -> tuple[str, bool]:
    """What the worker process itself runs: the module of its model runner, and async scheduling."""
    return type(worker.model_runner).__module__, worker.vllm_config.scheduler_config.async_scheduling


def test_regime_is_what_it_says(engine: Engines, regime: Regime) -> None:
    runner = "vllm.v1.worker.cpu.model_runner" if regime.v2 else "vllm.v1.worker.cpu_model_runner"
    assert engine(regime).collective_rpc(inside) == [(runner, regime.async_scheduling)]


def test_embedded_model_answers_alike(engine: Engines, regime: Regime) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=32)
    [answer] = engine(regime).chat(QUESTION, greedy, use_tqdm=False)
    assert answer.outputs[0].text == "The capital of Italy is Rome."


def test_random_model_runs(engine: Engines, regime: Regime) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    alone, *batch = engine(regime, "random").generate(["Licensor"] * 3, greedy, use_tqdm=False)
    assert len(set(alone.outputs[0].token_ids)) > 4
    assert all(one.outputs[0].token_ids == alone.outputs[0].token_ids for one in batch)
