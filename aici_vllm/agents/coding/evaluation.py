"""`AICode`: one piece of Python code, checked, parsed and run in another process."""

from __future__ import annotations

import ast
import builtins
import logging
import signal
from typing import Any

from aici_vllm.agents.coding.blocks import extract_code
from aici_vllm.agents.coding.process import ProcessResult, run_in_process
from aici_vllm.agents.coding.safety import EXPRESSION_TRANSFORMS, find_unsafe, remove_unsafe, transform_code
from aici_vllm.agents.coding.worker import CODE_FILENAME
from aici_vllm.agents.errors import (
    CodeExecutionError,
    CodeParseError,
    CodeProcessDied,
    CodeSafetyError,
    CodeTestFailure,
    CodeTimeout,
)
from aici_vllm.agents.messages import AIMessage

logger = logging.getLogger("aici_vllm.agents")

DEFAULT_MEMORY_LIMIT = 4 << 30
BLOCKED_WARNING = "!!! IMPORTANT: Unsafe lines blocked from execution"


class AICode:
    """Python code and what came of running it.

    code: the source that is run; from an AIMessage, its fenced Python blocks.
    expression: the parsed module, None before parsing or when it failed.
    stdout: what the code wrote to standard output and standard error (the error's text if it wrote nothing
        and failed); None before a run and without `capture_stdout`.
    output: with `safe_eval` the names the code defined, else the last expression's value. Plain literals
        come back as values, everything else as its printed form.
    success: None before a run, then whether the code ran without an error.
    error: the exception. Builtin ones come back as such, others as CodeExecutionError; a run that was killed
        for its time is a CodeTimeout.
    error_lines: lines of `code`, counted from 1, that led to the error, the failing one first.

    The code runs in a fresh interpreter, limited to `execution_timeout` seconds and `memory_limit` bytes
    (None for no limit), and is killed with all it started. That protects this process, not the machine: the
    code may read and write files. `safe_eval` refuses package management and imports of modules that are not
    installed; `skip_unsafe` replaces such statements by `pass` instead. `prefix` and `suffix` are run before
    and after the code. `expression_transform` cuts out tests ("remove_all_tests", "remove_test_items").
    `skip_invalid` leaves out blocks of a message that do not parse. With `auto_eval=False` nothing runs
    before `evaluate()`.
    """

    def __init__(
        self,
        text: str | AIMessage,
        *,
        auto_eval: bool = True,
        safe_eval: bool = True,
        skip_unsafe: bool = False,
        skip_invalid: bool = False,
        capture_stdout: bool = True,
        verbose: bool = False,
        prefix: str = "",
        suffix: str = "",
        expression_transform: str | None = None,
        execution_timeout: float = 60,
        memory_limit: int | None = DEFAULT_MEMORY_LIMIT,
    ) -> None:
        if execution_timeout <= 0:
            raise ValueError(f"execution_timeout must be positive, got {execution_timeout}.")
        if expression_transform is not None and expression_transform not in EXPRESSION_TRANSFORMS:
            raise ValueError(f"expression_transform must be None or one of {EXPRESSION_TRANSFORMS}.")
        self.code = code_of(text, skip_invalid=skip_invalid)
        self.safe_eval = safe_eval
        self.skip_unsafe = skip_unsafe
        self.capture_stdout = capture_stdout
        self.verbose = verbose
        self.prefix, self.suffix = prefix, suffix
        self.expression_transform = expression_transform
        self.execution_timeout = execution_timeout
        self.memory_limit = memory_limit
        self._reset()
        if auto_eval:
            self.evaluate()

    def _reset(self) -> None:
        self.expression: ast.Module | None = None
        self.stdout: str | None = None
        self.output: Any = None
        self.success: bool | None = None
        self.error: BaseException | None = None
        self.error_lines: list[int] = []

    def evaluate(self) -> AICode:
        """Check, parse and run the code; the fields then say what came of it."""
        self._reset()
        removed: list[str] = []
        if self.skip_unsafe:
            self.code, removed = remove_unsafe(self.code)
        if removed and self.verbose:
            logger.info("Unsafe lines blocked from execution: %s", "; ".join(removed))
        if self._is_refused() or not self._parse():
            self.success = False
        else:
            self._run()
        if removed:
            warning = f"{BLOCKED_WARNING}\n" + "\n".join(removed)
            self.stdout = f"{self.stdout}\n{warning}" if self.stdout else warning
        return self

    @property
    def is_parsed(self) -> bool:
        """Whether the code was parsed."""
        return self.expression is not None

    def _is_refused(self) -> bool:
        reasons = [unsafe.reason for unsafe in find_unsafe(self.code)] if self.safe_eval else []
        if reasons:
            self.error = CodeSafetyError(f"Safety Error: {'; '.join(reasons)}.")
        return bool(reasons)

    def _parse(self) -> bool:
        if not self.code.strip():
            self.error = CodeParseError("Parse Error: No code found!")
            return False
        try:
            self.expression = ast.parse(transform_code(self.code, self.expression_transform), CODE_FILENAME)
        except SyntaxError as error:
            self.error = error
            self.error_lines = [error.lineno] if error.lineno else []
        except (ValueError, RecursionError, MemoryError) as error:
            self.error = CodeParseError(f"Parse Error: {type(error).__name__}: {error}")
        return self.error is None

    def _run(self) -> None:
        result = run_in_process(
            transform_code(self.code, self.expression_transform),
            prefix=self.prefix,
            suffix=self.suffix,
            timeout=self.execution_timeout,
            memory_limit=self.memory_limit,
            capture_stdout=self.capture_stdout,
            last_value=not self.safe_eval,
        )
        self.stdout = result.stdout if self.capture_stdout else None
        report = result.report or {}
        self.error = self._error_of(result)
        self.success = self.error is None
        if self.success:
            self.output = _output(report.get("output"))
            return
        self.error_lines = [int(line) for line in (report.get("error") or {}).get("lines", [])]
        if self.capture_stdout and not self.stdout:
            self.stdout = f"{type_name(self.error)}: {self.error}"

    def _error_of(self, result: ProcessResult) -> BaseException | None:
        if result.timed_out:
            return CodeTimeout(f"The code was killed after {self.execution_timeout} seconds.")
        if result.report is None:
            return CodeProcessDied(
                f"The code's process ended without a result ({_exit_text(result.exit_code)})."
            )
        described = result.report.get("error")
        return None if described is None else _exception(described)

    def __repr__(self) -> str:
        def known(value: Any) -> str:
            return "N/A" if value is None else "True"

        success = "N/A" if self.success is None else str(self.success)
        return (
            f"AICode(Success: {success}, Parsed: {known(self.expression)}, Evaluated: {known(self.output)}, "
            f"Error Caught: {known(self.error)}, StdOut: {known(self.stdout)}, "
            f"Code: {self.code.count(chr(10)) + 1} Lines)"
        )


