"""Final answers in text: finding `FINAL(...)` and `FINAL_VAR(...)`, and refusing those the data brought."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

_HEAD = re.compile(r"FINAL(?:_VAR)?\(")
_MAX_CANDIDATES = 50
_MAX_LINES = 2000
"""How many beginnings of markers are looked at in one output, and how many lines of each: hostile output may
hold any number of both."""


@dataclass(frozen=True)
class Marker:
    """A marker in text: `answer` is the literal answer, or the name of the variable that holds it."""

    kind: Literal["answer", "variable"]
    answer: str
    start: int = 0


def _pairs(text: str) -> dict[int, int]:
    """Index of the closing parenthesis for every opening one that has one."""
    pairs: dict[int, int] = {}
    opened: list[int] = []
    for match in re.finditer(r"[()]", text):
        if match.group() == "(":
            opened.append(match.start())
        elif opened:
            pairs[opened.pop()] = match.start()
    return pairs


def _marker(head: str, body: str, start: int) -> Marker:
    if head.startswith("FINAL_VAR"):
        return Marker("variable", body.strip().strip("\"'"), start)
    return Marker("answer", body, start)


def _whole_lines(text: str) -> list[tuple[str, str]]:
    """(first line, marker) of every marker that fills whole lines of `text`, in order."""
    found: list[tuple[str, str]] = []
    lines = text.split("\n")
    index = candidates = 0
    while index < len(lines) and candidates < _MAX_CANDIDATES:
        line = lines[index].strip()
        if _HEAD.match(line):
            candidates += 1
            taken = _lines_of_marker(lines, index)
            if taken:
                found.append((line, "\n".join([line, *lines[index + 1 : index + taken]]).strip()))
                index += taken
                continue
        index += 1
    return found


def _lines_of_marker(lines: list[str], index: int) -> int:
    """How many lines the marker that opens line `index` fills, or 0 when it fills none exactly."""
    text = lines[index].strip()
    opening = text.index("(")
    closing = _pairs(text).get(opening)
    if closing is not None:
        return 1 if not text[closing + 1 :].strip(") ") else 0
    if text.endswith(")"):
        return 1
    depth = text.count("(") - text.count(")")
    for offset, line in enumerate(lines[index + 1 : index + _MAX_LINES], start=1):
        depth += line.count("(") - line.count(")")
        if depth <= 0:
            return offset + 1 if depth == 0 and line.rstrip().endswith(")") else 0
    return 0


def _squeezed(text: str) -> str:
    return "".join(text.split()).casefold()


class ContextGuard:
    """Tells whether a line stands in the context, ignoring case and white space."""

    def __init__(self, context: str) -> None:
        self._context = context
        self._squeezed_context: str | None = None

    def holds(self, line: str) -> bool:
        if self._squeezed_context is None:
            self._squeezed_context = _squeezed(self._context)
        return _squeezed(line) in self._squeezed_context


def find_marker(text: str, guard: ContextGuard) -> Marker | None:
    """The first marker that fills whole lines of `text` and does not stand in the context.

    A context may hold text that looks like a final answer, and model code prints pieces of it. So a marker
    counts only where it is all there is on its lines, and where neither it nor its first line stands in the
    context. `FINAL(...)` goes before `FINAL_VAR(...)`.
    """
    markers = []
    for first_line, whole in _whole_lines(text):
        if guard.holds(first_line) or guard.holds(whole):
            continue
        head, _, body = whole.partition("(")
        markers.append(_marker(head, body[:-1], 0))
    answers = [marker for marker in markers if marker.kind == "answer"]
    return next(iter(answers or markers), None)


def find_in_reply(text: str) -> Marker | None:
    """The first marker anywhere in a model's last-chance reply, with balanced parentheses."""
    pairs = _pairs(text)
    for head in _HEAD.finditer(text):
        closing = pairs.get(head.end() - 1)
        if closing is not None:
            return _marker(head.group(), text[head.end() : closing].strip(), head.start())
    return None
