"""The controller that runs in the engine: splice the feedback, fork, sample a reply in each branch."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Coroutine, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import constraints
from aici_vllm import aici
from constraints import AnyText, Constraint, Vocabulary
from constraints.token_set import Row

SPLICED = "spliced"
"""Variable: [tokens, characters] of the spliced tail; special tokens have no characters."""


def outcome_of(branch: int) -> str:
    """Name of the variable that holds a branch's `Outcome`; unset when the context was full before it."""
    return f"outcome of branch {branch}"


class Outcome(NamedTuple):
    """How a reply ended.

    reason: "stop", "length" or "condition".
    closing: how many tokens closed it: one or none. They were sampled and taken back.
    cut: how many characters of it count, None for all: a stop text is not part of a reply.
    """

    reason: str
    closing: int
    cut: int | None


@dataclass(frozen=True)
class BranchPlan:
    """What the branches of one request do.

    tail: text spliced behind the prompt before anything is sampled; "" for none.
    temperatures: one per branch; without any the prompt is only computed.
    max_tokens: of a reply; None for as long as the context allows.
    context: the longest sequence, in tokens.
    min_tokens: before which no end of sequence is sampled and no stop text counts.
    stop, stop_token_ids: a reply ends with any of them, and keeps it only with `keep_stop`.
    shape: which replies are possible, as one keyword of `make_constraint`; None for any text.
    may_still_pass: the check on the beginning of a reply.
    """

    tail: str
    temperatures: tuple[float, ...]
    max_tokens: int | None
    context: int
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    keep_stop: bool = False
    shape: tuple[str, Any] | None = None
    may_still_pass: Callable[[str], bool] | None = None


def branches_of(plan: BranchPlan) -> Callable[[], Coroutine[Any, Any, None]]:
    """The controller of one request."""

    async def branches() -> None:
        spliced = await aici.FixedTokens(plan.tail) if plan.tail else []
        aici.set_var(SPLICED, json.dumps([len(spliced), len(aici.detokenize(spliced).decode())]))
        if not plan.temperatures:
            await TakeBack(await aici.gen_tokens(max_tokens=1))
            return
        index = await aici.fork(len(plan.temperatures)) if len(plan.temperatures) > 1 else 0
        reply = Reply(plan)
        room = max(0, plan.context - len(aici.get_tokens()))
        tokens = await aici.gen_tokens(
            constraint=reply,
            max_tokens=room if plan.max_tokens is None else min(plan.max_tokens, room),
            min_tokens=min(plan.min_tokens, room),
            temperature=plan.temperatures[index],
        )
        outcome = reply.outcome(tokens)
        aici.set_var(outcome_of(index), json.dumps(outcome))
        if outcome.closing:
            # What the engine keeps of the branch is then the reply and no more.
            await TakeBack(tokens[-outcome.closing :])

    return branches


async def nothing() -> None:
    """A controller for requests that only carry a word to the engine."""


class TakeBack(aici.NextToken):
    """Take back `tokens` from the end of the text; no token is sampled for it."""

    def __init__(self, tokens: list[int]) -> None:
        self._count = len(tokens)

    def mid_process(self) -> aici.MidProcessResult:
        return aici.MidProcessResult.splice(self._count, [])


def make_constraint(shape: tuple[str, Any] | None, vocabulary: Vocabulary) -> Constraint:
    """The constraint of a plan's `shape`. Raises ValueError when it does not compile."""
    if shape is None:
        return AnyText(vocabulary)
    kind, value = shape
    makers: dict[str, Callable[[Vocabulary, Any], Constraint]] = {
        "regex": constraints.regex,
        "choice": constraints.options,
        "json": constraints.json_schema,
    }
    return makers[kind](vocabulary, value)


class Reply(Constraint):
    """The text of one reply: possible as the plan's shape says, and over when nothing after it can matter."""

    def __init__(self, plan: BranchPlan) -> None:
        super().__init__()
        self._plan = plan
        self._shape: Constraint | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""
        self._tokens = 0
        self._free = 0
        self._ended: str | None = None
        self._cut: int | None = None

    @property
    def shape(self) -> Constraint:
        """What the plan's shape allows; made when the vocabulary is known."""
        if self._shape is None:
            self._shape = make_constraint(self._plan.shape, self.known_vocabulary())
        return self._shape

    def outcome(self, tokens: list[int]) -> Outcome:
        """How the reply ended, given the tokens that the generation took."""
        closed = bool(tokens) and self._closes(tokens[-1])
        over = closed or self.shape.eos_forced()
        return Outcome(self._ended or ("stop" if over else "length"), int(closed), self._cut)

    def _closes(self, token: int) -> bool:
        """Whether a token ends a reply without being part of it."""
        vocabulary = self.known_vocabulary()
        if token in vocabulary.eos_token_ids:
            return True
        shown = self._plan.keep_stop and vocabulary.token_bytes(token)
        return token in self._plan.stop_token_ids and not shown

    def eos_allowed(self) -> bool:
        return self.shape.eos_allowed()

    def eos_forced(self) -> bool:
        return self._ended is not None or self.shape.eos_forced()

    def token_allowed(self, token: int) -> bool:
        return token in self._plan.stop_token_ids or self.shape.token_allowed(token)

    def forced_tokens(self) -> list[int]:
        return self.shape.forced_tokens()

    def allow_tokens(self, allowed: constraints.TokenSet) -> None:
        self.shape.allow_tokens(allowed)
        for token in self._plan.stop_token_ids:
            allowed[token] = True

    def state_key(self) -> Hashable | None:
        key = self.shape.state_key()
        return key if key is None or not self._plan.stop_token_ids else (key, self._plan.stop_token_ids)

    def mask_row(self) -> Row:
        # Without stop tokens the mask is the shape's own, which may be far cheaper than through a token set.
        return super().mask_row() if self._plan.stop_token_ids else self.shape.mask_row()

    def append_token(self, token: int) -> None:
        if token in self._plan.stop_token_ids:
            self._end("stop", None)
            return
        self.shape.append_token(token)
        self._tokens += 1
        self._text += self._decoder.decode(self.known_vocabulary().token_bytes(token))
        if self._tokens <= self._plan.min_tokens:
            self._free = len(self._text)
        elif (found := find_stop(self._text, self._plan.stop, self._free)) is not None:
            self._end("stop", found[1] if self._plan.keep_stop else found[0])
        check = self._plan.may_still_pass
        if self._ended is None and check is not None and not check(self._text):
            self._end("condition", None)

    def _end(self, reason: str, cut: int | None) -> None:
        self._ended, self._cut = reason, cut


def find_stop(text: str, stops: Sequence[str], start: int = 0) -> tuple[int, int] | None:
    """Where the first of `stops` that ends after `start` begins and ends; None when there is none."""
    found = [(text.find(stop, max(0, start - len(stop) + 1)), len(stop)) for stop in stops]
    return min(((at, at + length) for at, length in found if at >= 0), default=None)
