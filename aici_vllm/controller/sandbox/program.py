"""A script as its branch sees it: a dump between turns, a job of the pool during one."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aici_vllm.controller.awaits import Awaitable, Generate
from aici_vllm.controller.branch import Branch
from aici_vllm.controller.program import Raised, Turn
from aici_vllm.controller.sandbox.host import Host, Pending
from aici_vllm.controller.sandbox.patience import Patience
from aici_vllm.controller.sandbox.preludes import Prelude

if TYPE_CHECKING:
    from aici_vllm.controller.sandbox.pool import SandboxPool


@dataclass(slots=True, eq=False)
class Suspended:
    """A script stopped at an await: all that it is. Any worker can go on with it, any number of times.

    The worker in which it stopped fills in `dump` after it has said that the turn is over. Until then
    nobody can go on. If the worker dies before, the script is `lost`.

    Attributes:
        call_id: of the await that is answered next.
        awaited: the awaits that have begun, by the sandbox's number.
        runs_main: whether the script's own lines are over, and what it gave to `aici.start` runs.
    """

    call_id: int
    awaited: dict[int, Pending]
    runs_main: bool
    dump: bytes | None = None
    lost: Raised | None = None

    @property
    def settled(self) -> bool:
        """Whether it can be gone on with, or never will."""
        return self.dump is not None or self.lost is not None


@dataclass(slots=True)
class Result:
    """What the current await gives: a value, or an error that it raises."""

    value: Any
    error: Exception | None


class SandboxProgram:
    """One branch's script, run by the pool. It needs a worker while a turn runs, and else stays where nobody
    else needs one.

    Attributes:
        seconds: CPU time of its turns, that of its questions in this process included.
        prelude: the words that it has, from its first turn on.
        late: its last turn took longer than a step may.
        patience: how long steps still wait for it.
    """

    def __init__(self, pool: "SandboxPool", source: str, branch: Branch):
        self._pool = pool
        self.source = source
        self.host = Host(branch)
        self.suspended: Suspended | None = None
        self.prelude: Prelude | None = None
        self.result = Result(None, None)
        self.closed = False
        self.awaits = 0
        self.seconds = 0.0
        self.late = False
        self.patience = Patience()
        self._taken_over: dict[int, Generate] = {}
        self._turn: Turn | None = None

    @property
    def ready(self) -> bool:
        """Whether its next turn can begin: the last one is kept."""
        return self.suspended is None or self.suspended.settled

    @property
    def started(self) -> bool:
        """True once the script has awaited something."""
        return self.suspended is not None

    def resume(self, value: Any = None, error: Exception | None = None) -> None:
        self.result = Result(value, error)
        self._turn = None
        self._pool.submit(self)

    def poll(self) -> Turn | None:
        return self._turn

    def fork(self, branch: Branch) -> "SandboxProgram":
        copy = self._pool.program(self.source, branch)
        copy.host = self.host.fork(branch)
        copy.suspended = self.suspended
        copy.prelude = self.prelude
        copy.awaits = self.awaits
        copy.late = self.late
        copy.patience = self.patience.copy()
        copy._taken_over = self._hand_over(copy.host)
        copy._turn = self._turn
        return copy

    def asked_for(self, call_id: int, pending: Pending) -> Awaitable:
        """What the branch must do for an await that has begun."""
        return self._taken_over.pop(call_id, pending.awaitable)

    def _hand_over(self, host: Host) -> dict[int, Generate]:
        """The generations that have not begun, each with a constraint of the copy's own."""
        asked: dict[int, Generate] = {}
        for call_id, pending in self.suspended.awaited.items() if self.suspended else ():
            request = self._taken_over.get(call_id, pending.awaitable)
            if isinstance(request, Generate):
                asked[call_id] = host.take_over(request, self.host)
        return asked

    def close(self) -> None:
        self.closed = True
        self._pool.abandon(self)

    def end_turn(self, turn: Turn) -> None:
        """What the pool's thread says last about a turn; from here on the branch may go on."""
        self._turn = turn
