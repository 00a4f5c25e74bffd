r"""llguidance, the token tree, outlines-core and xgrammar on real vocabularies give the same masks.

Known disagreements, each with a test below:
- outlines-core loses every token that leads from a state where the text may end to one where it may not:
  after the first `1`, `1+(\.1+)?` no longer allows `.`. So it is compared where the text may not end.
- llguidance narrows a mask to one token where bytes are forced, unless a grammar says `no_forcing`.
"""

from __future__ import annotations

from random import Random

import numpy as np
import outlines_core
import pytest
import xgrammar

from constraints import TokenSet, Vocabulary, guidance, regex, regex_syntax
from constraints.regex_constraint import RegexConstraint

PATTERNS = [
    r"[a-z]+!",
    r"\d{4}-\d{2}-\d{2}",
    r"(yes|no|maybe), (sir|madam)",
    r'"[^"\n]*"',
    r"[\w.+-]+@[\w-]+\.[a-z]{2,4}",
    r"(a+)+b",
    r"<b>.{1,20}</b>",
    r"[A-Z][a-z]+( [A-Z][a-z]+){1,3}\.",
    r"日本.*!",
    r"[é-ü]{2,6}x",
    r"(\d+,)*\d+;",
]


def ids_of(row: np.ndarray, vocabulary: Vocabulary) -> set[int]:
    return set(TokenSet(vocabulary.size, row=row & ~vocabulary.eos_row).ids().tolist())


def steps(vocabulary: Vocabulary, pattern: str, seed: int, count: int = 12):
    """Positions along a random walk: the constraint and the tokens so far."""
    constraint, random, tokens = regex(vocabulary, pattern), Random(seed), []
    assert isinstance(constraint, RegexConstraint)
    for _ in range(count):
        yield constraint, list(tokens)
        onward = sorted(ids_of(constraint.mask_row(), vocabulary))
        if not onward:
            break
        tokens.append(random.choice(onward))
        constraint.append_token(tokens[-1])


@pytest.mark.parametrize("name", ["smol", "tekken"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_llguidance_is_the_walk_of_the_tree(name: str, pattern: str, request: pytest.FixtureRequest):
    vocabulary = request.getfixturevalue(name)
    for constraint, tokens in steps(vocabulary, pattern, seed=1):
        at = constraint.machine.fresh.deep_copy()
        at.consume_tokens(tokens)
        guided = guidance.compute_row(vocabulary, at)
        assert (guided == constraint.machine.walked_row(constraint._state)).all()


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if ".{1,20}" not in p and ".*" not in p])
def test_outlines_core_agrees_where_the_text_may_not_end(pattern: str, smol: Vocabulary):
    by_bytes = {text: list(ids) for text, ids in smol.ids_by_bytes.items()}
    rendered = regex_syntax.render(regex_syntax.parse(pattern))
    index = outlines_core.Index(rendered, outlines_core.Vocabulary(smol.eos_token_id, by_bytes))
    for constraint, tokens in steps(smol, pattern, seed=2):
        state = index.get_initial_state()
        for token in tokens:
            state = index.get_next_state(state, token)
        if constraint.eos_allowed():
            break
        assert set(index.get_allowed_tokens(state)) == ids_of(constraint.mask_row(), smol)


def test_outlines_core_loses_tokens_after_a_state_where_the_text_may_end():
    vocabulary = Vocabulary([b"", b"1", b".", b".1"], specials={0: b"</s>"}, eos_token_ids=[0])
    index = outlines_core.Index(
        r"1+(?:\.1+)?", outlines_core.Vocabulary(0, {b"1": [1], b".": [2], b".1": [3]})
    )
    theirs = set(index.get_allowed_tokens(index.get_next_state(index.get_initial_state(), 1)))
    ours = regex(vocabulary, r"1+(?:\.1+)?")
    ours.append_token(1)
    assert ids_of(ours.mask_row(), vocabulary) == {1, 2, 3}
    assert theirs - {0} == {1, 3}, "outlines-core was mended: it may serve as a tier again"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_xgrammar_agrees(pattern: str, smol: Vocabulary):
    encoded = [smol.token_bytes(i) for i in range(smol.size)]
    info = xgrammar.TokenizerInfo(
        encoded, xgrammar.VocabType.RAW, vocab_size=smol.size, stop_token_ids=[*smol.eos_token_ids]
    )
    compiled = xgrammar.GrammarCompiler(info, max_threads=1).compile_regex(explicit_for_xgrammar(pattern))
    special = smol.text_tokens
    for constraint, tokens in steps(smol, pattern, seed=3, count=8):
        matcher = xgrammar.GrammarMatcher(compiled)
        for token in tokens:
            assert matcher.accept_token(token)
        bits = xgrammar.allocate_token_bitmask(1, smol.size)
        matcher.fill_next_token_bitmask(bits)
        theirs = bits.numpy()[0] & special.row
        assert ids_of(theirs, smol) == ids_of(constraint.mask_row(), smol)


def explicit_for_xgrammar(pattern: str) -> str:
    """The pattern with `.` written out: xgrammar's matches a newline too."""
    return pattern.replace(".{1,20}", "[^\\n]{1,20}").replace(".*", "[^\\n]*")


def test_the_engine_that_forces_is_told_not_to(smol: Vocabulary):
    plain = guidance.matcher(smol, "start: /hello world/")
    forced = set(TokenSet(smol.size, row=guidance.compute_row(smol, plain)).ids().tolist())
    ours = ids_of(regex(smol, "hello world").mask_row(), smol)
    assert {smol.token_bytes(t) for t in ours} >= {b"h", b"he", b"hello"}
    assert forced != ours
