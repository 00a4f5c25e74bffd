"""The branches of one request: how they fork, wait for each other, and end."""

from collections.abc import Callable

from aici_vllm.controller.branch import Branch, Next
from aici_vllm.controller.limits import Limits
from aici_vllm.controller.program import Program, error_line
from aici_vllm.controller.sequence import Sequence
from aici_vllm.controller.stops import Stops
from aici_vllm.controller.variables import Variables
from constraints import Vocabulary

NewProgram = Callable[[Branch], Program]

MOST_NAMED, LONGEST_NAMED = 10, 100
"""Variables that an error names, and how many characters of each."""


class Group:
    """All branches of one request, in the order they were made.

    Args:
        vocabulary: of the model.
        prompt: its tokens; never empty.
        max_tokens: budget of each branch after the prompt; spliced tokens count.
        min_tokens: how many tokens a branch has before a generation may end it with EOS.
        context: the longest sequence the model can hold.
        stops: what ends a branch from outside its script.
        arg: the string that came with the controller.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        prompt: list[int],
        *,
        max_tokens: int,
        min_tokens: int = 0,
        context: int,
        limits: Limits | None = None,
        arg: str = "",
        stops: Stops | None = None,
    ):
        self.vocabulary = vocabulary
        self.max_tokens = max_tokens
        self.min_tokens = min_tokens
        self.context = context
        self.limits = limits or Limits()
        self.arg = arg
        self.stops = stops
        self.variables = Variables(self.limits.variable_bytes)
        self.branches = [Branch(self, 0, Sequence(prompt))]

    @property
    def root(self) -> Branch:
        return self.branches[0]

    @property
    def finished(self) -> bool:
        return not self.live

    @property
    def live(self) -> list[Branch]:
        """The branches that have not ended."""
        return [branch for branch in self.branches if branch.next is not Next.END]

    def start(self, new_program: NewProgram) -> None:
        """Make the root branch's program and run it to its first decision."""
        try:
            program = new_program(self.root)
        except Exception as error:
            self.root.fail(error_line(error))
            return
        self.root.start(program)

    def fork(self, parent: Branch) -> list[Branch]:
        """Carry out a fork: the children, which stand where the parent stood, each with its own future.

        Branches over the limit are made too: they have no text, and fail at once with an error.
        """
        decisions = parent.forks
        if len(self.branches) + len(decisions) - 1 > self.limits.branches_made:
            parent.fail(f"too many forks (a request may make {self.limits.branches_made} branches in all)")
            return []
        room = self.limits.branches - len(self.live)
        children: list[Branch] = []
        for _ in decisions[1:]:
            child = self._copy(parent, fits=room > 0)
            room -= child.next is not Next.END
            children.append(child)
        parent.begin_fork(0, decisions[0])
        for index, (child, decision) in enumerate(zip(children, decisions[1:], strict=True), start=1):
            if child.next is not Next.END:
                child.begin_fork(index, decision)
        return children

    def wake(self) -> list[Branch]:
        """Resume the branches whose variables are all set."""
        woken = []
        for branch in self.branches:
            if branch.next is Next.WAIT:
                values = self.variables.get_all(branch.wanted)
                if values is not None:
                    branch.resume(values)
                    branch.advance()
                    woken.append(branch)
        return woken

    def poll(self) -> list[Branch]:
        """Advance the branches whose program's turn is over by now; those that did anything."""
        done: list[Branch] = []
        for branch in self.branches:
            if branch.next is Next.THINK:
                before = branch.awaits
                branch.advance()
                if branch.next is not Next.THINK or branch.awaits != before:
                    done.append(branch)
        return done

    def end_deadlock(self) -> bool:
        """If every live branch waits, end them all: nobody is left to set what they wait for."""
        live = self.live
        if not live or any(branch.next is not Next.WAIT for branch in live):
            return False
        missing = [self.variables.missing(branch.wanted) for branch in live]
        if not all(missing):
            return False
        for branch, names in zip(live, missing, strict=True):
            named = ", ".join(repr(name[:LONGEST_NAMED]) for name in names[:MOST_NAMED])
            more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
            branch.end("deadlock", f"deadlock: every live branch waits, this one for {named}{more}")
        return True

    def abort(self) -> None:
        """End every live branch because the client has gone."""
        for branch in self.live:
            branch.end("abort")

    def _copy(self, parent: Branch, fits: bool) -> Branch:
        # Hundreds that fail at once must not each copy a long text.
        child = Branch(self, len(self.branches), parent.sequence.copy() if fits else Sequence([]))
        child.initial_prompt_len = parent.initial_prompt_len
        child.log_level = parent.log_level
        child.awaits = parent.awaits
        child.takes_back = parent.takes_back
        self.branches.append(child)
        assert parent.program is not None
        if not fits:
            child.fail(f"too many forks (max={self.limits.branches})")
            return child
        try:
            child.program = parent.program.fork(child)
        except Exception as error:
            child.fail(error_line(error))
        return child
