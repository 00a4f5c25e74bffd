"""What a branch does with sampled tokens until its await is over: the state behind one mask."""

import copy
from collections.abc import Hashable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from aici_vllm.controller.awaits import Generate
from aici_vllm.controller.decisions import Splice
from constraints import TokenSet, Vocabulary
from constraints.place import Place

Row = NDArray[np.int32]
"""A mask: int32[vocabulary.num_words], bit t set when token t may come next."""


class Sampling(Protocol):
    """Tells the engine which tokens may come next, and takes the one that did."""

    @property
    def temperature(self) -> float | None:
        """Replaces the request's temperature, where set."""

    @property
    def top_p(self) -> float | None:
        """Replaces the request's top_p, where set."""

    @property
    def finished(self) -> bool:
        """No further token is wanted."""

    place: Place | None
    """Where it stands. A token that leads onward from here, to a text shorter than `follow_below`, is taken
    by putting the place it leads to here. None where every token must be told to `accept`."""
    follow_below: int

    def follow(self, longest: int) -> None:
        """Set `place`, if there is one. A text of `longest` tokens is the end of the branch."""

    def mask_key(self) -> Hashable | None:
        """Equal keys mean equal masks; None when the mask has no name and must be sent each time."""

    def mask_row(self) -> Row:
        """The mask. Never empty."""

    def accept(self, token: int) -> bool:
        """Take a sampled token.

        Returns:
            True when another must be sampled, so that neither `finished` nor `take_forced` need be asked.

        Raises:
            Exception: the constraint failed; if it is one of ours, a ConstraintError.
        """

    def take_forced(self) -> list[int]:
        """Accept and return the tokens that must come next; [] when there is a choice.

        They are spliced instead of sampled, at no forward pass of their own.
        """

    def ahead(self, drafts: list[int]) -> "list[Sampling]":
        """What the sampling becomes with the first draft, with the first two, and so on.

        It goes no further than another token would be sampled: neither past a draft that may not come nor
        past one that ends the sampling or leaves no choice. -1 is a draft that nobody knows.
        """


