"""JSON Schema constraints: llguidance's compiler, with what it would ignore refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from constraints.errors import ConstraintError
from constraints.guidance import BASE, GuidanceConstraint, GuidanceGrammar
from constraints.json_names import SchemaNames
from constraints.machine import compiled
from constraints.vocabulary import Vocabulary

REFUSED = frozenset(
    {"not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "propertyNames"}
    | {"dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems"}
    | {"$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor", "divisibleBy", "extends"}
    | {"disallow", "nullable", "discriminator"}
)
"""Keywords of some draft, or of OpenAPI, that change what is valid and that are not enforced."""

EXCERPT = re.compile(r"^ +(\d+ \||\^ *$).*\n?", re.MULTILINE)
"""Lines with which llguidance shows a place in the grammar that this file wrote."""

TOO_DEEP = "the JSON schema nests too deeply"

SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")
SCHEMA_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
SCHEMAS = ("items", "additionalProperties", "additionalItems")


def json_schema(vocabulary: Vocabulary, schema: Any, *, compact: bool = False) -> GuidanceConstraint:
    """A JSON document that a schema (draft 2020-12) accepts: a dict, JSON text or a pydantic model class.

    Objects write the properties that they name in the order of the schema, others after them. White space is
    free between tokens of JSON; `compact` allows none, so that more of the text is forced. Raises
    `ConstraintError` naming the keyword, and its place in the schema, of what is not supported.
    """
    text = _text_of(schema)
    key = ("json", vocabulary.key, text, compact)
    return GuidanceConstraint(compiled.get(key, lambda: _compiled(vocabulary, text, compact)))


def _compiled(vocabulary: Vocabulary, text: str, compact: bool) -> GuidanceGrammar:
    schema = _parsed(text)
    check(schema)
    try:
        return GuidanceGrammar(
            vocabulary, _source(schema, text, compact), lambda: SchemaNames(schema, compact, BASE)
        )
    except ConstraintError as error:
        raise ConstraintError(f"the JSON schema does not compile: {_explained(str(error), schema)}") from None


def _text_of(schema: Any) -> str:
    """The schema as JSON text, which nobody changes later."""
    if isinstance(schema, str):
        return schema
    if isinstance(schema, bytes):
        schema = _parsed(schema)
    if isinstance(schema, type) and hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    if not isinstance(schema, (dict, bool)):
        raise ConstraintError(
            f"a JSON schema is a dict, its JSON text or a pydantic model class, not {type(schema).__name__}"
        )
    try:
        return json.dumps(schema)
    except (TypeError, ValueError) as error:
        raise ConstraintError(f"the JSON schema cannot be written as JSON: {error}") from None
    except RecursionError:
        raise ConstraintError(TOO_DEEP) from None


def _parsed(text: str | bytes) -> dict[str, Any] | bool:
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise ConstraintError(f"the JSON schema is no JSON: {error}") from None
    except RecursionError:
        raise ConstraintError(TOO_DEEP) from None
    if not isinstance(schema, (dict, bool)):
        raise ConstraintError(f"the JSON text of a schema is an object or a bool, not {text!r:.60}")
    return schema


def _source(schema: dict[str, Any] | bool, text: str, compact: bool) -> str:
    """The schema as llguidance reads it, which takes white space to be free if it is not told otherwise."""
    if compact or not isinstance(schema, dict) or "x-guidance" in schema:
        options = {"whitespace_flexible": not compact}
        text = json.dumps({**(schema if isinstance(schema, dict) else {}), "x-guidance": options})
    return f'{{"grammars": [{{"json_schema": {text}}}]}}'


def walk(schema: Any, path: str = "#") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every subschema that is an object, with its JSON pointer."""
    if not isinstance(schema, dict):
        return
    yield path, schema
    for name in SCHEMAS:
        below = schema.get(name)
        for place, child in enumerate(below) if isinstance(below, list) else (("", below),):
            yield from walk(child, f"{path}/{name}" + (f"/{place}" if place != "" else ""))
    for name in SCHEMA_LISTS:
        for place, child in enumerate(schema[name]) if isinstance(schema.get(name), list) else ():
            yield from walk(child, f"{path}/{name}/{place}")
    for name in SCHEMA_MAPS:
        for key, child in schema[name].items() if isinstance(schema.get(name), dict) else ():
            yield from walk(child, f"{path}/{name}/{key}")


def check(schema: Any) -> None:
    """Raise `ConstraintError` for the first keyword that would not be enforced."""
    if schema is False:
        raise ConstraintError("the JSON schema `false` allows no document")
    try:
        if not _has_refused(schema):
            return
        for path, part in walk(schema):
            for keyword in part:
                if keyword in REFUSED:
                    raise ConstraintError(f"JSON schema keyword '{keyword}' at {path} is not supported")
    except RecursionError:
        raise ConstraintError(TOO_DEEP) from None


def _has_refused(schema: Any) -> bool:
    """Whether `walk` meets a refused keyword; quicker than `walk`, because it makes no paths."""
    if not isinstance(schema, dict):
        return False
    if not REFUSED.isdisjoint(schema):
        return True
    for name, below in schema.items():
        if not isinstance(below, (dict, list)):
            continue
        if name in SCHEMA_MAPS and isinstance(below, dict):
            found = any(map(_has_refused, below.values()))
        elif isinstance(below, list):
            found = (name in SCHEMA_LISTS or name in SCHEMAS) and any(map(_has_refused, below))
        else:
            found = name in SCHEMAS and _has_refused(below)
        if found:
            return True
    return False


def _explained(message: str, schema: Any) -> str:
    """llguidance's message, with the places of the keywords that it names."""
    message = EXCERPT.sub("", message.removeprefix("at 1(8): ")).strip()
    names = re.findall(r'"([^"]+)"', message) if message.startswith("Unimplemented") else []
    names += re.findall(r"Unknown format: (\S+)", message)
    places = [
        f"{path}/{keyword}"
        for path, part in walk(schema)
        for keyword, value in part.items()
        if keyword in names or (isinstance(value, str) and value in names)
    ]
    return f"{message} at {', '.join(places[:5])}" if places else message
