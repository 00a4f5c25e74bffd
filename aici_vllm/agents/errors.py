"""The exceptions of agents: one class per thing that can go wrong and that a caller may want to catch.

Bad arguments raise `ValueError` or `TypeError`, a call made in the wrong state raises `RuntimeError`. An
exception raised by a user's condition, feedback function or model callable passes through unchanged.
"""

from __future__ import annotations


class RetryBudgetExceeded(RuntimeError):
    """`airetry(..., throw=True)` used up its retries or calls and the condition still does not hold."""


class TemplateNotFound(ValueError):
    """No template is registered under this name."""


class NoModelError(RuntimeError):
    """An AI function was run without a model and no default model is set."""


class ModelCallError(RuntimeError):
    """A shipped model could not produce a reply: network failure, HTTP error, or a reply it cannot read.

    `status` is the HTTP status when there was one, `body` the (shortened) body of that answer.
    """

    def __init__(self, message: str, status: int | None = None, body: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.body = body


class ScriptExhausted(RuntimeError):
    """A scripted model was asked for more replies than its script holds."""


class CodeError(Exception):
    """Base of what can go wrong with a piece of code besides the exceptions Python itself raises in it."""


class CodeSafetyError(CodeError):
    """The code was refused before it ran: it manages packages, or imports what is not installed."""


class CodeParseError(CodeError):
    """There is no code to run, or it cannot be parsed for a reason that is not a SyntaxError."""


class CodeTimeout(CodeError):
    """The code ran longer than allowed and was killed, or interrupted itself."""


class CodeProcessDied(CodeError):
    """The process that ran the code ended without a result: killed, crashed, or left by `os._exit`."""


class CodeExecutionError(CodeError):
    """An exception raised by the code that cannot be rebuilt here; `type_name` is the name of its class."""

    def __init__(self, type_name: str, message: str) -> None:
        super().__init__(message)
        self.type_name = type_name


class CodeTestFailure(CodeError):
    """A unittest run inside the code failed; `failures` pairs each test's id with its last error line."""

    def __init__(self, message: str, failures: list[tuple[str, str]]) -> None:
        super().__init__(message)
        self.failures = failures
