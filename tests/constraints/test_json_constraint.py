"""JSON Schema constraints: brute force over finite schemas, a validator over others, refusals by name."""

from __future__ import annotations

import itertools
import json
from random import Random
from typing import Any

import jsonschema
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from constraints import Constraint, ConstraintError, TokenSet, Vocabulary, json_schema
from tests.constraints.walks import small_vocabulary, walk

VOCABULARY = small_vocabulary(
    '{"',
    '":',
    '","',
    "true",
    "false",
    "null",
    "tr",
    "ue",
    "[]",
    "{}",
    "},",
    "[1",
    ",1",
    "é",
    b"\xc3",
    b"\xa9",
    "ab",
    '"a"',
    "10",
    "-1",
    single='{}[]:,"\\abeflnrstu0123456789-é',
)

SCALARS = st.sampled_from(
    [
        {"type": "boolean"},
        {"type": "null"},
        {"const": "ab"},
        {"enum": ["a", "ab", 1, None]},
        {"enum": ["é", 'q"']},
        {"type": "integer", "minimum": 1, "maximum": 12},
        {"const": [1, {"a": "b"}]},
        {"type": ["null", "boolean"]},
        {"anyOf": [{"const": "a"}, {"type": "null"}]},
        {"type": "string", "enum": ["b", "a\\b"]},
        {"type": "integer", "minimum": 3, "exclusiveMaximum": 11},
        {"type": "string", "pattern": "^a?b$"},
    ]
)


