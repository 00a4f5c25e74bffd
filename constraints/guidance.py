"""llguidance, the engine that starts at once: its tokenizer and its matchers."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from constraints.constraint import Constraint
from constraints.errors import ConstraintError
from constraints.forced import CONTEXT, canonical_run
from constraints.machine import MAX_STEPS, compiled
from constraints.masks import masks, owners
from constraints.place import Place, Places
from constraints.token_set import Row, TokenSet, freeze
from constraints.vocabulary import Vocabulary, once_per_vocabulary

SPECIAL = b"\xff"
"""llguidance marks the spelling of a special token with this byte, which no UTF-8 text contains."""

NO_FORCING = '\n%llguidance {"no_forcing": true}\n'
"""Without it llguidance narrows a mask to its own choice of a token where the bytes are forced."""

OWN_LINES = re.compile(r"^ +\d+ \| (%llguidance.*)?\n?$", re.MULTILINE)
"""Lines of an error that show what was added to the user's grammar."""

NOTHING_FOLLOWS = ("NoExtension", "NoExtensionBias", "EndOfSentence")


class _Words:
    """A vocabulary in the words of llguidance."""

    def __init__(self, vocabulary: Vocabulary):
        v = vocabulary
        self.eos_token_id = v.eos_token_ids[0] if v.eos_token_ids else v.size
        self.bos_token_id = v.bos_token_id
        self.tokens = [v.token_bytes(i) or SPECIAL + b"%d" % i for i in range(v.size)]
        if not v.eos_token_ids:
            self.tokens.append(SPECIAL + b"eos")
        self.special_token_ids = [i for i, text in enumerate(self.tokens) if text.startswith(SPECIAL)]

    def __call__(self, text: object) -> list[int]:
        """llguidance tokenizes only to force tokens, which `forced.py` does here."""
        return []


@once_per_vocabulary
def tokenizer_of(vocabulary: Vocabulary) -> LLTokenizer:
    """llguidance's tokenizer for `vocabulary`, built once."""
    words = _Words(vocabulary)
    return LLTokenizer(TokenizerWrapper(words), n_vocab=len(words.tokens))


def matcher(vocabulary: Vocabulary, grammar: str) -> LLMatcher:
    """A matcher for a grammar in llguidance's Lark or its JSON form.

    `ConstraintError` when it does not compile.
    """
    made = LLMatcher(tokenizer_of(vocabulary), grammar, log_level=0)
    if made.is_error():
        raise ConstraintError(made.get_error())
    return made


def compute_row(vocabulary: Vocabulary, at: LLMatcher) -> Row:
    """The text tokens that `at` allows, writable. `ConstraintError` when the engine hits its limits.

    Where no token can follow, `at` ends in its error state, which it never leaves.
    """
    if at.is_stopped() and not at.is_error():
        return np.zeros(vocabulary.num_words, np.int32)
    bits = b"" if at.is_error() else at.compute_bitmask()
    if at.is_error():
        message = first_line(at.get_error())
        if message in NOTHING_FOLLOWS:
            return np.zeros(vocabulary.num_words, np.int32)
        raise ConstraintError(f"the grammar became too complex here: {message}")
    return np.frombuffer(bits, np.int32, vocabulary.num_words) & vocabulary.text_tokens.row


def first_line(message: str) -> str:
    """llguidance appends dumps of its state to some errors."""
    return message.strip().split("\n<state>", 1)[0].strip()


PRIME = (1 << 127) - 1
# Random, so that nobody can prepare two histories with the same key.
BASE = secrets.randbits(120) + 3


Position = tuple[int, Hashable]
"""The number of a grammar, and the name of a position in it: equal for equal futures only."""

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


def remember(known: dict[Key, Value], key: Key, value: Value) -> Value:
    """Put `value` into `known`, which starts again when it is full."""
    if len(known) >= MAX_STEPS:
        known.clear()
    known[key] = value
    return value


class History(NamedTuple):
    """The name of a position that nothing names better: where it was left, and a hash of the tokens since."""

    since: Hashable
    tokens: int


class Names(Protocol):
    """Names for the positions in the texts of one grammar; 0 is the start."""

    def after(self, name: Any, text: bytes) -> Hashable | None:
        """The name after `text`, None where it cannot be followed."""

    def __len__(self) -> int:
        """How many states it remembers."""


