"""The regex language: text to a tree of code point sets, and the tree back to text for other engines."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby
from operator import itemgetter

from constraints.errors import ConstraintError

Ranges = tuple[tuple[int, int], ...]
"""Code points as sorted, disjoint, inclusive ranges."""

MAX_PATTERN = 50_000
"""Characters of a pattern."""
MAX_DEPTH = 100
MAX_POSITIONS = 20_000
"""Characters that a pattern may match in sequence, counted repeats written out."""
MAX_RANGES = 100_000
"""Ranges of code points in all classes of a pattern together. `\\p{L}` has 648."""

TOP = 0x10FFFF
SURROGATES = (0xD800, 0xDFFF)


@dataclass(frozen=True)
class Chars:
    """One character out of `ranges`."""

    ranges: Ranges


@dataclass(frozen=True)
class Cat:
    """One part after another."""

    parts: tuple[Tree, ...]


@dataclass(frozen=True)
class Alt:
    """Any of the options."""

    options: tuple[Tree, ...]


@dataclass(frozen=True)
class Repeat:
    """`low` to `high` times `body`; `high` is None for no bound."""

    body: Tree
    low: int
    high: int | None


Tree = Chars | Cat | Alt | Repeat
EMPTY_TEXT = Cat(())


def normal(ranges: list[tuple[int, int]]) -> Ranges:
    """Sorted and merged, surrogates removed: no text has them."""
    merged: list[tuple[int, int]] = []
    # By one number: pairs take four times as long, and no other thread runs meanwhile.
    for low, high in sorted(ranges, key=itemgetter(0)):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    kept: list[tuple[int, int]] = []
    for low, high in merged:
        before, after = (low, min(high, SURROGATES[0] - 1)), (max(low, SURROGATES[1] + 1), high)
        kept += [part for part in ((low, high),) if high < SURROGATES[0] or low > SURROGATES[1]]
        if low <= SURROGATES[1] and high >= SURROGATES[0]:
            kept += [part for part in (before, after) if part[0] <= part[1]]
    return tuple(kept)


def negate(ranges: Ranges) -> Ranges:
    gaps, start = [], 0
    for low, high in ranges:
        gaps.append((start, low - 1))
        start = high + 1
    gaps.append((start, TOP))
    return normal([gap for gap in gaps if gap[0] <= gap[1]])


def of_chars(text: str) -> Ranges:
    if len(text) == 1 and not SURROGATES[0] <= (code := ord(text)) <= SURROGATES[1]:
        return ((code, code),)
    return normal([(ord(c), ord(c)) for c in text])


DIGIT = ((0x30, 0x39),)
WORD = normal([(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)])
SPACE = of_chars(" \t\n\r\f\v")
DOT = negate(of_chars("\n"))
ANY = negate(())
CLASSES = {"d": DIGIT, "w": WORD, "s": SPACE, "D": negate(DIGIT), "W": negate(WORD), "S": negate(SPACE)}
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a", "e": "\x1b", "0": "\0"}
POSIX = {
    "alpha": ((0x41, 0x5A), (0x61, 0x7A)),
    "digit": DIGIT,
    "alnum": ((0x30, 0x39), (0x41, 0x5A), (0x61, 0x7A)),
    "upper": ((0x41, 0x5A),),
    "lower": ((0x61, 0x7A),),
    "space": SPACE,
    "blank": of_chars(" \t"),
    "punct": ((0x21, 0x2F), (0x3A, 0x40), (0x5B, 0x60), (0x7B, 0x7E)),
    "xdigit": ((0x30, 0x39), (0x41, 0x46), (0x61, 0x66)),
    "word": WORD,
    "cntrl": ((0x00, 0x1F), (0x7F, 0x7F)),
    "print": ((0x20, 0x7E),),
    "graph": ((0x21, 0x7E),),
    "ascii": ((0x00, 0x7F),),
}
UNSUPPORTED_GROUPS = (
    ("=", "look-ahead"), ("!", "look-ahead"), ("<", "look-behind"), (">", "atomic group"),
    ("P=", "back reference"), ("P>", "recursion"), ("#", "comment"), ("(", "condition"),
)  # fmt: skip
INLINE_FLAGS = re.compile(r"\(\?[a-z-]+\)")
BOUNDS = re.compile(r"\{(?:([0-9]+)(?:(,)([0-9]*))?|(,)([0-9]+))\}")
FEW = 256
"""Characters that are sooner folded one by one than looked up among all that have a case."""
SIGNS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
HEX_LENGTH = {"x": 2, "u": 4, "U": 8}


@cache
def _category_runs() -> list[tuple[str, int, int]]:
    """The general categories of all code points in order, those of neighbours together."""
    runs, low = [], 0
    for name, run in groupby(map(unicodedata.category, map(chr, range(TOP + 1)))):
        length = sum(1 for _ in run)
        runs.append((name, low, low + length - 1))
        low += length
    return runs


@lru_cache(128)
def category(name: str, negated: bool = False) -> Ranges | None:
    """The code points of a Unicode general category such as `L` or `Lu`, or all but those.

    None when there is no such one.
    """
    found = normal([(low, high) for known, low, high in _category_runs() if known.startswith(name)])
    return (negate(found) if negated else found) or None


@cache
def _cased() -> list[int]:
    """The code points that have another case."""
    # Above the last cased plane nothing folds.
    return [code for code in range(0x1E944) if chr(code).lower() != chr(code).upper()]


def any_case(ranges: Ranges) -> Ranges:
    """`ranges` with the other case of every character, where that is one character."""
    found = list(ranges)
    for low, high in ranges:
        codes: Sequence[int] = range(low, high + 1)
        if len(codes) > FEW:
            codes = _cased()[bisect_left(_cased(), low) : bisect_right(_cased(), high)]
        for code in codes:
            found += _other_cases(code)
    return normal(found)


@lru_cache(1024)
def _other_cases(code: int) -> Ranges:
    others = {chr(code).lower(), chr(code).upper()} - {chr(code)}
    return tuple((ord(other), ord(other)) for other in others if len(other) == 1)


def parse(pattern: str) -> Tree:
    """The syntax tree of `pattern`, a full match of which is wanted.

    The language is what Python's and Rust's engines share: `\\d \\w \\s` are ASCII, `.` is any character but
    a newline, lazy quantifiers match what greedy ones do. `ConstraintError` names the place of anything else.
    """
    if len(pattern) > MAX_PATTERN:
        raise ConstraintError(
            f"regex {shown(pattern)} has {len(pattern)} characters; {MAX_PATTERN} are allowed,"
            " so use `options` for a list of texts"
        )
    tree = _Parser(pattern).parse()
    # Without counted repeats there are at most as many as the pattern has characters.
    counted = "{" in pattern or len(pattern) > MAX_POSITIONS
    if counted and (size := positions(tree)) > MAX_POSITIONS:
        raise ConstraintError(
            f"regex {shown(pattern)} describes up to {size} characters in sequence;"
            f" {MAX_POSITIONS} are allowed, so use smaller repeat counts or an open-ended repeat"
        )
    return tree


def positions(tree: Tree) -> int:
    """Characters in `tree` with its counted repeats written out."""
    match tree:
        case Chars():
            return 1
        case Cat(parts):
            return sum(map(positions, parts))
        case Alt(options):
            return sum(map(positions, options))
        case Repeat(body, low, high):
            return positions(body) * max(1, low if high is None else high)


def num_ranges(tree: Tree) -> int:
    """Ranges of characters in `tree`."""
    match tree:
        case Chars(ranges):
            return len(ranges)
        case Cat(parts) | Alt(parts):
            return sum(map(num_ranges, parts))
        case Repeat(body):
            return num_ranges(body)


def shown(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 60 else pattern[:57] + "...")


class _Parser:
    """Recursive descent over one pattern. `self.at` is the next character to read."""

    def __init__(self, pattern: str):
        self.pattern = pattern
        self.at = 0
        self.depth = 0
        self.num_ranges = 0
        self.ignore_case = False
        self.dot_all = False

    def parse(self) -> Tree:
        tree = self._alternation()
        if self.at < len(self.pattern):
            raise self._error("unbalanced ')'")
        return tree

    def _error(self, what: str, at: int | None = None) -> ConstraintError:
        place = self.at if at is None else at
        return ConstraintError(f"regex {shown(self.pattern)}: {what} at character {place}")

    def _peek(self, text: str) -> bool:
        return self.pattern.startswith(text, self.at)

    def _take(self, text: str) -> bool:
        if self._peek(text):
            self.at += len(text)
            return True
        return False

    def _next(self, wanted: str) -> str:
        if self.at >= len(self.pattern):
            raise self._error(f"the pattern ends where {wanted} is expected")
        self.at += 1
        return self.pattern[self.at - 1]

    def _count(self, ranges: Sequence[tuple[int, int]]) -> None:
        self.num_ranges += len(ranges)
        if self.num_ranges > MAX_RANGES:
            raise self._error(f"the classes have more than {MAX_RANGES} ranges of characters together")

    def _cased(self, ranges: Ranges) -> Ranges:
        return any_case(ranges) if self.ignore_case else ranges

    def _chars(self, ranges: Ranges) -> Chars:
        self._count(ranges)
        return Chars(ranges)

    def _alternation(self) -> Tree:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self._error(f"groups nest deeper than {MAX_DEPTH}")
        options = [self._sequence()]
        while self._take("|"):
            options.append(self._sequence())
        self.depth -= 1
        return options[0] if len(options) == 1 else Alt(tuple(options))

    def _sequence(self) -> Tree:
        parts: list[Tree] = []
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            part = self._atom()
            if part is not None:
                parts.append(self._quantified(part))
        return parts[0] if len(parts) == 1 else Cat(tuple(parts))

    def _atom(self) -> Tree | None:
        """The next atom; None for an anchor that a full match makes redundant, or for flags."""
        at = self.at
        char = self._next("an atom")
        if char == "(":
            return self._group(at)
        if char == "[":
            return self._chars(self._char_class(at))
        if char == ".":
            return self._chars(ANY if self.dot_all else DOT)
        if char == "\\":
            return self._escape_atom(at)
        if char in "^$":
            self._check_anchor(char, at)
            return None
        if char in "*+?":
            raise self._error(f"nothing to repeat before '{char}'", at)
        return self._chars(self._cased(of_chars(char)))

    def _check_anchor(self, name: str, at: int) -> None:
        """Anchors at the ends of the pattern, or of its alternatives, say what a full match says anyway."""
        if name in ("^", "\\A"):
            useless = (
                at == 0
                or self.pattern[at - 1] == "|"
                or INLINE_FLAGS.fullmatch(self.pattern, 0, at) is not None
            )
        else:
            useless = self.at == len(self.pattern) or self._peek("|")
        if self.depth > 1 or not useless:
            raise self._error(
                f"'{name}' in the middle of the pattern can never match and is not supported", at
            )

    def _group(self, at: int) -> Tree | None:
        saved = self.ignore_case, self.dot_all
        if self._take("?"):
            if self._peek("P<") or (self._peek("<") and not self._peek("<=") and not self._peek("<!")):
                end = self.pattern.find(">", self.at)
                name = self.pattern[self.at : end].lstrip("P<")
                if end < 0 or not name.isidentifier():
                    raise self._error("bad group name")
                self.at = end + 1
            elif not self._take(":") and self._flags():
                return None
        tree = self._alternation()
        if not self._take(")"):
            raise self._error("this group is never closed", at)
        self.ignore_case, self.dot_all = saved
        return tree

    def _flags(self) -> bool:
        """Read `ims-u:` or `ims)` of an inline group; True when the flags hold for the rest of the group."""
        at = self.at
        for start, name in UNSUPPORTED_GROUPS:
            if self._peek(start):
                raise self._error(f"a {name} is not supported", at - 2)
        value = True
        while (char := self._next("a flag or ':'")) not in ":)":
            if char == "-":
                value = False
            elif char == "i":
                self.ignore_case = value
            elif char == "s":
                self.dot_all = value
            elif char != "u" or not value:
                raise self._error(f"flag '{char}' is not supported", self.at - 1)
        return char == ")"

    def _quantified(self, body: Tree) -> Tree:
        at = self.at
        bounds = self._bounds()
        if bounds is None:
            return body
        if self._take("+"):
            raise self._error("possessive repeats are not supported", self.at - 1)
        self._take("?")
        if self._bounds() is not None:
            raise self._error("a repeat of a repeat needs a group", at)
        low, high = bounds
        if high is not None and high < low:
            raise self._error(f"the repeat {{{low},{high}}} has its bounds swapped", at)
        return Repeat(body, low, high)

    def _bounds(self) -> tuple[int, int | None] | None:
        sign = self.pattern[self.at : self.at + 1]
        if sign in SIGNS:
            self.at += 1
            return SIGNS[sign]
        found = BOUNDS.match(self.pattern, self.at)
        if found is None:
            return None
        low, high = found[1] or "", found[3] or found[5] or ""
        if max(len(low), len(high)) > 9:
            raise self._error("the repeat count is too large")
        self.at = found.end()
        if not (found[2] or found[4]):
            return int(low), int(low)
        return int(low or 0), int(high) if high else None

    def _escape_atom(self, at: int) -> Tree | None:
        char = self._next("an escaped character")
        if char in "AzZ":
            self._check_anchor("\\" + char, at)
            return None
        if char in "bBG":
            raise self._error(f"the assertion '\\{char}' is not supported", at)
        if (char.isdecimal() and char != "0") or char == "k":
            raise self._error("a back reference is not supported", at)
        return self._chars(self._cased(self._escape(char, at)))

    def _escape(self, char: str, at: int) -> Ranges:
        """The characters of the escape whose letter is `char`."""
        if char in CLASSES:
            return CLASSES[char]
        if char in "pP":
            return self._property(char == "P", at)
        if char in HEX_LENGTH:
            return self._code_point(char, at)
        if char in ESCAPES:
            return of_chars(ESCAPES[char])
        if char.isalnum() and char.isascii():
            raise self._error(f"the escape '\\{char}' is not supported", at)
        return of_chars(char)

    def _code_point(self, kind: str, at: int) -> Ranges:
        if self._take("{"):
            end = self.pattern.find("}", self.at)
            digits = self.pattern[self.at : end] if end >= 0 else ""
            self.at = end + 1
        else:
            digits = self.pattern[self.at : self.at + HEX_LENGTH[kind]]
            self.at += len(digits)
            if len(digits) != HEX_LENGTH[kind]:
                raise self._error(f"'\\{kind}' needs {HEX_LENGTH[kind]} hexadecimal digits", at)
        if not digits or len(digits) > 8 or any(d not in "0123456789abcdefABCDEF" for d in digits):
            raise self._error(f"{shown(digits)} is not a hexadecimal code point", at)
        code = int(digits, 16)
        if code > TOP or SURROGATES[0] <= code <= SURROGATES[1]:
            raise self._error(f"U+{code:X} is not a character", at)
        return ((code, code),)

    def _property(self, negated: bool, at: int) -> Ranges:
        name = self._next("a property")
        if name == "{":
            end = self.pattern.find("}", self.at)
            if end < 0:
                raise self._error("the property name is never closed", at)
            name, self.at = self.pattern[self.at : end], end + 1
        if name.startswith("^"):
            name, negated = name[1:], not negated
        if name == "Any":
            return () if negated else ANY
        known = category(name, negated) if 1 <= len(name) <= 2 and name[0] in "LMNPSZC" else None
        if known is None:
            raise self._error(
                f"the Unicode property {shown(name)} is not supported; use a general category", at
            )
        return known

    def _char_class(self, at: int) -> Ranges:
        negated = self._take("^")
        found: list[tuple[int, int]] = []
        first = True
        while first or not self._peek("]"):
            if self.at >= len(self.pattern):
                raise self._error("this '[' is never closed", at)
            if self._peek("&&"):
                raise self._error("class intersection '&&' is not supported")
            item = self._class_item()
            self._count(item)
            found += item
            first = False
        self.at += 1
        # Case must be folded before the complement is taken: (?i)[^a] excludes A too.
        ranges = self._cased(normal(found))
        return negate(ranges) if negated else ranges

    def _class_item(self) -> list[tuple[int, int]]:
        at = self.at
        if self._take("[:"):
            end = self.pattern.find(":]", self.at)
            name = self.pattern[self.at : end] if end >= 0 else ""
            known = POSIX.get(name.lstrip("^"))
            if known is None:
                raise self._error(f"{shown(f'[:{name}:]')} is not a POSIX class", at)
            self.at = end + 2
            return list(negate(known) if name.startswith("^") else known)
        low = self._class_char()
        is_range = self._peek("-") and self.pattern[self.at + 1 : self.at + 2] not in ("]", "")
        if not is_range:
            return list(low)
        self.at += 1
        high = self._class_char()
        if len(low) != 1 or low[0][0] != low[0][1] or len(high) != 1 or high[0][0] != high[0][1]:
            raise self._error("a range needs a single character on both sides", at)
        if high[0][0] < low[0][0]:
            raise self._error(f"the range {self.pattern[at : self.at]} has its ends swapped", at)
        return [(low[0][0], high[0][0])]

    def _class_char(self) -> Ranges:
        at = self.at
        char = self._next("a character")
        if char != "\\":
            return of_chars(char)
        letter = self._next("an escaped character")
        return of_chars("\b") if letter == "b" else self._escape(letter, at)


def render(tree: Tree) -> str:
    """`tree` as a regex in which every character is explicit, so that every engine reads it alike."""
    match tree:
        case Chars(ranges):
            return _render_chars(ranges)
        case Cat(parts):
            return "".join(f"(?:{render(p)})" if isinstance(p, Alt) else render(p) for p in parts)
        case Alt(options):
            return "|".join(map(render, options))
        case Repeat(body, low, high):
            if high == 0:
                return ""
            inner = render(body)
            if not inner:
                return ""
            bounds = {(0, None): "*", (1, None): "+", (0, 1): "?"}.get((low, high))
            atom = inner if isinstance(body, Chars) else f"(?:{inner})"
            return atom + (bounds or f"{{{low},{'' if high is None else high}}}")


def _render_chars(ranges: Ranges) -> str:
    if (
        len(ranges) == 1
        and ranges[0][0] == ranges[0][1]
        and chr(ranges[0][0]).isalnum()
        and ranges[0][0] < 128
    ):
        return chr(ranges[0][0])
    return "[" + "".join(f"\\x{{{a:x}}}-\\x{{{b:x}}}" if a != b else f"\\x{{{a:x}}}" for a, b in ranges) + "]"


def has_match(tree: Tree) -> bool:
    """Whether any text matches: a class may be empty."""
    match tree:
        case Chars(ranges):
            return bool(ranges)
        case Cat(parts):
            return all(map(has_match, parts))
        case Alt(options):
            return any(map(has_match, options))
        case Repeat(body, low, high):
            return low == 0 or high == 0 or has_match(body)


def is_nullable(tree: Tree) -> bool:
    """Whether the empty text matches."""
    match tree:
        case Chars():
            return False
        case Cat(parts):
            return all(map(is_nullable, parts))
        case Alt(options):
            return any(map(is_nullable, options))
        case Repeat(body, low, high):
            return low == 0 or high == 0 or is_nullable(body)


def first_ascii(tree: Tree) -> bytes:
    """Every ASCII character with which a match may begin, some more than once."""
    match tree:
        case Chars(ranges):
            return b"".join(bytes(range(low, min(high, 127) + 1)) for low, high in ranges if low < 128)
        case Cat(parts):
            found = b""
            for part in parts:
                found += first_ascii(part)
                if not is_nullable(part):
                    break
            return found
        case Alt(options):
            return b"".join(map(first_ascii, options))
        case Repeat(body, _, high):
            return b"" if high == 0 else first_ascii(body)


def begins_with_loop(tree: Tree) -> bool:
    """Whether a match may begin with a repeat of one class of characters, or have it after one character.

    A class that is a part of the characters beyond ASCII does not count.
    """
    match tree:
        case Cat(parts):
            second = len(parts) > 1 and isinstance(parts[0], Chars)
            return bool(parts) and begins_with_loop(parts[second])
        case Alt(options):
            return any(map(begins_with_loop, options))
        case Repeat(Repeat(body)) | Repeat(body):
            return isinstance(body, Chars) and _all_or_none_beyond_ascii(body.ranges)
        case Chars():
            return False


def _all_or_none_beyond_ascii(ranges: Ranges) -> bool:
    beyond = [part for part in ranges if part[1] > 0x7F]
    whole = bool(beyond) and beyond[0][0] <= 0x80 and beyond[0][1] == ANY[0][1]
    return not beyond or (whole and tuple(beyond[1:]) == ANY[1:])
