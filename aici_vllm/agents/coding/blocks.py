"""Find the Python code in a model's reply: fenced blocks, prompts, nested fences."""

from __future__ import annotations

import ast
import re
import textwrap

_OPEN_PYTHON = re.compile(r"^[ \t]*```(?:python3?|py)(?=$|[ \t])[ \t]*(.*)$", re.IGNORECASE)
_OPEN_NAMED = re.compile(r"^[ \t]*```[ \t]*[A-Za-z]")
_OPEN_PLAIN = re.compile(r"^[ \t]*```[ \t]*()$")
_CLOSE = re.compile(r"^[ \t]*```[ \t]*$")
_PROMPT = re.compile(r"^[ \t]*(?:>>>|\.\.\.)(?: |$)")


def extract_code(text: str, *, skip_invalid: bool = False) -> str:
    """The Python code of a reply, blocks joined by newlines; "" if there is none.

    Blocks fenced as python (or py) are taken; without any, unnamed fences whose content parses and does more
    than name a value. `skip_invalid` leaves out blocks that do not parse.
    """
    blocks = fenced_blocks(text, _OPEN_PYTHON)
    if not blocks:
        blocks = [block for block in fenced_blocks(text, _OPEN_PLAIN) if looks_like_code(block)]
    if skip_invalid:
        blocks = [block for block in blocks if parses(block)]
    return "\n".join(blocks)


def fenced_blocks(text: str, opening: re.Pattern[str] = _OPEN_PYTHON) -> list[str]:
    """The contents of the fences `opening` matches, in order, trimmed; of nested fences the outer one."""
    lines = text.splitlines()
    blocks, index = [], 0
    while index < len(lines):
        start = opening.match(lines[index])
        end = _closing_line(lines, index) if _opens(lines[index]) or start else None
        if end is None:
            index += 1
            continue
        if start:
            blocks.append(_cleaned([start.group(1), *lines[index + 1 : end]]))
        index = end + 1
    return [block for block in blocks if block]


def _opens(line: str) -> bool:
    return bool(_OPEN_NAMED.match(line) or _OPEN_PLAIN.match(line))


def _closing_line(lines: list[str], start: int) -> int | None:
    """Where the fence opened at `start` closes; the first closing fence if nested ones do not balance."""
    depth, first = 1, None
    for index in range(start + 1, len(lines)):
        if _CLOSE.match(lines[index]):
            first = index if first is None else first
            depth -= 1
            if depth == 0:
                return index
        elif _OPEN_NAMED.match(lines[index]):
            depth += 1
    return first


def _cleaned(lines: list[str]) -> str:
    """The lines without interpreter prompts and their output, without common indentation, trimmed."""
    if any(line.lstrip().startswith(">>>") for line in lines):
        lines = [_PROMPT.sub("", line) for line in lines if _PROMPT.match(line)]
    first, rest = lines[0], textwrap.dedent("\n".join(lines[1:]))
    return f"{first}\n{rest}".strip("\n").rstrip() if first.strip() else rest.strip("\n").rstrip()


def parses(code: str) -> bool:
    """Whether the code is syntactically valid Python."""
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def looks_like_code(code: str) -> bool:
    """Whether the text parses and holds a statement beyond a bare name or constant (a plain word)."""
    if not parses(code):
        return False
    return any(
        not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Name | ast.Constant))
        for statement in ast.parse(code).body
    )
