"""An engine without a model: it samples the lowest token that the mask allows, and obeys branches.

Tests of controllers drive a whole request with it, in one process and in a fixed order.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from aici_vllm.controller.branch import Branch, Next
from aici_vllm.controller.group import Group, NewProgram

Choose = Callable[[Branch, list[int]], int]
"""Picks the next token of a branch among the allowed ones, ascending."""


def lowest(branch: Branch, allowed: list[int]) -> int:
    return allowed[0]


class FakeEngine:
    """Runs one group to its end.

    `wait` blocks until a program's turn may have ended; programs that end their turns within `resume`, as
    native ones do, need none. `steps` counts forward passes: rounds in which at least one branch sampled.
    """

    def __init__(
        self, group: Group, wait: Callable[[float], object] | None = None, choose: Choose = lowest
    ) -> None:
        self.group = group
        self.steps = 0
        self.timeout = 20.0
        self._wait = wait
        self._choose = choose

    def run(self, program: NewProgram) -> Group:
        self.group.start(program)
        deadline = time.monotonic() + self.timeout
        while not self.group.finished:
            if time.monotonic() > deadline:
                raise TimeoutError(f"branches are {[b.next for b in self.group.branches]}")
            self.round()
        return self.group

    def round(self) -> None:
        """One step of the engine: what branches want is done, then those that can sample do."""
        self.group.poll()
        self.group.wake()
        self._fork()
        if self.group.end_deadlock():
            return
        samplers = [b for b in self.group.live if b.next is Next.SAMPLE]
        for branch in self.group.live:
            branch.sequence.kept = len(branch.sequence)
        for branch in samplers:
            branch.accept(self._choose(branch, self.allowed(branch)))
        self.steps += bool(samplers)
        if not samplers and self._wait and any(b.next is Next.THINK for b in self.group.live):
            self._wait(0.05)

    def allowed(self, branch: Branch) -> list[int]:
        """The tokens that the branch's mask allows."""
        assert branch.sampling is not None
        row = np.ascontiguousarray(branch.sampling.mask_row())
        return [int(i) for i in np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))]

    def _fork(self) -> None:
        while forking := [b for b in self.group.live if b.next is Next.FORK]:
            for parent in forking:
                self.group.fork(parent)

    def text(self, branch: Branch) -> str:
        """The branch's text after its prompt."""
        tokens = branch.sequence.tokens[branch.sequence.prompt_len :]
        return self.group.vocabulary.detokenize(tokens).decode(errors="replace")
