"""The sandbox: one REPL session in a worker process; its state outlives blocks, and most crashes."""

from __future__ import annotations

import builtins
import contextlib
import keyword
import os
import re
import secrets
import string
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic_monty import ExternalModule, MontyComplete, MontyCrashedError, MontyError

from .chat import call_off_loop, settle
from .deadline import NEVER, Deadline, DeadlineExceeded, call_within
from .sandbox_hints import hint_for
from .sandbox_pool import POOLS, SandboxError
from .sandbox_prelude import HELPER_NAMES, PRELUDE, REBIND, VARIABLES

_STRING_MODULE = {
    name: value for name, value in vars(string).items() if isinstance(value, str) and name[0] != "_"
}

_BUILTINS = frozenset(vars(builtins))


@dataclass(frozen=True)
class SandboxLimits:
    """What one sandbox may use.

    `block_seconds` counts only the time a block computes: while it waits for a model the clock stands still.
    `memory_bytes` comes on top of the context's own size. `output_chars` is what is kept of one block's
    prints before the environment shortens them for the model.
    """

    block_seconds: float = 30.0
    memory_bytes: int = 512 * 1024 * 1024
    output_chars: int = 1_000_000
    recursion_depth: int = 1000
    host_calls: int = 1_000_000


@dataclass
class BlockOutcome:
    """What one block did. `error` is `Type: message`; `trace` is the traceback with the hint below it."""

    stdout: str = ""
    stderr: str = ""
    error: str | None = None
    trace: str = ""
    seconds: float = 0.0


@dataclass
class _Output:
    """Collects prints up to a number of characters and counts the rest."""

    limit: int
    parts: dict[str, list[str]] = field(default_factory=lambda: {"stdout": [], "stderr": []})
    kept: int = 0
    dropped: int = 0

    def __call__(self, stream: str, text: str) -> None:
        room = self.limit - self.kept
        self.parts[stream].append(text[:room])
        self.kept += min(len(text), room)
        self.dropped += max(0, len(text) - room)

    def text(self, stream: str) -> str:
        text = "".join(self.parts[stream])
        if self.dropped and stream == "stdout":
            text += f"\n... ({self.dropped} more chars were printed and dropped)"
        return text


class _CannotRebuild(Exception):
    """Running the recorded blocks again took too long, ran into a limit, or took another course."""


@dataclass
class _Recorded:
    """A block that ran, with the answers of its host calls: enough to run it again in a fresh worker."""

    code: str
    answers: list[tuple[str, dict[str, Any]]]


