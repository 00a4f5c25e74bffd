"""Names for the positions in the documents of a JSON schema: equal names, equal futures.

llguidance decides what a document may be and names no positions. Here a schema becomes an automaton that
follows its documents, so that a mask made once serves every sequence that comes to the same place. The
automaton refuses no text. What a schema demands of a value beyond its shape (a pattern, a range, a keyword
that is not known here) is not followed: inside such a value the name holds the text itself, so it may be too
fine but never too coarse. Where the automaton cannot follow at all, the tokens so far are the name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote

from constraints.automaton import DOUBTFUL, Automaton, Term, utf8
from constraints.errors import ConstraintError
from constraints.regex_syntax import Ranges, negate, normal

Name = int | tuple[int, int, bool]
"""A state, and inside watched text a hash of that text; True when the hash is kept to the end."""

ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "$comment", "$schema", "$defs", "definitions", "$id"}
    | {"deprecated", "readOnly", "writeOnly", "contentEncoding", "contentMediaType", "contentSchema"}
)
KINDS = ("null", "boolean", "number", "integer", "string", "array", "object")
FOLLOWED = frozenset(
    {
        "type",
        "minLength",
        "maxLength",
        "items",
        "prefixItems",
        "minItems",
        "maxItems",
        "properties",
        "required",
    }
    | {"additionalProperties"}
)
NUMBERS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
STRINGS = frozenset({"pattern", "format"})
OBJECTS = frozenset({"patternProperties", "minProperties", "maxProperties"})
SHAPED = FOLLOWED | NUMBERS | STRINGS | OBJECTS

MAX_PROPERTIES = 300
"""Of one object: every property stands before all that may follow it."""
PRIME = (1 << 61) - 1
PLAIN = negate(normal([(0, 0x1F), (ord('"'), ord('"')), (ord("\\"), ord("\\")), (0x7F, 0x7F)]))
"""The characters that a JSON string spells as themselves."""


NO_PLAIN = re.compile('["\\\\\x00-\x1f\x7f\ud800-\udfff]')


class SchemaNames(Automaton):
    """The automaton of one schema. `base` is a secret number for hashes of text."""

    # Options that stay possible side by side, level by level, would double at each level.
    max_terms = 64

    def __init__(self, schema: Any, compact: bool, base: int):
        super().__init__()
        self._root = schema
        self._base = base
        self._space = self._chars(" \t\n\r")
        self.blank = self.epsilon if compact else self.repeat(self._space, 0, None)
        self._plain = self.sequences(utf8(PLAIN))
        self._quote = self._chars('"')
        self._comma = self._row(self.blank, self._chars(","), self.blank)
        self._digits = self.repeat(self._range("0", "9"), 1, None)
        self._escape = self._row(self._chars("\\"), self.watch(self._escaped()))
        self._char = self.alt([self._plain, self._escape])
        self._rest = self._row(self.repeat(self._char, 0, None), self._quote)
        self._string = self._row(self._quote, self._rest)
        self._any = self.call("any", self._make_any)
        self._number([self.call("#", lambda: self._value(schema, "#"))])

    def after(self, name: Name, text: bytes) -> Name | None:
        """The name after `text`, None where the automaton cannot follow."""
        rows, watched = self._rows, self.watched
        try:
            if isinstance(name, int):
                state = name
                for byte in text:
                    state = (rows[state] or self.row(state))[byte]
                    if state < 0:
                        return None
                    if watched[state]:
                        break
                else:
                    return state
            state, mark, kept = (name, 0, False) if isinstance(name, int) else name
            for byte in text:
                state = (rows[state] or self.row(state))[byte]
                if state < 0:
                    return None
                if kept or watched[state]:
                    mark = (mark * self._base + byte + 1) % PRIME
                    kept = kept or watched[state] == DOUBTFUL
                elif mark:
                    mark = 0
        except (ConstraintError, RecursionError):
            return None
        return (state, mark, kept) if mark else state

    # Small parts ------------------------------------------------------------------------------------------

    def _range(self, low: str, high: str) -> Term:
        return self.sequences((((ord(low), ord(high)),),))

    def _chars(self, text: str) -> Term:
        return self.alt([self._range(char, char) for char in text])

    def _row(self, *parts: Term) -> Term:
        made = self.epsilon
        for part in reversed(parts):
            made = self.cat(part, made)
        return made

    def _optional(self, term: Term) -> Term:
        return self.repeat(term, 0, 1)

    def _text(self, text: str) -> Term:
        return self._row(*(self.sequences((((byte, byte),),)) for byte in text.encode()))

    def _escaped(self) -> Term:
        hexadecimal = self.alt([self._range("0", "9"), self._range("a", "f"), self._range("A", "F")])
        return self.alt([self._chars('"\\/bfnrt'), self._row(self._chars("u"), *[hexadecimal] * 4)])

    def _real(self, integer: bool) -> Term:
        whole = self.alt(
            [self._chars("0"), self._row(self._range("1", "9"), self.repeat(self._range("0", "9"), 0, None))]
        )
        parts = [self._optional(self._chars("-")), whole]
        if not integer:
            parts.append(self._optional(self._row(self._chars("."), self._digits)))
            parts.append(
                self._optional(self._row(self._chars("eE"), self._optional(self._chars("+-")), self._digits))
            )
        return self._row(*parts)

    def _watched_number(self) -> Term:
        return self.watch(self.repeat(self.alt([self._range("0", "9"), self._chars("+-.eE")]), 1, None))

    def _make_any(self) -> Term:
        more = self.repeat(self._row(self._comma, self._any), 0, None)
        array = self._row(self._any, more, self.blank)
        pair = self._row(self._string, self.blank, self._chars(":"), self.blank, self._any)
        pairs = self._row(pair, self.repeat(self._row(self._comma, pair), 0, None), self.blank)
        return self.alt(
            [
                *map(self._text, ("null", "true", "false")),
                self._real(integer=False),
                self._string,
                self._row(self._chars("["), self.blank, self.repeat(array, 0, 1), self._chars("]")),
                self._row(self._chars("{"), self.blank, self.repeat(pairs, 0, 1), self._chars("}")),
            ]
        )

    # Schemas ----------------------------------------------------------------------------------------------

    def _below(self, schema: Any, at: str) -> Term:
        """The value of the subschema at the pointer `at`, made when text reaches it."""
        return self.call(at, lambda: self._value(schema, at))

    def _value(self, schema: Any, at: str) -> Term:
        if schema is True:
            return self._any
        if not isinstance(schema, dict):
            return self.watch(self._any)
        keywords = schema.keys() - ANNOTATIONS
        if "$id" in schema and at != "#":
            # It moves what references below it are relative to.
            return self.watch(self._any)
        if not keywords:
            return self._any
        if keywords == {"$ref"}:
            return self._reference(schema["$ref"])
        if keywords == {"const"}:
            return self._constants([schema["const"]])
        if "enum" in keywords and keywords <= {"enum", "type"} and isinstance(schema["enum"], list):
            return self._constants(schema["enum"])
        for word in ("anyOf", "oneOf", "allOf"):
            if keywords == {word} and isinstance(schema[word], list) and schema[word]:
                if word == "allOf" and len(schema[word]) > 1:
                    break
                return self.alt(
                    [self._below(part, f"{at}/{word}/{place}") for place, part in enumerate(schema[word])]
                )
        if keywords <= SHAPED:
            return self._shaped(schema, at)
        return self.watch(self._any)

    def _reference(self, reference: Any) -> Term:
        found = self._root
        if not isinstance(reference, str) or not (reference + "/").startswith("#/"):
            return self.watch(self._any)
        for part in reference.split("/")[1:]:
            part = unquote(part).replace("~1", "/").replace("~0", "~")
            if not isinstance(found, dict) or part not in found:
                return self.watch(self._any)
            found = found[part]
        return self._below(found, reference)

    def _constants(self, values: Iterable[Any]) -> Term:
        options = []
        for value in values:
            if value is None or isinstance(value, bool):
                options.append(self._text(json.dumps(value)))
            elif isinstance(value, (int, float)):
                options.append(self._watched_number())
            elif isinstance(value, str):
                plain = _is_plain(value)
                options.append(self._text(f'"{value}"') if plain else self.watch(self._string))
            else:
                return self.watch(self._any)
        return self.alt(options) if options else self.watch(self._any)

    def _shaped(self, schema: dict[str, Any], at: str) -> Term:
        """A value of the types that `schema` names."""
        kinds = schema.get("type", list(KINDS))
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if not isinstance(kinds, list) or not kinds or not all(kind in KINDS for kind in kinds):
            return self.watch(self._any)
        if "number" in kinds:
            kinds = [kind for kind in kinds if kind != "integer"]
        return self.alt([self._of_kind(kind, schema, at) for kind in kinds])

    def _of_kind(self, kind: str, schema: dict[str, Any], at: str) -> Term:
        match kind:
            case "null":
                return self._text("null")
            case "boolean":
                return self.alt([self._text("true"), self._text("false")])
            case "integer" | "number":
                return self._watched_number() if schema.keys() & NUMBERS else self._real(kind == "integer")
            case "string":
                return self.watch(self._string) if schema.keys() & STRINGS else self._bounded_string(schema)
            case "array":
                return self._array(schema, at)
            case _:
                return self.watch(self._any) if schema.keys() & OBJECTS else self._object(schema, at)

    def _bounded_string(self, schema: dict[str, Any]) -> Term:
        low, high = _bounds(schema, "minLength", "maxLength")
        return self._row(self._quote, self.repeat(self._char, low, high), self._quote)

    def _array(self, schema: dict[str, Any], at: str) -> Term:
        first, rest = schema.get("prefixItems", []), schema.get("items", True)
        if isinstance(rest, list) or not isinstance(first, list):
            return self.watch(self._any)
        low, high = _bounds(schema, "minItems", "maxItems")
        count = len(first)
        item = self._below(rest, f"{at}/items")
        top = None if high is None else max(high - count, 0)
        more = self.repeat(self._row(self._comma, item), max(low - count, 0), top)
        # Backwards: `more` is what may follow the first `place` items and those before it.
        for place in range(count - 1, -1, -1):
            one = self._row(self._below(first[place], f"{at}/prefixItems/{place}"), more)
            more = self._row(self._comma, one) if place else one
            if place >= low:
                more = self.repeat(more, 0, 1)
            if high is not None and place >= high:
                more = self.epsilon
        if not count:
            top = None if high is None else max(high - 1, 0)
            more = self._row(item, self.repeat(self._row(self._comma, item), max(low - 1, 0), top))
            more = self.epsilon if high == 0 else self.repeat(more, min(low, 1), 1)
        return self._row(self._chars("["), self.blank, more, self.blank, self._chars("]"))

    def _object(self, schema: dict[str, Any], at: str) -> Term:
        """The properties in order, then the required ones that have no schema, then others."""
        properties, required = schema.get("properties", {}), schema.get("required", [])
        others = schema.get("additionalProperties", True)
        if not isinstance(properties, dict) or not isinstance(required, list):
            return self.watch(self._any)
        names = list(dict.fromkeys([*properties, *required]))
        if len(names) > MAX_PROPERTIES or not all(map(_is_plain, names)):
            return self.watch(self._any)
        close = self._chars("}")
        colon = self._row(self.blank, self._chars(":"), self.blank)
        following: Term | None = None
        if others is not False:
            value = self._below(others, f"{at}/additionalProperties")
            other = self._row(self._quote, self._unlike(frozenset(names), "", at), colon, value)

            def others_from_here() -> Term:
                return self._row(other, self._next(self.call((at, "others"), others_from_here), close))

            following = self.call((at, "others"), others_from_here)
        may_end = True
        for place in range(len(names) - 1, -1, -1):
            name = names[place]
            value = self._below(properties.get(name, others), f"{at}/properties/{name}")
            pair = self._row(self._text(f'"{name}"'), colon, value)
            one = self._row(pair, self._next(following, close if may_end else None))
            if name in required:
                following, may_end = one, False
            else:
                following = one if following is None else self.alt([one, following])
        inside = [term for term in (following, close if may_end else None) if term is not None]
        return self._row(self._chars("{"), self.blank, self.alt(inside))

    def _next(self, following: Term | None, close: Term | None) -> Term:
        """What may stand after a property: a comma and `following`, or `close`."""
        options = [] if close is None else [close]
        if following is not None:
            options.append(self._row(self._chars(","), self.blank, following))
        return self._row(self.blank, self.alt(options))

    def _unlike(self, taken: frozenset[str], begun: str, at: str) -> Term:
        """The rest of a property's name that is none of `taken`, after the opening quote and `begun`."""
        ahead = {name[len(begun)] for name in taken if name.startswith(begun) and len(name) > len(begun)}
        if not ahead and begun not in taken:
            return self._rest
        return self.call((at, "unlike", begun), lambda: self._make_unlike(taken, begun, ahead, at))

    def _make_unlike(self, taken: frozenset[str], begun: str, ahead: set[str], at: str) -> Term:
        codes = normal([(ord(char), ord(char)) for char in ahead])
        others = _without(codes)
        options = [self._row(self.sequences(utf8(others)), self._rest), self._row(self._escape, self._rest)]
        options += [
            self._row(self._text(char), self._unlike(taken, begun + char, at)) for char in sorted(ahead)
        ]
        if begun not in taken:
            options.append(self._quote)
        return self.alt(options)


def _is_plain(text: Any) -> bool:
    """Whether a JSON string spells all of `text` as itself."""
    return isinstance(text, str) and not NO_PLAIN.search(text)


def _without(codes: Ranges) -> Ranges:
    """PLAIN without `codes`."""
    kept = []
    for low, high in PLAIN:
        for first, last in codes:
            if low <= first and last <= high:
                kept.append((low, first - 1))
                low = last + 1
        kept.append((low, high))
    return tuple((low, high) for low, high in kept if low <= high)


def _bounds(schema: dict[str, Any], least: str, most: str) -> tuple[int, int | None]:
    """Two counts of a schema. `ConstraintError` for what is none."""
    low, high = schema.get(least, 0), schema.get(most)
    if not isinstance(low, (int, float)) or not isinstance(high, (int, float, type(None))):
        raise ConstraintError(f"{least} and {most} must be numbers")
    return int(low), None if high is None else int(high)
