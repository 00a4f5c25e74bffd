"""The text of one branch as it grows and is taken back, in whole characters."""

import codecs
from collections.abc import Iterable


class BranchText:
    """Bytes of tokens in, characters out; an incomplete character at the end is held until it is whole."""

    def __init__(self) -> None:
        self._tokens: list[bytes] = []
        self._shown: list[str] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, tokens: Iterable[bytes]) -> str:
        """Append tokens; returns the characters that became whole."""
        text = ""
        for token in tokens:
            self._tokens.append(token)
            text += self._decoder.decode(token)
        self._shown.append(text)
        return text

    def take_back(self, count: int) -> str:
        """Drop the last `count` tokens, or all there are; returns the characters that are gone.

        A character that loses some of its bytes is gone.
        """
        if count > 0:
            del self._tokens[-count:]
        before = "".join(self._shown)
        self._decoder.reset()
        after = self._decoder.decode(b"".join(self._tokens))
        # A decoder never changes its mind about bytes, so what is left begins what was shown.
        assert before.startswith(after)
        self._shown = [after]
        return before[len(after) :]

    def finish(self) -> str:
        """The incomplete character at the end, if there is one, as U+FFFD."""
        return self._decoder.decode(b"", final=True)