class GuidanceGrammar:
    """A grammar that llguidance has compiled, and what all its sequences found out about it.

    `names_of` makes the names of its positions; without it the tokens so far are the name.
    """

    def __init__(self, vocabulary: Vocabulary, source: str, names_of: Callable[[], Names] | None = None):
        self.vocabulary = vocabulary
        self.number = next(owners)
        self.fresh = matcher(vocabulary, source)
        # In a grammar of JSON form llguidance's masks follow one way to write forced bytes as tokens.
        self.forces = source.startswith("{")
        # `<|name|>` and `<[3]>` are how llguidance's Lark names special tokens.
        self.names_tokens = not self.forces and "<" in source
        self.start: Position = (self.number, 0 if names_of else History(None, 0))
        self._names_of = names_of
        # Of positions: where a token leads, whether the text may end, the bytes that must follow.
        self.steps: dict[Position, dict[int, Position]] = {}
        self._num_steps = 0
        self.ends: dict[Position, bool] = {}
        self.forced: dict[Position, bytes] = {}
        self.choices: dict[Position, bool] = {}
        self.runs: dict[tuple[Position, tuple[int, ...]], list[int]] = {}
        self.places = Places()

    @cached_property
    def _names(self) -> Names | None:
        return self._names_of() if self._names_of else None

    def num_states(self) -> int:
        """Its memory; eight steps take what a state of the names takes."""
        names = self.__dict__.get("_names")
        return (len(names) if names else 0) + self._num_steps // 8

    def after(self, position: Position, token: int) -> Position:
        """The position after `token`, which may follow."""
        name = position[1]
        found: Hashable | None = None
        if not isinstance(name, History) and self._names is not None:
            found = self._names.after(name, self.vocabulary.texts[token])
        if found is None:
            since, tokens = name if isinstance(name, History) else (name, 0)
            found = History(since, (tokens * BASE + token + 1) % PRIME)
        if self._num_steps >= MAX_STEPS:
            self.steps.clear()
            self._num_steps = 0
        self._num_steps += 1
        # Positions that are met again are one object, so that a comparison of keys is one of identities.
        after = position if found == name else (self.number, found)
        self.steps.setdefault(position, {})[token] = after
        return after