def _objects(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    def build(properties: dict[str, Any], required: set[str]) -> dict[str, Any]:
        kept = [name for name in properties if name in required]
        return {"type": "object", "properties": properties, "required": kept, "additionalProperties": False}

    names = st.sampled_from(["a", "b", "ab", "é"])
    objects = st.builds(build, st.dictionaries(names, inner, max_size=3), st.sets(names))
    arrays = st.builds(
        lambda item, low, more: {"type": "array", "items": item, "minItems": low, "maxItems": low + more},
        inner,
        st.integers(0, 1),
        st.integers(0, 1),
    )
    return objects | arrays


SCHEMAS = st.recursive(SCALARS, _objects, max_leaves=4)


def documents(schema: dict[str, Any]) -> list[str]:
    """Every document of a finite schema, written without white space."""
    if "const" in schema:
        return [compact(schema["const"])]
    if "enum" in schema:
        return [
            compact(value)
            for value in schema["enum"]
            if schema.get("type") != "string" or isinstance(value, str)
        ]
    if "anyOf" in schema:
        return [text for option in schema["anyOf"] for text in documents(option)]
    if "pattern" in schema:
        return ['"b"', '"ab"']
    match schema["type"]:
        case "boolean":
            return ["true", "false"]
        case "null":
            return ["null"]
        case "integer":
            top = schema.get("maximum", schema.get("exclusiveMaximum", 0) - 1)
            return [str(n) for n in range(schema["minimum"], top + 1)]
        case "array":
            items = documents(schema["items"])
            lengths = range(schema["minItems"], schema["maxItems"] + 1)
            return [
                "[" + ",".join(chosen) + "]" for n in lengths for chosen in itertools.product(items, repeat=n)
            ]
        case "object":
            ways = [
                [f"{compact(name)}:{text}" for text in documents(below)]
                + ([] if name in schema["required"] else [""])
                for name, below in schema["properties"].items()
            ]
            return ["{" + ",".join(filter(None, chosen)) + "}" for chosen in itertools.product(*ways)]
        case list(kinds):
            return [text for kind in kinds for text in documents({"type": kind})]
    raise AssertionError(schema)


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


@settings(max_examples=150, deadline=None)
@given(SCHEMAS, st.integers(0, 1 << 16))
def test_masks_of_finite_schemas_are_brute_force(schema: dict[str, Any], seed: int):
    texts = {text.encode() for text in documents(schema)}
    walk(
        json_schema(VOCABULARY, schema, compact=True),
        VOCABULARY,
        lambda text: any(whole.startswith(text) for whole in texts),
        lambda text: text in texts,
        Random(seed),
        steps=15,
    )


FEATURES: dict[str, tuple[Any, list[Any], list[Any]]] = {
    "type": ({"type": "integer"}, [0, -7, 123], [1.5, "a", None, True]),
    "types": ({"type": ["string", "number"]}, ["x", 1.5e3, 2], [None, []]),
    "enum": ({"enum": ["a", 1, None, {"b": [1]}]}, ["a", 1, None, {"b": [1]}], ["b", 2, {"b": [2]}]),
    "const": ({"const": {"a": "é"}}, [{"a": "é"}], [{"a": "e"}, {}]),
    "required": (
        {"type": "object", "properties": {"a": {"type": "integer"}, "b": {}}, "required": ["a"]},
        [{"a": 1}, {"a": 1, "b": []}, {"a": 1, "c": 2}],
        [{}, {"b": 1}, {"a": "x"}],
    ),
    "additionalProperties": (
        {"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "integer"}},
        [{}, {"a": "x", "z": 1}, {"z": 1, "y": 2}],
        [{"z": "x"}],
    ),
    "patternProperties": (
        {"type": "object", "patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": False},
        [{}, {"xa": 1}],
        [{"xa": "b"}, {"a": 1}],
    ),
    "minProperties": (
        {"type": "object", "minProperties": 1, "maxProperties": 2},
        [{"a": 1}],
        [{}, {"a": 1, "b": 1, "c": 1}],
    ),
    "items": (
        {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2},
        [[1], [1, 2]],
        [[], [1, 2, 3]],
    ),
    "prefixItems": (
        {"type": "array", "prefixItems": [{"type": "string"}], "items": {"type": "integer"}, "minItems": 1},
        [["a"], ["a", 1, 2]],
        [[], [1], ["a", "b"]],
    ),
    "length": ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "éé", "日本語"], ["a", "abcd", ""]),
    "pattern": ({"type": "string", "pattern": "^[a-c]+$"}, ["abc"], ["", "abd"]),
    "search": ({"type": "string", "pattern": "b"}, ["abc", "b"], ["ac", ""]),
    "format": ({"type": "string", "format": "date"}, ["2024-02-29"], ["2024-13-01", "x"]),
    "range": ({"type": "integer", "minimum": -3, "exclusiveMaximum": 12}, [-3, 0, 11], [-4, 12]),
    "numbers": ({"type": "number", "minimum": 0.5, "maximum": 2}, [0.5, 1, 1.75, 2], [0.4, 2.1, -1]),
    "multipleOf": ({"type": "integer", "multipleOf": 3}, [0, 3, 33], [1, 31]),
    "anyOf": ({"anyOf": [{"type": "integer"}, {"type": "array"}]}, [1, [1, "a"]], ["a", {}]),
    "oneOf": ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, [1, "a"], [None]),
    "allOf": ({"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]}, [3, 5], [2, 6]),
    "ref": (
        {
            "$ref": "#/$defs/n",
            "$defs": {
                "n": {
                    "type": "object",
                    "properties": {"n": {"$ref": "#/$defs/n"}},
                    "additionalProperties": False,
                }
            },
        },
        [{}, {"n": {"n": {}}}],
        [{"n": 1}, {"m": {}}],
    ),
    "any": (True, [1, "a", None, {"a": [{}]}, -1.5e10], []),
    "annotations": (
        {"title": "t", "description": "d", "type": "null", "default": 1, "examples": [2]},
        [None],
        [1],
    ),
}


def accepts(constraint: Constraint, vocabulary: Vocabulary, text: str) -> bool:
    for token in vocabulary.tokenize(text):
        if not constraint.token_allowed(token):
            return False
        constraint.append_token(token)
    return constraint.eos_allowed()


@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_accepts_what_is_valid_and_nothing_else(name: str, smol: Vocabulary):
    schema, valid, invalid = FEATURES[name]
    checker = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    for document in valid:
        assert checker.is_valid(document)
        for text in (compact(document), json.dumps(document, ensure_ascii=False, indent=1)):
            assert accepts(json_schema(smol, schema), smol, text), text
    for document in invalid:
        assert not checker.is_valid(document)
        assert not accepts(json_schema(smol, schema), smol, compact(document)), document


def generated(constraint: Constraint, vocabulary: Vocabulary, random: Random, steps: int = 150) -> str | None:
    """A document written at random, None when it did not end."""
    tokens: list[int] = []
    closing = [
        i
        for i in range(vocabulary.size)
        if vocabulary.token_bytes(i) in (b'"', b"}", b"]", b"1", b"a", b":", b",")
    ]
    for _ in range(steps):
        if constraint.eos_allowed() and (constraint.eos_forced() or random.random() < 0.5):
            return vocabulary.detokenize(tokens).decode()
        allowed = TokenSet(vocabulary.size, row=constraint.mask_row() & ~vocabulary.eos_row)
        short = [token for token in closing if allowed[token]]
        ids = allowed.ids()
        token = (
            random.choice(short) if short and random.random() < 0.7 else int(ids[random.randrange(len(ids))])
        )
        constraint.append_token(token)
        tokens.append(token)
    return None


@pytest.mark.parametrize("name", FEATURES)
def test_generated_documents_validate(name: str, smol: Vocabulary):
    schema = FEATURES[name][0]
    checker = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    found = [generated(json_schema(smol, schema), smol, Random(seed)) for seed in range(8)]
    for text in filter(None, found):
        checker.validate(json.loads(text))
    assert any(found)


REFUSED = {
    "not": {},
    "if": {},
    "then": {},
    "else": {},
    "contains": {},
    "minContains": 1,
    "maxContains": 1,
    "uniqueItems": True,
    "propertyNames": {},
    "dependentRequired": {},
    "dependentSchemas": {},
    "dependencies": {},
    "unevaluatedItems": False,
    "unevaluatedProperties": False,
    "$dynamicRef": "#a",
    "$recursiveRef": "#",
    "nullable": True,
}


@pytest.mark.parametrize("keyword", REFUSED)
def test_what_is_not_enforced_is_refused_by_name_and_place(keyword: str, smol: Vocabulary):
    below = {"type": "object", "properties": {"x": {"items": {keyword: REFUSED[keyword]}}}}
    with pytest.raises(ConstraintError) as caught:
        json_schema(smol, below)
    assert f"'{keyword}' at #/properties/x/items" in str(caught.value)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "format": "no-such"}, "no-such at #/format"),
        ({"type": "string", "pattern": "a(?=b)"}, "look-around"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
        ({"$ref": "http://example.com/x"}, "example.com"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        (False, "allows no document"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "nsatisfiable"),
        ("{", "is no JSON"),
        (7, "not int"),
        ("[1]", "an object or a bool"),
        (b"7", "an object or a bool"),
        ({"default": {1, 2}}, "cannot be written"),
        ("[" * 100_000, "too deeply"),
    ],
)
def test_what_does_not_compile_is_explained(schema: Any, message: str, smol: Vocabulary):
    with pytest.raises(ConstraintError, match=message):
        json_schema(smol, schema)


