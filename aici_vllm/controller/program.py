"""A running script seen from its branch, and the kind that is a plain Python coroutine.

A program runs in turns. `resume` starts a turn; `poll` says how it ended, or None while it runs.
A native program's turn is over when `resume` returns; a sandboxed one's ends later, elsewhere.
"""

import contextlib
import contextvars
import inspect
import io
import traceback
from collections.abc import Callable, Coroutine, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from aici_vllm.controller.awaits import Awaitable
from aici_vllm.controller.errors import ControllerError, ReplayError

if TYPE_CHECKING:
    from aici_vllm.controller.branch import Branch


T = TypeVar("T")


@dataclass(slots=True)
class Returned:
    """The turn ended the program."""


@dataclass(slots=True)
class Raised:
    """The turn ended the program with an error.

    `message` is one line for the client; `details` is a traceback for the logs.
    """

    message: str
    details: str = ""


Turn = Awaitable | Returned | Raised


class Program(Protocol):
    """One branch's script."""

    def resume(self, value: Any = None, error: Exception | None = None) -> None:
        """Start a turn: the first one, or the one that the current await's result begins.

        `error` is raised at the await instead of returning `value`.
        """

    def poll(self) -> Turn | None:
        """How the turn ended; None while it runs. Asked again, it answers the same."""

    def fork(self, branch: "Branch") -> "Program":
        """A copy for `branch`, stopped at the same await. Only between turns."""

    def close(self) -> None:
        """Release what the program holds. May be called at any time, more than once."""


current_program: contextvars.ContextVar["NativeProgram"] = contextvars.ContextVar("aici_program")
"""The native program that runs; set only while it runs."""


def running_program() -> "NativeProgram":
    """The native program whose code is running.

    Raises:
        RuntimeError: called outside a controller.
    """
    try:
        return current_program.get()
    except LookupError:
        raise RuntimeError(
            "this only works inside a running controller: use aici_vllm.run(...), `aici run`, "
            "or send the script with a request"
        ) from None


def error_line(error: BaseException) -> str:
    """`Type: message`, the way Python ends a traceback."""
    return traceback.format_exception_only(error)[-1].strip()


Controller = Callable[..., Coroutine[Awaitable, Any, Any]]


def start_controller(controller: Controller, arg: str) -> Coroutine[Awaitable, Any, Any]:
    """Call a coroutine function, with `arg` if it takes a positional parameter.

    Raises:
        ControllerError: it did not return a coroutine.
    """
    wants_arg = any(
        p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)
        for p in inspect.signature(controller).parameters.values()
    )
    coroutine = controller(arg) if wants_arg else controller()
    if not inspect.iscoroutine(coroutine):
        raise ControllerError(
            f"a controller must be an async function; {controller!r} returned {type(coroutine).__name__}"
        )
    return coroutine


class NativeProgram:
    """A coroutine function, run in this process as plain Python.

    A coroutine cannot be copied, so `fork` calls the function again and replays to it what the first
    run was told: the result of every await and of everything it asked its branch.
    The function must therefore do the same when it is told the same.
    """

    def __init__(self, controller: Controller, arg: str, branch: "Branch"):
        self._controller = controller
        self._arg = arg
        self.branch = branch
        self._coroutine: Generator[Any, Any, Any] | Coroutine[Any, Any, Any] | None = None
        self._turn: Turn | None = None
        self._answers: list[Any] = []
        self._replay: Iterator[Any] | None = None

    def resume(self, value: Any = None, error: Exception | None = None) -> None:
        if self._coroutine is not None:
            self._answers.append(_Result(value, error))
        self._run(value, error)

    def poll(self) -> Turn | None:
        return self._turn

    def fork(self, branch: "Branch") -> "NativeProgram":
        copy = NativeProgram(self._controller, self._arg, branch)
        copy._catch_up(list(self._answers))
        return copy

    def close(self) -> None:
        if self._coroutine is not None:
            with self._running():
                self._coroutine.close()

    def ask(self, question: Callable[["Branch"], T]) -> T:
        """Ask the branch something, or tell it: in a replay the answer is the recorded one."""
        if self._replay is not None:
            answer = next(self._replay, None)
            if not isinstance(answer, _Answer):
                raise ReplayError("the controller asked something else the second time it ran")
            return cast(T, answer.value)
        answer = question(self.branch)
        self._answers.append(_Answer(answer))
        return answer

    def _run(self, value: Any, error: Exception | None) -> None:
        with self._running():
            try:
                if self._coroutine is None:
                    self._coroutine = start_controller(self._controller, self._arg)
                coroutine = self._coroutine
                awaited = coroutine.send(value) if error is None else coroutine.throw(error)
            except StopIteration:
                self._turn = Returned()
            except Exception as caught:
                self._turn = Raised(error_line(caught), traceback.format_exc())
            else:
                self._turn = self._check(awaited)

    def _check(self, awaited: object) -> Turn:
        if isinstance(awaited, Awaitable):
            return awaited
        return Raised(f"TypeError: a controller can only await aici's own words, not {awaited!r}")

    def _catch_up(self, answers: list[Any]) -> None:
        self._answers = answers
        self._replay = iter(list(answers))
        self._run(None, None)
        for answer in self._replay:
            if not isinstance(answer, _Result) or not isinstance(self._turn, Awaitable):
                raise ReplayError("the controller stopped somewhere else the second time it ran")
            self._run(answer.value, answer.error)
        self._replay = None

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Make this program's branch the current one, and its prints the branch's log."""
        token = current_program.set(self)
        log: io.TextIOBase = io.StringIO() if self._replay is not None else _LogStream(self.branch)
        try:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                yield
        finally:
            current_program.reset(token)


@dataclass(slots=True)
class _Result:
    value: Any
    error: Exception | None


@dataclass(slots=True)
class _Answer:
    value: Any


class _LogStream(io.TextIOBase):
    def __init__(self, branch: "Branch"):
        self._branch = branch

    def write(self, text: str) -> int:
        self._branch.log.write(text)
        return len(text)
