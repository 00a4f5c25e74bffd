"""What a model is told about its code: outcomes of a run, and the text for each."""

from __future__ import annotations

import asyncio
import builtins
import concurrent.futures
import functools
import importlib
import sys
from typing import TYPE_CHECKING, Any

from aici_vllm.agents.coding.evaluation import AICode, type_name
from aici_vllm.agents.errors import CodeTestFailure, CodeTimeout
from aici_vllm.agents.messages import AIMessage

if TYPE_CHECKING:
    from aici_vllm.agents.calls import AICall

# Modules whose names models use without importing them.
COMMON_MODULES = (
    "math",
    "collections",
    "itertools",
    "functools",
    "typing",
    "dataclasses",
    "datetime",
    "random",
    "statistics",
    "pathlib",
    "decimal",
    "fractions",
    "heapq",
    "bisect",
    "operator",
    "string",
)

MAX_ERROR_LINES = 3


class AbstractCodeOutcome:
    """Base of what can come of running code; `cb` is the code."""

    def __init__(self, cb: AICode) -> None:
        self.cb = cb


class CodeEmpty(AbstractCodeOutcome):
    """There was no code."""


class CodeFailedParse(AbstractCodeOutcome):
    """The code could not be parsed, or was refused as unsafe."""


class CodeFailedTimeout(AbstractCodeOutcome):
    """The code ran too long, or interrupted itself."""


class CodeFailedEval(AbstractCodeOutcome):
    """The code raised an exception."""


class CodeSuccess(AbstractCodeOutcome):
    """The code ran without an error."""


def code_outcome(cb: AICode) -> AbstractCodeOutcome:
    """Which of the five outcomes this evaluated code had."""
    if not cb.code.strip():
        return CodeEmpty(cb)
    if not cb.is_parsed:
        return CodeFailedParse(cb)
    if isinstance(cb.error, CodeTimeout):
        return CodeFailedTimeout(cb)
    if cb.error is not None:
        return CodeFailedEval(cb)
    return CodeSuccess(cb)


@functools.singledispatch
def outcome_feedback(outcome: AbstractCodeOutcome, max_length: int = 512) -> str:
    """The text for an outcome; `@outcome_feedback.register` with an outcome class replaces the one for it."""
    raise TypeError(
        f"No feedback is defined for {type(outcome).__name__}; register one with outcome_feedback."
    )


@outcome_feedback.register
def _(outcome: CodeEmpty, max_length: int = 512) -> str:
    return (
        "**Error Detected**: No Python code found. Always enclose Python code in triple backticks code fence "
        "(```python\\n ... \\n```)."
    )


@outcome_feedback.register
def _(outcome: CodeFailedParse, max_length: int = 512) -> str:
    return f"**Parsing Error Detected:** {str(outcome.cb.error)[: _share(outcome.cb, max_length)]}"


@outcome_feedback.register
def _(outcome: CodeFailedTimeout, max_length: int = 512) -> str:
    return (
        "**Error Detected**: Evaluation timed out. Please check your code for infinite loops or other issues."
    )


@outcome_feedback.register
def _(outcome: CodeFailedEval, max_length: int = 512) -> str:
    cb = outcome.cb
    parts = [f"**Error Detected:**\n{error_feedback(cb.error, max_length=_share(cb, max_length))}"]
    source = cb.code.split("\n")
    lines = [source[number - 1] for number in dict.fromkeys(cb.error_lines) if 1 <= number <= len(source)]
    if lines:
        listed = "\n".join(f"- {line}" for line in lines[:MAX_ERROR_LINES])
        parts.append(f"\n\n**Lines that caused the error:**\n{listed}")
    left = max_length - len("\n\n".join(parts))
    if cb.stdout and left > 0:
        parts.append(f"**Output Captured:**\n {cb.stdout[:left]}")
    return "\n\n".join(parts)