def code_of(text: str | AIMessage, *, skip_invalid: bool = False) -> str:
    """The code itself, or the code in a message."""
    if isinstance(text, AIMessage):
        return extract_code(text.content, skip_invalid=skip_invalid)
    if isinstance(text, str):
        return text
    raise TypeError(f"Code comes as a string or an AIMessage, got {type(text).__name__}.")


def type_name(error: Any) -> str:
    """The name of an exception's class, also where the class exists only in the code's process."""
    return error.type_name if isinstance(error, CodeExecutionError) else type(error).__name__


def _output(described: Any) -> Any:
    if not isinstance(described, dict):
        return None
    if set(described) == {"literal", "text"} and isinstance(described["literal"], bool):
        return _value(described)
    return {name: _value(item) for name, item in described.items()}


def _value(item: dict[str, Any]) -> Any:
    if not item["literal"]:
        return item["text"]
    try:
        return ast.literal_eval(item["text"])
    except (ValueError, SyntaxError):
        # inf and nan print as names.
        return item["text"]


def _exception(described: dict[str, Any]) -> BaseException:
    """An exception like the one the code raised, without loading anything the code defined."""
    name, message = str(described["type"]), str(described["message"])
    if described.get("failures"):
        return CodeTestFailure(
            f"{len(described['failures'])} tests failed.", [tuple(f) for f in described["failures"]]
        )
    kind = getattr(builtins, name, None) if described.get("builtin") else None
    if kind is KeyboardInterrupt:
        return CodeTimeout("The code interrupted itself.")
    if isinstance(kind, type) and issubclass(kind, BaseException):
        rebuilt = _rebuilt(kind, described)
        if rebuilt is not None and str(rebuilt) == message:
            return rebuilt
    return CodeExecutionError(name, message)


def _rebuilt(kind: type[BaseException], described: dict[str, Any]) -> BaseException | None:
    args = described["args"] if described.get("args") is not None else [described["message"]]
    try:
        error = kind(*args)
    except (TypeError, ValueError):
        return None
    if isinstance(error, NameError | ImportError) and described.get("name"):
        error.name = str(described["name"])
    return error


def _exit_text(exit_code: int | None) -> str:
    if exit_code is None:
        return "it closed its channel"
    if exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    return f"exit status {exit_code}"
