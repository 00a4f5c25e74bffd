"""The reference interpreter by hand: short programs, whose outcome is written here."""

from __future__ import annotations

from typing import Any

import pytest

from tests.simulator.model import EOS, PLAIN_TOKENS, Prefix, encode, next_token, text_of
from tests.simulator.reference import Expected, run_plain, run_program

PROMPT = encode("ab")


def run(program: list[Any], max_tokens: int = 50, context: int = 60) -> Expected:
    return run_program(Prefix(), program, PROMPT, max_tokens, context)


def texts(expected: Expected) -> list[tuple[str | None, str, str]]:
    return [(o.path, text_of(o.tokens), o.reason) for o in expected.outcomes]


def test_fixed_text_and_labels() -> None:
    found = run([["fixed", "cd"], ["mark"], ["fixed", "ghost"], ["back", 0, "de"]])
    assert texts(found) == [("0", "cdde", "stop")]
    assert (found.sampled, found.spliced) == (0, 3)


def test_a_label_before_the_first_await_takes_the_prompt_back() -> None:
    assert texts(run([["mark"], ["fixed", "cd"], ["back", 0, "no"]])) == [("0", "no", "stop")]


def test_a_label_over_which_text_was_taken_back_is_gone() -> None:
    program = [["fixed", "a"], ["mark"], ["fixed", "b"], ["mark"], ["back", 0, "c"], ["back", 1, "d"]]
    assert texts(run(program)) == [("0", "ac", "stop")]


def test_generation_is_the_models_choice_of_each_prefix() -> None:
    found = run([["gen", None, 3, None, None, None]])
    prefix, tokens = Prefix().then_all(PROMPT), list[int]()
    while len(tokens) < 3 and EOS not in tokens:
        tokens.append(next_token(prefix, PLAIN_TOKENS))
        prefix = prefix.then(tokens[-1])
    assert found.outcomes[0].tokens == tokens == run_plain(Prefix(), PROMPT, 3, 60)
    assert found.sampled == len(tokens)


def test_branches_wait_for_variables_in_any_order() -> None:
    children = [[None, [["wait", ["v0"]]]], [None, [["set", "v0", "op"]]]]
    assert sorted(texts(run([["fork", children]]))) == [("0.0", "op", "stop"), ("0.1", "", "stop")]


def test_nobody_left_to_set_a_variable_is_a_deadlock() -> None:
    assert texts(run([["wait", ["v0"]]])) == [("0", "", "deadlock")]


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ([["raise"]], "fail"),
        ([["splice", 3, ""]], "fail"),
        ([["fixed", "a" * 200]], "length"),
        ([["fixed", "badbad" * 9]], "length"),
        ([["splice", 2, ""], ["gen", None, 1, None, None, None]], "fail"),
        ([["stop"], ["raise"]], "stop"),
    ],
)
def test_ends(program: list[Any], reason: str) -> None:
    assert [outcome.reason for outcome in run(program, max_tokens=10).outcomes] == [reason]


def test_text_beyond_the_context_fails() -> None:
    assert [outcome.reason for outcome in run([["fixed", "a" * 200]], max_tokens=500).outcomes] == ["fail"]
