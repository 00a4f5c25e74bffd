"""How long a turn computes, and the end of one that computes for too long."""

import contextlib
import os
import signal
import sys
import time

from aici_vllm.controller.limits import Limits
from aici_vllm.controller.sandbox.faults import time_limit
from aici_vllm.controller.sandbox.program import SandboxProgram

LOW_PRIORITY, LOWEST_PRIORITY = 10, 19
"""Niceness of sandbox processes: where the engine wants a processor, a script has a tenth of it, or less."""

STILL = 1.0
"""Seconds without any progress, after which a process is called hung: others leave every process some."""

STARVED = 5
"""How many times as long as a hung process one may take that others keep from computing."""

HUNG = "the sandbox process hung while it ran this script; nothing else was lost: send the request again"


class Watch:
    """The clock of one turn. Loading a script and keeping a copy of it are no part of its time."""

    def __init__(self, program: SandboxProgram, limits: Limits):
        self.program = program
        self._limits = limits
        self.fault: str | None = None
        """Why the turn's process was killed, if it was."""
        self.began = False
        """Whether the script has run: from then on a turn cannot be repeated."""
        self.counted = 0.0
        """How much of its `total` the program and its worker have noted."""
        self._late_steps = 0
        self._was_started = program.started
        self._limit = limits.step_seconds * limits.late_steps if program.started else limits.init_seconds
        self._pid = 0
        self._started = self._script_started = self._first = self._last = 0.0
        self._script_runs = False
        self._asked = 0.0
        self._computed = self._last_computed = self._last_moved = 0.0

    def begin(self, pid: int) -> None:
        """The turn has got a process."""
        self._pid = pid
        self._started = time.monotonic()
        self._first = self._seconds()
        self.program.host.begin_turn()

    def begin_script(self) -> None:
        """The script goes on."""
        self._script_started = self._seconds()
        self.began = self._script_runs = True

    def end_script(self) -> None:
        """The script has stopped at an await, or for good."""
        if self._script_runs:
            self._computed = self.computed()
            self._script_runs = False
            # Once the script is kept, another worker may begin its next turn and count from 0.
            host = self.program.host
            self._asked = host.seconds + host.long_seconds

    def computed(self) -> float:
        """CPU seconds of the script in this turn, its questions in this process included."""
        if self._script_runs:
            return self._seconds() - self._script_started + self.program.host.seconds
        return self._computed

    def total(self) -> float:
        """CPU seconds of a turn that has ended, as far as its process lived, and of what it asked for."""
        return self._seconds() - self._first + self._asked

    def check(self) -> float:
        """Kill the process when the script computed for too long, or hangs. Seconds since the turn began."""
        seconds = time.monotonic() - self._started
        runs, computed = self._script_runs, self.computed()
        if computed != self._last_computed:
            self._last_computed, self._last_moved = computed, seconds
        still = seconds - self._last_moved > STILL
        if (runs and computed > self._limit) or seconds > patience(self._limit) * (1 if still else STARVED):
            self.kill(HUNG if still else f"TimeoutError: {time_limit(self._limits, self._was_started)}")
        elif runs and self._was_started:
            self._note_late(computed)
        return seconds

    def _note_late(self, computed: float) -> None:
        """Say in the log that the step had to go on without the script."""
        steps = int(computed / self._limits.step_seconds)
        if steps > self._late_steps:
            self._late_steps = steps
            limit = f"{1000 * self._limits.step_seconds:g} ms"
            self.program.host.branch.log.write(
                f"late: a step may take {limit} of script time ({steps} of {self._limits.late_steps})\n"
            )

    def kill(self, fault: str) -> None:
        """End the process. The first reason stands."""
        if self.fault is None:
            self.fault = fault
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def slow_down(self) -> None:
        """Let everybody else compute first."""
        for thread in _threads(self._pid):
            with contextlib.suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, thread, LOWEST_PRIORITY)
            if sys.platform == "linux":
                # Whoever wakes up takes its processor at once, which niceness alone does not give. Some
                # containers forbid the call.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))

    def _seconds(self) -> float:
        """CPU time of the process, or its last known one."""
        try:
            # The clock id of another process, as Linux's clock_getcpuclockid makes it.
            self._last = time.clock_gettime((~self._pid << 3) | 2)
        except OSError:
            # The process is gone, or the system has no such clock: then wall time has to do.
            if sys.platform != "linux":
                self._last = time.monotonic()
        return self._last


def make_modest(pid: int) -> None:
    """Let the engine's processes compute before this new one."""
    for thread in _threads(pid):
        with contextlib.suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, thread, LOW_PRIORITY)


def _threads(pid: int) -> list[int]:
    """On Linux each thread has a priority of its own, and scripts do not run in the first."""
    if sys.platform != "linux":
        return [pid]
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except (FileNotFoundError, ProcessLookupError):
        return []


def patience(limit: float) -> float:
    """Seconds after which a process is killed that makes no progress and has not used its `limit`."""
    return 4 * limit + 1
