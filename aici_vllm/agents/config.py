"""The settings and counters of retries."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from aici_vllm.agents.scoring import UCT, AbstractScoringMethod, traversal_of


@dataclass
class RetryConfig:
    """How an `AICall` samples and retries, and what it has used so far.

    `retries` and `calls` are counters (fixing rounds and generated samples); they are never reset, so several
    `airetry` calls share the budgets `max_retries` and `max_calls`. `retry_delay` is in seconds.
    `temperature` applies unless the call's `api_kwargs` set one.
    """

    retries: int = 0
    calls: int = 0
    max_retries: int = 10
    max_calls: int = 99
    retry_delay: float = 0
    n_samples: int = 1
    scoring: AbstractScoringMethod = field(default_factory=UCT)
    ordering: str = "PostOrderDFS"
    feedback_inplace: bool = False
    feedback_template: str = "FeedbackFromEvaluator"
    temperature: float = 0.7
    catch_errors: bool = False

    def __post_init__(self) -> None:
        for name in ("retries", "calls", "max_retries", "max_calls", "retry_delay"):
            if getattr(self, name) < 0:
                raise ValueError(f"RetryConfig.{name} must not be negative, got {getattr(self, name)}.")
        if self.n_samples < 1:
            raise ValueError(f"RetryConfig.n_samples must be at least 1, got {self.n_samples}.")
        if not isinstance(self.scoring, AbstractScoringMethod):
            raise TypeError(
                f"RetryConfig.scoring must be a scoring method, got {type(self.scoring).__name__}."
            )
        traversal_of(self.ordering)

    def copy(self) -> RetryConfig:
        """An independent copy."""
        return copy.deepcopy(self)
