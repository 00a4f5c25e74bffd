"""What ends a branch from outside its script: the client's stop strings and stop tokens.

They are looked for in the bytes of everything after the prompt, whether it was sampled or spliced. A
branch ends with the token that completes the first one.
"""

from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import accumulate

from constraints import Vocabulary


@dataclass(frozen=True, slots=True)
class Stop:
    """A stop that was found.

    Attributes:
        index: of the token that completes it, among those searched.
        reason: the string or the token.
        hidden: bytes at the end of that text that the client does not see.
    """

    index: int
    reason: str | int
    hidden: int


@dataclass(frozen=True, slots=True)
class Stops:
    """What to look for.

    Attributes:
        shown: the client wants to see the stop string or token in the text.
        min_tokens: a stop that the first `min_tokens` tokens complete does not count.
    """

    strings: tuple[str, ...] = ()
    tokens: frozenset[int] = frozenset()
    shown: bool = False
    min_tokens: int = 0
    _wanted: tuple[bytes, ...] = field(init=False, repr=False, compare=False)
    _reach: int = field(init=False, repr=False, compare=False)
    """How many bytes before a token a stop string that it completes may begin."""

    def __post_init__(self) -> None:
        wanted = tuple(string.encode() for string in self.strings)
        object.__setattr__(self, "_wanted", wanted)
        object.__setattr__(self, "_reach", max(map(len, wanted), default=1) - 1)

    def find(
        self, vocabulary: Vocabulary, tokens: list[int], start: int, position: int, new: list[int]
    ) -> Stop | None:
        """The first stop that one of `new` completes, put at `position` of `tokens`.

        Nothing before `start`, the end of the prompt, counts.
        """
        barred = max(self.min_tokens - (position - start), 0)
        by_string = self._find_string(
            vocabulary, self._before(vocabulary, tokens, start, position), new, barred
        )
        searched = len(new) if by_string is None else by_string.index + 1
        for index in range(barred, searched if self.tokens else 0):
            if new[index] in self.tokens:
                hidden = 0 if self.shown else len(vocabulary.token_bytes(new[index]))
                return Stop(index, new[index], hidden)
        return by_string

    def _find_string(self, vocabulary: Vocabulary, before: bytes, new: list[int], barred: int) -> Stop | None:
        """The string that ends first in the text of `new`, behind its `barred` first tokens."""
        if not self._wanted or barred >= len(new):
            return None
        texts = [vocabulary.token_bytes(token) for token in new]
        text = b"".join([before, *texts])
        ends = list(accumulate(map(len, texts), initial=len(before)))
        best: tuple[int, int] | None = None
        for order, wanted in enumerate(self._wanted):
            at = text.find(wanted, max(ends[barred] - len(wanted) + 1, 0))
            if at >= 0 and (best is None or at + len(wanted) < best[0]):
                best = at + len(wanted), order
        if best is None:
            return None
        end, order = best
        index = bisect_left(ends, end) - 1
        seen = end if self.shown else end - len(self._wanted[order])
        return Stop(index, self.strings[order], ends[index + 1] - seen)

    def _before(self, vocabulary: Vocabulary, tokens: list[int], start: int, position: int) -> bytes:
        """The end of the text before `position` that a stop string may have begun in."""
        texts: list[bytes] = []
        missing = self._reach
        while position > start and missing > 0:
            position -= 1
            texts.append(vocabulary.token_bytes(tokens[position]))
            missing -= len(texts[-1])
        text = b"".join(reversed(texts))
        return text[-self._reach :] if self._reach else b""
