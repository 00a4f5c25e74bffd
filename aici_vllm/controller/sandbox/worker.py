"""One sandbox process, which runs one turn at a time."""

import threading

from pydantic_monty import Monty, MontyCrashedError, MontySession

from aici_vllm.controller.limits import Limits
from aici_vllm.controller.program import Raised, Turn
from aici_vllm.controller.sandbox.program import SandboxProgram
from aici_vllm.controller.sandbox.turn import Abandoned, Prelude, TurnRun, make_prelude
from aici_vllm.controller.sandbox.watch import Watch, patience

WORKER_DIED = (
    "the sandbox process died while it ran this script; nothing else was lost: send the request again"
)

LOST = Raised("no sandbox process could be started: the machine may be out of memory or processes")

MAX_SUSPENSIONS = 1_000_000
"""Words that one turn may use; its time ends long before."""

_starting = threading.Lock()
"""Held while a process's program is looked up: Python's sysconfig fills its cache without a lock."""


class Worker:
    """A process that runs one turn at a time. A crash or a kill costs that turn and no other."""

    def __init__(self, limits: Limits):
        self._limits = limits
        # The watch kills first, and knows why; this finds a process that hung while it was idle.
        longest = max(limits.init_seconds, limits.step_seconds * limits.late_steps)
        self._longest_turn = patience(longest) + 1
        self._monty: Monty | None = None
        self._preludes: dict[bool, Prelude] = {}
        self._lock = threading.Lock()
        self._watch: Watch | None = None
        self._pid: int | None = None
        self.restarts = 0
        self.script_seconds = 0.0

    def run(self, program: SandboxProgram) -> Turn | None:
        """Run a turn; None when the program was closed meanwhile."""
        turn = self._try(program)
        # A process that died before the script ran in it has cost nothing yet.
        return self._try(program) if turn == LOST else turn

    def _try(self, program: SandboxProgram) -> Turn | None:
        watch = Watch(program, self._limits)
        try:
            prelude = self._prelude(program.decides)
            with self._checkout() as session:
                self._begin_watch(session, watch)
                try:
                    return TurnRun(session, prelude, program, self._limits, watch).run()
                finally:
                    self._end_watch(watch)
        except Abandoned:
            return None
        except MontyCrashedError:
            self.restarts += 1
            self._pid = None
            return Raised(watch.fault or WORKER_DIED) if watch.began else LOST

    def check(self) -> float:
        """Kill the process if its turn broke a time limit. Seconds that the turn has run, 0 if none runs."""
        with self._lock:
            return self._watch.check() if self._watch is not None else 0.0

    def abandon(self, program: SandboxProgram) -> None:
        """Kill the process if it runs `program`."""
        with self._lock:
            if self._watch is not None and self._watch.program is program:
                self._watch.kill("closed")

    def slow_down(self) -> None:
        """Let everybody else compute first for the rest of this turn."""
        with self._lock:
            if self._watch is not None:
                self._watch.slow_down()

    def close(self) -> None:
        """End the process; the next turn starts another. No turn may be running."""
        if self._monty is not None:
            self._monty.__exit__(None, None, None)
            self._monty = None
            self._pid = None

    def _prelude(self, decisions: bool) -> Prelude:
        if decisions not in self._preludes:
            with self._checkout() as session:
                self._preludes[decisions] = make_prelude(session, decisions)
        return self._preludes[decisions]

    def _checkout(self) -> MontySession:
        if self._monty is None:
            with _starting:
                self._monty = Monty(min_processes=1, max_processes=1, request_timeout=self._longest_turn)
            self._monty.__enter__()
        return self._monty.checkout(
            script_name="script.py",
            limits={
                "max_turn_duration_secs": self._longest_turn,
                "max_memory": int(self._limits.memory),
                "max_suspensions": MAX_SUSPENSIONS,
            },
            os_policy={"datetime": "call_host", "sleep": "zero", "random_start": {"seed": 0}},
        )

    def _begin_watch(self, session: MontySession, watch: Watch) -> None:
        pid = session.worker_pid
        assert pid is not None
        # A process that died while idle was replaced without a word.
        self.restarts += self._pid not in (None, pid)
        self._pid = pid
        watch.begin(pid)
        with self._lock:
            self._watch = watch
        if watch.program.closed:
            raise Abandoned

    def _end_watch(self, watch: Watch) -> None:
        with self._lock:
            self._watch = None
        watch.end_script()
        watch.program.late = watch.computed() > self._limits.step_seconds
        seconds = watch.total()
        watch.program.seconds += seconds
        self.script_seconds += seconds
