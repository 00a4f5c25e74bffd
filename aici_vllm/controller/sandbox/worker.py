"""One sandbox process, and the watch over the turn that runs in it."""

import contextlib
import os
import signal
import threading
import time

from pydantic_monty import Monty, MontyCrashedError, MontySession

from aici_vllm.controller.limits import Limits
from aici_vllm.controller.program import Raised, Turn
from aici_vllm.controller.sandbox.faults import time_limit
from aici_vllm.controller.sandbox.program import SandboxProgram
from aici_vllm.controller.sandbox.turn import Abandoned, Prelude, TurnRun, make_prelude

WORKER_DIED = (
    "the sandbox process died while it ran this script; nothing else was lost: send the request again"
)

MAX_SUSPENSIONS = 1_000_000
"""Words that one turn may use; its time ends long before."""

LOWEST_PRIORITY = 19


class Worker:
    """A process that runs one turn at a time. A crash or a kill costs that turn and no other."""

    def __init__(self, limits: Limits):
        self._limits = limits
        # The watch kills by CPU time; wall time, which a busy machine stretches, is only the last resort.
        self._longest_turn = _patience(max(limits.init_seconds, limits.step_seconds * limits.late_steps))
        self._monty: Monty | None = None
        self._preludes: dict[bool, Prelude] = {}
        self._lock = threading.Lock()
        self._watch: Watch | None = None
        self.restarts = 0
        self.script_seconds = 0.0

    def run(self, program: SandboxProgram) -> Turn | None:
        """Run a turn; None when the program was closed meanwhile."""
        prelude = self._prelude(program.decides)
        watch = None
        try:
            with self._checkout() as session:
                watch = self._begin_watch(session, program)
                try:
                    return TurnRun(session, prelude, program, self._limits).run()
                finally:
                    self._end_watch(watch)
        except Abandoned:
            return None
        except MontyCrashedError:
            self.restarts += 1
            return Raised(watch.fault if watch and watch.fault else WORKER_DIED)

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

    def _prelude(self, decisions: bool) -> Prelude:
        if decisions not in self._preludes:
            with self._checkout() as session:
                self._preludes[decisions] = make_prelude(session, decisions)
        return self._preludes[decisions]

    def _checkout(self) -> MontySession:
        if self._monty is None:
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

    def _begin_watch(self, session: MontySession, program: SandboxProgram) -> "Watch":
        assert session.worker_pid is not None
        watch = Watch(program, session.worker_pid, self._limits)
        with self._lock:
            self._watch = watch
        if program.closed:
            raise Abandoned
        return watch

    def _end_watch(self, watch: "Watch") -> None:
        with self._lock:
            self._watch = None
        self.script_seconds += watch.used()


class Watch:
    """How long a turn has run, and what to do about it. Its owner serializes all calls."""

    def __init__(self, program: SandboxProgram, pid: int, limits: Limits):
        self.program = program
        program.host.seconds = 0.0
        self._started = time.monotonic()
        self.fault: str | None = None
        self._pid = pid
        self._cpu_started = _cpu_seconds(pid)
        self._used = 0.0
        self._message = f"TimeoutError: {time_limit(limits, program.started)}"
        self._limit = limits.step_seconds * limits.late_steps if program.started else limits.init_seconds

    def used(self) -> float:
        """Seconds that the process has computed for this turn, as far as it lived."""
        cpu = _cpu_seconds(self._pid)
        if self._cpu_started is None:
            self._used = time.monotonic() - self._started
        elif cpu is not None:
            self._used = cpu - self._cpu_started
        return self._used

    def check(self) -> float:
        """Kill the process when it computed for too long, or hangs. Seconds since the turn began."""
        seconds = time.monotonic() - self._started
        hangs = seconds > _patience(self._limit)
        if self.fault is None and (hangs or self.used() + self.program.host.seconds > self._limit):
            self.kill(self._message)
        return seconds

    def kill(self, fault: str) -> None:
        self.fault = fault
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)

    def slow_down(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, self._pid, LOWEST_PRIORITY)


def _patience(limit: float) -> float:
    """Seconds in which a process that others keep from computing should have used its `limit`."""
    return 4 * limit + 1


def _cpu_seconds(pid: int) -> float | None:
    """CPU time of a process; None where the system does not tell."""
    try:
        # The clock id of another process, as Linux's clock_getcpuclockid makes it.
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return None
