"""The base class, any text, and constraints that users write."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from constraints import (
    AnyText,
    Constraint,
    ConstraintError,
    DynamicLexer,
    TokenSet,
    lark,
    options,
    regex,
    substring,
    yacc,
)
from constraints.masks import MaskCache
from constraints.token_set import freeze
from tests.constraints.walks import EOS, EOS_TOO, SPECIAL, small_vocabulary

VOCABULARY = small_vocabulary("a", "b", "ab", "é", b"\xc3")


@pytest.mark.parametrize("kind", [AnyText, Constraint])
def test_any_text_allows_all_text_and_the_end(kind: type[Constraint]):
    constraint = kind(VOCABULARY)
    texts = {i for i in range(VOCABULARY.size) if VOCABULARY.token_bytes(i)}
    for token in (3, 5, 4):
        assert set(TokenSet(VOCABULARY.size, row=constraint.mask_row()).ids().tolist()) == texts | {
            EOS,
            EOS_TOO,
        }
        assert constraint.eos_allowed() and not constraint.eos_forced()
        assert constraint.forced_tokens() == []
        constraint.append_token(token)
    constraint.append_token(EOS)
    with pytest.raises(ConstraintError, match=r"token 2 \(EMPTY\[2\]\)"):
        constraint.append_token(SPECIAL)
    constraint.rollback(2)
    assert constraint.fork().mask_row().any()


def test_any_text_shares_one_mask():
    one, two = AnyText(VOCABULARY), AnyText(VOCABULARY).fork()
    assert one.state_key() == two.state_key() and one.mask_row() is two.mask_row()


class AtMost(Constraint):
    """A user's constraint: so many letters a, one token at a time."""

    def __init__(self, limit: int):
        super().__init__()
        self.left = [limit]

    def eos_allowed(self) -> bool:
        return self.left[-1] == 0

    def token_allowed(self, token: int) -> bool:
        text = self.known_vocabulary().token_bytes(token)
        return bool(text) and set(text) <= {ord("a")} and len(text) <= self.left[-1]

    def append_token(self, token: int) -> None:
        super().append_token(token)
        self.left.append(self.left[-1] - len(self.known_vocabulary().token_bytes(token)))


def test_a_subclass_needs_only_what_it_changes():
    constraint = AtMost(2)
    with pytest.raises(ConstraintError, match="no vocabulary"):
        constraint.mask_row()
    constraint.vocabulary = VOCABULARY
    # The first token of a small vocabulary has a twin.
    assert TokenSet(VOCABULARY.size, row=constraint.mask_row()).ids().tolist() == [3, 8]
    assert constraint.state_key() is None
    twin = constraint.fork()
    twin.append_token(3)
    twin.append_token(8)
    assert TokenSet(VOCABULARY.size, row=twin.mask_row()).ids().tolist() == [EOS, EOS_TOO]
    assert constraint.left == [2]
    with pytest.raises(ConstraintError, match="not allowed"):
        twin.append_token(3)
    with pytest.raises(ConstraintError, match="rollback"):
        twin.rollback(1)


class Both(Constraint):
    """A user's constraint: what two others allow."""

    def __init__(self, *parts: Constraint):
        super().__init__(VOCABULARY)
        self.parts = parts

    def eos_allowed(self) -> bool:
        return all(part.eos_allowed() for part in self.parts)

    def token_allowed(self, token: int) -> bool:
        return all(part.token_allowed(token) for part in self.parts)

    def append_token(self, token: int) -> None:
        for part in self.parts:
            part.append_token(token)


@pytest.mark.parametrize(
    "part",
    [
        lambda: regex(VOCABULARY, "a+"),
        lambda: options(VOCABULARY, ["a", "aa"]),
        lambda: substring(VOCABULARY, "aa", ""),
        lambda: yacc(VOCABULARY, "%% S: 'a' S | 'a' ;"),
        lambda: lark(VOCABULARY, 'start: "a"+'),
    ],
    ids=["regex", "options", "substring", "yacc", "lark"],
)
def test_a_subclass_that_holds_other_constraints_forks(part: Callable[[], Constraint]):
    constraint = Both(part(), AnyText(VOCABULARY))
    constraint.append_token(3)
    before = constraint.mask_row().copy()
    twin = constraint.fork()
    assert (twin.mask_row() == before).all()
    twin.append_token(3)
    assert (constraint.mask_row() == before).all()


def test_a_subclass_that_holds_a_lexer_forks():
    lexer = DynamicLexer(VOCABULARY)
    lexer.add("a")
    for held in ((lexer, lexer.constraint()), (lexer.constraint(), lexer)):
        holder = Constraint(VOCABULARY)
        holder.held = held  # type: ignore[attr-defined]
        copied = holder.fork().held  # type: ignore[attr-defined]
        there = next(part for part in copied if isinstance(part, DynamicLexer))
        there.add("b")
        assert there.constraint() in copied and there.constraint().token_allowed(4)
        assert not lexer.constraint().token_allowed(4)


def test_a_subclass_may_allow_tokens_itself():
    class OnlyB(Constraint):
        def allow_tokens(self, allowed: TokenSet) -> None:
            allowed.set_all(False)
            allowed[4] = True

    assert TokenSet(VOCABULARY.size, row=OnlyB(VOCABULARY).mask_row()).ids().tolist() == [4]


def test_the_mask_cache_drops_what_was_used_least_lately():
    rows = [freeze(TokenSet.of([i], 64).row) for i in range(4)]
    cache = MaskCache(max_bytes=3 * rows[0].nbytes)
    for key in range(3):
        cache.put(key, rows[key])
    assert cache.get(0) is rows[0]
    cache.put(3, rows[3])
    assert cache.get(1) is None and cache.get(0) is rows[0] and len(cache) == 3
    assert cache.num_bytes == 3 * rows[0].nbytes
    assert cache.put(0, rows[1]) is rows[0]
    assert cache.misses == 1
    cache.clear()
    assert len(cache) == cache.num_bytes == 0
