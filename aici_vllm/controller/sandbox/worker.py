"""One sandbox process, which runs one turn at a time."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pydantic_monty import Monty, MontyCrashedError, MontySession

from aici_vllm.controller.limits import Limits
from aici_vllm.controller.program import Raised, Turn
from aici_vllm.controller.sandbox.preludes import Needs, Prelude, Preludes, needs
from aici_vllm.controller.sandbox.program import SandboxProgram
from aici_vllm.controller.sandbox.turn import Abandoned, LiveScript
from aici_vllm.controller.sandbox.watch import HUNG, STARVED, Watch, make_modest, patience

WORKER_DIED = (
    "the sandbox process died while it ran this script; nothing else was lost: send the request again"
)

LOST = Raised("no sandbox process could be started: the machine may be out of memory or processes")

MOST_ASKED = 500_000
"""Questions that a script may ask before it has to leave the session in which it stayed between turns."""

MOST_SUSPENSIONS = 2 * MOST_ASKED
"""Questions that a session takes; a turn's time ends long before it has asked half of them."""

_starting = threading.Lock()
"""Held while a process's program is looked up: Python's sysconfig fills its cache without a lock."""

Answer = Callable[[Turn], None]
"""What is told how a turn ended."""


class Worker:
    """A process that runs one turn at a time. A crash or a kill costs that turn and no other.

    A script whose turn has ended may stay in the process until another needs it, so that its next turn need
    not load it. Everything is in its dump as well, which is made as soon as the turn's end has been told.
    """

    def __init__(self, limits: Limits, preludes: Preludes):
        self._limits = limits
        # The watch kills first, and knows why; this finds a process that hung while it was idle.
        longest = max(limits.init_seconds, limits.step_seconds * limits.late_steps)
        self._longest_turn = STARVED * patience(longest) + 1
        self._monty: Monty | None = None
        self._preludes = preludes
        self._session: MontySession | None = None
        self._live: LiveScript | None = None
        self._keep: Callable[[], bool] = bool
        self._used = False
        """Whether the session has had a script in it, and can load no other."""
        self._lock = threading.Lock()
        self._watch: Watch | None = None
        self._answered = False
        self._pid: int | None = None
        self.restarts = 0
        self.script_seconds = 0.0

    def run(self, program: SandboxProgram, answer: Answer, keep: Callable[[], bool]) -> None:
        """Run a turn, tell `answer` how it ended, and keep where the script stands.

        When the program was closed meanwhile, nothing is told.

        Args:
            keep: asked after a turn whether the script is to stay in the process.
        """
        self._keep = keep
        self._answered = False
        suspended = program.suspended
        if suspended is not None and suspended.lost is not None:
            answer(suspended.lost)
            return
        if self._stands_here(program) and self._go_on(program, answer):
            return
        # A process that died before the script ran in it has cost nothing yet.
        if not self._run(program, answer) and not self._run(program, answer):
            answer(LOST)

    def check(self) -> float:
        """Kill the process if its turn broke a time limit. Seconds that the turn has run, 0 if none runs."""
        with self._lock:
            return self._watch.check() if self._watch is not None else 0.0

    def abandon(self, program: SandboxProgram) -> None:
        """Kill the process if it runs `program`."""
        with self._lock:
            if self._watch is not None and self._watch.program is program and not self._answered:
                self._watch.kill("closed")

    def slow_down(self) -> None:
        """Let everybody else compute first for the rest of this turn."""
        with self._lock:
            if self._watch is not None:
                self._watch.slow_down()

    def let_go(self) -> None:
        """Forget the script that has stayed in the process, and make room for the next. No turn may run."""
        try:
            self._leave()
            self._enter()
        except MontyCrashedError:
            self._count_crash()

    def fail(self, program: SandboxProgram, fault: Raised, answer: Answer) -> None:
        """A turn broke off: tell it, or note that where the script stands could not be kept."""
        if not self._answered:
            answer(fault)
        elif program.suspended is not None and not program.suspended.settled:
            program.suspended.lost = fault

    def close(self) -> None:
        """End the process; the next turn starts another. No turn may be running."""
        self._leave()
        if self._monty is not None:
            self._monty.__exit__(None, None, None)
            self._monty = None
            self._pid = None

    @property
    def open(self) -> bool:
        """Whether it has a process."""
        return self._monty is not None

    @property
    def stays(self) -> SandboxProgram | None:
        """The program that has stayed in the process after its turn."""
        return None if self._live is None else self._live.program

    # Turns.

    def _stands_here(self, program: SandboxProgram) -> bool:
        """Whether the program stands here where its last turn has left it."""
        live = self._live
        return live is not None and live.suspended is program.suspended and live.program is program

    def _go_on(self, program: SandboxProgram, answer: Answer) -> bool:
        """Run the next turn of the script that has stayed; False if that must be done somewhere else."""
        live = self._live
        assert live is not None
        watch = Watch(program, self._limits)
        try:
            with self._watched(live.session, watch):
                self._end(live, live.go_on(watch), watch, answer)
        except Abandoned:
            self._leave()
        except MontyCrashedError:
            self._count_crash()
            # Of a process that died or hung between two turns, nothing was heard since.
            if not live.heard and watch.fault in (None, HUNG) and not self._answered:
                return False
            self.fail(program, Raised(watch.fault or WORKER_DIED), answer)
        return True

    def _run(self, program: SandboxProgram, answer: Answer) -> bool:
        """Run a turn from the start or from a dump; False if the process died before the script ran."""
        watch = Watch(program, self._limits)
        try:
            if self._used:
                self._leave()
            suspended = program.suspended
            prelude = self._prelude(needs(program.source)) if suspended is None else None
            live = LiveScript(self._enter(), program, self._limits)
            self._used = True
            with self._watched(live.session, watch):
                if suspended is not None:
                    assert suspended.dump is not None
                    live.load(suspended.dump)
                    turn = live.go_on(watch)
                else:
                    assert prelude is not None
                    turn = live.begin(prelude, watch)
                self._end(live, turn, watch, answer)
        except Abandoned:
            self._leave()
        except MontyCrashedError:
            self._count_crash()
            if not watch.began:
                return False
            self.fail(program, Raised(watch.fault or WORKER_DIED), answer)
        return True

    def _end(self, live: LiveScript, turn: Turn, watch: Watch, answer: Answer) -> None:
        """Tell how a turn has ended; then keep where the script stands."""
        program = live.program
        program.late = watch.computed() > self._limits.step_seconds
        with self._lock:
            self._answered = True
        suspended = program.suspended
        # First: the branch that hears of its end is asked at once what it has used.
        self._count_seconds(watch)
        answer(turn)
        if live.stopped is None:
            self.let_go()
            return
        assert suspended is not None
        suspended.dump = live.stopped.dump()
        if self._keep() and live.asked < MOST_ASKED:
            self._live = live
        else:
            self.let_go()

    # The process.

    def _prelude(self, needed: Needs) -> Prelude:
        prelude = self._preludes.find(needed)
        if prelude is None:
            prelude = self._preludes.make(needed, self._enter())
            self._leave()
        return prelude

    def _enter(self) -> MontySession:
        """A fresh session."""
        if self._session is None:
            if self._monty is None:
                with _starting:
                    self._monty = Monty(min_processes=1, max_processes=1, request_timeout=self._longest_turn)
                self._monty.__enter__()
            session = self._monty.checkout(
                script_name="script.py",
                limits={
                    "max_turn_duration_secs": self._longest_turn,
                    "max_memory": int(self._limits.memory),
                    "max_suspensions": MOST_SUSPENSIONS,
                },
                os_policy={"datetime": "call_host", "sleep": "zero", "random_start": {"seed": 0}},
            )
            session.__enter__()
            self._session = session
        return self._session

    def _leave(self) -> None:
        """End the session, and the script that stays in it."""
        session, self._session, self._live, self._used = self._session, None, None, False
        if session is not None:
            session.__exit__(None, None, None)

    def _count_crash(self) -> None:
        self.restarts += 1
        self._pid = None
        self._leave()

    @contextmanager
    def _watched(self, session: MontySession, watch: Watch) -> Iterator[None]:
        """Have the watch look at the process meanwhile, and count what the turn has used."""
        pid = session.worker_pid
        if pid is None:
            raise AssertionError("a session that runs nothing has a process")
        # A process that died while idle was replaced without a word.
        self.restarts += self._pid not in (None, pid)
        if pid != self._pid:
            make_modest(pid)
        self._pid = pid
        watch.begin(pid)
        with self._lock:
            self._watch = watch
            self._answered = False
        try:
            if watch.program.closed:
                raise Abandoned
            yield
        finally:
            with self._lock:
                self._watch = None
            watch.end_script()
            self._count_seconds(watch)

    def _count_seconds(self, watch: Watch) -> None:
        """Add what the turn has used since this was last done."""
        seconds = watch.total() - watch.counted
        watch.counted += seconds
        watch.program.seconds += seconds
        self.script_seconds += seconds
