"""Rewards, with the documented values as oracle."""

import pytest

from aici_vllm.recursive import (
    CodeBlockResult,
    CodeExecutionRubric,
    CustomMetricRubric,
    ExactMatchRubric,
    FuzzyMatchRubric,
    REPLAction,
    REPLObservation,
    REPLRubric,
    Rubric,
)

ACTION = REPLAction(code="x")


def observed(answer=None, done=True, success=True):
    return REPLObservation(
        result=CodeBlockResult(success=success), done=done, metadata={"final_answer": answer}
    )


@pytest.mark.parametrize(
    ("rubric", "expected", "answer", "reward"),
    [
        (ExactMatchRubric(), "Paris", " paris ", 1.0),
        (ExactMatchRubric(), "Paris", "Rome", 0.0),
        (ExactMatchRubric(normalize=False), "Paris", "paris", 0.0),
        (ExactMatchRubric(normalize=False), "Paris", "Paris", 1.0),
        (FuzzyMatchRubric(), "Paris", "PARIS", 1.0),
        (FuzzyMatchRubric(), "Paris", "It is paris.", 0.5),
        (FuzzyMatchRubric(), "It is Paris.", "paris", 0.5),
        (FuzzyMatchRubric(), "Paris", "Rome", 0.0),
        (CustomMetricRubric(lambda expected, predicted: len(expected) - len(predicted)), "abc", "a", 2),
    ],
)
def test_outcomes(rubric, expected, answer, reward):
    rubric.set_expected(expected)
    assert rubric(ACTION, observed(answer)) == reward == rubric.last_score
    assert rubric(ACTION, observed(answer, done=False)) == 0.0
    assert rubric(ACTION, observed(None)) == 0.0
    rubric.reset()
    assert rubric(ACTION, observed(answer)) == 0.0


def test_steps():
    assert CodeExecutionRubric()(ACTION, observed(done=False)) == 0.0
    assert CodeExecutionRubric()(ACTION, observed(done=False, success=False)) == -0.05
    assert CodeExecutionRubric(0.1, -1.0)(ACTION, observed(done=False)) == 0.1


def test_the_composite():
    rubric = REPLRubric()
    rubric.set_expected("42")
    assert rubric(ACTION, observed("42")) == 1.0
    assert rubric(ACTION, observed("41")) == 0.0
    assert rubric(ACTION, observed(None)) == -0.1
    assert rubric(ACTION, observed(None, done=False, success=False)) == -0.05
    assert rubric(ACTION, observed(None, done=False)) == 0.0
    rubric.reset()
    assert rubric(ACTION, observed("42")) == 0.0


def test_a_rubric_must_say_how_it_rates():
    with pytest.raises(NotImplementedError, match="forward"):
        Rubric()(ACTION, observed())