@outcome_feedback.register
def _(outcome: CodeSuccess, max_length: int = 512) -> str:
    text = (
        "Execution has been successful (no errors detected). "
        "Consider adding 1-2 challenging unit tests for the main function (eg, edge cases or wrong input)."
    )
    stdout = outcome.cb.stdout
    return f"{text}\n\n**Output Captured:** {stdout[:max_length]}" if stdout else text


def _share(cb: AICode, max_length: int) -> int:
    """What an error's text may use: half where captured output follows."""
    return max_length // 2 if cb.stdout else max_length


def aicodefixer_feedback(x: AICode | AIMessage | list[Any] | AICall, max_length: int = 512) -> dict[str, str]:
    """Feedback about code, as the argument `feedback` of the next call.

    `x` is evaluated code, a message with code (it is run, unsafe lines skipped), a conversation ending in
    one, or a call. `max_length` bounds the error's text and the captured output, in characters.
    """
    if max_length <= 0:
        raise ValueError(f"max_length must be positive, got {max_length}.")
    return {"feedback": outcome_feedback(code_outcome(evaluated_code(x)), max_length)}


def evaluated_code(x: AICode | AIMessage | list[Any] | AICall) -> AICode:
    """The code of `x`, run. Raises TypeError where there is no reply to take code from."""
    if isinstance(x, AICode):
        return x
    message = x if isinstance(x, AIMessage) else _last_reply(x)
    return AICode(message, skip_unsafe=True, capture_stdout=True)


def _last_reply(x: Any) -> AIMessage:
    conversation = getattr(x, "conversation", x)
    if not isinstance(conversation, list):
        raise TypeError(f"Feedback needs code, a message, a conversation or a call, got {type(x).__name__}.")
    last = conversation[-1] if conversation else None
    if not isinstance(last, AIMessage):
        raise TypeError("The conversation must end with an AIMessage to take code from.")
    return last


@functools.singledispatch
def error_feedback(error: Any, max_length: int = 512) -> str:
    """What to tell a model about an exception, at most `max_length` characters.

    `@error_feedback.register` adds a text for a class of exceptions. Anything but an exception gives
    "No error found. Ignore.".
    """
    return "No error found. Ignore."[:max_length]


@error_feedback.register
def _(error: BaseException, max_length: int = 512) -> str:
    return _generic(error)[:max_length]


def _generic(error: BaseException) -> str:
    return f"**{type_name(error)}**:\n{error}"


@error_feedback.register
def _(error: CodeTestFailure, max_length: int = 512) -> str:
    return "\n".join([_generic(error), *(f"{test}: {line}" for test, line in error.failures)])[:max_length]


@error_feedback.register
def _(error: NameError, max_length: int = 512) -> str:
    tip = _expert_tip(error.name) if error.name else None
    tip = tip or "Tip: Does it even exist? Does it need to be imported? Or is it a typo?"
    return f"{_generic(error)}\n{tip}"[:max_length]


@error_feedback.register
def _(error: ModuleNotFoundError, max_length: int = 512) -> str:
    tip = _expert_tip(error.name) if error.name else None
    return (f"{_generic(error)}\n{tip}" if tip else _generic(error))[:max_length]


@error_feedback.register(concurrent.futures.Future)
@error_feedback.register(asyncio.Future)
def _(error: concurrent.futures.Future[Any] | asyncio.Future[Any], max_length: int = 512) -> str:
    if not error.done() or error.cancelled():
        return error_feedback(None, max_length=max_length)
    outcome = error.exception() or error.result()
    return error_feedback(outcome, max_length=max_length)


def _expert_tip(name: str) -> str | None:
    """Where an undefined name is defined, if the standard library has it."""
    if name in sys.stdlib_module_names:
        return f"Expert Tip: I know that {name} is a module of the standard library. Use `import {name}`."
    if hasattr(builtins, name):
        return f"Expert Tip: I know that {name} is built in. Use it without an import."
    for module in COMMON_MODULES:
        if name in vars(importlib.import_module(module)) and not name.startswith("_"):
            return (
                f"Expert Tip: I know that the variable {name} is defined in module {module}. "
                f"Use `from {module} import {name}` to use it."
            )
    return None
