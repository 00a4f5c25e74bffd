"""The texts for the five outcomes and for errors."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Iterator

import pytest

from aici_vllm.agents import (
    AICall,
    AICode,
    AIMessage,
    CodeEmpty,
    CodeExecutionError,
    CodeFailedEval,
    CodeFailedParse,
    CodeFailedTimeout,
    CodeSuccess,
    CodeTestFailure,
    CodeTimeout,
    UserMessage,
    aicodefixer_feedback,
    code_outcome,
    error_feedback,
    outcome_feedback,
)


def evaluated(code: str = "x = 1", **fields: object) -> AICode:
    """Code with the fields that a run would have left."""
    cb = AICode(code, auto_eval=False)
    cb._parse()
    for name, value in fields.items():
        setattr(cb, name, value)
    return cb


def text(cb: AICode, max_length: int = 512) -> str:
    return aicodefixer_feedback(cb, max_length=max_length)["feedback"]


def test_the_order_of_classification() -> None:
    assert type(code_outcome(evaluated("", error=CodeTimeout("t")))) is CodeEmpty
    assert type(code_outcome(evaluated("x ="))) is CodeFailedParse
    assert type(code_outcome(evaluated(expression=None, error=CodeTimeout("t")))) is CodeFailedParse
    assert type(code_outcome(evaluated(error=CodeTimeout("t")))) is CodeFailedTimeout
    assert type(code_outcome(evaluated(error=ValueError("v")))) is CodeFailedEval
    assert type(code_outcome(evaluated())) is CodeSuccess


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("", CodeEmpty),
        ("x =", CodeFailedParse),
        ("import nope_a", CodeFailedParse),
        ("raise KeyboardInterrupt", CodeFailedTimeout),
        ("1 / 0", CodeFailedEval),
        ("x = 1", CodeSuccess),
    ],
)
def test_outcomes_of_real_runs(code: str, outcome: type) -> None:
    assert type(code_outcome(AICode(code))) is outcome


def test_empty() -> None:
    assert text(evaluated("")) == (
        "**Error Detected**: No Python code found. Always enclose Python code in triple backticks code fence "
        "(```python\\n ... \\n```)."
    )


def test_timeout() -> None:
    assert text(evaluated(error=CodeTimeout("t"))) == (
        "**Error Detected**: Evaluation timed out. Please check your code for infinite loops or other issues."
    )


def test_parse_failure() -> None:
    cb = evaluated(expression=None, error=SyntaxError("s" * 100))
    assert text(cb, 40) == "**Parsing Error Detected:** " + "s" * 40
    cb.stdout = "out"
    assert text(cb, 40) == "**Parsing Error Detected:** " + "s" * 20


def test_success() -> None:
    said = text(evaluated(stdout=""))
    assert said.startswith("Execution has been successful (no errors detected).")
    assert "1-2 challenging unit tests" in said
    assert text(evaluated(stdout="o" * 100), 30) == f"{said}\n\n**Output Captured:** {'o' * 30}"


def test_failed_evaluation_without_output() -> None:
    assert text(evaluated(error=ValueError("bad"))) == "**Error Detected:**\n**ValueError**:\nbad"


def test_failed_evaluation_with_everything() -> None:
    cb = evaluated(
        "a = 1\nb = 2\nc = 3\nd = 4", error=ValueError("bad"), error_lines=[3, 9, 1, 3, 2, 4], stdout="out"
    )
    assert text(cb) == (
        "**Error Detected:**\n**ValueError**:\nbad"
        "\n\n\n\n**Lines that caused the error:**\n- c = 3\n- a = 1\n- b = 2"
        "\n\n**Output Captured:**\n out"
    )


def test_captured_output_gets_what_is_left() -> None:
    cb = evaluated(error=ValueError("v" * 300), stdout="o" * 500)
    said = text(cb, 100)
    head, captured = said.split("\n\n**Output Captured:**\n ")
    # Half of the length for the error, with its heading.
    assert head == "**Error Detected:**\n" + f"**ValueError**:\n{'v' * 300}"[:50]
    assert captured == "o" * (100 - len(head))


def test_long_lines_leave_no_room_but_do_no_harm() -> None:
    cb = evaluated("x = '" + "é" * 900 + "'", error=ValueError("v"), error_lines=[1], stdout="out")
    assert "Output Captured" not in text(cb, 100)


def test_real_failure_end_to_end() -> None:
    message = AIMessage("```python\ndef f(xs):\n    return xs[5]\n\nf([1])\n```")
    said = aicodefixer_feedback([UserMessage("u"), message])["feedback"]
    assert said == (
        "**Error Detected:**\n**IndexError**:\nlist index out of range"
        "\n\n\n\n**Lines that caused the error:**\n-     return xs[5]\n- f([1])"
        "\n\n**Output Captured:**\n IndexError: list index out of range"
    )


def test_what_is_accepted() -> None:
    message = AIMessage("```python\nx = 1\n```")
    call = AICall(print, [UserMessage("u"), message])
    results = [aicodefixer_feedback(x) for x in (AICode("x = 1"), message, [message], call)]
    assert all(result == results[0] for result in results)
    assert list(results[0]) == ["feedback"]
    with pytest.raises(ValueError, match="max_length"):
        aicodefixer_feedback(message, max_length=0)
    for bad in ([UserMessage("u")], [], 3):
        with pytest.raises(TypeError):
            aicodefixer_feedback(bad)  # type: ignore[arg-type]


def test_unsafe_lines_of_a_message_are_skipped() -> None:
    said = aicodefixer_feedback(AIMessage("```python\n!pip install x\nprint('ran')\n```"))["feedback"]
    assert "successful" in said
    assert "**Output Captured:** ran\n" in said
    assert "!!! IMPORTANT: Unsafe lines blocked from execution" in said


@pytest.fixture
def own_success_text() -> Iterator[None]:
    original = outcome_feedback.dispatch(CodeSuccess)

    @outcome_feedback.register
    def _(outcome: CodeSuccess, max_length: int = 512) -> str:
        return f"fine: {outcome.cb.code}"

    yield
    outcome_feedback.register(CodeSuccess, original)


def test_an_outcome_can_be_overridden(own_success_text: None) -> None:
    assert text(evaluated("x = 1")) == "fine: x = 1"
    assert text(evaluated("")).startswith("**Error Detected**")


# error_feedback


def test_no_error() -> None:
    for nothing in (None, "text", 3):
        assert error_feedback(nothing) == "No error found. Ignore."


def test_generic_errors_are_cut_as_a_whole() -> None:
    assert error_feedback(ValueError("bad")) == "**ValueError**:\nbad"
    assert error_feedback(ValueError("b" * 50), max_length=20) == "**ValueError**:\n" + "b" * 4
    assert error_feedback(CodeExecutionError("MyError", "own")) == "**MyError**:\nown"
    assert error_feedback(SyntaxError("s")) == "**SyntaxError**:\ns"


def test_undefined_names() -> None:
    head = "**NameError**:\nname 'NAME' is not defined\n"

    def said(name: str) -> str:
        return error_feedback(NameError(f"name '{name}' is not defined", name=name))

    assert said("foo_bar") == head.replace("NAME", "foo_bar") + (
        "Tip: Does it even exist? Does it need to be imported? Or is it a typo?"
    )
    assert said("sqrt").endswith("Use `from math import sqrt` to use it.")
    assert said("defaultdict").endswith("Use `from collections import defaultdict` to use it.")
    assert said("json").endswith("Use `import json`.")
    assert len(error_feedback(NameError("x" * 900, name="x"))) == 512


def test_missing_modules() -> None:
    assert error_feedback(ModuleNotFoundError("No module named 'nope'", name="nope")) == (
        "**ModuleNotFoundError**:\nNo module named 'nope'"
    )
    assert "Expert Tip" in error_feedback(ModuleNotFoundError("No module named 'sqrt'", name="sqrt"))


def test_failed_tests_are_listed_without_traces() -> None:
    error = CodeTestFailure("2 tests failed.", [("T.a", "AssertionError: 1 != 2"), ("T.b", "KeyError: 3")])
    assert error_feedback(error) == (
        "**CodeTestFailure**:\n2 tests failed.\nT.a: AssertionError: 1 != 2\nT.b: KeyError: 3"
    )


def test_futures_are_unwrapped() -> None:
    failed: concurrent.futures.Future[object] = concurrent.futures.Future()
    failed.set_exception(ValueError("inside"))
    assert error_feedback(failed) == "**ValueError**:\ninside"
    fine: concurrent.futures.Future[object] = concurrent.futures.Future()
    assert error_feedback(fine) == "No error found. Ignore."
    fine.set_result(3)
    assert error_feedback(fine) == "No error found. Ignore."

    async def task() -> str:
        async def fails() -> None:
            raise KeyError("k")

        running = asyncio.create_task(fails())
        await asyncio.wait([running])
        return error_feedback(running)

    assert asyncio.run(task()) == "**KeyError**:\n'k'"


def test_no_text_for_an_unknown_outcome() -> None:
    with pytest.raises(TypeError, match="register"):
        outcome_feedback("other")  # type: ignore[arg-type]
