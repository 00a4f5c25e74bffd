"""A model of arithmetic: its next token is a number made of all tokens before it. And its vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from constraints import Vocabulary

LETTERS = "abcdefghijklmnop"
WORDS = [
    "ab",
    "abc",
    "cd",
    "aa",
    "bad",
    "cafe",
    "de",
    "ed",
    "ghost",
    "ha",
    "ip",
    "jk",
    "no",
    "on",
    "op",
    "pig",
]
TOKENS = [*LETTERS, *WORDS]
EOS = len(TOKENS)
TEXT_TOKENS = list(range(EOS))
PLAIN_TOKENS = [*TEXT_TOKENS, EOS]
SIZE = EOS + 6
"""Rows of the model's output: more than there are tokens, and no multiple of 32."""

_BY_LENGTH = sorted(range(EOS), key=lambda token: -len(TOKENS[token]))


def encode(text: str) -> list[int]:
    """The longest token first. Characters other than the letters a to p are dropped."""
    ids: list[int] = []
    at = 0
    while at < len(text):
        token = next((token for token in _BY_LENGTH if text.startswith(TOKENS[token], at)), EOS)
        ids += [token] if token < EOS else []
        at += len(TOKENS[token]) if token < EOS else 1
    return ids


def text_of(tokens: Sequence[int]) -> str:
    """The text of `tokens`; the end of a sequence has none."""
    return "".join(TOKENS[token] for token in tokens if token < EOS)


def vocabulary() -> Vocabulary:
    """The vocabulary that the engine is told."""
    tokens = [*(token.encode() for token in TOKENS), None]
    return Vocabulary(tokens, specials={EOS: b"<end>"}, eos_token_ids=[EOS], encode=encode, size=SIZE)


def allowed_by(row: np.ndarray) -> list[int]:
    """The tokens whose bits are set in a packed mask row, int32[words], ascending."""
    bits = int.from_bytes(np.ascontiguousarray(row).tobytes(), "little")
    return [token for token in range(SIZE) if bits >> token & 1]


def mix(number: int, other: int) -> int:
    """A 62-bit number that depends on both."""
    mixed = (number * 0x9E3779B97F4A7C15 + other * 0xC2B2AE3D27D4EB4F + 0x165667B19E3779F9) & (2**64 - 1)
    mixed ^= mixed >> 31
    return (mixed * 0xD6E8FEB86659FD93 & (2**64 - 1)) >> 2


class Prefix:
    """A sequence of tokens as one object: under one root, the same tokens are the same object.

    It stands for what attention has seen at a position, so it is also what a slot of the KV cache holds.
    """

    __slots__ = ("_longer", "length", "number", "parent", "token")

    def __init__(self, parent: Prefix | None = None, token: int = -1, root: str = "") -> None:
        self.parent = parent
        self.token = token
        self.length = 0 if parent is None else parent.length + 1
        seed = int.from_bytes(root.encode()[:7], "little")
        self.number = mix(seed, 1) if parent is None else mix(parent.number, token)
        self._longer: dict[int, Prefix] = {}

    def then(self, token: int) -> Prefix:
        """The sequence with one token more."""
        longer = self._longer.get(token)
        if longer is None:
            longer = self._longer[token] = Prefix(self, token)
        return longer

    def then_all(self, tokens: Sequence[int]) -> Prefix:
        """The sequence with all of `tokens` more."""
        prefix = self
        for token in tokens:
            prefix = prefix.then(token)
        return prefix

    def tokens(self) -> list[int]:
        """The sequence."""
        return [prefix.token for prefix in self._back()][::-1]

    def _back(self) -> Iterator[Prefix]:
        prefix = self
        while prefix.parent is not None:
            yield prefix
            prefix = prefix.parent

    def __repr__(self) -> str:
        return f"<{self.length} tokens: …{text_of(self.tokens()[-12:])}>"


def next_token(prefix: Prefix, allowed: Sequence[int]) -> int:
    """What the model says after `prefix` when it may say one of `allowed`, ascending."""
    return allowed[prefix.number % len(allowed)]