@contextlib.contextmanager
def _killed_at(deadline: Deadline, pid: int | None) -> Iterator[None]:
    """Kill worker `pid` when the deadline passes while it computes; the waiting call then fails at once."""
    if deadline.remaining is None or pid is None:
        yield
        return
    timer = threading.Timer(deadline.remaining, _kill, (pid,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 9)


def _valid(text: str) -> str:
    """The text as a plain `str`, with "?" for halves of surrogate pairs, which UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _thrown(error: Exception) -> Exception:
    """An error that can cross into the sandbox."""
    text = str(error)
    return error if _valid(text) == text else RuntimeError(_valid(text))


def _plain(value: Any) -> Any:
    """A host result as plain data, which is all that can enter the sandbox."""
    if value is None or isinstance(value, bool | int | float | bytes):
        return value
    if isinstance(value, str):
        return _valid(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    raise TypeError(
        f"the function gave a {type(value).__name__}; only text, numbers, lists and dicts can be used"
    )


class Sandbox:
    """One REPL session. `tools` are host functions by name; `variables` are bound before the first block.

    With `asynchronous=True` every method must be awaited inside an event loop, no thread is held while the
    sandbox or a tool works, and tools may be coroutine functions. Without it the same methods never suspend,
    so `run_to_end` can drive them. `seed` starts the `random` module of the session; a rebuilt session draws
    the same numbers again.
    """

    def __init__(
        self,
        tools: Mapping[str, Callable[..., Any]],
        variables: Mapping[str, Any],
        limits: SandboxLimits | None = None,
        *,
        asynchronous: bool = False,
        seed: int | None = None,
        on_final: Callable[[str], str] = lambda answer: f"FINAL({answer})",
    ) -> None:
        self.limits = limits or SandboxLimits()
        self.tools = dict(tools)
        self._variables = {
            name: _valid(value) if isinstance(value, str) else value for name, value in variables.items()
        }
        self._asynchronous = asynchronous
        self._seed = secrets.randbits(32) if seed is None else seed
        self._private: dict[str, Callable[..., Any]] = {
            "__final__": on_final,
            "__candidates__": self._candidates,
        }
        self._session: Any = None
        self._pid: int | None = None
        self._journal: list[_Recorded] = []
        self._names: dict[str, str] = {}
        self._words: set[str] = set()

    # Life of the session

    async def _open(self) -> None:
        pool: Any = POOLS.asynchronous() if self._asynchronous else POOLS.sync()
        context = self._variables.get("context")
        size = len(context.encode()) if isinstance(context, str) else 0
        session = pool.checkout(
            script_name="repl.py",
            limits={
                "max_feed_duration_secs": self.limits.block_seconds,
                "max_memory": self.limits.memory_bytes + 2 * size,
                "max_recursion_depth": self.limits.recursion_depth,
                "max_suspensions": self.limits.host_calls,
            },
            os_policy={"sleep": "zero", "random_start": {"seed": self._seed}},
            external_modules={"string": ExternalModule(_STRING_MODULE)},
        )
        await settle(session.__aenter__() if self._asynchronous else session.__enter__())
        self._session, self._pid = session, session.worker_pid
        try:
            await settle(session.feed_run(PRELUDE, inputs=self._variables))
        except (MontyError, RuntimeError) as error:
            await self.close()
            raise SandboxError(
                f"the sandbox could not load a context of {size} bytes with {self.limits.memory_bytes} bytes "
                f"of memory ({error}); raise SandboxLimits.memory_bytes"
            ) from error

    async def close(self) -> None:
        """Hand the worker back; the state is gone."""
        session, self._session = self._session, None
        if session is not None:
            leave = session.__aexit__ if self._asynchronous else session.__exit__
            await settle(leave(None, None, None))

    async def abandon(self) -> None:
        """Drop the session in whatever state it is, together with everything it held."""
        self._journal.clear()
        await self.close()

    # Running a block

    async def run(self, code: str, deadline: Deadline = NEVER) -> BlockOutcome:
        """Run one block and report what it printed and how it failed.

        Raises:
            DeadlineExceeded: the deadline passed; the session and its state are gone.
        """
        if self._session is None:
            await self._open()
        code, started = _valid(code), time.monotonic()
        output, record = _Output(self.limits.output_chars), _Recorded(code, [])
        outcome = BlockOutcome()
        try:
            await self._prepare()
            await self._feed(
                code,
                output,
                deadline,
                lambda name, args, kwargs: self._call(name, args, kwargs, deadline, record),
            )
            self._journal.append(record)
        except DeadlineExceeded:
            await self.abandon()
            raise
        except Exception as error:
            await self._fail(outcome, error, record, deadline)
        outcome.stdout, outcome.stderr = output.text("stdout"), output.text("stderr")
        outcome.seconds = time.monotonic() - started
        return outcome

    async def _prepare(self) -> None:
        functions: dict[str, Callable[..., Any]] = {**self.tools, **self._private}
        inputs = {name: _named(function, name) for name, function in functions.items()}
        await settle(self._session.feed_run(REBIND, inputs=inputs))

    async def _feed(
        self,
        code: str,
        output: _Output,
        deadline: Deadline,
        answer: Callable[[str, tuple[Any, ...], dict[str, Any]], Awaitable[dict[str, Any]]],
    ) -> None:
        self._words.update(re.findall(r"[^\W\d]\w*", code))
        with _killed_at(deadline, self._pid):
            snapshot = await settle(self._session.feed_start(code, print_callback=output))
        while not isinstance(snapshot, MontyComplete):
            name = getattr(snapshot, "function_name", None)
            if name is None:
                step: Callable[[], Any] = snapshot.resume
            elif snapshot.is_os_function:
                step = snapshot.resume_auto
            else:
                result = await answer(name, snapshot.args, snapshot.kwargs)
                step = _resumption(snapshot, result)
            with _killed_at(deadline, self._pid):
                snapshot = await settle(step())

    async def _call(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], deadline: Deadline, record: _Recorded
    ) -> dict[str, Any]:
        """Answer a host call: the result, or the exception that the block gets raised."""
        result: dict[str, Any]
        try:
            if name in self._private:
                value = self._private[name](*args)
            elif name not in self.tools:
                raise NameError(f"name '{name}' is not defined")
            elif self._asynchronous:
                value = await call_off_loop(self.tools[name], *args, **kwargs)
            else:
                value = await settle(call_within(deadline, self.tools[name], *args, **kwargs))
            result = {"return_value": _plain(value)}
        except DeadlineExceeded:
            raise
        except Exception as error:
            result = {"exception": _thrown(error)}
        record.answers.append((name, result))
        return result

    def _candidates(self) -> list[str]:
        words = {*self._words, *self._variables, *self.tools, *HELPER_NAMES}
        return sorted(w for w in words if not (w.startswith("__") or keyword.iskeyword(w) or w in _BUILTINS))

    # Failing, and rebuilding what was lost

    async def _fail(
        self, outcome: BlockOutcome, error: Exception, record: _Recorded, deadline: Deadline
    ) -> None:
        if not (isinstance(error, MontyError) or _is_dead_session(error)):
            raise error
        if isinstance(error, MontyCrashedError) and deadline.passed:
            await self.abandon()
            raise DeadlineExceeded from None
        reason = _loss(error, self.limits)
        if reason is None:
            self._journal.append(record)
            outcome.error, outcome.trace = _described(error)
            hint = hint_for(outcome.error)
            if hint:
                outcome.trace += f"\nHINT: {hint}"
            return
        rebuilt = await self._rebuild()
        kept = (
            "Variables of earlier blocks were rebuilt; what this block assigned is lost."
            if rebuilt
            else "Variables of earlier blocks are lost; only `context` and `answer` are left. "
            "Assign again what is needed."
        )
        outcome.error = reason
        outcome.trace = f"{reason}\n{kept}"

    async def _rebuild(self) -> bool:
        """Start a fresh worker and run the recorded blocks again with their recorded host answers."""
        with contextlib.suppress(MontyError, RuntimeError):
            await self.close()
        self._session = None
        await self._open()
        started = time.monotonic()
        try:
            for block in self._journal:
                if time.monotonic() - started > self.limits.block_seconds:
                    raise _CannotRebuild
                await self._replay(block)
        except (MontyCrashedError, _CannotRebuild):
            self._journal.clear()
            with contextlib.suppress(MontyError, RuntimeError):
                await self.close()
            self._session = None
            await self._open()
            return False
        return True

    async def _replay(self, block: _Recorded) -> None:
        answers = iter(block.answers)

        async def recorded(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
            expected, result = next(answers, ("", {}))
            if expected != name:
                raise _CannotRebuild
            return result

        await self._prepare()
        try:
            await self._feed(block.code, _Output(0), NEVER, recorded)
        except MontyCrashedError:
            raise
        except MontyError as error:
            if _loss(error, self.limits) is not None:
                raise _CannotRebuild from None

    # Looking at the state

    async def value(self, expression: str) -> Any:
        """The value of a short expression over the session's variables, or None when it cannot be had."""
        if self._session is None:
            await self._open()
        try:
            return await settle(self._session.feed_run(expression))
        except (MontyError, RuntimeError):
            return None

    async def variables(self) -> dict[str, str]:
        """The model's variables, `context` and `answer` included, with the start of their `repr`."""
        if self._session is None:
            await self._open()
        hidden = [*self.tools, *HELPER_NAMES]
        try:
            names = await settle(self._session.feed_run(VARIABLES, inputs={"__hidden__": hidden}))
        except (MontyError, RuntimeError):
            return dict(self._names)
        self._names = names
        return dict(names)

    @property
    def function_names(self) -> list[str]:
        """The functions model code can call, helpers included."""
        return sorted({*self.tools, *HELPER_NAMES})


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A stand-in with the wanted name: the sandbox knows a host function by its name only."""

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    stand_in.__name__ = stand_in.__qualname__ = name
    return stand_in


def _resumption(snapshot: Any, result: dict[str, Any]) -> Callable[[], Any]:
    return lambda: snapshot.resume(result)


def _is_dead_session(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and "already been finished" in str(error)


def _described(error: Exception) -> tuple[str, str]:
    """`Type: message` and the traceback of an error that model code raised."""
    if hasattr(error, "display"):
        return error.display("type-msg"), error.display("traceback")
    text = f"TypeError: {error}"
    return text, text


def _loss(error: Exception, limits: SandboxLimits) -> str | None:
    """Why the session cannot be used any further, as `Type: message`; None when it can."""
    if isinstance(error, MontyCrashedError) or _is_dead_session(error):
        return f"SandboxCrashed: the sandbox process died while it ran this block ({error})."
    text, _ = _described(error)
    if "time limit exceeded" in text:
        return (
            f"TimeoutError: this block computed for more than {limits.block_seconds:g} s and was stopped. "
            "Waiting for llm_query is not counted. Use string methods, `in` and re on whole texts, not "
            "loops over characters, or do the work in several blocks."
        )
    if "MemoryError" in text and "memory limit" in text:
        return (
            f"MemoryError: this block needed more than {limits.memory_bytes // 2**20} MiB and was stopped. "
            "Work on slices, and keep fewer copies of large texts."
        )
    if "suspension" in text and "limit" in text:
        return f"RuntimeError: this REPL made over {limits.host_calls} host calls. Use the batched functions."
    return None
