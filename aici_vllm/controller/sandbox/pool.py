"""Who runs next: the turns of all scripts, shared out over a few worker processes.

While there are few scripts, each stays in the process of its last turn, and goes on there. A turn normally
takes microseconds. One that runs longer than a step goes on at the lowest priority and makes room for another
beside it, so that slow scripts do not hold up the others. The next turn of a script that was late comes after
everybody else's.
"""

import logging
import threading
import time
import weakref

from aici_vllm.controller.branch import Branch
from aici_vllm.controller.limits import Limits
from aici_vllm.controller.program import Raised, Turn
from aici_vllm.controller.sandbox.preludes import Preludes
from aici_vllm.controller.sandbox.program import SandboxProgram
from aici_vllm.controller.sandbox.waiting import WaitingTurns
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
        self._lock = lock
        self._preludes = Preludes()
        self._steps = WaitingTurns()
        self._starts = WaitingTurns()
        self._slow = WaitingTurns()
        self._awaited: set[SandboxProgram] = set()
        self._none_awaited = threading.Condition(lock)
        self._held_up_since: float | None = None
        self._lanes: list[Lane] = []
        self._programs: weakref.WeakSet[SandboxProgram] = weakref.WeakSet()
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
        program = SandboxProgram(self, source, branch)
        self._programs.add(program)
        return program

    def wait(self, timeout: float) -> bool:
        """Block until a turn ends, or `timeout` seconds. A turn that ended since the last call counts."""
        ended = self._ended.wait(timeout)
        self._ended.clear()
        return ended

    def hold_up(self, timeout: float) -> bool:
        """Block until the turns that just began have ended, or `timeout` seconds. Whether any had begun.

        A turn is waited for once only, and only as long as its script has patience left.
        """
        with self._lock:
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
        with self._lock:
            self._closed = True
            lanes = list(self._lanes)
            waiting = [*self._steps, *self._starts, *self._slow]
            for lane in lanes:
                lane.called.notify()
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
        with self._lock:
            if self._closed:
                raise RuntimeError("the sandbox pool is closed")
            queue = self._slow if program.late else self._steps if program.started else self._starts
            queue.append(program)
            if queue is self._steps and program.patience.left() > 0:
                self._awaited.add(program)
            self._share_out()

    def abandon(self, program: SandboxProgram) -> None:
        """Stop the program's turn, if one runs."""
        with self._lock:
            self._programs.discard(program)
            self._stop_awaiting(program)
            lane = next((lane for lane in self._lanes if lane.program is program), None)
            for other in self._lanes:
                if other.stays is program:
                    other.called.notify()
        if lane is not None:
            lane.worker.abandon(program)

    # What lanes ask.

    def few(self) -> bool:
        """Whether every script may stay in a process of its own between its turns."""
        return len(self._programs) <= self._workers

    def take(self, lane: "Lane") -> bool:
        """Wait until the lane has a turn to run or a closed script to let go; False when the pool closes."""
        with self._lock:
            while not self._closed:
                if lane.program is not None or self._must_let_go(lane):
                    return True
                lane.called.wait()
            return False

    def end(self, program: SandboxProgram, turn: Turn) -> None:
        """The program's turn has ended in `turn`. The lane is still busy with it until `give_back`."""
        with self._lock:
            self.turns += 1
            self.late_turns += program.late
            self._stop_awaiting(program)
            # Under the lock: the branch may begin the next turn as soon as it sees this one's end.
            program.end_turn(turn)
        self._ended.set()

    def give_back(self, lane: "Lane") -> bool:
        """The lane's turn is over, and where its script stands is kept.

        False if the lane must end its process first: a late one cannot get its priority back.
        """
        with self._lock:
            if lane.late and lane.worker.open:
                return False
            self._prompt -= not lane.late
            self._starting -= lane.starting
            lane.program = None
            lane.slow = False
            self._share_out()
        return True

    def _must_let_go(self, lane: "Lane") -> bool:
        """Whether nobody needs what stays in the lane's process."""
        return lane.stays is not None and lane.stays.closed

    def _stop_awaiting(self, program: SandboxProgram) -> None:
        if program not in self._awaited:
            return
        self._awaited.discard(program)
        if self._held_up_since is not None:
            program.patience.spend(time.monotonic() - self._held_up_since)
        if not self._awaited:
            self._none_awaited.notify_all()

    def _share_out(self) -> None:
        """Give turns that wait to lanes that are idle, and make those that are missing."""
        while self._prompt < self._workers and not self._closed:
            program = self._next()
            if program is None:
                return
            lane = self._lane_for(program)
            lane.begin(program)
            self._prompt += 1
            self._starting += lane.starting
            self._busy.set()
            lane.called.notify()

    def _next(self) -> SandboxProgram | None:
        # Whoever has begun goes first, and scripts that begin never fill all lanes: they may take long.
        queues = [self._steps]
        most = max(1, self._most_lanes // 2)
        if self._starting < most:
            queues.append(self._starts)
        if sum(lane.slow for lane in self._lanes) < most:
            queues.append(self._slow)
        for queue in queues:
            if (program := queue.take()) is not None:
                return program
        return None

    def _lane_for(self, program: SandboxProgram) -> "Lane":
        """An idle lane: the one where the program stays, or else one where nobody does, if possible."""
        idle = [lane for lane in self._lanes if lane.program is None]
        for lane in idle:
            if lane.stays is program:
                return lane
        free = [lane for lane in idle if lane.stays is None or lane.stays.closed]
        if free or (idle and len(self._lanes) >= self._workers):
            return (free or idle)[0]
        lane = Lane(self, self._limits, self._preludes, self._lock)
        self._lanes.append(lane)
        lane.start()
        return lane

    # The watch over turns.

    def _watch(self) -> None:
        while True:
            self._busy.wait()
            if self._closed:
                return
            time.sleep(self._limits.step_seconds / 2)
            with self._lock:
                running = [lane for lane in self._lanes if lane.program is not None]
                if not running and not self._closed:
                    self._busy.clear()
            for lane in running:
                if lane.worker.check() > self._limits.step_seconds:
                    self._make_room(lane)

    def _make_room(self, lane: "Lane") -> None:
        """Let another turn run beside this late one."""
        with self._lock:
            late = sum(lane.late for lane in self._lanes if lane.program is not None)
            if lane.late or lane.program is None or late >= self._most_lanes - self._workers:
                return
            lane.late = True
            self._prompt -= 1
            self._share_out()
        lane.worker.slow_down()


class Lane(threading.Thread):
    """A thread with a worker process, which runs one turn after another.

    Attributes:
        program: whose turn it runs.
        stays: the program that it ran last and that is still in its process.
        called: notified when it has a turn to run, or may have something to let go.
    """

    def __init__(self, pool: SandboxPool, limits: Limits, preludes: Preludes, lock: threading.RLock):
        super().__init__(name="aici-sandbox", daemon=True)
        self.worker = Worker(limits, preludes)
        self.program: SandboxProgram | None = None
        self.stays: SandboxProgram | None = None
        self.called = threading.Condition(lock)
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
        while self._pool.take(self):
            if self.program is not None:
                self._turn(self.program)
                self.stays = self.worker.stays
                while not self._pool.give_back(self):
                    self.worker.close()
                    self.stays = None
            else:
                self.worker.let_go()
                self.stays = None
        self.worker.close()

    def _turn(self, program: SandboxProgram) -> None:
        def answer(turn: Turn) -> None:
            self._pool.end(program, turn)

        try:
            self.worker.run(program, answer, keep=self._pool.few)
        except BaseException as error:
            # The branch must hear of it, or its request would wait for ever.
            logger.exception("a turn in the sandbox failed")
            self.worker.fail(program, Raised(f"the sandbox failed: {type(error).__name__}: {error}"), answer)
