"""Who runs next: the turns of all scripts, shared out over a few worker processes.

A turn normally takes microseconds. One that runs longer than a step goes on at the lowest priority and
makes room for another beside it, so that slow scripts do not hold up the others. The next turn of a
script that was late comes after everybody else's.
"""

import logging
import threading
import time
from collections import deque

from aici_vllm.controller.branch import Branch
from aici_vllm.controller.limits import Limits
from aici_vllm.controller.program import Raised, Turn
from aici_vllm.controller.sandbox.program import SandboxProgram
from aici_vllm.controller.sandbox.worker import Worker

logger = logging.getLogger(__name__)


class SandboxPool:
    """Runs scripts in sandbox processes. Safe to call from any thread; only `wait` and `close` block.

    Args:
        limits: of each script.
        workers: turns that run at once, as long as none is late.
        late_workers: how many late turns run beside them; when there are more, the others wait for them.

    Attributes:
        turns: that have ended.
        late_turns: those of them that computed for longer than a step may.
    """

    def __init__(self, limits: Limits, workers: int = 2, late_workers: int = 32):
        self.turns = 0
        self.late_turns = 0
        self._limits = limits
        self._workers = workers
        self._most_lanes = workers + late_workers
        lock = threading.RLock()
        self._changed = threading.Condition(lock)
        self._steps: deque[SandboxProgram] = deque()
        self._starts: deque[SandboxProgram] = deque()
        self._slow: deque[SandboxProgram] = deque()
        self._awaited: set[SandboxProgram] = set()
        self._none_awaited = threading.Condition(lock)
        self._held_up_since: float | None = None
        self._lanes: list[Lane] = []
        self._prompt = 0
        self._starting = 0
        self._closed = False
        self._ended = threading.Event()
        self._busy = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="aici-sandbox-watch", daemon=True)
        self._watcher.start()

    @property
    def restarts(self) -> int:
        """How many worker processes died or were killed, and were replaced."""
        return sum(lane.worker.restarts for lane in self._lanes)

    @property
    def script_seconds(self) -> float:
        """CPU seconds that scripts have used."""
        return sum(lane.worker.script_seconds for lane in self._lanes)

    def program(self, source: str, branch: Branch) -> SandboxProgram:
        """The script `source`, to be run for `branch`. Nothing runs before its first `resume`."""
        return SandboxProgram(self, source, branch)

    def wait(self, timeout: float) -> bool:
        """Block until a turn ends, or `timeout` seconds. A turn that ended since the last call counts."""
        ended = self._ended.wait(timeout)
        self._ended.clear()
        return ended

    def hold_up(self, timeout: float) -> bool:
        """Block until the turns that just began have ended, or `timeout` seconds. Whether any had begun.

        A turn is waited for once only, and only as long as its script has patience left.
        """
        with self._changed:
            if not self._awaited:
                return False
            self._held_up_since = started = time.monotonic()
            self._none_awaited.wait_for(lambda: not self._awaited, timeout)
            self._held_up_since = None
            for program in self._awaited:
                program.patience.spend(time.monotonic() - started)
            self._awaited.clear()
        return True

    def close(self) -> None:
        """End all workers. Turns that still run are killed."""
        with self._changed:
            self._closed = True
            lanes = list(self._lanes)
            waiting = [*self._steps, *self._starts, *self._slow]
            self._changed.notify_all()
        self._busy.set()
        for program in waiting:
            program.end_turn(Raised("the sandbox was closed"))
        for lane in lanes:
            if (running := lane.program) is not None:
                lane.worker.abandon(running)
        for thread in [self._watcher, *lanes]:
            thread.join()

    # What programs ask.

    def submit(self, program: SandboxProgram) -> None:
        """Run the program's next turn when its time comes."""
        with self._changed:
            if self._closed:
                raise RuntimeError("the sandbox pool is closed")
            queue = self._slow if program.late else self._steps if program.started else self._starts
            queue.append(program)
            if queue is self._steps and program.patience.left() > 0:
                self._awaited.add(program)
            self._wake_lanes()

    def abandon(self, program: SandboxProgram) -> None:
        """Stop the program's turn, if one runs."""
        with self._changed:
            self._stop_awaiting(program)
            lane = next((lane for lane in self._lanes if lane.program is program), None)
        if lane is not None:
            lane.worker.abandon(program)

    # What lanes ask.

    def take(self, lane: "Lane") -> SandboxProgram | None:
        """The next turn to run; None when the pool closes. Blocks."""
        with self._changed:
            while not self._closed:
                program = self._next()
                if program is not None:
                    lane.begin(program)
                    self._prompt += 1
                    self._starting += lane.starting
                    self._busy.set()
                    return program
                self._changed.wait()
            return None

    def give_back(self, lane: "Lane", program: SandboxProgram, turn: Turn | None) -> None:
        """The lane's turn is over; `turn` is how it ended, unless nobody waits for that."""
        with self._changed:
            self.turns += 1
            self.late_turns += program.late
            self._prompt -= not lane.late
            self._starting -= lane.starting
            lane.program = None
            lane.slow = False
            self._stop_awaiting(program)
            # Under the lock: the branch may begin the next turn as soon as it sees this one's end.
            if turn is not None:
                program.end_turn(turn)
            self._wake_lanes()
        self._ended.set()

    def _stop_awaiting(self, program: SandboxProgram) -> None:
        if program not in self._awaited:
            return
        self._awaited.discard(program)
        if self._held_up_since is not None:
            program.patience.spend(time.monotonic() - self._held_up_since)
        if not self._awaited:
            self._none_awaited.notify_all()

    def _next(self) -> SandboxProgram | None:
        if self._prompt >= self._workers:
            return None
        # Whoever has begun goes first, and scripts that begin never fill all lanes: they may take long.
        queues = [self._steps]
        most = max(1, self._most_lanes // 2)
        if self._starting < most:
            queues.append(self._starts)
        if sum(lane.slow for lane in self._lanes) < most:
            queues.append(self._slow)
        for queue in queues:
            while queue:
                program = queue.popleft()
                if not program.closed:
                    return program
        return None

    def _wake_lanes(self) -> None:
        """Wake as many lanes as there is work for, and make those that are missing."""
        waiting = len(self._steps) + len(self._starts) + len(self._slow)
        wanted = min(self._workers - self._prompt, waiting)
        idle = sum(lane.program is None for lane in self._lanes)
        for _ in range(min(wanted - idle, self._most_lanes - len(self._lanes))):
            lane = Lane(self, self._limits)
            self._lanes.append(lane)
            lane.start()
        if wanted > 0:
            self._changed.notify(wanted)

    # The watch over turns.

    def _watch(self) -> None:
        while True:
            self._busy.wait()
            if self._closed:
                return
            time.sleep(self._limits.step_seconds / 2)
            with self._changed:
                running = [lane for lane in self._lanes if lane.program is not None]
                if not running and not self._closed:
                    self._busy.clear()
            for lane in running:
                if lane.worker.check() > self._limits.step_seconds:
                    self._make_room(lane)

    def _make_room(self, lane: "Lane") -> None:
        """Let another turn run beside this late one."""
        with self._changed:
            late = sum(lane.late for lane in self._lanes if lane.program is not None)
            if lane.late or lane.program is None or late >= self._most_lanes - self._workers:
                return
            lane.late = True
            self._prompt -= 1
            self._wake_lanes()
        lane.worker.slow_down()


class Lane(threading.Thread):
    """A thread with a worker process, which runs one turn after another."""

    def __init__(self, pool: SandboxPool, limits: Limits):
        super().__init__(name="aici-sandbox", daemon=True)
        self.worker = Worker(limits)
        self.program: SandboxProgram | None = None
        self.late = False
        self.starting = False
        self.slow = False
        self._pool = pool

    def begin(self, program: SandboxProgram) -> None:
        """Note what runs next. Under the pool's lock."""
        self.program = program
        self.late = False
        self.starting = not program.started
        self.slow = program.late

    def run(self) -> None:
        while (program := self._pool.take(self)) is not None:
            turn = self._turn(program)
            late = self.late
            self._pool.give_back(self, program, turn)
            if late:
                # Its process cannot get its priority back.
                self.worker.close()
        self.worker.close()

    def _turn(self, program: SandboxProgram) -> Turn | None:
        try:
            return self.worker.run(program)
        except BaseException as error:
            # The branch must hear of it, or its request would wait for ever.
            logger.exception("a turn in the sandbox failed")
            return Raised(f"the sandbox failed: {type(error).__name__}: {error}")
