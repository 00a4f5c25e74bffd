"""The ways a controller can fail, each with a sentence for whoever sent it."""


class ControllerError(Exception):
    """Base of every error a controller, or the request that carries it, can cause."""


class BadRequestError(ControllerError, ValueError):
    """The request itself is wrong: known before anything runs, answered with HTTP 400."""


class ScriptError(BadRequestError):
    """The script cannot run as written.

    Args:
        message: what is wrong and what to write instead.
        line: line of the script, counted from 1, where known.
    """

    def __init__(self, message: str, line: int | None = None):
        self.line = line
        super().__init__(f"line {line}: {message}" if line is not None else message)


class LimitError(ControllerError):
    """A controller broke one of the operator's limits; the message names the limit and its value."""


class ReplayError(ControllerError):
    """A forked coroutine did not repeat what it did before the fork."""
