"""The shape of a turn as a regular expression: prose, then one fenced block or one final answer.

A reply of this shape cannot be malformed: the runner finds exactly one block in it, or one marker. It ends
with the closing fence or parenthesis, so a model cannot write the output of its own block.
"""

from __future__ import annotations

FENCE = "```repl\n"
_MARKERS = ("FINAL(", "FINAL_VAR(")

_REST_OF_LINE = r"(?:`{0,2}[^`\n])*`{0,2}\n"
_MORE = r"(?:`{0,2}[^`])*`{0,2}"
_BODY = rf"[ \t\n]*(?:[^`\s]{_MORE}|`{{1,2}}(?:[^`]{_MORE})?)"
"""Code that is not empty and holds no three backticks in a row: they would end it."""
_BLOCK = rf"```repl\n{_BODY}\n```"
_FLAT = r"[^()\n]*"
FINAL = rf"FINAL(?:_VAR)?\({_FLAT}(?:\({_FLAT}(?:\({_FLAT}\){_FLAT})*\){_FLAT})*\)"
"""A marker on one line whose parentheses are balanced, so that it ends at the one that closes it."""


def _line_not_beginning_with(word: str) -> str:
    """A line of prose that does not begin with `word`."""
    ways = [rf"{word[:end]}`{{0,2}}\n" for end in range(len(word))]
    for end, letter in enumerate(word):
        ways.append(rf"{word[:end]}(?:[^`\n{letter}]|`{{1,2}}[^`\n]){_REST_OF_LINE}")
    return f"(?:{'|'.join(ways)})"


TURN = rf"{_line_not_beginning_with('FINAL')}*(?:{_BLOCK}|{FINAL})"
STRICT_TURN = rf"(?:{_REST_OF_LINE})*{_BLOCK}"
"""In strict mode text never finishes a run, so a turn is a block."""


def missing_opening(text: str, strict: bool = False) -> str | None:
    """What opens a block behind unfinished prose; None when a block or a final answer is open already."""
    last = _last_line(text)
    if FENCE in text or (not strict and last.startswith(_MARKERS)):
        return None
    if not strict and last.startswith("FINAL"):
        return missing_marker(last)
    return FENCE[len(last) :] if FENCE.startswith(last) else f"\n{FENCE}"


def missing_end(text: str, strict: bool = False) -> str:
    """What completes a turn that was cut short."""
    opening = missing_opening(text, strict)
    if opening is not None:
        return opening + missing_end(text + opening, strict)
    if FENCE not in text:
        return missing_parentheses(_last_line(text))
    body = text[text.rfind(FENCE) + len(FENCE) :]
    last = _last_line(body)
    if body[: -len(last)].strip() and last and "```".startswith(last):
        return "```"[len(last) :]
    return "\n```" if body.strip() else "pass\n```"


def missing_final(text: str) -> str:
    """What completes a final answer that was cut short."""
    marker = "" if text.startswith(_MARKERS) else missing_marker(text)
    return marker + missing_parentheses(text + marker)


def missing_marker(text: str) -> str:
    """The rest of the marker that `text` begins."""
    return next(marker[len(text) :] for marker in _MARKERS if marker.startswith(text))


def missing_parentheses(text: str) -> str:
    return ")" * (text.count("(") - text.count(")"))


def _last_line(text: str) -> str:
    return text[text.rfind("\n") + 1 :]
