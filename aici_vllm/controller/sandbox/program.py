"""A script as its branch sees it: a dump between turns, a job of the pool during one."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aici_vllm.controller.branch import Branch
from aici_vllm.controller.program import Turn
from aici_vllm.controller.sandbox.host import Host, Pending
from aici_vllm.controller.sandbox.patience import Patience

if TYPE_CHECKING:
    from aici_vllm.controller.sandbox.pool import SandboxPool


_DECIDES = re.compile(
    "Constraint|ConstrainedToken|TokenSet|all_tokens|DynamicLexer|NextToken|mid_process|MidProcessResult|Splice|Branch"
    "|getattr|eval|exec"
)


@dataclass(frozen=True, slots=True)
class Suspended:
    """A script stopped at an await: all that it is. Any worker can go on with it, any number of times."""

    dump: bytes
    call_id: int
    awaited: dict[int, Pending]
    """The awaits that have begun, by the sandbox's number; the one of `call_id` is answered next."""


@dataclass(slots=True)
class Result:
    """What the current await gives: a value, or an error that it raises."""

    value: Any
    error: Exception | None


class SandboxProgram:
    """One branch's script, run by the pool. It holds a worker only while a turn runs.

    Attributes:
        seconds: CPU time of its turns, that of its questions in this process included.
        late: its last turn took longer than a step may.
        patience: how long steps still wait for it.
    """

    def __init__(self, pool: "SandboxPool", source: str, branch: Branch):
        self._pool = pool
        self.source = source
        self.decides = bool(_DECIDES.search(source))
        """Whether the script may make constraints or decisions of its own."""
        self.host = Host(branch)
        self.suspended: Suspended | None = None
        self.result = Result(None, None)
        self.closed = False
        self.awaits = 0
        self.seconds = 0.0
        self.late = False
        self.patience = Patience()
        self._turn: Turn | None = None

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
        copy = SandboxProgram(self._pool, self.source, branch)
        copy.host = self.host.fork(branch)
        copy.suspended = self.suspended
        copy.awaits = self.awaits
        copy.late = self.late
        copy.patience = self.patience.copy()
        copy._turn = self._turn
        return copy

    def close(self) -> None:
        self.closed = True
        self._pool.abandon(self)

    def end_turn(self, turn: Turn) -> None:
        """What the pool's thread says last about a turn; from here on the branch may go on."""
        self._turn = turn
