"""One turn of a script in a worker: from where it stopped to its next await or its end."""

from collections.abc import Callable
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

from aici_vllm.controller.errors import LimitError
from aici_vllm.controller.limits import Limits
from aici_vllm.controller.program import Raised, Returned, Turn
from aici_vllm.controller.sandbox.awaited_objects import wrap_awaits
from aici_vllm.controller.sandbox.faults import in_script, sandbox_exception, script_fault
from aici_vllm.controller.sandbox.host import WORDS, OutOfTime, Pending
from aici_vllm.controller.sandbox.preludes import Prelude
from aici_vllm.controller.sandbox.program import Result, SandboxProgram, Suspended
from aici_vllm.controller.sandbox.watch import Watch

Stopped = FunctionSnapshot | FutureSnapshot
"""A script that has asked for what it awaits, or that awaits what it asked for."""

Snapshot = FunctionSnapshot | FutureSnapshot | NameLookupSnapshot | MontyComplete

RUN_COROUTINE = "await _aici_mains[0]"
CALL_MAIN = "await _aici_mains[0]()"
CALL_MAIN_WITH_ARGUMENT = "await _aici_mains[0](_aici_argument)"
"""What follows a script: it runs what the script gave to `aici.start`."""

NO_COROUTINE = "object can't be awaited"
WANTS_ARGUMENT = "missing 1 required positional argument"

NOT_STARTED = "the script never called aici.start(...)"
NOT_ASYNC = "TypeError: aici.start() takes an async function; the one it got returned no coroutine"
NOTHING_AWAITED = "the controller awaited nothing, so it generated nothing; is an `await` missing?"

FUEL = 10
"""Awaits that a script may make, per token of the model's context: an endless loop of awaits must end."""

MOST_AWAITED = 64
"""Awaits that a script may have begun at once: each may hold a long text or a large constraint."""


class Abandoned(Exception):
    """Nobody waits for this turn any more."""


class Printed:
    """Takes what a script prints.

    The session holds it, so it must not lead back to the session: Python finds no such circles.

    Attributes:
        any: whether anything was printed since this was last set to False.
    """

    def __init__(self, program: SandboxProgram):
        self.any = False
        self._program = program

    def __call__(self, stream: Literal["stdout", "stderr"], text: str) -> None:
        self.any = True
        if not self._program.closed:
            self._program.host.branch.log.write(text)


