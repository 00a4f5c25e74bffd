"""What a branch does with sampled tokens until its await is over: the state behind one mask."""

import copy
from collections.abc import Hashable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from aici_vllm.controller.awaits import Generate
from aici_vllm.controller.decisions import Splice
from constraints import TokenSet, Vocabulary

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
        "_min_tokens",
        "_tail",
        "_vocabulary",
        "dead_end",
        "finished",
        "request",
        "tokens",
    )

    def __init__(
        self, request: Generate, vocabulary: Vocabulary, barred: frozenset[int] = frozenset(), until: int = 0
    ):
        """`barred` are tokens that may not come before `until` others have."""
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
        self.tokens: list[int] = []
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
        tokens, constraint = self.tokens, self._constraint
        tokens.append(token)
        if token in self._eos:
            self.finished = True
            self.dead_end = not constraint.eos_allowed()
            return False
        constraint.append_token(token)
        if len(tokens) < self._goes_on_below and constraint.has_choice():
            return True
        self.finished = (
            len(tokens) >= self.request.max_tokens or self._reached_stop(token) or constraint.eos_forced()
        )
        return False

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
        twin._constraint = self._constraint.fork()
        twin.tokens = list(self.tokens)
        return twin

    def mask_key(self) -> Hashable | None:
        try:
            key = self._constraint.state_key()
        except Exception as error:
            self._error = error
            return None
        if key is None:
            return None
        if len(self.tokens) < self._barred_until:
            key = (key, "without", self._barred)
        return (key, "no eos") if len(self.tokens) < self._min_tokens else key

    def mask_row(self) -> Row:
        try:
            row = self._constraint.mask_row()
        except Exception as error:
            # A user's own constraint may raise anything, and here the whole batch waits: the branch
            # fails when its token arrives.
            self._error = error
            return self._vocabulary.eos_row
        if len(self.tokens) < self._barred_until:
            row = _less(row, self._vocabulary.token_set(self._barred).row)
        if len(self.tokens) < self._min_tokens:
            row = _less(row, self._vocabulary.eos_row)
        # A dead end must still sample something: the end is the only honest token.
        return row if row.any() else self._vocabulary.eos_row

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

    __slots__ = ("_mask", "finished", "splices", "token")

    temperature = None
    top_p = None

    def __init__(self, mask: TokenSet, splices: list[Splice]):
        self._mask = mask.row
        self.splices = splices
        self.token = -1
        self.finished = False

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
