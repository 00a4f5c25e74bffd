"""What ends a branch from outside its script: the client's stop strings and stop tokens.

They are looked for in the bytes of everything after the prompt, whether it was sampled or spliced. A
branch ends with the token that completes the first one.
"""

from dataclasses import dataclass

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

    def find(
        self, vocabulary: Vocabulary, tokens: list[int], start: int, position: int, new: list[int]
    ) -> Stop | None:
        """The first stop that one of `new` completes, put at `position` of `tokens`.

        Nothing before `start`, the end of the prompt, counts.
        """
        tail = self._tail(vocabulary, tokens, start, position)
        for index, token in enumerate(new):
            text = vocabulary.token_bytes(token)
            if position - start + index >= self.min_tokens:
                if token in self.tokens:
                    return Stop(index, token, 0 if self.shown else len(text))
                found = self._find_string(tail, text)
                if found is not None:
                    return Stop(index, *found)
            tail = self._cut(tail + text)
        return None

    def _find_string(self, tail: bytes, text: bytes) -> tuple[str, int] | None:
        """The string that ends first in `text`, and how many bytes of both it hides."""
        both = tail + text
        best: tuple[int, str, int] | None = None
        for string in self.strings:
            wanted = string.encode()
            start = both.find(wanted, max(len(tail) - len(wanted) + 1, 0))
            end = start + len(wanted)
            if start >= 0 and (best is None or end < best[0]):
                best = (end, string, len(both) - (end if self.shown else start))
        return best and best[1:]

    def _tail(self, vocabulary: Vocabulary, tokens: list[int], start: int, position: int) -> bytes:
        """The end of the text before `position` that a stop string may have begun in."""
        tail = b""
        while position > start and len(tail) < self._reach:
            position -= 1
            tail = vocabulary.token_bytes(tokens[position]) + tail
        return self._cut(tail)

    def _cut(self, text: bytes) -> bytes:
        return text[-self._reach :] if self._reach else b""

    @property
    def _reach(self) -> int:
        return max((len(string.encode()) for string in self.strings), default=1) - 1
