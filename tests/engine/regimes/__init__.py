"""The four engine regimes, and how a process enters one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SHIM = Path(__file__).parent / "shim"


@dataclass(frozen=True)
class Regime:
    """One way to run vLLM: a model runner, and whether scheduling is asynchronous.

    `env` goes into the environment of a server process as it is; `entered` is for the pytest process.
    """

    name: str
    v2: bool
    async_scheduling: bool

    @property
    def env(self) -> dict[str, str]:
        env = {
            "VLLM_USE_V2_MODEL_RUNNER": str(int(self.v2)),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "AICI_TEST_ASYNC_SCHEDULING": str(int(self.async_scheduling)),
            "TRITON_INTERPRET": str(int(self.v2)),
        }
        if self.v2 or self.async_scheduling:  # V1 without async is what vLLM does on a CPU by itself.
            inherited = os.environ.get("PYTHONPATH")
            env["PYTHONPATH"] = os.pathsep.join([str(SHIM), *([inherited] if inherited else [])])
        return env

    @contextmanager
    def entered(self, extra: Mapping[str, str] | None = None) -> Iterator[None]:
        """This process's environment with `env` and `extra` in it while the body runs."""
        changes = {**self.env, **(extra or {})}
        before = {name: os.environ.get(name) for name in changes}
        os.environ.update(changes)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


REGIMES = [
    Regime("v1-sync", v2=False, async_scheduling=False),
    Regime("v1-async", v2=False, async_scheduling=True),
    Regime("v2-sync", v2=True, async_scheduling=False),
    Regime("v2-async", v2=True, async_scheduling=True),
]


def load_shim_here() -> None:
    """Make the pytest process able to configure engines of every regime; call it before vLLM is imported.

    The engine's own processes load the shim by themselves, and only where their regime needs it.
    """
    if "regime_hooks" in sys.modules:
        return
    sys.path.insert(0, str(SHIM))
    try:
        import regime_hooks
    finally:
        sys.path.remove(str(SHIM))
    regime_hooks.accept_triton_on_cpu()
    regime_hooks.let_environment_choose_async_scheduling()