class GuidanceConstraint(Constraint):
    """A position in a grammar. Its matcher follows only when something is asked that nobody has found out."""

    vocabulary: Vocabulary

    def __init__(self, grammar: GuidanceGrammar):
        super().__init__(grammar.vocabulary)
        self._grammar = grammar
        self._matcher: LLMatcher | None = None
        self._consumed = 0
        self._tokens: list[int] = []
        self._position = grammar.start
        # Before each token, as far as somebody asked: the rest is found again from the tokens.
        self._positions = [grammar.start]

    def eos_allowed(self) -> bool:
        ends = self._grammar.ends.get(self._position)
        if ends is None:
            ends = remember(self._grammar.ends, self._position, self._caught_up().is_accepting())
        return ends

    def eos_forced(self) -> bool:
        return self.eos_allowed() and np.array_equal(self.mask_row(), self.vocabulary.eos_row)

    def token_allowed(self, token: int) -> bool:
        return 0 <= token < self.vocabulary.size and _has(self.mask_row(), token)

    def allow_tokens(self, allowed: TokenSet) -> None:
        allowed.row[:] = self.mask_row()

    def append_token(self, token: int) -> None:
        onward = self._grammar.steps.get(self._position)
        after = None if onward is None else onward.get(token)
        if after is None:
            after = self._new_step(token)
        self._position = after
        self._tokens.append(token)

    def place(self, variant: Hashable = None) -> Place:
        return self._grammar.places.at(self._position, variant)

    def move(self, tokens: list[int], state: Position) -> None:
        self._tokens += tokens
        self._position = state

    def _new_step(self, token: int) -> Position:
        """Where `token` leads, which nobody has asked yet."""
        v = self.vocabulary
        if token in v.eos_token_ids:
            return self._position
        if not (0 <= token < v.size and v.token_bytes(token)):
            raise self._refusal(token)
        row = masks.get(self._position)
        if row is None:
            self._consume(token)
        elif not _has(row, token):
            raise self._refusal(token)
        return self._grammar.after(self._position, token)

    def _consume(self, token: int) -> None:
        """Let the matcher take `token`: cheaper than a mask where only one token is in question."""
        at = self._caught_up()
        if at.try_consume_tokens([token]) == 1:
            self._consumed += 1
            return
        message = first_line(at.get_error())
        self._matcher = None
        if message:
            raise ConstraintError(f"the grammar became too complex here: {message}")
        raise self._refusal(token)

    def has_choice(self) -> bool:
        known = self._grammar.choices.get(self._position)
        if known is None:
            known = not self._forced_bytes() and not self.eos_forced()
            remember(self._grammar.choices, self._position, known)
        return known

    def forced_tokens(self) -> list[int]:
        forced = self._forced_bytes()
        if not forced:
            return []
        recent = tuple(self._tokens[-CONTEXT:])
        run = self._grammar.runs.get((self._position, recent))
        if run is None:
            run = canonical_run(self.vocabulary, recent, forced, None)
            remember(self._grammar.runs, (self._position, recent), run)
        return list(run)

    def _forced_bytes(self) -> bytes:
        """The bytes that must follow; none where the text may end."""
        forced = self._grammar.forced.get(self._position)
        if forced is None:
            at = self._caught_up()
            forced = b"" if at.is_stopped() or at.is_accepting() else at.compute_ff_bytes()
            remember(self._grammar.forced, self._position, forced)
        return forced

    def state_key(self) -> Hashable:
        return self._position

    def mask_row(self) -> Row:
        known = masks.get(self._position)
        return masks.put(self._position, freeze(self._make_row())) if known is None else known

    def _make_row(self) -> Row:
        at = self._caught_up()
        ends = remember(self._grammar.ends, self._position, at.is_accepting())
        if not ends and not at.is_stopped():
            forced = at.compute_ff_bytes() if self._grammar.forces else b""
            if forced:
                return forced_row(self.vocabulary, at, forced)
            if not self._grammar.names_tokens:
                # Nothing but text tokens can be in the engine's mask, which is then used as it is, uncopied.
                bits = at.compute_bitmask()
                if not at.is_error():
                    return np.frombuffer(bits, np.int32, self.vocabulary.num_words)
        try:
            row = compute_row(self.vocabulary, at)
        finally:
            if at.is_error():
                self._matcher = None
        return row | self.vocabulary.eos_row if ends else row

    def _caught_up(self) -> LLMatcher:
        """The matcher after all tokens so far."""
        if self._matcher is None:
            self._matcher, self._consumed = self._grammar.fresh.deep_copy(), 0
        if self._consumed < len(self._tokens):
            eos = self.vocabulary.eos_token_ids
            behind = [token for token in self._tokens[self._consumed :] if token not in eos]
            if behind and not self._matcher.consume_tokens(behind):
                message, self._matcher = first_line(self._matcher.get_error()), None
                raise ConstraintError(f"the grammar became too complex here: {message}")
            self._consumed = len(self._tokens)
        return self._matcher

    def rollback(self, count: int) -> None:
        if not 0 <= count <= len(self._tokens):
            raise ConstraintError(f"cannot take back {count} of {len(self._tokens)} tokens")
        if not count:
            return
        kept = len(self._tokens) - count
        if self._matcher is not None and self._consumed > kept:
            eos = self.vocabulary.eos_token_ids
            taken = sum(token not in eos for token in self._tokens[kept : self._consumed])
            if taken and not self._matcher.rollback(taken):
                self._matcher = None
            self._consumed = kept
        positions = self._positions
        for token in self._tokens[len(positions) - 1 : kept]:
            positions.append(self._known_step(positions[-1], token))
        del self._tokens[kept:], positions[kept + 1 :]
        self._position = positions[-1]

    def _known_step(self, position: Position, token: int) -> Position:
        """Where a token that was taken led."""
        if token in self.vocabulary.eos_token_ids:
            return position
        onward = self._grammar.steps.get(position)
        after = None if onward is None else onward.get(token)
        return self._grammar.after(position, token) if after is None else after

    def fork(self) -> GuidanceConstraint:
        twin = GuidanceConstraint.__new__(GuidanceConstraint)
        twin.__dict__.update(self.__dict__)
        twin._matcher = None if self._matcher is None else self._matcher.deep_copy()
        twin._tokens = self._tokens.copy()
        twin._positions = self._positions.copy()
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> GuidanceConstraint:
        return self.fork()


def forced_row(vocabulary: Vocabulary, at: LLMatcher, forced: bytes) -> Row:
    """The mask where the bytes `forced` must follow: the tokens that begin them, and those that go beyond."""
    v = vocabulary
    ids = [i for end in range(1, len(forced) + 1) for i in v.ids_by_bytes.get(forced[:end], ())]
    for probe, groups in v.beyond(forced):
        # Where a byte may not follow, no token that writes it there may come: asked once for all of them.
        if not probe or at.validate_tokens(probe) == len(probe):
            for same in groups:
                if at.validate_tokens([same[0]]):
                    ids += same
    bits = bytearray(4 * v.num_words)
    for token in ids:
        bits[token >> 3] |= 1 << (token & 7)
    return np.frombuffer(bits, np.int32)


def _has(row: Row, token: int) -> bool:
    return bool(row.item(token >> 5) >> (token & 31) & 1)


def lark(vocabulary: Vocabulary, grammar: str) -> GuidanceConstraint:
    """Text of a Lark grammar, in llguidance's dialect, whose start rule is `start`.

    Raises `ConstraintError` with the line of what does not compile.
    """
    if not isinstance(grammar, str):
        raise ConstraintError(f"a Lark grammar is a string, not {type(grammar).__name__}")
    source = grammar + NO_FORCING
    try:
        made = compiled.get(("lark", vocabulary.key, grammar), lambda: GuidanceGrammar(vocabulary, source))
    except ConstraintError as error:
        shown = OWN_LINES.sub("", str(error)).strip()
        raise ConstraintError(f"the Lark grammar does not compile: {shown}") from None
    return GuidanceConstraint(made)
