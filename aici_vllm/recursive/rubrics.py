"""Rubrics: rewards for a final answer, for a step, and the two together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Rubric:
    """Maps an action and its observation to a reward; subclasses define `forward`."""

    last_score: float | None = None

    def forward(self, action: Any, observation: Any) -> float:
        raise NotImplementedError(f"{type(self).__name__} must define forward(action, observation)")

    def __call__(self, action: Any, observation: Any) -> float:
        self.last_score = self.forward(action, observation)
        return self.last_score

    def reset(self) -> None:
        """Forget what belongs to the episode."""


class _OutcomeRubric(Rubric):
    """Compares the final answer with the expected one; 0.0 while either is missing."""

    def __init__(self) -> None:
        self._expected: str | None = None

    def set_expected(self, expected: str | None) -> None:
        self._expected = expected

    def reset(self) -> None:
        self._expected = None

    def score(self, expected: str, predicted: str) -> float:
        raise NotImplementedError(f"{type(self).__name__} must define score(expected, predicted)")

    def forward(self, action: Any, observation: Any) -> float:
        if self._expected is None or not observation.done:
            return 0.0
        predicted = observation.metadata.get("final_answer")
        if predicted is None:
            return 0.0
        return self.score(str(self._expected), str(predicted))


class ExactMatchRubric(_OutcomeRubric):
    """1.0 when the answers are equal, else 0.0. `normalize` ignores case and outer white space."""

    def __init__(self, normalize: bool = True) -> None:
        super().__init__()
        self._normalize = normalize

    def score(self, expected: str, predicted: str) -> float:
        if self._normalize:
            expected, predicted = expected.strip().lower(), predicted.strip().lower()
        return float(expected == predicted)


class FuzzyMatchRubric(_OutcomeRubric):
    """1.0 when the answers are equal, 0.5 when one contains the other, else 0.0; case is ignored."""

    def score(self, expected: str, predicted: str) -> float:
        expected, predicted = expected.strip().lower(), predicted.strip().lower()
        if expected == predicted:
            return 1.0
        return 0.5 if expected in predicted or predicted in expected else 0.0


class CustomMetricRubric(_OutcomeRubric):
    """The score is `metric_fn(expected, predicted)`."""

    def __init__(self, metric_fn: Callable[[str, str], float]) -> None:
        super().__init__()
        self._metric_fn = metric_fn

    def score(self, expected: str, predicted: str) -> float:
        return self._metric_fn(expected, predicted)


class CodeExecutionRubric(Rubric):
    """A reward per step: one for a block that ran, another for a block that failed."""

    def __init__(self, success_reward: float = 0.0, error_penalty: float = -0.05) -> None:
        self.success_reward = success_reward
        self.error_penalty = error_penalty

    def forward(self, action: Any, observation: Any) -> float:
        return self.success_reward if observation.result.success else self.error_penalty


class REPLRubric(Rubric):
    """The outcome's reward at the end, a penalty for ending without an answer, else the step's reward."""

    def __init__(
        self,
        outcome: Rubric | None = None,
        process: Rubric | None = None,
        failure_reward: float = -0.1,
    ) -> None:
        self.outcome = outcome or ExactMatchRubric()
        self.process = process or CodeExecutionRubric()
        self.failure_reward = failure_reward

    def set_expected(self, expected: str | None) -> None:
        set_expected = getattr(self.outcome, "set_expected", None)
        if set_expected is not None:
            set_expected(expected)

    def forward(self, action: Any, observation: Any) -> float:
        if not observation.done:
            return self.process(action, observation)
        if observation.metadata.get("final_answer") is None:
            return self.failure_reward
        return self.outcome(action, observation)

    def reset(self) -> None:
        self.outcome.reset()
        self.process.reset()
