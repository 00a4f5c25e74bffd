"""llguidance, the engine that starts at once: its tokenizer and its matchers."""

from __future__ import annotations

import re
import secrets
from collections.abc import Hashable
from itertools import count
from weakref import WeakKeyDictionary

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from constraints.constraint import Constraint
from constraints.errors import ConstraintError
from constraints.forced import CONTEXT, canonical_run
from constraints.machine import compiled
from constraints.token_set import Row, TokenSet
from constraints.vocabulary import Vocabulary

SPECIAL = b"\xff"
"""llguidance marks the spelling of a special token with this byte, which no UTF-8 text contains."""

NO_FORCING = '\n%llguidance {"no_forcing": true}\n'
"""Without it llguidance narrows a mask to its own choice of a token where the bytes are forced."""

OWN_LINES = re.compile(r"^ +\d+ \| (%llguidance.*)?\n?$", re.MULTILINE)
"""Lines of an error that show what was added to the user's grammar."""

NOTHING_FOLLOWS = ("NoExtension", "NoExtensionBias", "EndOfSentence")

_tokenizers: WeakKeyDictionary[Vocabulary, LLTokenizer] = WeakKeyDictionary()


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


def tokenizer_of(vocabulary: Vocabulary) -> LLTokenizer:
    """llguidance's tokenizer for `vocabulary`, built once."""
    known = _tokenizers.get(vocabulary)
    if known is None:
        words = _Words(vocabulary)
        known = LLTokenizer(TokenizerWrapper(words), n_vocab=len(words.tokens))
        _tokenizers[vocabulary] = known
    return known


def matcher(vocabulary: Vocabulary, lark: str) -> LLMatcher:
    """A matcher for a grammar in llguidance's Lark. `ConstraintError` when it does not compile."""
    made = LLMatcher(tokenizer_of(vocabulary), lark, log_level=0)
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

_numbers = count()


class GuidanceGrammar:
    """A grammar that llguidance has compiled, shared by all its sequences."""

    def __init__(self, vocabulary: Vocabulary, lark: str):
        self.vocabulary = vocabulary
        self.number = next(_numbers)
        self.fresh = matcher(vocabulary, lark)
        # `<|name|>` and `<[3]>` are how llguidance's Lark names special tokens.
        self.names_tokens = "<" in lark


class GuidanceConstraint(Constraint):
    """A position in a grammar. llguidance names no states, so the tokens so far name the position."""

    vocabulary: Vocabulary

    def __init__(self, grammar: GuidanceGrammar):
        super().__init__(grammar.vocabulary)
        self._grammar = grammar
        self._matcher = grammar.fresh.deep_copy()
        self._tokens: list[int] = []
        self._history = [0]

    def eos_allowed(self) -> bool:
        return self._matcher.is_accepting()

    def eos_forced(self) -> bool:
        return self.eos_allowed() and np.array_equal(self.mask_row(), self.vocabulary.eos_row)

    def token_allowed(self, token: int) -> bool:
        v = self.vocabulary
        if token in v.eos_token_ids:
            return self.eos_allowed()
        if not 0 <= token < v.size or not v.token_bytes(token):
            return False
        return self._matcher.validate_tokens([token]) == 1

    def allow_tokens(self, allowed: TokenSet) -> None:
        allowed.row[:] = self.mask_row()

    def append_token(self, token: int) -> None:
        v = self.vocabulary
        before = self._history[-1]
        if token not in v.eos_token_ids:
            if not (0 <= token < v.size and v.token_bytes(token)) or not self._matcher.try_consume_tokens(
                [token]
            ):
                raise self._failed_append(token)
            before = (before * BASE + token + 1) % PRIME
        self._history.append(before)
        self._tokens.append(token)

    def _failed_append(self, token: int) -> ConstraintError:
        """The error for `token`; the matcher is as it was before it."""
        message = first_line(self._matcher.get_error())
        self._matcher = self._replayed()
        return (
            ConstraintError(f"the grammar became too complex here: {message}")
            if message
            else self._refusal(token)
        )

    def forced_tokens(self) -> list[int]:
        if self._matcher.is_stopped() or self.eos_allowed():
            return []
        forced = self._matcher.compute_ff_bytes()
        if not forced:
            return []
        return canonical_run(self.vocabulary, self._tokens[-CONTEXT:], forced, None)

    def state_key(self) -> Hashable:
        return "grammar", self._grammar.number, self._history[-1]

    def _make_row(self) -> Row:
        at = self._matcher
        ends = at.is_accepting()
        if not ends and not at.is_stopped() and not self._grammar.names_tokens:
            # Nothing but text tokens can be in the engine's mask, which is then used as it is, uncopied.
            bits = at.compute_bitmask()
            if not at.is_error():
                return np.frombuffer(bits, np.int32, self.vocabulary.num_words)
        row = compute_row(self.vocabulary, at)
        if self._matcher.is_error():
            self._matcher = self._replayed()
        if ends:
            row |= self.vocabulary.eos_row
        return row

    def _replayed(self) -> LLMatcher:
        """A matcher in this position that was not asked for a mask yet."""
        at = self._grammar.fresh.deep_copy()
        at.consume_tokens([token for token in self._tokens if token not in self.vocabulary.eos_token_ids])
        return at

    def rollback(self, count: int) -> None:
        if not 0 <= count <= len(self._tokens):
            raise ConstraintError(f"cannot take back {count} of {len(self._tokens)} tokens")
        if not count:
            return
        eos = self.vocabulary.eos_token_ids
        consumed = sum(token not in eos for token in self._tokens[-count:])
        if consumed and not self._matcher.rollback(consumed):
            raise ConstraintError(f"cannot take back {count} tokens: {first_line(self._matcher.get_error())}")
        del self._tokens[-count:], self._history[-count:]

    def fork(self) -> GuidanceConstraint:
        twin = GuidanceConstraint.__new__(GuidanceConstraint)
        twin.__dict__.update(self.__dict__)
        twin._matcher = self._matcher.deep_copy()
        twin._tokens = self._tokens.copy()
        twin._history = self._history.copy()
        return twin


def lark(vocabulary: Vocabulary, grammar: str) -> GuidanceConstraint:
    """Text of a Lark grammar, in llguidance's dialect, whose start rule is `start`.

    Raises `ConstraintError` with the line of what does not compile.
    """
    source = grammar + NO_FORCING
    try:
        made = compiled.get(("lark", vocabulary.key, grammar), lambda: GuidanceGrammar(vocabulary, source))
    except ConstraintError as error:
        shown = OWN_LINES.sub("", str(error)).strip()
        raise ConstraintError(f"the Lark grammar does not compile: {shown}") from None
    return GuidanceConstraint(made)
