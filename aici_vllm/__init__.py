"""Controllers that run inside vLLM: programs that decide, token by token, what a model may say."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aici_vllm.client import AsyncClient, Client
    from aici_vllm.engine.scheduler import Scheduler
    from aici_vllm.engine.worker import Worker
    from aici_vllm.model import embedded_model
    from aici_vllm.offline import BranchResult, ControllerResult, Usage, engine_args, request_params, run

__all__ = [
    "AsyncClient",
    "BranchResult",
    "Client",
    "ControllerResult",
    "Scheduler",
    "Usage",
    "Worker",
    "embedded_model",
    "engine_args",
    "request_params",
    "run",
]

_HOME = {
    "AsyncClient": "aici_vllm.client",
    "BranchResult": "aici_vllm.offline",
    "Client": "aici_vllm.client",
    "ControllerResult": "aici_vllm.offline",
    "Scheduler": "aici_vllm.engine.scheduler",
    "Usage": "aici_vllm.offline",
    "Worker": "aici_vllm.engine.worker",
    "embedded_model": "aici_vllm.model",
    "engine_args": "aici_vllm.offline",
    "request_params": "aici_vllm.offline",
    "run": "aici_vllm.offline",
}
"""Where each public name lives. Names load on first use, so that importing the package imports no vLLM."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
