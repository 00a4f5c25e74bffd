"""Programs whose turns take time, as those of the sandbox do: a turn ends after so many looks at it."""

from __future__ import annotations

from typing import Any

from aici_vllm.controller.branch import Branch
from aici_vllm.controller.program import NativeProgram, Turn
from tests.simulator.model import mix
from tests.simulator.scripts import controller


class SlowProgram:
    """A native program behind a delay of 0 to `slowest` looks, which depends on `seed` alone."""

    def __init__(self, program: NativeProgram, slowest: int, seed: int) -> None:
        self._program = program
        self._slowest = slowest
        self._seed = seed
        self._pending: tuple[Any, Exception | None] | None = None
        self._looks = 0

    @property
    def seconds(self) -> float:
        return self._program.seconds

    def resume(self, value: Any = None, error: Exception | None = None) -> None:
        self._seed = mix(self._seed, 7)
        self._looks = self._seed % (self._slowest + 1)
        self._pending = (value, error)

    def poll(self) -> Turn | None:
        if self._pending is None:
            return self._program.poll()
        if self._looks:
            self._looks -= 1
            return None
        (value, error), self._pending = self._pending, None
        self._program.resume(value, error)
        return self._program.poll()

    def fork(self, branch: Branch) -> SlowProgram:
        assert self._pending is None, "forked in a turn"
        return SlowProgram(self._program.fork(branch), self._slowest, mix(self._seed, branch.index))

    def close(self) -> None:
        self._pending = None
        self._program.close()


class SimulatedPrograms:
    """Stands where the scheduler makes programs; `scripts` are those that requests name."""

    def __init__(self, slowest: int) -> None:
        self.scripts: dict[str, list[Any]] = {}
        self._slowest = slowest

    def make(self, name: str, arg: str, branch: Branch) -> SlowProgram:
        program = self.scripts[name]
        native = NativeProgram(lambda: controller(program), arg, branch)
        return SlowProgram(native, self._slowest, len(self.scripts))

    def wait(self, seconds: float) -> bool:
        """Nothing runs elsewhere."""
        return False

    def hold_up(self, seconds: float) -> bool:
        """Nothing runs elsewhere."""
        return False

    def count(self, counts: Any) -> None:
        """No sandbox, nothing to count."""

    def close(self) -> None:
        """Nothing to stop."""
