"""Random walks: at every position, every token is compared with a brute-force answer."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from constraints import Constraint, TokenSet, Vocabulary

EOS, EOS_TOO, SPECIAL = 0, 1, 2
"""Ids in the vocabularies of `small_vocabulary`: two ends and another special token."""


def small_vocabulary(*pieces: str | bytes, single: str | bytes = b"") -> Vocabulary:
    """Special tokens, `pieces`, and each byte of `single` as a token; the first piece twice."""
    texts = [p.encode() if isinstance(p, str) else p for p in pieces]
    singles = single.encode() if isinstance(single, str) else single
    texts += [bytes([byte]) for byte in dict.fromkeys(singles)]
    specials = {EOS: b"</s>", EOS_TOO: b"<|end|>", SPECIAL: b"<|tool|>"}
    tokens = [b"", b"", b"", *texts, texts[0]]
    return Vocabulary(tokens, specials=specials, eos_token_ids=(EOS, EOS_TOO), size=len(tokens) + 2)


def allowed_by_brute_force(
    vocabulary: Vocabulary, text: bytes, viable: Callable[[bytes], bool], ends: Callable[[bytes], bool]
) -> set[int]:
    """The ids that may follow `text`."""
    found = {i for i in range(vocabulary.size) if (b := vocabulary.token_bytes(i)) and viable(text + b)}
    return found | (set(vocabulary.eos_token_ids) if ends(text) else set())


def walk(
    constraint: Constraint,
    vocabulary: Vocabulary,
    viable: Callable[[bytes], bool],
    ends: Callable[[bytes], bool],
    random: Random,
    steps: int = 12,
) -> bytes:
    """Follow allowed tokens at random, checking every question that a constraint answers."""
    text = b""
    for _ in range(steps):
        wanted = allowed_by_brute_force(vocabulary, text, viable, ends)
        check_position(constraint, vocabulary, wanted, text, ends(text))
        onward = sorted(wanted - set(vocabulary.eos_token_ids))
        if not onward:
            break
        check_copies(constraint, onward, random)
        token = random.choice(onward)
        constraint.append_token(token)
        text += vocabulary.token_bytes(token)
    return text


def check_position(
    constraint: Constraint, vocabulary: Vocabulary, wanted: set[int], text: bytes, ends: bool
) -> None:
    row = constraint.mask_row()
    got = set(TokenSet(vocabulary.size, row=row).ids().tolist())
    assert got == wanted, (text, vocabulary.tokens_repr(got ^ wanted), "extra", got - wanted)
    assert not row.flags.writeable
    allowed = vocabulary.all_tokens()
    constraint.allow_tokens(allowed)
    assert set(allowed.ids().tolist()) == wanted
    assert constraint.eos_allowed() == ends
    for token in range(vocabulary.size):
        assert constraint.token_allowed(token) == (token in wanted), (text, token)


def check_copies(constraint: Constraint, onward: list[int], random: Random) -> None:
    """A fork goes its own way, and rollback undoes appending."""
    before = constraint.mask_row().copy()
    key = constraint.state_key()
    twin = constraint.fork()
    twin.append_token(random.choice(onward))
    assert (constraint.mask_row() == before).all()
    twin.rollback(1)
    assert twin.state_key() == key
    assert (twin.mask_row() == before).all()
