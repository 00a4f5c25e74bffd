"""Engines for the tests: started when first asked for, one after the other, and stopped at the end."""

from __future__ import annotations

import gc
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.engine.random_model import random_model
from tests.engine.regimes import REGIMES, Regime

if TYPE_CHECKING:
    from vllm import LLM

LIVE_AT_ONCE = 2

ENGINE_ARGS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 2048,
    "seed": 0,
}

SMALL: dict[str, Any] = {"max_model_len": 1024, "num_gpu_blocks_override": 12, "max_num_seqs": 16}
"""Engine arguments for a KV cache that holds fewer branches than run."""

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
}

# Read by both ends of an engine at every call; with it, `collective_rpc` takes functions.
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"


BETWEEN = {"v1-async", "v2-sync"}
"""Regimes with one of the two differences between the simplest regime and that of a GPU."""
IN_EVERY_REGIME = "test_random_scripts_are_greedy_exact[{}-random]"
SLOWEST = "test_random_scripts_are_greedy_exact[v2-async-embedded]"
"""There Triton is interpreted for a real model; the random one shows the same."""


def exhaustive(value: Any) -> Any:
    """A parameter that only `make test-full` takes."""
    return pytest.param(value, marks=pytest.mark.exhaustive)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave to `make test-full` what is slowest, and the regimes in between but for random scripts."""
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        regimes = [value.name for value in params.values() if isinstance(value, Regime)]
        between = BETWEEN.intersection(regimes) and item.name != IN_EVERY_REGIME.format(*regimes)
        if between or item.name == SLOWEST:
            item.add_marker("exhaustive")


class Engines:
    """`engine(regime, model="embedded", **engine_args)` gives a running `LLM` in a process of its own.

    The same call gives the same engine while it lives; at most `LIVE_AT_ONCE` live, so ask again in each test
    rather than keep one. `model` is `"embedded"`, `"random"`, or a folder. `engine_args` are those of `LLM`,
    on top of `ENGINE_ARGS`. The regime's environment holds while the engine starts and no longer: what vLLM
    reads from it later in the pytest process, such as `vllm_config.use_v2_model_runner`, says nothing of the
    engine; ask its workers.
    """

    def __init__(self, models: dict[str, Path]) -> None:
        self.models = models
        self._live: OrderedDict[str, LLM] = OrderedDict()

    def __call__(self, regime: Regime, model: str | Path = "embedded", **engine_args: Any) -> LLM:
        key = repr((regime, str(model), sorted(engine_args.items())))
        if key not in self._live:
            while len(self._live) >= LIVE_AT_ONCE:
                self._stop_oldest()
            self._live[key] = self._start(regime, model, engine_args)
        self._live.move_to_end(key)
        return self._live[key]

    def stop(self, llm: LLM) -> None:
        """Stop one engine."""
        for key, live in list(self._live.items()):
            if live is llm:
                self._live.move_to_end(key, last=False)
                self._stop_oldest()

    def close(self) -> None:
        """Stop every engine."""
        while self._live:
            self._stop_oldest()

    def _start(self, regime: Regime, model: str | Path, engine_args: dict[str, Any]) -> LLM:
        from vllm import LLM

        folder = self.models.get(str(model), Path(model))
        with regime.entered(ENVIRONMENT):
            return LLM(str(folder), **{**ENGINE_ARGS, **engine_args})

    def _stop_oldest(self) -> None:
        _, llm = self._live.popitem(last=False)
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


@pytest.fixture(scope="session")
def engine(embedded_folder: Path, random_folder: Path) -> Iterator[Engines]:
    """The engines of this test run; see `Engines`."""
    engines = Engines({"embedded": embedded_folder, "random": random_folder})
    yield engines
    engines.close()


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the random-weight model."""
    return random_model(tmp_path_factory.mktemp("random-model"))


@pytest.fixture(scope="session", params=REGIMES, ids=lambda regime: regime.name)
def regime(request: pytest.FixtureRequest) -> Regime:
    """Each regime in turn; pytest runs all tests of one before it goes on to the next."""
    chosen: Regime = request.param
    return chosen
