"""Controllers that run inside vLLM: programs that decide, token by token, what a model may say."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aici_vllm.model import embedded_model

__all__ = ["embedded_model"]

_HOME = {"embedded_model": "aici_vllm.model"}
"""Where each public name lives. Names load on first use, so that importing the package imports no vLLM."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
