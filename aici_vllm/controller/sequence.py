"""The tokens of one branch, where each came from, and the marks that a script set in them."""

import enum
from itertools import groupby


class Origin(enum.IntEnum):
    """Where a token came from."""

    PROMPT = 0
    SAMPLED = 1
    SPLICED = 2


_SAMPLED = bytes([Origin.SAMPLED])


class Sequence:
    """Tokens that grow at the end and can be taken back.

    `tokens[:kept]` stand as the engine last saw them; the engine sets `kept` to `len(tokens)` once it
    has carried the rest out. `marks` says where each mark stands. `prompt_len` shrinks when the prompt
    itself is taken back. `sampled` and `spliced` count every token this sequence ever got, those taken
    back too.
    """

    __slots__ = (
        "_changes",
        "_cut",
        "_last_mark",
        "_origins",
        "_sampled",
        "marks",
        "prompt_len",
        "spliced",
        "tokens",
    )

    def __init__(self, prompt: list[int]):
        self.tokens = list(prompt)
        # Of the first tokens only; all beyond were sampled.
        self._origins = bytearray(len(prompt))
        self.prompt_len = len(prompt)
        # None: all tokens are kept.
        self._cut: int | None = None
        self._sampled = 0
        self.spliced = 0
        self.marks: dict[int, int] = {}
        self._last_mark = 0
        self._changes: list[tuple[str, list[int]]] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def add_sampled(self, token: int) -> None:
        """Append a token that the engine sampled and therefore already holds."""
        self.tokens.append(token)
        self._cut = None
        if self._changes is not None:
            self._note("sampled", [token])

    @property
    def kept(self) -> int:
        """How many tokens stand as the engine last saw them."""
        return len(self.tokens) if self._cut is None else self._cut

    @kept.setter
    def kept(self, kept: int) -> None:
        self._cut = None if kept == len(self.tokens) else kept

    @property
    def origins(self) -> bytearray:
        """Where each token came from."""
        if missing := len(self.tokens) - len(self._origins):
            self._origins += _SAMPLED * missing
            self._sampled += missing
        return self._origins

    @property
    def sampled(self) -> int:
        """How many tokens were sampled."""
        return self._sampled + len(self.tokens) - len(self._origins)

    def splice(self, position: int, tokens: list[int]) -> None:
        """Take back everything from `position` on and append `tokens`."""
        kept, origins = self.kept, self.origins
        if position < len(self.tokens):
            if self._changes is not None:
                self._note("taken_back", self.tokens[position:])
            del self.tokens[position:]
            del origins[position:]
            kept = min(kept, position)
            self.prompt_len = min(self.prompt_len, position)
            while self.marks and next(reversed(self.marks.values())) > position:
                self.marks.popitem()
        self.tokens += tokens
        self.kept = kept
        origins += bytes([Origin.SPLICED]) * len(tokens)
        self.spliced += len(tokens)
        if self._changes is not None:
            self._note("spliced", tokens)

    def mark(self, position: int) -> int:
        """Remember `position`, not before any other mark, under a number that dies when it is taken back."""
        assert not self.marks or position >= next(reversed(self.marks.values()))
        self._last_mark += 1
        self.marks[self._last_mark] = position
        return self._last_mark

    def position(self, mark: int) -> int:
        """Where `mark` was set.

        Raises:
            ValueError: the text it stood in was taken back.
        """
        try:
            return self.marks[mark]
        except KeyError:
            raise ValueError("this label is gone: the text it marked was backtracked over") from None

    def release(self, mark: int) -> None:
        """Nobody can use `mark` any more."""
        self.marks.pop(mark, None)

    def settled(self) -> int:
        """How many tokens no live mark can take back."""
        # Marks stand in the order of their positions.
        return next(iter(self.marks.values()), len(self.tokens))

    def copy(self) -> "Sequence":
        """The same tokens and marks, on their own from here on; it counts its own tokens only."""
        copy = Sequence(self.tokens)
        copy._origins = bytearray(self.origins)
        copy.prompt_len = self.prompt_len
        copy.kept = self.kept
        copy.marks = dict(self.marks)
        copy._last_mark = self._last_mark
        if self._changes is not None:
            copy.watch()
        return copy

    def watch(self) -> None:
        """Note every change from here on for `take_changes`, beginning with what follows the prompt."""
        self._changes = []
        at = self.prompt_len
        for source, count in self.sources():
            self._note(source, self.tokens[at : at + count])
            at += count

    def take_changes(self) -> list[tuple[str, list[int]]]:
        """What happened since the last call, in order: ("sampled" | "spliced" | "taken_back", tokens).

        Tokens taken back are the last ones at that time. Empty when nobody watches.
        """
        if not self._changes:
            return []
        changes, self._changes = self._changes, []
        return changes

    def _note(self, change: str, tokens: list[int]) -> None:
        assert self._changes is not None
        if tokens and self._changes and self._changes[-1][0] == change == "sampled":
            self._changes[-1][1].extend(tokens)
        elif tokens:
            self._changes.append((change, list(tokens)))

    def sources(self) -> list[tuple[str, int]]:
        """Runs of tokens after the prompt with the same origin: [("spliced", 5), ("sampled", 2)]."""
        runs = groupby(self.origins[self.prompt_len :])
        return [(Origin(origin).name.lower(), len(list(run))) for origin, run in runs]
