"""One branch of a request: a sequence, the program that writes it, and what it wants next.

The engine calls `accept` with each sampled token and reads `next`; between two tokens the branch runs
its program from await to await and turns each into a decision.
"""

import enum
from typing import TYPE_CHECKING, Any

from aici_vllm.controller.awaits import (
    Awaitable,
    Decide,
    Decided,
    FixedText,
    Generate,
    GetPrompt,
    Stop,
    WaitVars,
)
from aici_vllm.controller.check import TakesBack
from aici_vllm.controller.decisions import BranchDecision, checked
from aici_vllm.controller.errors import LimitError
from aici_vllm.controller.log import Log
from aici_vllm.controller.program import Program, Raised, Returned
from aici_vllm.controller.sampling import Generation, MaskedToken, Sampling
from aici_vllm.controller.sequence import Sequence
from aici_vllm.controller.stops import Stop as ClientStop

if TYPE_CHECKING:
    from aici_vllm.controller.group import Group


class Next(enum.Enum):
    """What a branch wants from the engine."""

    SAMPLE = enum.auto()
    """A token, under `branch.sampling`."""
    THINK = enum.auto()
    """Nothing: its program is still running."""
    WAIT = enum.auto()
    """Nothing until the variables `branch.wanted` are set."""
    FORK = enum.auto()
    """To be forked by its group into `len(branch.forks)` branches."""
    END = enum.auto()
    """Nothing ever again: `finish_reason` and `error` say why."""