class LiveScript:
    """A script in a worker's session: it may stay there for several turns.

    Args:
        session: a fresh one.
        program: one that has not begun, or whose last turn was kept.

    Attributes:
        program: whose turns these are.
        stopped, suspended: where the script stands after a turn that ended at an await, here and for anybody.
        asked: how many questions of the script the session has answered.
    """

    def __init__(self, session: MontySession, program: SandboxProgram, limits: Limits):
        self.session = session
        self.program = program
        self.stopped: Stopped | None = None
        self.suspended = program.suspended
        self.asked = 0
        self._asked_before = 0
        self._printed = Printed(program)
        self._limits = limits
        self._runs_main = False
        self._awaited: dict[int, Pending] = {}

    def begin(self, prelude: Prelude, watch: Watch) -> Turn:
        """Run the first turn.

        Raises:
            MontyCrashedError: the worker died.
            Abandoned: the program was closed meanwhile.
        """
        source = self.program.source
        if prelude.needed.decides:
            source = wrap_awaits(source)
        self.session.load_session(prelude.dump)
        self.program.prelude = prelude
        watch.begin_script()
        return self._turn(watch, lambda: self.session.feed_start(source, print_callback=self._printed))

    def load(self, dump: bytes) -> None:
        """Put the script where it stood when `dump` was kept.

        Raises:
            MontyCrashedError: the worker died.
        """
        snapshot = self.session.load_snapshot(dump, print_callback=self._printed)
        assert isinstance(snapshot, Stopped)
        self.stopped = snapshot

    def go_on(self, watch: Watch) -> Turn:
        """Run the next turn, from where the script stands.

        Raises:
            MontyCrashedError: the worker died.
            Abandoned: the program was closed meanwhile.
        """
        stopped, suspended = self.stopped, self.program.suspended
        assert stopped is not None and suspended is not None
        self._runs_main = suspended.runs_main
        self._awaited = dict(suspended.awaited)
        result = _settled(self.program.result, self._awaited.pop(suspended.call_id))
        watch.begin_script()
        if isinstance(stopped, FunctionSnapshot):
            return self._turn(watch, lambda: stopped.resume(result))
        return self._turn(watch, lambda: stopped.resume({suspended.call_id: result}))

    @property
    def heard(self) -> bool:
        """Whether anything came from the script in its last turn; until then, a turn can be repeated."""
        return self._printed.any or self.asked > self._asked_before

    def _turn(self, watch: Watch, first: Callable[[], Snapshot]) -> Turn:
        self._printed.any = False
        self._asked_before = self.asked
        self.stopped = None
        try:
            turn = self._drive(first())
        except OutOfTime as error:
            turn = Raised(str(error))
        except (MontyRuntimeError, MontySyntaxError) as error:
            if self._runs_main and NO_COROUTINE in str(error) and not in_script(error):
                turn = Raised(NOT_ASYNC)
            else:
                turn = script_fault(error, self.program.source, self._limits)
        watch.end_script()
        return turn

    def _drive(self, snapshot: Snapshot) -> Turn:
        while True:
            if self.program.closed:
                raise Abandoned
            match snapshot:
                case FutureSnapshot():
                    return self._suspend(snapshot, min(snapshot.pending_call_ids))
                case MontyComplete() if self._runs_main:
                    return self._end()
                case MontyComplete():
                    if self.program.host.main is None:
                        return Raised(NOT_STARTED)
                    snapshot = self._run_main(self.program.host.main.kind)
                case NameLookupSnapshot():
                    snapshot = snapshot.resume()
                case FunctionSnapshot(is_os_function=True):
                    self.asked += 1
                    snapshot = self._system_call(snapshot)
                case FunctionSnapshot():
                    self.asked += 1
                    answer = self._word(snapshot)
                    if isinstance(answer, Pending):
                        self._awaited[snapshot.call_id] = answer
                        if not self._prelude.needed.tasks:
                            return self._suspend(snapshot, snapshot.call_id)
                        answer = {"future": ...}
                    snapshot = snapshot.resume(answer)

    @property
    def _prelude(self) -> Prelude:
        assert self.program.prelude is not None
        return self.program.prelude

    def _suspend(self, snapshot: Stopped, call_id: int) -> Turn:
        program = self.program
        program.awaits += 1
        fuel = FUEL * program.host.branch.group.context
        if program.awaits > fuel:
            return Raised(f"out of fuel: a script may await {fuel} times, {FUEL} times the model's context")
        self.stopped = snapshot
        program.suspended = self.suspended = Suspended(call_id, self._awaited, self._runs_main)
        return program.asked_for(call_id, self._awaited[call_id])

    def _run_main(self, kind: str) -> Snapshot:
        self._runs_main = True
        if kind == "coroutine":
            return self.session.feed_start(RUN_COROUTINE, print_callback=self._printed)
        try:
            return self.session.feed_start(CALL_MAIN, print_callback=self._printed)
        except MontyRuntimeError as error:
            if WANTS_ARGUMENT not in str(error) or in_script(error):
                raise
        argument = {"_aici_argument": self.program.host.branch.group.arg}
        return self.session.feed_start(CALL_MAIN_WITH_ARGUMENT, inputs=argument, print_callback=self._printed)

    def _end(self) -> Turn:
        if not self.program.started:
            return Raised(NOTHING_AWAITED)
        if main := self.program.host.main:
            self.program.host.branch.log.write(main.ending)
        return Returned()

    def _system_call(self, call: FunctionSnapshot) -> Snapshot:
        modules = self._prelude.modules
        if call.function_name == "import" and call.args[0] in modules:
            return call.resume({"return_value": modules[call.args[0]]})
        return call.resume_not_handled()

    def _word(self, call: FunctionSnapshot) -> Any:
        """What a question of the script is answered with; a `Pending` if it must wait for that."""
        name = call.function_name
        if not name.startswith("aici."):
            return {"exc_type": "NameError", "message": f"name {name!r} is not defined"}
        name = name.removeprefix("aici.")
        try:
            if len(self._awaited) >= MOST_AWAITED and WORDS[name].awaited:
                raise LimitError(f"a script may await {MOST_AWAITED} things at once")
            answer = self.program.host.call(name, call.args, call.kwargs)
        except OutOfTime:
            raise
        except Exception as error:
            return _raised(error)
        return answer if isinstance(answer, Pending) else {"return_value": answer}


def _settled(result: Result, pending: Pending) -> Any:
    if result.error is not None:
        return _raised(result.error)
    try:
        return {"return_value": pending.convert(result.value)}
    except ValueError as error:
        return _raised(error)


def _raised(error: Exception) -> Any:
    return {"exc_type": sandbox_exception(error), "message": _message(error)}


def _message(error: Exception) -> str:
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
