"""The controller of one call, which the engine runs: write what is new, then generate a reply of one shape.

It is installed as the controller `recursive` (entry point group `aici_vllm.controllers`), so a server needs
nothing but this package to run it. Its argument is a `Plan` as JSON.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import constraints
from aici_vllm import aici
from aici_vllm.controller.program import running_program
from constraints import AnyText, Constraint, ConstraintError, Vocabulary

from .turn_shape import FINAL, STRICT_TURN, TURN, missing_end, missing_final, missing_opening

NAME = "recursive"
OUTCOME = "outcome"
REPLY = "reply"
CLOSED_SHAPES = {"turn": TURN, "strict turn": STRICT_TURN, "final": FINAL}
"""Shapes that are closed with written text when their tokens run out."""
CLOSING_TOKENS = 24
"""Room for that text."""


@dataclass(frozen=True)
class Plan:
    """What one call does.

    pieces: text to write behind the prompt, as (text, data): in data no special token is recognised.
    shape: "text", "turn", "strict turn", "final", "regex", "json"; "prefill" for no reply, and "nothing" to
        do nothing at all.
    pattern: the regular expression, or the JSON schema.
    max_tokens, min_tokens: sampled for the reply; a turn that is not finished then is closed.
    context: the longest sequence, in tokens.
    allowance: how many tokens the call may add in all, prompt and reply; None for any number.
    counted: tokens of its prompt that count against the allowance.
    """

    pieces: list[tuple[str, bool]]
    shape: str = "text"
    pattern: Any = None
    max_tokens: int = 512
    min_tokens: int = 0
    context: int = 0
    allowance: int | None = None
    counted: int = 0

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        found = json.loads(text)
        return cls(**{**found, "pieces": [(piece, data) for piece, data in found["pieces"]]})

    @property
    def closing_tokens(self) -> int:
        return CLOSING_TOKENS if self.shape in CLOSED_SHAPES else 0


@dataclass(frozen=True)
class Outcome:
    """What came of a call.

    reason: "stop"; "length" or "budget" when the reply is cut short by its own limit or by the allowance;
        "too long", "no budget" or "bad pattern" (the reply says why) when nothing was computed.
    prompt_tokens: of the whole prompt; `spent` counts what the call added, prompt and reply.
    reply_tokens: of the reply, an end-of-sequence token and closing text too.
    """

    reason: str
    prompt_tokens: int
    spent: int
    reply_tokens: int = 0

    @classmethod
    def from_json(cls, text: str | bytes) -> Outcome:
        return cls(**json.loads(text))


async def answer_call(argument: str) -> None:
    """The controller: sets the variables `outcome` and `reply`."""
    plan = Plan.from_json(argument)
    if plan.shape == "nothing":
        return _report(Outcome("stop", 0, 0), "")
    before = aici.get_tokens()
    new = written(plan.pieces, _vocabulary(), before)
    begun = len(before) + len(new)
    added = plan.counted + len(new)
    room = plan.context - begun - plan.closing_tokens
    allowed = room if plan.allowance is None else plan.allowance - added - plan.closing_tokens
    if min(room, allowed) < 1:
        reason = "too long" if room < 1 else "no budget"
        return _report(Outcome(reason, begun, 0), "")
    try:
        reply = _Reply(plan, min(plan.max_tokens, room, allowed))
    except ConstraintError as error:
        return _report(Outcome("bad pattern", begun, 0), str(error))
    if new:
        await _Write(new)
    if plan.shape == "prefill":
        await _Prefill()
        return _report(Outcome("stop", begun, added), "")
    finished = await (reply.turn() if "turn" in plan.shape else reply.generate(reply.limit))
    if not finished:
        await reply.close()
    cut = "budget" if allowed < min(plan.max_tokens, room) else "length"
    spent = added + len(reply.tokens)
    outcome = Outcome("stop" if finished else cut, begun, spent, len(reply.tokens))
    _report(outcome, reply.text)


class _Reply:
    """The reply of a call while it grows."""

    def __init__(self, plan: Plan, limit: int) -> None:
        self.limit = limit
        self.tokens: list[int] = []
        self._kind = plan.shape
        self._least = min(plan.min_tokens, limit)
        self._shape = _constraint(plan, _vocabulary())

    @property
    def text(self) -> str:
        return aici.detokenize(self.tokens).decode(errors="replace")

    async def generate(self, max_tokens: int) -> bool:
        """Sample up to `max_tokens`; whether the reply is complete."""
        least = min(max_tokens, max(0, self._least - len(self.tokens)))
        self.tokens += await aici.gen_tokens(constraint=self._shape, max_tokens=max_tokens, min_tokens=least)
        if self.tokens and self.tokens[-1] in _vocabulary().eos_token_ids:
            return self._shape.eos_allowed()
        return self._shape.eos_allowed() and type(self._shape) is not AnyText

    async def turn(self) -> bool:
        """A turn: prose may take half of the tokens, then a block is opened for it."""
        half = self.limit - self.limit // 2
        if await self.generate(half):
            return True
        opening = missing_opening(self.text, self._kind == "strict turn")
        for token in await self._write(opening or ""):
            self._shape.append_token(token)
        return await self.generate(self.limit - half)

    async def close(self) -> None:
        """Write what an unfinished turn or final answer lacks."""
        if self._kind == "final":
            await self._write(missing_final(self.text))
        elif "turn" in self._kind:
            await self._write(missing_end(self.text, self._kind == "strict turn"))

    async def _write(self, text: str) -> list[int]:
        tokens = await aici.FixedTokens(text) if text else []
        self.tokens += tokens
        return tokens


def _vocabulary() -> Vocabulary:
    return running_program().branch.group.vocabulary


def _constraint(plan: Plan, vocabulary: Vocabulary) -> Constraint:
    """What replies are possible. Raises ConstraintError for a pattern that does not compile."""
    if plan.shape == "json":
        return constraints.json_schema(vocabulary, plan.pattern)
    pattern = CLOSED_SHAPES.get(plan.shape, plan.pattern)
    return AnyText(vocabulary) if pattern is None else constraints.regex(vocabulary, pattern)


def _report(outcome: Outcome, reply: str) -> None:
    aici.set_var(OUTCOME, json.dumps(asdict(outcome)))
    aici.set_var(REPLY, reply)


class _Write(aici.NextToken):
    """Splice token ids."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def mid_process(self) -> aici.MidProcessResult:
        return aici.MidProcessResult.splice(0, self._tokens)


