"""Lets scripts await objects: the sandbox itself can await coroutines and host calls only.

`await x` becomes `await _aici_await(x)`, on the same line, in scripts that have such objects.
"""

import re

WRAPPER = "_aici_await"

_PIECE = re.compile(
    r"""(?P<skip> \#[^\n]*+ | [ \t\f]++ | \\\r?\n )
    | (?P<newline> \s )
    | (?P<string> (?<!\w)[a-zA-Z]{0,2}
      (?: \"\"\" (?:[^"\\]++ | \\. | "(?!""))*+ \"\"\"
        | \'\'\' (?:[^'\\]++ | \\. | '(?!''))*+ \'\'\'
        | "(?:[^"\\\n]++ | \\.)*+ "
        | '(?:[^'\\\n]++ | \\.)*+ ' ) )
    | (?P<word> \w++ )
    | (?P<open> [(\[{] )
    | (?P<close> [)\]}] )
    | (?P<sign> . )""",
    re.VERBOSE | re.DOTALL,
)

Piece = tuple[str, int, int]
"""Kind, start and end of one word or sign."""


def wrap_awaits(source: str) -> str:
    """The script with its awaits wrapped. Linear."""
    pieces, partner = _read(source)
    edits: list[tuple[int, str]] = []
    for at, (kind, start, end) in enumerate(pieces):
        if kind == "word" and source[start:end] == "await":
            operand = _operand(source, pieces, partner, at)
            if operand is not None:
                edits += [(operand[0], f"{WRAPPER}("), (operand[1], ")")]
    parts, last = [], 0
    for place, text in sorted(edits, key=lambda edit: edit[0]):
        parts += [source[last:place], text]
        last = place
    return "".join([*parts, source[last:]])


def _read(source: str) -> tuple[list[Piece], dict[int, int]]:
    """The pieces of the script, and which closing bracket belongs to which opening one."""
    pieces: list[Piece] = []
    partner: dict[int, int] = {}
    opened: list[int] = []
    for match in _PIECE.finditer(source):
        kind = match.lastgroup or "sign"
        if kind == "skip" or (kind == "newline" and opened):
            continue
        at = len(pieces)
        if kind == "close" and opened:
            partner[opened.pop()] = at
        pieces.append((kind, match.start(), match.end()))
        if kind == "open":
            opened.append(at)
    return pieces, partner


def _operand(source: str, pieces: list[Piece], partner: dict[int, int], at: int) -> tuple[int, int] | None:
    """Where the operand of the `await` at `at` starts and ends; None where there is none to wrap."""
    first = last = at + 1
    if first >= len(pieces) or pieces[first][0] not in ("word", "open"):
        return None
    if pieces[first][0] == "open":
        last = partner.get(first, len(pieces))
    while last + 1 < len(pieces):
        kind, start, end = pieces[last + 1]
        if kind == "open" and source[start] in "([":
            last = partner.get(last + 1, len(pieces))
        elif source[start:end] == "." and pieces[last + 1 : last + 3][-1][0] == "word":
            last += 2
        else:
            break
    return (pieces[first][1], pieces[last][2]) if last < len(pieces) else None
