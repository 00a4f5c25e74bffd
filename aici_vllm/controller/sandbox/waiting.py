"""Turns that wait for a process: one of each request in turn, those of one request in their order."""

from collections import OrderedDict, deque
from collections.abc import Iterator

from aici_vllm.controller.group import Group
from aici_vllm.controller.sandbox.program import SandboxProgram


class WaitingTurns:
    """A queue in which a request with many branches keeps no other waiting for all of them."""

    def __init__(self) -> None:
        self._of: OrderedDict[Group, deque[SandboxProgram]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def __iter__(self) -> Iterator[SandboxProgram]:
        for programs in self._of.values():
            yield from programs

    def append(self, program: SandboxProgram) -> None:
        """The program's next turn waits from now on."""
        self._of.setdefault(program.host.branch.group, deque()).append(program)

    def take(self) -> SandboxProgram | None:
        """Take out the next turn that can begin, and whatever was closed before it."""
        for group in list(self._of):
            programs = self._of[group]
            found = _first_ready(programs)
            if not programs:
                del self._of[group]
            if found is not None:
                if programs:
                    self._of.move_to_end(group)
                return found
        return None


def _first_ready(programs: deque[SandboxProgram]) -> SandboxProgram | None:
    unready: list[SandboxProgram] = []
    found = None
    while programs and found is None:
        program = programs.popleft()
        if program.closed:
            continue
        if program.ready:
            found = program
        else:
            unready.append(program)
    programs.extendleft(reversed(unready))
    return found
