"""RetryConfig: defaults, printing, copies, bad values."""

from __future__ import annotations

from typing import Any

import pytest

from aici_vllm.agents import UCT, RetryConfig, ThompsonSampling


def test_defaults_in_order() -> None:
    assert str(RetryConfig()) == (
        "RetryConfig(retries=0, calls=0, max_retries=10, max_calls=99, retry_delay=0, n_samples=1, "
        "scoring=UCT(exploration=1.4142135623730951), ordering='PostOrderDFS', feedback_inplace=False, "
        "feedback_template='FeedbackFromEvaluator', temperature=0.7, catch_errors=False)"
    )


def test_copy_and_equality() -> None:
    config = RetryConfig(n_samples=3, scoring=ThompsonSampling(2.0))
    twin = config.copy()
    assert twin == config
    twin.retries += 1
    assert twin != config
    assert config.retries == 0
    assert RetryConfig(scoring=UCT(1.0)) != RetryConfig()


@pytest.mark.parametrize(
    "bad",
    [{"max_retries": -1}, {"max_calls": -1}, {"retry_delay": -1}, {"n_samples": 0}, {"ordering": "BFS"}],
)
def test_bad_values(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        RetryConfig(**bad)


def test_bad_scoring() -> None:
    with pytest.raises(TypeError):
        RetryConfig(scoring="UCT")  # type: ignore[arg-type]
