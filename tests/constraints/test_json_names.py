"""Names of positions in JSON documents: equal names have equal masks, and places that are alike share one."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest

from constraints import ConstraintError, TokenSet, Vocabulary, guidance, json_schema
from constraints.guidance import GuidanceConstraint, History
from constraints.json_names import SchemaNames
from tests.constraints.test_json_constraint import FEATURES

KINDS = [
    {
        "properties": {
            "kind": {"const": kind},
            "when": {"type": "string", "pattern": p},
            kind: {"type": "null"},
        }
    }
    for kind, p in (("a", "^x*$"), ("b", "^(x|y)*$"))
]
EITHER = [
    {"type": "object", "properties": {"v": {"type": "string", "pattern": p}, n: {}}, "required": ["v", n]}
    for n, p in (("p", "^x+$"), ("q", "^(xx)+y?$"))
]
SCHEMAS: dict[str, Any] = {
    **{name: schema for name, (schema, _, _) in FEATURES.items()},
    "names that begin alike": {"type": "object", "properties": {"a": {}, "ab": {"type": "null"}, "b\"": {}}},
    "others of a kind": {"type": "object", "additionalProperties": {"type": "integer"}, "required": ["n"]},
    "told apart at the start": {"anyOf": [{"type": "object", **kind} for kind in KINDS]},
    "told apart at the end": {"anyOf": EITHER},
    "escapes": {"type": "object", "properties": {"é": {"enum": ["a\"b", "a\\", "\u0001"]}}},
    "tuple": {"type": "array", "prefixItems": [{"type": "null"}, {"type": "string"}], "items": False},
    "short tuple": {"type": "array", "prefixItems": [{"const": 1}, True], "minItems": 1, "maxItems": 1},
    "many": {"type": "array", "items": {"maxLength": 3, "type": "string"}, "minItems": 2, "maxItems": 4},
    "any of any": {"anyOf": [{"type": ["string", "number"], "minimum": 3}, {"type": ["array", "object"]}]},
    "deep": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2},
}  # fmt: skip


def reference(vocabulary: Vocabulary, schema: Any, compact: bool) -> guidance.LLMatcher:
    """llguidance by another way: through Lark, where it forces nothing, and following every token."""
    options = {"x-guidance": {"whitespace_flexible": not compact}}
    text = json.dumps({**(schema if isinstance(schema, dict) else {}), **options})
    return guidance.matcher(vocabulary, f"start: %json {text}{guidance.NO_FORCING}")


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_mask_made_for_one_sequence_is_right_for_all(name: str, smol: Vocabulary):
    schema, compact = SCHEMAS[name], len(name) % 2 == 0
    fresh = reference(smol, schema, compact)
    closing = [
        i for t in (b'"', b"}", b"]", b",", b":", b"{", b"[", b"x", b'":') for i in smol.ids_by_bytes[t]
    ]
    for seed in range(8):
        random, constraint, at = Random(seed), json_schema(smol, schema, compact=compact), fresh.deep_copy()
        for _ in range(25):
            ends = at.is_accepting()
            wanted = guidance.compute_row(smol, at)
            row = constraint.mask_row()
            assert (row == (wanted | smol.eos_row if ends else wanted)).all(), (seed, constraint.state_key())
            allowed = TokenSet(smol.size, row=row & ~smol.eos_row)
            ids = [token for token in closing if allowed[token]]
            if not ids or random.random() < 0.2:
                ids = allowed.ids().tolist()
            if not ids:
                break
            token = random.choice(ids)
            constraint.append_token(token)
            assert at.consume_token(token)


def after(vocabulary: Vocabulary, schema: Any, text: str) -> GuidanceConstraint:
    constraint = json_schema(vocabulary, schema)
    for token in vocabulary.tokenize(text):
        constraint.append_token(token)
    return constraint


def test_places_that_are_alike_share_a_mask(smol: Vocabulary):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string"}, "b": {"type": "array", "items": {"type": "integer"}}},
    }
    one = after(smol, schema, '{"a": "first", "b": [1, 22, 333')
    two = after(smol, schema, '{ "a" :"another one","b":[4444')
    assert one.state_key() == two.state_key()
    assert one.mask_row() is two.mask_row()
    assert after(smol, schema, '{"a": "first').state_key() != one.state_key()


def test_what_is_not_followed_is_named_by_its_text_and_then_forgotten(smol: Vocabulary):
    schema = {"type": "object", "properties": {"d": {"type": "string", "format": "date"}}}
    inside = [after(smol, schema, '{"d": "' + text) for text in ("2024-02", "2023-02", "2024-02")]
    assert inside[0].state_key() == inside[2].state_key() != inside[1].state_key()
    done = [after(smol, schema, '{"d": "' + text + '"') for text in ("2024-02-29", "2023-11-01")]
    assert done[0].state_key() == done[1].state_key()


def test_what_is_not_followed_is_kept_where_it_decides_what_comes_later(smol: Vocabulary):
    schema = {"anyOf": EITHER}
    # `xxy` is of the second kind only, `xxx` of the first, `xx` of both.
    keys = [after(smol, schema, '{"v": "' + text + '", ').state_key() for text in ("xx", "xxx", "xxy")]
    assert len(set(keys)) == 3


def test_where_the_automaton_cannot_follow_the_tokens_are_the_name(smol: Vocabulary):
    names = SchemaNames({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, False, 3)
    assert names.after(0, b"{") is None
    assert SchemaNames({"type": "null"}, False, 3).after(0, b"x") is None
    levels = {
        "t": {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": n} for n in (1, 2)]}
    }
    doubled = SchemaNames({"$ref": "#/$defs/t", "$defs": levels}, False, 3)
    assert doubled.after(0, b"[[[") is not None and doubled.after(0, b"[" * 30) is None
    wide = {"type": "object", "properties": {f"p{i}": {} for i in range(400)}}
    assert isinstance(SchemaNames(wide, False, 3).after(0, b'{"p'), tuple)
    grammar = guidance.GuidanceGrammar(smol, json.dumps({"grammars": [{"json_schema": {}}]}), lambda: names)
    one, two = GuidanceConstraint(grammar), GuidanceConstraint(grammar)
    for constraint, text in ((one, "[1"), (two, "[2")):
        for token in smol.tokenize(text):
            constraint.append_token(token)
    assert isinstance(one.state_key()[1], History)
    assert one.state_key() != two.state_key()
    two.rollback(2)
    assert two.state_key() == GuidanceConstraint(grammar).state_key()


def test_a_choice_is_neither_a_forced_end_nor_a_forced_token(smol: Vocabulary):
    schema = {"type": "object", "properties": {"ab": {"const": "xyz"}}, "required": ["ab"]}
    found = []
    for tokens in range(len(smol.tokenize('{"ab": "xyz"}')) + 1):
        constraint = json_schema(smol, schema, compact=True)
        for token in smol.tokenize('{"ab":"xyz","c":1}')[:tokens]:
            constraint.append_token(token)
        found.append(constraint.has_choice())
        if constraint.has_choice():
            assert not constraint.eos_forced() and constraint.forced_tokens() == []
    assert not found[0] and any(found)


def test_a_refused_token_changes_nothing(smol: Vocabulary):
    constraint = after(smol, {"type": "object", "properties": {"a": {"type": "integer"}}}, '{"a": 1')
    key = constraint.state_key()
    for asked_for_mask in (False, True):
        if asked_for_mask:
            constraint.mask_row()
        for token in (smol.tokenize("x")[0], smol.size, -1, 1):
            with pytest.raises(ConstraintError, match="not allowed"):
                constraint.append_token(token)
        assert constraint.state_key() == key and constraint.token_allowed(smol.tokenize("2")[0])