def test_a_pydantic_model_is_a_schema(smol: Vocabulary):
    class Person(pydantic.BaseModel):
        name: str
        friends: list[Person] = []

    Person.model_rebuild(_types_namespace={"Person": Person})
    text = '{"name": "Zoë", "friends": [{"name": "b"}]}'
    assert accepts(json_schema(smol, Person), smol, text)
    assert Person.model_validate_json(text)
    assert not accepts(json_schema(smol, Person), smol, '{"friends": []}')


def test_a_user_cannot_turn_the_checks_off(smol: Vocabulary):
    with pytest.raises(ConstraintError, match="'not'"):
        json_schema(smol, {"not": {}, "x-guidance": {"lenient": True}})
    schema = {"type": "string", "format": "no-such", "x-guidance": {"lenient": True}}
    with pytest.raises(ConstraintError, match="no-such"):
        json_schema(smol, schema)


@pytest.mark.parametrize("compact", [False, True])
def test_a_schema_is_what_it_was_when_it_was_given(smol: Vocabulary, compact: bool):
    schema: dict[str, Any] = {"properties": {"a": {"type": "integer"}}, "required": ["a"]}
    text = json.dumps(schema)
    constraint, other = json_schema(smol, schema, compact=compact), json_schema(smol, text, compact=compact)
    assert constraint.state_key() == other.state_key(), "equal schemas share their masks"
    schema["properties"].clear()
    for token in smol.tokenize('{"a":12'):
        constraint.append_token(token)
        other.append_token(token)
        assert (constraint.mask_row() == other.mask_row()).all()
    assert smol.ids_by_bytes[b"x"][0] not in TokenSet(smol.size, row=constraint.mask_row()).ids()
    spaced = '{ "a":\n12}'
    assert accepts(json_schema(smol, text, compact=compact), smol, spaced) is not compact


def test_a_hostile_schema_is_refused(smol: Vocabulary):
    deep: Any = {}
    for _ in range(5000):
        deep = {"items": deep}
    with pytest.raises(ConstraintError):
        json_schema(smol, deep)
