"""A running script seen from its branch, and the kind that is a plain Python coroutine.

A program runs in turns. `resume` starts a turn; `poll` says how it ended, or None while it runs.
A native program's turn is over when `resume` returns; a sandboxed one's ends later, elsewhere.
"""

import contextlib
import contextvars
import inspect
import io
import time
import traceback
from collections.abc import Callable, Coroutine, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from aici_vllm.controller.awaits import Awaitable, Decide, Decided, FixedText, Generate, WaitVars
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
    """One branch's script.

    Attributes:
        seconds: how long it computed, in all its turns; a fork begins at 0.
    """

    seconds: float

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
        self.seconds = 0.0
        self._coroutine: Generator[Any, Any, Any] | Coroutine[Any, Any, Any] | None = None
        self._turn: Turn | None = None
        self._shape: Any = None
        """Of the turn as the script made it: a branch may change the await it carries out."""
        self._told: list[_Result | _Answer] = []
        self._lists: Lists = {}
        self._replay: _Replay | None = None

    def resume(self, value: Any = None, error: Exception | None = None) -> None:
        if self._coroutine is not None:
            self._told.append(_Result(self._shape, _own(value), error))
        self._run(value, error)

    def poll(self) -> Turn | None:
        return self._turn

    def fork(self, branch: "Branch") -> "NativeProgram":
        copy = NativeProgram(self._controller, self._arg, branch)
        try:
            copy._catch_up(list(self._told), self._shape)
        except Exception:
            copy.close()
            raise
        return copy

    def close(self) -> None:
        if self._coroutine is None:
            return
        with self._running():
            try:
                self._coroutine.close()
            except KeyboardInterrupt:
                raise
            except BaseException:
                # The branch is over whatever its `finally` does; nobody is left to raise it in.
                traceback.print_exc()

    def ask(self, word: Callable[..., T], *args: Any) -> T:
        """Ask the branch `word(branch, *args)`; in a replay the answer is the recorded one."""
        question = (word, *args)
        if self._replay is not None:
            return cast(T, self._replay.answer(question))
        try:
            answer = word(self.branch, *args)
        except Exception as error:
            self._told.append(_Answer(question, None, error))
            raise
        self._told.append(_Answer(question, self._grown(question, answer), None))
        return answer

    def _grown(self, question: tuple[Any, ...], answer: Any) -> Any:
        """What to remember of an answer: of a list, as all tokens so far, only what is new since the last."""
        if not isinstance(answer, list):
            return _own(answer)
        before = self._lists.get(question, [])
        kept = len(before) if answer[: len(before)] == before else 0
        self._lists[question] = list(answer)
        return _Grown(kept, answer[kept:])

    def _run(self, value: Any, error: Exception | None) -> None:
        started = time.perf_counter()
        with self._running():
            try:
                if self._coroutine is None:
                    self._coroutine = start_controller(self._controller, self._arg)
                coroutine = self._coroutine
                awaited = coroutine.send(value) if error is None else coroutine.throw(error)
            except StopIteration:
                self._turn = Returned()
            except KeyboardInterrupt:
                raise
            except BaseException as caught:
                # `exit()` in a controller ends its branch, not the engine.
                self._turn = Raised(error_line(caught), traceback.format_exc())
            else:
                self._turn = self._check(awaited)
        self._shape = _shape(self._turn)
        self.seconds += time.perf_counter() - started

    def _check(self, awaited: object) -> Turn:
        if isinstance(awaited, Awaitable):
            return awaited
        return Raised(f"TypeError: a controller can only await aici's own words, not {awaited!r}")

    def _catch_up(self, told: list["_Result | _Answer"], stands_at: Any) -> None:
        """Run to the await of shape `stands_at`, told what the first run was told."""
        self._told = told
        self._replay = replay = _Replay(told)
        self._run(None, None)
        while (result := replay.result(self._turn)) is not None:
            self._run(_own(result.value), result.error)
        if self._shape != stands_at:
            raise replay.stray("did something else", self._turn)
        self._lists = replay.lists
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
    """What an await of this shape was told."""

    shape: Any
    value: Any
    error: Exception | None


@dataclass(slots=True)
class _Answer:
    """What a question was answered: a word and its arguments."""

    question: tuple[Any, ...]
    value: Any
    error: Exception | None


Lists = dict[tuple[Any, ...], list[Any]]
"""The last list that each question was answered with."""


@dataclass(slots=True)
class _Grown:
    """A list: the first `kept` items of the last answer to the same question, then `added`."""

    kept: int
    added: list[Any]


class _Replay:
    """What a first run was told, in order, for a second run that must ask for the same."""

    def __init__(self, told: list[_Result | _Answer]):
        self._told = iter(list(told))
        self.lists: Lists = {}
        self._stray: ReplayError | None = None

    def answer(self, question: tuple[Any, ...]) -> Any:
        """The next answer, which must be to this question."""
        told = next(self._told, None)
        if self._stray is not None or not isinstance(told, _Answer) or told.question != question:
            raise self.stray("asked for something else")
        if told.error is not None:
            raise told.error
        if not isinstance(told.value, _Grown):
            return _own(told.value)
        value = self.lists.get(question, [])[: told.value.kept] + told.value.added
        self.lists[question] = value
        return list(value)

    def result(self, turn: Turn | None) -> _Result | None:
        """The next result, which must be that of `turn`'s await; None at the end."""
        if self._stray is not None:
            raise self._stray
        told = next(self._told, None)
        if told is None:
            return None
        if not isinstance(told, _Result) or told.shape != _shape(turn):
            raise self.stray("did something else", turn)
        _tell_constraint(turn, told)
        return told

    def stray(self, what: str, turn: Turn | None = None) -> ReplayError:
        """The error of a run that left the path. It stands even if the controller catches it."""
        ended = f" ({turn.message})" if isinstance(turn, Raised) else ""
        self._stray = self._stray or ReplayError(
            f"cannot fork: the controller {what} when it was run again for the new branch{ended}; a forking "
            "controller must do the same each time, so keep clocks, randomness and outside state out of it"
        )
        return self._stray


def _shape(turn: Turn | None) -> Any:
    """What two turns have in common that ask for the same."""
    match turn:
        case FixedText():
            return (FixedText, tuple(turn.tokens), turn.following)
        case Generate():
            options = (turn.max_tokens, turn.min_tokens, turn.stop_at, turn.store_var)
            return (Generate, type(turn.constraint), *options, turn.temperature, turn.top_p)
        case WaitVars():
            return (WaitVars, turn.names)
        case Decide():
            return (Decide, len(turn.result.branches))
    return type(turn)


def _own(value: Any) -> Any:
    """A copy of what a script is told: it may change its own."""
    if isinstance(value, list):
        return list(value)
    return value._replace(tokens=list(value.tokens)) if isinstance(value, Decided) else value


def _tell_constraint(turn: Turn | None, told: _Result) -> None:
    """Advance the constraint of a replayed generation: the script may hold it and use it again."""
    if isinstance(turn, Generate) and turn.shared and told.error is None:
        for token in told.value:
            turn.constraint.append_token(token)


class _LogStream(io.TextIOBase):
    def __init__(self, branch: "Branch"):
        self._branch = branch

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() takes str, not {type(text).__name__}")
        self._branch.log.write(text)
        return len(text)
