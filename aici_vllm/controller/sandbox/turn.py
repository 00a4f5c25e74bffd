"""One turn of a script in a worker: from where it stopped to its next await or its end."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic_monty import (
    FunctionSnapshot,
    FutureSnapshot,
    MontyComplete,
    MontyRuntimeError,
    MontySession,
    MontySyntaxError,
    NameLookupSnapshot,
)

from aici_vllm.controller.limits import Limits
from aici_vllm.controller.program import Raised, Returned, Turn
from aici_vllm.controller.sandbox.awaited_objects import wrap_awaits
from aici_vllm.controller.sandbox.faults import sandbox_exception, script_fault
from aici_vllm.controller.sandbox.host import WORDS, Pending
from aici_vllm.controller.sandbox.program import Result, SandboxProgram, Suspended
from aici_vllm.controller.sandbox.watch import Watch

Snapshot = FunctionSnapshot | FutureSnapshot | NameLookupSnapshot | MontyComplete

LAST_LINE = "\nawait _aici_run()"
"""Follows every script: runs what it gave to `aici.start`."""

ENDS = {
    "not started": "the script never called aici.start(...)",
    "not async": "TypeError: aici.start() takes an async function; the one it got returned no coroutine",
}
"""What `_aici_run` returns when there is nothing to run."""

NOTHING_AWAITED = "the controller awaited nothing, so it generated nothing; is an `await` missing?"


@dataclass(frozen=True, slots=True)
class Prelude:
    """A session in which the words of a script are defined, ready to be loaded before each script."""

    dump: bytes
    modules: dict[str, Any]
    """What the imports of a script get, by the name they import."""


def make_prelude(session: MontySession, decisions: bool) -> Prelude:
    """Define the words in a fresh session, and keep a copy of it.

    Args:
        decisions: whether scripts get the words of `prelude_decisions.py` too.
    """
    inputs: dict[str, Any] = {
        "_aici_asked": {name: _host_function(name) for name, word in WORDS.items() if not word.awaited},
        "_aici_awaited": {name: _host_function(name) for name, word in WORDS.items() if word.awaited},
    }
    text = _text("prelude.py")
    if decisions:
        inputs["_aici_bytes"] = bytes(range(256))
        text += _text("prelude_decisions.py")
    modules = session.feed_run(text + "_aici_modules", inputs=inputs)
    return Prelude(session.dump(), modules)


def _text(name: str) -> str:
    return Path(__file__).with_name(name).read_text()


def _host_function(name: str) -> Callable[..., None]:
    def asked() -> None:
        raise RuntimeError("the sandbox calls this by name only")

    # The dot keeps a script from calling it without the prelude.
    asked.__name__ = f"aici.{name}"
    return asked


FUEL = 10
"""Awaits that a script may make, per token of the model's context: an endless loop of awaits must end."""


class Abandoned(Exception):
    """Nobody waits for this turn any more."""


class TurnRun:
    """A turn of `program` in `session`, which must be fresh."""

    def __init__(
        self, session: MontySession, prelude: Prelude, program: SandboxProgram, limits: Limits, watch: Watch
    ):
        self._session = session
        self._prelude = prelude
        self._program = program
        self._limits = limits
        self._watch = watch
        self._awaited: dict[int, Pending] = {}

    def run(self) -> Turn:
        """Run it to the end.

        Raises:
            MontyCrashedError: the worker died.
            Abandoned: the program was closed meanwhile.
        """
        try:
            return self._drive(self._begin())
        except (MontyRuntimeError, MontySyntaxError) as error:
            return script_fault(error, self._program.source, self._limits)

    def _begin(self) -> Snapshot:
        suspended = self._program.suspended
        if suspended is None:
            self._session.load_session(self._prelude.dump)
            self._watch.begin_script()
            source = self._program.source
            if self._program.decides:
                source = wrap_awaits(source)
            return self._session.feed_start(source + LAST_LINE, print_callback=self._print)
        snapshot = self._session.load_snapshot(suspended.dump, print_callback=self._print)
        assert isinstance(snapshot, FutureSnapshot)
        self._awaited = dict(suspended.awaited)
        pending = self._awaited.pop(suspended.call_id)
        self._watch.begin_script()
        return snapshot.resume({suspended.call_id: _settled(self._program.result, pending)})

    def _drive(self, snapshot: Snapshot) -> Turn:
        while True:
            if self._program.closed:
                raise Abandoned
            match snapshot:
                case FutureSnapshot():
                    return self._suspend(snapshot)
                case MontyComplete():
                    return self._complete(snapshot.output)
                case NameLookupSnapshot():
                    snapshot = snapshot.resume()
                case FunctionSnapshot(is_os_function=True):
                    snapshot = self._system_call(snapshot)
                case FunctionSnapshot():
                    snapshot = self._word(snapshot)

    def _suspend(self, snapshot: FutureSnapshot) -> Turn:
        self._watch.end_script()
        program = self._program
        program.awaits += 1
        fuel = FUEL * program.host.branch.group.context
        if program.awaits > fuel:
            return Raised(f"out of fuel: a script may await {fuel} times, {FUEL} times the model's context")
        call_id = min(snapshot.pending_call_ids)
        program.suspended = Suspended(snapshot.dump(), call_id, self._awaited)
        return self._awaited[call_id].awaitable

    def _complete(self, output: Any) -> Turn:
        if output is not None:
            return Raised(ENDS.get(output, "the script replaced _aici_run"))
        return Returned() if self._program.started else Raised(NOTHING_AWAITED)

    def _system_call(self, call: FunctionSnapshot) -> Snapshot:
        if call.function_name == "import" and call.args[0] in self._prelude.modules:
            return call.resume({"return_value": self._prelude.modules[call.args[0]]})
        return call.resume_not_handled()

    def _word(self, call: FunctionSnapshot) -> Snapshot:
        name = call.function_name
        if not name.startswith("aici."):
            return call.resume({"exc_type": "NameError", "message": f"name {name!r} is not defined"})
        try:
            answer = self._program.host.call(name.removeprefix("aici."), call.args, call.kwargs)
        except Exception as error:
            return call.resume({"exc_type": sandbox_exception(error), "message": _message(error)})
        if isinstance(answer, Pending):
            self._awaited[call.call_id] = answer
            return call.resume({"future": ...})
        return call.resume({"return_value": answer})

    def _print(self, stream: Literal["stdout", "stderr"], text: str) -> None:
        if not self._program.closed:
            self._program.host.branch.log.write(text)


def _settled(result: Result, pending: Pending) -> Any:
    if result.error is not None:
        return {"exc_type": sandbox_exception(result.error), "message": _message(result.error)}
    return {"return_value": pending.convert(result.value)}


def _message(error: Exception) -> str:
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
