"""Forced runs are what the model's tokenizer writes, whatever text comes after them."""

from __future__ import annotations

import json
from random import Random

import pytest

from constraints import Constraint, Vocabulary, json_schema, options, regex, substring, yacc
from constraints.forced import canonical_run, is_left_open

PERSON = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string"},
        "age": {"type": "integer"},
        "email_addresses": {"type": "array"},
    },
    "required": ["first_name", "age", "email_addresses"],
    "additionalProperties": False,
}
CASES = [
    (
        lambda v: regex(v, r'\{"name": "[a-z ]+", "age": \d{1,3}\}'),
        ['{"name": "bob", "age": 7}', '{"name": "a b", "age": 123}'],
    ),
    (
        lambda v: regex(v, r"<answer>(yes|no|none)</answer>\n?"),
        ["<answer>yes</answer>", "<answer>none</answer>\n"],
    ),
    (lambda v: regex(v, r"foo(bar|baz)?s{2,9}"), ["foobarss", "foobazsss", "foossssss"]),
    (lambda v: regex(v, r" {4}return \w+"), ["    return x", "    return value_1"]),
    (lambda v: regex(v, r"\n\n {2}(\n| x)"), ["\n\n  \n", "\n\n   x"]),
    (lambda v: regex(v, r"1234(5678)?\.0"), ["1234.0", "12345678.0"]),
    (lambda v: regex(v, r"(日本語|日本酒)です"), ["日本語です", "日本酒です"]),
    (lambda v: regex(v, r"don('t|ate)"), ["don't", "donate"]),
    (
        lambda v: options(v, ["The quick brown fox", "The quick red fox", "A"]),
        ["The quick brown fox", "The quick red fox", "A"],
    ),
    (
        lambda v: substring(v, "It was the best of times, it was the worst of times"),
        ['best of times,"', 'worst of times"'],
    ),
    (
        lambda v: json_schema(v, PERSON),
        [json.dumps({"first_name": "Åsa", "age": 3, "email_addresses": []}, ensure_ascii=False)],
    ),
    (
        lambda v: json_schema(v, PERSON, compact=True),
        [json.dumps({"first_name": "a", "age": 31, "email_addresses": [1]}, separators=(",", ":"))],
    ),
    (
        lambda v: yacc(v, '%% S: "begin" " " ID ":=" "0" ";" "end" ; ID: "/[a-z]+/" ;'),
        ["begin x:=0;end", "begin abc:=0;end"],
    ),
]


def follow(constraint: Constraint, vocabulary: Vocabulary, text: str) -> int:
    """Walk along the model's tokens of `text`; each forced run must lie on them. Counts forced ones."""
    ids = vocabulary.tokenize(text)
    place = forced = 0
    while place < len(ids):
        run = constraint.forced_tokens()
        assert run == ids[place : place + len(run)], vocabulary.tokens_repr(run)
        forced += len(run)
        for token in run or ids[place : place + 1]:
            constraint.append_token(token)
        place += len(run) or 1
    assert constraint.eos_allowed() and constraint.forced_tokens() == []
    return forced


@pytest.mark.parametrize("name", ["smol", "tekken"])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_forced_runs_lie_on_the_tokens_of_every_continuation(
    name: str, case: int, request: pytest.FixtureRequest
):
    vocabulary = request.getfixturevalue(name)
    make, texts = CASES[case]
    for text in texts:
        follow(make(vocabulary), vocabulary, text)


def test_long_literals_are_mostly_forced(smol: Vocabulary):
    text = '{"identifier": "x", "description": "y"}'
    constraint = regex(smol, r'\{"identifier": "[a-z]", "description": "[a-z]"\}')
    assert follow(constraint, smol, text) >= len(smol.tokenize(text)) * 2 // 3
    whole = regex(smol, r"This sentence has no choice in it\.")
    assert whole.forced_tokens() == smol.tokenize("This sentence has no choice in it.")


def test_an_open_run_stops_before_a_token_that_could_grow(smol: Vocabulary):
    assert smol.detokenize(canonical_run(smol, [], b"hello wor", None)) == b"hello"
    assert smol.detokenize(canonical_run(smol, [], b"hello wor", b"")) == b"hello wor"
    assert smol.detokenize(canonical_run(smol, [], b"hello\xe6\x97", None)) in (b"", b"hello")


def test_text_that_spells_a_special_token_is_not_forced(smol: Vocabulary):
    run = regex(smol, r"<\|im_end\|>").forced_tokens()
    assert not any(map(smol.is_special, run))


def test_the_end_is_a_choice(smol: Vocabulary):
    assert regex(smol, "(abc)?").forced_tokens() == []
    assert options(smol, ["", "abc"]).forced_tokens() == []


@pytest.mark.parametrize("forced", [b" ", b", ", b'": ', b"th", b"{", b"re", b"\n\n "])
def test_a_run_that_is_left_open_is_never_forced(smol: Vocabulary, forced: bytes):
    rng = Random(0)
    contexts = [[rng.randrange(300, smol.size) for _ in range(rng.randrange(7))] for _ in range(20)]
    follows = [b"a", b'"', b" \n", b"0123456789", b"abcdefghijklmnopqrstuvwxyz", b""]
    runs = {
        follow: [canonical_run(smol, tokens, forced, follow) for tokens in contexts] for follow in follows
    }
    left_open = [follow for follow in follows if is_left_open(smol, forced, follow)]
    assert b"" not in left_open
    assert not any(run for follow in left_open for run in runs[follow])
    assert left_open or any(run for found in runs.values() for run in found)