class Generation:
    """One `gen_tokens`: a constraint, a budget and a place to stop."""

    __slots__ = (
        "_barred",
        "_barred_until",
        "_constraint",
        "_eos",
        "_error",
        "_goes_on_below",
        "_longest",
        "_min_tokens",
        "_start",
        "_tail",
        "_vocabulary",
        "_written",
        "dead_end",
        "finished",
        "follow_below",
        "place",
        "request",
        "tokens",
    )

    def __init__(
        self,
        request: Generate,
        vocabulary: Vocabulary,
        barred: frozenset[int] = frozenset(),
        until: int = 0,
        written: list[int] | None = None,
    ):
        """`barred` are tokens that may not come before `until` others have.

        `written` is the text so far, which grows with every token that is taken here; without it there is
        no place to follow from.
        """
        self.request = request
        self._barred = barred
        self._barred_until = until if barred else 0
        self._constraint = request.constraint
        self._vocabulary = vocabulary
        self._error: Exception | None = None
        self._eos = frozenset(vocabulary.eos_token_ids)
        self._min_tokens = request.min_tokens
        # Up to here only the constraint can end it. With a text to stop at, every token may be the last one.
        self._goes_on_below = request.max_tokens if request.stop_at is None else 0
        self._tail = b""
        self._written = [] if written is None else written
        self._start = len(self._written)
        self._longest = 0
        self.place: Place | None = None
        self.follow_below = 0
        self.tokens: list[int] = []
        """Those taken so far, except that the last ones may be missing while there is a place."""
        self.dead_end = False
        """The text had to end where the constraint does not let it."""
        self.finished = request.max_tokens <= 0 or request.constraint.eos_forced()

    @property
    def temperature(self) -> float | None:
        return self.request.temperature

    @property
    def top_p(self) -> float | None:
        return self.request.top_p

    def accept(self, token: int) -> bool:
        if self._error is not None:
            raise self._error
        before, tokens, constraint = self.place, self.tokens, self._constraint
        if before is not None:
            self._catch_up(len(self._written) - 1)
            self.place = None
        tokens.append(token)
        if token in self._eos:
            self.finished = True
            self.dead_end = not constraint.eos_allowed()
            return False
        constraint.append_token(token)
        if len(tokens) < self._goes_on_below and constraint.has_choice():
            if self._longest:
                of_one_kind = self._start + len(tokens) < self.follow_below
                self.place = after = self._place()
                if before is not None and after is not None and of_one_kind:
                    before.link(token, after)
            return True
        self.finished = (
            len(tokens) >= self.request.max_tokens or self._reached_stop(token) or constraint.eos_forced()
        )
        return False

    def follow(self, longest: int) -> None:
        self._longest = longest
        self.place = self._place()

    def _place(self) -> Place | None:
        """Where the constraint stands; sets `follow_below`, up to which the mask stays of one kind."""
        if self._error is not None:
            return None
        used = len(self.tokens)
        changes = [at for at in (self._barred_until, self._min_tokens) if at > used]
        self.follow_below = min(self._longest, self._start + min([self._goes_on_below, *changes]))
        barred = self._barred if used < self._barred_until else None
        variant = barred, used < self._min_tokens
        return self._constraint.place(None if variant == (None, False) else variant)

    def _catch_up(self, end: int) -> None:
        """Take the tokens that were followed, up to the first `end` of the text."""
        assert self.place is not None
        if missed := self._written[self._start + len(self.tokens) : end]:
            self.tokens += missed
            self._constraint.move(missed, self.place.state)

    def take_forced(self) -> list[int]:
        run: list[int] = []
        while not self.finished and (forced := self._constraint.forced_tokens()):
            for token in forced:
                run.append(token)
                self.accept(token)
                if self.finished:
                    break
        return run

    def ahead(self, drafts: list[int]) -> list[Sampling]:
        reached: list[Sampling] = []
        generation = self
        if self.place is not None:
            self._catch_up(len(self._written))
        try:
            for draft in drafts:
                if draft < 0 or not generation._constraint.token_allowed(draft):
                    break
                generation = generation._fork()
                if not generation.accept(draft) and (generation.finished or generation.take_forced()):
                    break
                reached.append(generation)
        except Exception:
            # A user's own constraint may raise anything: it will again if the draft is what the model says.
            pass
        return reached

    def _fork(self) -> "Generation":
        twin = copy.copy(self)
        # It writes nothing, so it must be told of each token.
        twin.place, twin._longest = None, 0
        twin._constraint = self._constraint.fork()
        twin.tokens = list(self.tokens)
        return twin

    def mask_key(self) -> Hashable | None:
        if self.place is not None:
            self._catch_up(len(self._written))
        try:
            key = self._constraint.state_key()
        except Exception as error:
            self._fail(error)
            return None
        if key is None:
            return None
        if len(self.tokens) < self._barred_until:
            key = (key, "without", self._barred)
        return (key, "no eos") if len(self.tokens) < self._min_tokens else key

    def mask_row(self) -> Row:
        if self.place is not None:
            self._catch_up(len(self._written))
        try:
            row = self._constraint.mask_row()
        except Exception as error:
            self._fail(error)
            return self._vocabulary.eos_row
        if len(self.tokens) < self._barred_until:
            row = _less(row, self._vocabulary.token_set(self._barred).row)
        if len(self.tokens) < self._min_tokens:
            row = _less(row, self._vocabulary.eos_row)
        # A dead end must still sample something: the end is the only honest token.
        return row if row.any() else self._vocabulary.eos_row

    def _fail(self, error: Exception) -> None:
        """Keep an error of the constraint until its next token arrives.

        A user's own constraint may raise anything, and where masks are made the whole batch waits.
        """
        self._error = error
        self.place = None

    def _reached_stop(self, token: int) -> bool:
        stop = self.request.stop_at
        if stop is None:
            return False
        text = self._tail + self._vocabulary.token_bytes(token)
        self._tail = text[-(len(stop) - 1) :] if len(stop) > 1 else b""
        return stop in text


def _less(row: Row, tokens: Row) -> Row:
    """`row` without `tokens`, unless it has no others."""
    rest = row & ~tokens
    return rest if rest.any() else row


class MaskedToken:
    """One token under a mask that the script made itself, for a user's `NextToken`."""

    __slots__ = ("_mask", "finished", "follow_below", "place", "splices", "token")

    temperature = None
    top_p = None

    def __init__(self, mask: TokenSet, splices: list[Splice]):
        self._mask = mask.row
        self.splices = splices
        self.token = -1
        self.finished = False
        self.place: Place | None = None
        self.follow_below = 0

    def follow(self, longest: int) -> None:
        return None

    def mask_key(self) -> Hashable | None:
        return None

    def mask_row(self) -> Row:
        return self._mask

    def accept(self, token: int) -> bool:
        self.token = token
        self.finished = True
        return False

    def take_forced(self) -> list[int]:
        return []

    def ahead(self, drafts: list[int]) -> list[Sampling]:
        return []

    def matched(self) -> Splice | None:
        """The splice that replaces the plain append of the sampled token, if any."""
        return next((s for s in self.splices if not s.when_sampled or self.token in s.when_sampled), None)
