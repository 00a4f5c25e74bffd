"""Which program a request's controller is: source in the sandbox, or a function in this process."""

import sys
from typing import TYPE_CHECKING

import cloudpickle

from aici_vllm.controller.branch import Branch
from aici_vllm.controller.limits import Limits
from aici_vllm.controller.program import NativeProgram, Program
from aici_vllm.engine.admission import is_name, load_installed

if TYPE_CHECKING:
    from aici_vllm.controller.sandbox import SandboxPool
    from aici_vllm.engine.metrics import Counts


SWITCH_INTERVAL = 0.0005
"""Seconds after which a thread that answers a script's questions gives the interpreter to the engine's."""


class Programs:
    """Makes programs. The sandbox's workers start with the first script that needs them."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._sandbox: SandboxPool | None = None

    def make(self, controller: str | bytes, arg: str, branch: Branch) -> Program:
        """The program of a request's first branch.

        Args:
            controller: source text, an installed name, or a pickled coroutine function.

        Raises:
            Exception: whatever loading somebody's function raises.
        """
        if isinstance(controller, bytes):
            return NativeProgram(cloudpickle.loads(controller), arg, branch)
        if is_name(controller):
            from aici_vllm.aici import controller_from

            return NativeProgram(controller_from(load_installed(controller)), arg, branch)
        return self._sandboxed(controller, branch)

    def wait(self, seconds: float) -> bool:
        """Give scripts in the sandbox up to `seconds` to end a turn; whether one did."""
        return self._sandbox is not None and self._sandbox.wait(seconds)

    def hold_up(self, seconds: float) -> bool:
        """Give scripts that others may be held up for up to `seconds`; whether there were any."""
        return self._sandbox is not None and self._sandbox.hold_up(seconds)

    def count(self, counts: "Counts") -> None:
        """Fill in what the sandbox has done so far."""
        if (sandbox := self._sandbox) is not None:
            counts.sandbox_turns = sandbox.turns
            counts.sandbox_late_turns = sandbox.late_turns
            counts.sandbox_restarts = sandbox.restarts
            counts.sandbox_seconds = sandbox.script_seconds

    def close(self) -> None:
        """Stop the sandbox's workers."""
        if self._sandbox is not None:
            self._sandbox.close()

    def _sandboxed(self, source: str, branch: Branch) -> Program:
        from aici_vllm.controller.check import takes_back
        from aici_vllm.controller.sandbox import SandboxPool

        if self._sandbox is None:
            # Python's 5 ms would be added to every step that waits for the interpreter.
            sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL))
            self._sandbox = SandboxPool(self._limits)
        branch.takes_back = takes_back(source)
        return self._sandbox.program(source, branch)
