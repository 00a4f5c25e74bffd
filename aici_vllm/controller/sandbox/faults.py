"""What a client reads when a script fails: its own lines and its own words, nothing of the sandbox's."""

import re
from collections.abc import Iterator

from pydantic_monty import ExcType, Frame, MontyRuntimeError, MontySyntaxError

from aici_vllm.controller.limits import Limits
from aici_vllm.controller.program import Raised

SCRIPT_FILE = "<python-input-1>"
"""How the sandbox names the script: what it was fed second, after the prelude."""

SHOWN_FRAMES = 20
"""Frames that a traceback in the logs lists; recursion has a thousand."""

ONE_STRING = "Internal error in monty: exceptions can only be called with zero or one string argument"
NO_LENGTH = "object of type 'TokenSet' has no len()"
ITS_LENGTH = "aici.all_tokens().num_set()"
_IN_CALLBACK = re.compile(r"external function '(.+)' cannot suspend in this synchronous context")
LONGEST_MESSAGE = 1000
"""Characters of a script's own message that a client is told."""

PIECE = 1 << 14
"""Characters of a script in which line ends are counted at once."""

UNSUPPORTED = "The monty syntax parser does not yet support "

CATCHABLE: tuple[ExcType, ...] = (
    "AssertionError",
    "AttributeError",
    "IndexError",
    "KeyError",
    "MemoryError",
    "NotImplementedError",
    "OverflowError",
    "RecursionError",
    "TypeError",
    "ValueError",
    "LookupError",
    "ArithmeticError",
    "OSError",
    "RuntimeError",
)
"""Exceptions that the sandbox knows and a word may raise."""


def sandbox_exception(error: Exception) -> ExcType:
    """The sandbox's name for the nearest class of `error` that it knows."""
    for cls in type(error).__mro__:
        for name in CATCHABLE:
            if name == cls.__name__:
                return name
    return "RuntimeError"


def in_script(error: MontyRuntimeError | MontySyntaxError) -> bool:
    """Whether the error came from a line of the script, and not from how its main function was called."""
    # A call that does not fit a function is told with the line of its `def`, which is in no function.
    return any(
        frame.filename == SCRIPT_FILE and frame.function_name is not None for frame in error.traceback()
    )


def script_fault(error: MontyRuntimeError | MontySyntaxError, source: str, limits: Limits) -> Raised:
    """The end of a script that raised."""
    count = source.count("\n") + 1
    frames = [f for f in error.traceback() if f.filename == SCRIPT_FILE and f.line <= count]
    message = error.display(format="type-msg")
    # First: a million lines, taken apart and put together, hold the interpreter up for everybody else.
    cut = "..." if len(message) > LONGEST_MESSAGE else ""
    message = _in_our_words(message[:LONGEST_MESSAGE].replace("\n", " "), limits) + cut
    details = [f"{message}\n"]
    if frames:
        details = ["Traceback (most recent call last):\n", *_traceback(frames, source), *details]
        message = f"{message} (line {frames[-1].line})"
    return Raised(message, "".join(details))


def _in_our_words(message: str, limits: Limits) -> str:
    if message.startswith("TimeoutError: turn time limit exceeded"):
        return f"TimeoutError: {time_limit(limits, started=False)}"
    if message.startswith("MemoryError: ") and "memory limit" in message:
        return f"MemoryError: a script may use {limits.memory} bytes of memory"
    if UNSUPPORTED in message:
        return f"SyntaxError: the sandbox does not run {message.split(UNSUPPORTED)[1]}"
    if callback := _IN_CALLBACK.search(message):
        return f"NotImplementedError: {callback[1]}() cannot be asked from a sort key or another callback"
    message = message.replace(NO_LENGTH, f"{NO_LENGTH} here: the vocabulary has {ITS_LENGTH} tokens")
    return message.replace(ONE_STRING, "in the sandbox an exception takes one string or nothing")


def time_limit(limits: Limits, started: bool) -> str:
    """The sentence about the time limit that a script broke."""
    if started:
        seconds = limits.step_seconds * limits.late_steps
        return f"a script may compute for {seconds:g} s between two awaits"
    return f"a script may compute for {limits.init_seconds:g} s before its first await"


def long_limit(limits: Limits) -> str:
    """The sentence about the time for what a script asks for."""
    return (
        f"fixed texts and constraints may take {limits.init_seconds:g} s between two awaits: "
        "make fewer or smaller ones"
    )


def _traceback(frames: list[Frame], source: str) -> Iterator[str]:
    cut = len(frames) - SHOWN_FRAMES
    for number, frame in enumerate(frames):
        if cut > 0 and number == SHOWN_FRAMES // 2:
            yield f"  ... {cut} more ...\n"
        if cut > 0 and SHOWN_FRAMES // 2 <= number < SHOWN_FRAMES // 2 + cut:
            continue
        yield f'  File "<script>", line {frame.line}, in {frame.function_name or "<module>"}\n'
        yield f"    {_line(source, frame.line).strip()}\n"


def _line(source: str, number: int) -> str:
    """The start of a line that the source has. To split all of a long source would hold everybody else up."""
    at, left = 0, number - 1
    while left > (here := source.count("\n", at, at + PIECE)):
        at, left = at + PIECE, left - here
    for _ in range(left):
        at = source.index("\n", at) + 1
    end = source.find("\n", at, at + LONGEST_MESSAGE)
    return source[at : at + LONGEST_MESSAGE if end < 0 else end]