class _Prefill(aici.NextToken):
    """Have the engine compute all tokens so far: one step, whose sampled token is taken back."""

    def mid_process(self) -> aici.MidProcessResult:
        end = aici.eos_token()
        mask = aici.TokenSet()
        mask[end] = True
        back = aici.Splice(when_sampled=[end], backtrack=1, ff_tokens=[])
        return aici.MidProcessResult([aici.Branch(sample_mask=mask, splices=[back])])


def written(pieces: list[tuple[str, bool]], vocabulary: Vocabulary, before: list[int]) -> list[int]:
    """The tokens of `pieces` behind the tokens `before`.

    Pieces are tokenized as one text, as a chat template's would be, except that what looks like a special
    token inside data stays text. A reply that ended with its end-of-sequence token is not ended twice.
    """
    parts = [""]
    for text, is_data in pieces:
        first, *rest = without_specials(text, vocabulary) if is_data else [text]
        parts[-1] += first
        parts += rest
    tokens = [token for part in parts for token in vocabulary.tokenize(part)]
    if tokens and before and tokens[0] == before[-1] and tokens[0] in vocabulary.eos_token_ids:
        return tokens[1:]
    return tokens


def without_specials(text: str, vocabulary: Vocabulary) -> list[str]:
    """`text` cut inside everything that is spelled like a special token."""
    cuts = [match.start() + 1 for match in _special_spellings(vocabulary).finditer(text)]
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@cache
def _special_spellings(vocabulary: Vocabulary) -> re.Pattern[str]:
    """What spells a special token of more than one character."""
    spelled = [vocabulary.token_text(i) for i in range(vocabulary.size) if vocabulary.is_special(i)]
    texts = sorted({text.decode(errors="ignore") for text in spelled}, key=len, reverse=True)
    return re.compile("|".join(re.escape(text) for text in texts if len(text) > 1) or "(?!)")
