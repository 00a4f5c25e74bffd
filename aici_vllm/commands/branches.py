"""What is known of the branches of a run while it goes on: their text, what was taken back, their logs."""

from dataclasses import dataclass, field
from typing import Any

STRUCK = "taken_back"
"""The kind of text that is no longer there."""


@dataclass
class Piece:
    """Text of one kind: sampled, spliced, or taken back."""

    kind: str
    text: str


@dataclass
class Picture:
    """One branch, with everything that it ever wrote still in its place."""

    index: int
    pieces: list[Piece] = field(default_factory=list)
    logs: str = ""
    finish_reason: str | None = None
    error: str = ""

    @property
    def text(self) -> str:
        """The text that stands."""
        return "".join(piece.text for piece in self.pieces if piece.kind != STRUCK)

    def update(self, fork: dict[str, Any]) -> None:
        """One fork of one event."""
        for part in fork["parts"]:
            if part["kind"] == STRUCK:
                self._strike(len(part["text"]))
            else:
                self._append(part["kind"], part["text"])
        self.logs += fork.get("logs", "")
        self.error = fork.get("error") or self.error
        self.finish_reason = fork.get("finish_reason") or self.finish_reason

    def _append(self, kind: str, text: str) -> None:
        if self.pieces and self.pieces[-1].kind == kind:
            self.pieces[-1].text += text
        else:
            self.pieces.append(Piece(kind, text))

    def _strike(self, count: int) -> None:
        """Strike the last `count` characters that still stand, where they are."""
        at = len(self.pieces)
        while count and at:
            at -= 1
            piece = self.pieces[at]
            if piece.kind == STRUCK:
                continue
            kept = max(len(piece.text) - count, 0)
            count -= len(piece.text) - kept
            halves = [Piece(piece.kind, piece.text[:kept]), Piece(STRUCK, piece.text[kept:])]
            self.pieces[at : at + 1] = [half for half in halves if half.text]


@dataclass
class Pictures:
    """All branches of a run, in the order they were made."""

    branches: dict[int, Picture] = field(default_factory=dict)
    usage: dict[str, int] = field(default_factory=dict)

    def update(self, event: dict[str, Any]) -> None:
        """One event of the run."""
        for fork in event.get("forks", []):
            self.branches.setdefault(fork["index"], Picture(fork["index"])).update(fork)
        self.usage = event.get("usage") or self.usage
