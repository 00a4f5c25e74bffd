"""The controller of a served environment: the four functions a REPL is given, and the backend behind them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .backends import BackendLimits, DirectLMBackend, LocalChildRLMBackend
from .chat import ChatFn
from .prompts import RLM_SYSTEM_PROMPT


@dataclass
class RecursiveController:
    """The functions of one environment; the recursive ones are None where depth allows no children."""

    llm_query_fn: Callable[..., str]
    llm_batch_fn: Callable[..., list[str]]
    rlm_query_fn: Callable[..., str] | None
    rlm_batch_fn: Callable[..., list[str]] | None
    backend: Any

    def start_episode(self) -> None:
        """Begin a new episode: children and traces of earlier ones no longer count."""
        limits = getattr(self.backend, "limits", None)
        if limits is not None:
            limits.start_episode()
        self.backend.child_traces.clear()

    def close(self) -> None:
        """Nothing to release."""


def create_server_recursive_controller(
    chat_fn: ChatFn,
    *,
    max_depth: int,
    max_iterations: int,
    system_prompt: str = RLM_SYSTEM_PROMPT,
    max_batch_workers: int = 8,
    max_children_total: int | None = None,
    max_children_per_batch: int | None = None,
    result_truncation_limit: int | None = None,
    per_child_timeout_s: float | None = None,
    env_max_iterations_multiplier: int = 5,
) -> RecursiveController:
    """A controller over `chat_fn`: child RLMs where `max_depth` is above 1, else plain calls only."""
    limits = BackendLimits(
        max_depth=max_depth,
        max_batch_workers=max_batch_workers,
        max_children_total=max_children_total,
        max_children_per_batch=max_children_per_batch,
        result_truncation_limit=result_truncation_limit,
        per_child_timeout_s=per_child_timeout_s,
    )
    if max_depth <= 1:
        direct = DirectLMBackend(chat_fn, limits=limits)
        return RecursiveController(direct.query, direct.query_batched, None, None, direct)
    from .runner import LocalRLMRunner

    backend = LocalChildRLMBackend(
        chat_fn,
        runner_factory=LocalRLMRunner,
        system_prompt=system_prompt,
        max_iterations=max_iterations,
        env_max_iterations_multiplier=env_max_iterations_multiplier,
        limits=limits,
    )
    return RecursiveController(
        backend.query,
        backend.query_batched,
        backend.recursive_query,
        backend.recursive_query_batched,
        backend,
    )