class Branch:
    """One of the futures of a request."""

    __slots__ = (
        "_decided_index",
        "_longest",
        "_stops",
        "awaits",
        "error",
        "finish_reason",
        "forks",
        "group",
        "index",
        "initial_prompt_len",
        "log",
        "log_level",
        "next",
        "program",
        "sampling",
        "sequence",
        "stopped_by",
        "takes_back",
        "wanted",
    )

    def __init__(self, group: "Group", index: int, sequence: Sequence):
        self.group = group
        self._stops = group.stops
        self.index = index
        self.sequence = sequence
        self.initial_prompt_len = sequence.prompt_len
        self.next = Next.THINK
        self.sampling: Sampling | None = None
        self.wanted: tuple[str, ...] = ()
        self.forks: list[BranchDecision] = []
        self.finish_reason: str | None = None
        self.stopped_by: ClientStop | None = None
        self.error: str | None = None
        self.log = Log(group.limits.log_bytes)
        self.log_level = 1
        self.awaits = 0
        self.program: Program | None = None
        self.takes_back = TakesBack.MARKED
        self._decided_index = 0
        self._longest = 0

    @property
    def settled(self) -> int:
        """How many tokens nothing can take back any more: these may be streamed.

        The token that completed a client's stop goes out with the end, which says how much of it is seen.
        """
        if self.stopped_by is not None:
            return len(self.sequence) - 1
        sequence = self.sequence
        if self.next is Next.END or self.takes_back is TakesBack.NOTHING:
            return len(sequence.tokens)
        return sequence.settled() if self.takes_back is TakesBack.MARKED else sequence.prompt_len

    def mark(self) -> int:
        """Mark the end of the text; before the first await, the start of the prompt."""
        return self.sequence.mark(len(self.sequence) if self.awaits else 0)

    # What the engine and the group do.

    def start(self, program: Program) -> None:
        """Run `program` to its first decision."""
        self.program = program
        program.resume()
        self.advance()

    def accept(self, token: int) -> bool:
        """Take a sampled token. True when the branch just samples on and has nothing to splice."""
        sequence, sampling = self.sequence, self.sampling
        assert sampling is not None
        sequence.add_sampled(token)
        place = sampling.place
        if place is not None and len(sequence.tokens) < sampling.follow_below:
            after = place.onward.get(token) or place.find(token)
            if after is not None:
                sampling.place = after
                return True
        return self._accept(token, sampling)

    def _accept(self, token: int, sampling: Sampling) -> bool:
        """Take a sampled token that is more than a step to a place that is known."""
        if self._stops is not None:
            stop = self._find_stop(len(self.sequence) - 1, [token])
            if stop is not None:
                self._stop(stop)
                return False
        try:
            if sampling.accept(token):
                # `_await_token` left the length at which the branch must end.
                return len(self.sequence.tokens) < self._longest or not self._ends_here()
            forced = sampling.take_forced()
        except Exception as error:
            # The constraint may be the user's own class: its error is the script's, at its await.
            if self._raise(error):
                self.advance()
            return False
        if not forced and not sampling.finished:
            return not self._ends_here()
        if self._splice_forced(forced):
            self.advance()
        return False

    def advance(self) -> None:
        """Go on from a turn that is over, through every await that needs no token."""
        assert self.program is not None
        while self.next is not Next.END:
            turn = self.program.poll()
            if turn is None:
                self.next = Next.THINK
                return
            self.log.end_step()
            match turn:
                case Returned():
                    self.end("stop")
                case Raised():
                    self.log.write(turn.details)
                    self.fail(turn.message)
                case Awaitable():
                    self.awaits += 1
                    if not self._begin(turn):
                        return

    def resume(self, value: Any) -> None:
        """Give the current await its result."""
        assert self.program is not None
        self.next = Next.THINK
        self.sampling = None
        self.program.resume(value)

    def begin_fork(self, index: int, decision: BranchDecision) -> None:
        """Go on as branch `index` of a fork."""
        self.next = Next.THINK
        self.forks = []
        if self._decide(index, decision):
            self.advance()

    def end(self, reason: str, error: str | None = None) -> None:
        """Finish for good. The first reason stands."""
        if self.next is Next.END:
            return
        self.next = Next.END
        self.finish_reason = reason
        # An error may quote what UTF-8 cannot hold, and then could not be sent.
        self.error = None if error is None else error.encode(errors="replace").decode()
        self.log.end_step()
        if self.program is not None:
            self.program.close()

    def fail(self, message: str) -> None:
        """Finish with an error that the client reads."""
        self.end("fail", message)

    # Awaits, one by one. Each returns True when the program was resumed and the branch can go on at once.

    def _begin(self, awaited: Awaitable) -> bool:
        match awaited:
            case FixedText():
                return self._fixed_text(awaited)
            case Generate():
                return self._generate(awaited)
            case Decide():
                return self._begin_decision(awaited)
            case WaitVars():
                return self._wait_vars(awaited.names)
            case GetPrompt():
                return self._get_prompt()
            case Stop():
                self.end("stop")
                return False
        return self._raise(TypeError(f"a controller cannot yield {awaited!r}: await one of aici's words"))

    def _fixed_text(self, awaited: FixedText) -> bool:
        at = len(self.sequence)
        if awaited.following is not None:
            try:
                at = self.sequence.position(awaited.following)
            except ValueError as error:
                return self._raise(error)
        if not self._splice(at, awaited.tokens):
            return False
        self.resume(list(awaited.tokens))
        return True

    def _generate(self, awaited: Generate) -> bool:
        try:
            missing = self.group.min_tokens - (len(self.sequence) - self.sequence.prompt_len)
            awaited.min_tokens = max(awaited.min_tokens, missing)
            written = self.sequence.tokens
            self.sampling = Generation(awaited, self.group.vocabulary, *self._barred(), written)
            forced = self.sampling.take_forced()
        except Exception as error:
            return self._raise(error)
        self.next = Next.SAMPLE
        return self._splice_forced(forced)

    def _begin_decision(self, awaited: Decide) -> bool:
        branches = awaited.result.branches
        if not branches:
            self.end("stop")
            return False
        try:
            branches = branches if awaited.own else checked(branches, self.group.vocabulary.size)
        except (TypeError, ValueError) as error:
            return self._raise(error)
        if len(branches) == 1:
            # A round trip that changes nothing lets everybody else go first: scripts poll with it.
            return self._decide(0, branches[0]) and branches[0] != BranchDecision.noop()
        self.forks = branches
        self.next = Next.FORK
        return False

    def _wait_vars(self, names: tuple[str, ...]) -> bool:
        values = self.group.variables.get_all(names)
        if values is None:
            self.wanted = names
            self.next = Next.WAIT
            return False
        self.resume(values)
        return True

    def _get_prompt(self) -> bool:
        if self.awaits > 1:
            return self._raise(RuntimeError("GetPrompt() must be the first thing a controller awaits"))
        self.resume(list(self.sequence.tokens))
        return True

    def _decide(self, index: int, decision: BranchDecision) -> bool:
        self._decided_index = index
        if decision.sample_mask is not None:
            self.sampling = MaskedToken(decision.sample_mask, decision.splices)
            self.next = Next.SAMPLE
            return self._await_token()
        splice = decision.splices[0]
        if not self._splice(len(self.sequence) - splice.backtrack, splice.ff_tokens):
            return False
        self.resume(Decided(index, splice.backtrack, list(splice.ff_tokens)))
        return True

    # The ends of awaits, and what they share.

    def _splice_forced(self, forced: list[int]) -> bool:
        """Splice what the sampling takes without being asked; True when that was all it wanted."""
        assert self.sampling is not None
        room = self.group.context - len(self.sequence)
        if forced and not self._splice(len(self.sequence), forced[:room]):
            return False
        if len(forced) > room:
            self.end("length")
            return False
        if not self.sampling.finished:
            return self._await_token()
        if isinstance(self.sampling, Generation):
            return self._finish_generation(self.sampling)
        assert isinstance(self.sampling, MaskedToken)
        return self._finish_masked_token(self.sampling)

    def _finish_generation(self, generation: Generation) -> bool:
        text = self.group.vocabulary.detokenize(generation.tokens)
        if generation.request.store_var is not None:
            try:
                self.group.variables.set(generation.request.store_var, text, self.index)
            except LimitError as error:
                return self._raise(error)
        if self.log_level >= 1 and generation.dead_end:
            self.log.write("Constraint doesn't allow any tokens; adding EOS\n")
        if self.log_level >= 1:
            self.log.write(f"GEN: {text.decode(errors='replace')!r}\n")
        self.resume(generation.tokens)
        return True

    def _finish_masked_token(self, masked: MaskedToken) -> bool:
        splice = masked.matched()
        if splice is None:
            self.resume(Decided(self._decided_index, 0, [masked.token]))
            return True
        if not self._splice(len(self.sequence) - splice.backtrack, splice.ff_tokens):
            return False
        # The sampled token counts as backtracked, so before this await one token fewer was lost.
        lost = max(splice.backtrack - 1, 0)
        got = [*([] if splice.backtrack else [masked.token]), *splice.ff_tokens]
        self.resume(Decided(self._decided_index, lost, got))
        return True

    def _raise(self, error: Exception) -> bool:
        """Raise `error` in the program, at its await."""
        assert self.program is not None
        self.next = Next.THINK
        self.sampling = None
        self.program.resume(error=error)
        return True

    def _splice(self, position: int, tokens: list[int]) -> bool:
        """Splice within the budgets; False when that ended the branch."""
        if position < 0:
            self.fail(
                f"ValueError: cannot backtrack {len(self.sequence) - position} tokens: "
                f"the sequence has {len(self.sequence)}"
            )
            return False
        room = self.group.max_tokens - (position - min(position, self.sequence.prompt_len))
        fitting = tokens[:room]
        stop = self._find_stop(position, fitting)
        if stop is not None:
            fitting = fitting[: stop.index + 1]
        if (length := position + len(fitting)) > self.group.context:
            self.fail(
                f"ValueError: {len(fitting)} tokens of fixed text do not fit: the sequence would have "
                f"{length} tokens and the model's context holds {self.group.context}"
            )
            return False
        self.sequence.splice(position, fitting)
        if stop is not None:
            self._stop(stop)
        elif len(tokens) > room:
            self.end("length")
        return self.next is not Next.END

    def _find_stop(self, position: int, tokens: list[int]) -> ClientStop | None:
        """The first of the client's stops that `tokens`, put at `position`, complete."""
        stops, sequence = self._stops, self.sequence
        if stops is None:
            return None
        start = min(sequence.prompt_len, position)
        return stops.find(self.group.vocabulary, sequence.tokens, start, position, tokens)

    def _barred(self) -> tuple[frozenset[int], int]:
        """The client's stop tokens, and how many tokens must come before one of them may."""
        stops = self._stops
        if stops is None:
            return frozenset(), 0
        used = len(self.sequence) - self.sequence.prompt_len
        return stops.tokens, max(stops.min_tokens - used, 0)

    def _stop(self, stop: ClientStop) -> None:
        self.stopped_by = stop
        self.end("stop")

    def _await_token(self) -> bool:
        """Leave it to the engine to sample; True when it cannot and the program was told."""
        if not self.sequence.tokens:
            return self._raise(ValueError("the model needs a token to go on from: all were taken back"))
        self._ends_here()
        return False

    def _ends_here(self) -> bool:
        """End the branch if no token may follow."""
        self._longest = min(self.sequence.prompt_len + self.group.max_tokens, self.group.context)
        if len(self.sequence.tokens) >= self._longest:
            self.end("length")
            return True
        if self._stops is None and self.sampling is not None:
            self.sampling.follow(self._longest)
        return False
