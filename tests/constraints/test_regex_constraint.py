"""Regex constraints against a matcher that shares no code with them."""

from __future__ import annotations

import re
from random import Random
from typing import SupportsIndex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from constraints import ConstraintError, regex, regex_syntax
from constraints.automaton import DEAD, _kept_utf8
from constraints.regex_automaton import RegexAutomaton
from tests.constraints.regex_oracle import RegexOracle
from tests.constraints.walks import small_vocabulary, walk

VOCABULARY = small_vocabulary(
    "ab",
    "aa",
    "abc",
    "ba",
    "bb",
    "aab",
    "a1",
    "12",
    "1.",
    " a",
    "a ",
    "é",
    "éa",
    "日本",
    b"\xc3",
    b"\xa9",
    b"\xe6\x97",
    b"\xa5",
    b"a\xe6",
    "_",
    "\n\n",
    b"\xf0\x9f",
    b"\x98\x80",
    "😀",
    "ß",
    b"\xff",
    b"\xc0\x80",
    b"\xed\xa0",
    "-",
    single='abcAB012 .\n"é',
)

PATTERNS = [
    "a",
    "a|b",
    "ab|abc",
    "a*",
    "a+b",
    "(a+)+b",
    "(a|ab)(c|bcd)?",
    "a{2,4}b{0,2}",
    "(ab?){2,3}",
    "[^a]*",
    ".{1,5}",
    r"\d+\.\d{2}",
    r"[\w-]+",
    r"\s*a\s*",
    "日本|日曜",
    "[é-ü]+a?",
    "(?:é|a){3}",
    r"[^\n\"]*",
    "",
    "a?b?c?",
    "(a|)(b|)+",
    "^ab$",
    "^a|b$",
    "(?P<name>a)b",
    r"\x61\u00e9",
    "[a-c]{3,}",
    "a{0}b",
    "a{,2}b",
    "(a*)*b",
    "[]a]b",
    "[^]a]b",
    "a{b",
    "😀?a",
    "(a|b|ab)*c",
    ".*a.{3}",
    "a{0,5}a{0,5}a{2}",
    "x{2}a|x{2}b|[a-b]*",
    "abc|ab|abd|a|b(a|ba|)|ba1",
    "(a?b|a?c|a?|bb)*1",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_are_brute_force_along_walks(pattern: str):
    oracle = RegexOracle(pattern)
    for seed in range(4):
        text = walk(regex(VOCABULARY, pattern), VOCABULARY, oracle.viable, oracle.matches, Random(seed))
        if oracle.matches(text):
            assert re.fullmatch(pattern, text.decode(), re.ASCII)


@pytest.mark.parametrize(
    ("pattern", "plain"),
    [
        ("(?i)aB+", "[aA][bB]+"),
        ("a(?i:b)c", "a[bB]c"),
        ("(?i)[^a]", "[^aA]"),
        ("(?s).+", r"[\s\S]+"),
        ("(?s:.)(?-s:.)", r"[\s\S]."),
        ("(?is)a.", r"[aA][\s\S]"),
        (r"\p{Nd}+", "[0-9]+"),
        (r"\pL1", "[a-zA-Zéß日本]1"),
        ("[[:alpha:]]+", "[a-zA-Z]+"),
        (r"\x{e9}", "é"),
        (r"\Aab\z", "ab"),
        ("(?<n>a)b", "ab"),
        (r"[\^\-\]b]", "[-b^\\]]"),
    ],
)
def test_what_python_writes_otherwise(pattern: str, plain: str):
    oracle = RegexOracle(plain)
    by_property = pattern.startswith(r"\p")
    # Only for the letters of a smaller vocabulary are a property and its plain form the same.
    letters = small_vocabulary("ab", "日本", single="abAB12é .") if by_property else VOCABULARY
    for seed in range(2):
        walk(
            regex(letters, pattern),
            letters,
            oracle.viable,
            oracle.matches,
            Random(seed),
            steps=1 + 3 * (letters is VOCABULARY),
        )


CHARS = st.sampled_from(
    ["a", "b", "c", "1", " ", "é", "日", ".", r"\.", r"\d", r"\w", r"\s", r"\D", "[ab]", "[^a]", "[é-日]"]
)


def _patterns() -> st.SearchStrategy[str]:
    def grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        counts = st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{0,2}", "{2,}", "*?", "+?"])
        return st.one_of(
            st.tuples(inner, inner).map("".join),
            st.lists(inner, min_size=2, max_size=3).map(lambda options: "(" + "|".join(options) + ")"),
            st.tuples(inner, counts).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
        )

    return st.recursive(CHARS, grow, max_leaves=6)


@settings(max_examples=150, deadline=None)
@given(_patterns(), st.integers(0, 1 << 16))
def test_masks_of_generated_patterns_are_brute_force(pattern: str, seed: int):
    oracle = RegexOracle(pattern)
    walk(regex(VOCABULARY, pattern), VOCABULARY, oracle.viable, oracle.matches, Random(seed), steps=6)


@pytest.mark.parametrize(
    ("pattern", "what", "place"),
    [
        ("a(?=b)", "look-ahead", 1),
        ("a(?<!b)", "look-behind", 1),
        (r"(a)\1", "back reference", 3),
        (r"a\b", "assertion", 1),
        ("a**", "repeat of a repeat", 1),
        ("*a", "nothing to repeat", 0),
        ("(a", "never closed", 0),
        ("a)", "unbalanced", 1),
        ("[a", "never closed", 0),
        ("a{3,1}", "swapped", 1),
        ("[b-a]", "swapped", 1),
        (r"\p{Greek}", "property", 0),
        ("a$b", "middle", 1),
        ("b^a", "middle", 1),
        ("a++", "possessive", 2),
        ("(?>a)", "atomic", 0),
        ("(?m)a", "flag", 2),
        (r"\xzz", "hexadecimal", 0),
        ("[a&&b]", "intersection", 2),
        (r"\q", "escape", 0),
        ("[[:foo:]]", "POSIX", 1),
        (r"\ud800", "not a character", 0),
    ],
)
def test_what_is_not_supported_is_named_with_its_place(pattern: str, what: str, place: int):
    with pytest.raises(ConstraintError, match=f"{what}.* at character {place}"):
        regex(VOCABULARY, pattern)


@pytest.mark.parametrize(
    "pattern", [".{1,100000}", "(a{1,1000}){1,1000}", "((((a{99}){99}){99}){99}){99}", "a{999999999999}"]
)
def test_a_pattern_that_is_too_large_is_refused(pattern: str):
    with pytest.raises(ConstraintError, match="repeat"):
        regex(VOCABULARY, pattern)


class Counted(str):
    """Text that counts the characters that are copied out of it."""

    copied = 0

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        part = super().__getitem__(key)
        Counted.copied += len(part)
        return part


@pytest.mark.parametrize("pattern", ["^|" * 5_000, "a{" * 5_000 + "}", "a{1" * 5_000, "(?:a)" * 3_000])
def test_a_pattern_is_read_once(pattern: str):
    Counted.copied = 0
    regex_syntax.parse(Counted(pattern))
    assert Counted.copied < 5 * len(pattern)


def test_a_long_pattern_is_refused_before_it_is_read():
    with pytest.raises(ConstraintError, match=r"50001 characters; 50000 are allowed"):
        regex(VOCABULARY, "[" + "a" * 49_999 + "]")
    regex(VOCABULARY, "[" + "a" * 49_998 + "]")


@pytest.mark.parametrize("pattern", [r"\PL" * 200, r"[\pL\pL]" * 80, "[" + r"\pL" * 200 + "]"])
def test_classes_of_too_many_ranges_are_refused(pattern: str):
    with pytest.raises(ConstraintError, match="classes have more than 100000 ranges"):
        regex(VOCABULARY, pattern)


def test_large_classes_are_kept_by_no_cache():
    kept = _kept_utf8.cache_info().currsize
    for start in range(0x4E00, 0x4E04):
        pattern = "(?i)[" + "".join(map(chr, range(start, start + 2_000, 2))) + "]+"
        RegexAutomaton(regex_syntax.parse(pattern))
    assert _kept_utf8.cache_info().currsize == kept


def test_the_case_of_a_large_class_is_that_of_its_characters():
    one_by_one = [span for code in range(0x61, 0x500) for span in regex_syntax.any_case(((code, code),))]
    assert regex_syntax.any_case(((0x61, 0x4FF),)) == regex_syntax.normal(one_by_one)
    tree = regex_syntax.parse("(?i)[^k]")
    assert isinstance(tree, regex_syntax.Chars)
    # U+212A is no k by itself, but its lower case is one.
    assert not any(low <= ord("k") <= high for low, high in tree.ranges)


def test_a_text_that_can_be_read_in_too_many_ways_is_an_error():
    constraint = regex(VOCABULARY, "[ab]*a[ab]{600}")
    with pytest.raises(ConstraintError, match=r"read in 257 ways at once, and 256 are allowed; use"):
        for token in VOCABULARY.greedy(b"ab" * 600):
            constraint.append_token(token)
    automaton = constraint.machine.automaton
    assert max(len(automaton.terms_of(state)) for state in range(len(automaton))) == 256


def test_options_that_begin_alike_are_read_once():
    automaton = RegexAutomaton(regex_syntax.parse("|".join(f"item-{n:04}" for n in range(1_500))))
    for text in (b"i", b"item-", b"item-0", b"item-012"):
        assert len(automaton.terms_of(automaton.step(automaton.start, text))) == 1
    assert automaton.step(automaton.start, b"item-1500") == DEAD


def test_repeats_of_long_repeats_are_followed_in_bounded_steps():
    pattern = "(" * 90 + "x" * 2_000 + ")*a" * 90
    constraint = regex(VOCABULARY, pattern)
    before = constraint.machine.automaton.num_terms()
    with pytest.raises(ConstraintError, match="more than 50000 terms to follow"):
        constraint.mask_row()
    assert constraint.machine.automaton.num_terms() <= before + 2 * 50_000


def test_what_the_first_mask_of_a_long_pattern_needs_is_made_with_it():
    made, pattern = regex(VOCABULARY, "[ab]c?" * 2).machine.__dict__, "[ab]c?" * 600
    assert "automaton" not in made and "fresh" not in made
    made = regex(VOCABULARY, pattern).machine.__dict__
    assert "automaton" in made and "fresh" in made


def test_the_states_of_a_machine_tell_what_its_pattern_takes():
    small, large = regex(VOCABULARY, "[ab]+c").machine, regex(VOCABULARY, "[ab]c" * 5_000).machine
    assert small.num_states() <= len(small.automaton) + 2
    assert large.num_states() >= 2_000


def test_deep_nesting_is_refused():
    with pytest.raises(ConstraintError, match="nest deeper"):
        regex(VOCABULARY, "(" * 5000 + "a" + ")" * 5000)


def test_a_pattern_without_a_match_is_refused():
    with pytest.raises(ConstraintError, match="no text"):
        regex(VOCABULARY, r"[^\s\S]")


def test_the_end_is_forced_only_when_no_byte_can_follow():
    constraint = regex(VOCABULARY, "ab?")
    constraint.append_token(VOCABULARY.greedy(b"a")[0])
    assert constraint.eos_allowed() and not constraint.eos_forced()
    constraint.append_token(VOCABULARY.greedy(b"b")[0])
    assert constraint.eos_forced()


def test_equal_states_share_one_mask_across_objects_and_paths():
    one, two = regex(VOCABULARY, "[ab]*c"), regex(VOCABULARY, "[ab]*c")
    for token in VOCABULARY.greedy(b"abab"):
        one.append_token(token)
    assert one.state_key() == two.state_key()
    assert one.mask_row() is two.mask_row()
    assert regex(VOCABULARY, "[ab]*d").state_key() != one.state_key()


def test_an_illegal_token_is_an_error_and_changes_nothing():
    constraint = regex(VOCABULARY, "ab")
    before = constraint.mask_row()
    for token in (VOCABULARY.greedy(b"b")[0], 2, VOCABULARY.size - 1, VOCABULARY.size, -1):
        with pytest.raises(ConstraintError, match="not allowed"):
            constraint.append_token(token)
    assert constraint.mask_row() is before
    constraint.append_token(0)
    assert constraint.mask_row() is before
    with pytest.raises(ConstraintError, match="take back"):
        constraint.rollback(2)
    constraint.rollback(1)


def test_a_vocabulary_without_the_bytes_gives_an_empty_mask():
    vocabulary = small_vocabulary("x", "y")
    constraint = regex(vocabulary, "xa")
    constraint.append_token(3)
    assert not constraint.mask_row().any()
    assert not constraint.eos_allowed()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_tree_says_what_the_first_state_of_the_automaton_does(pattern: str):
    tree = regex_syntax.parse(pattern)
    automaton = RegexAutomaton(tree)
    assert regex_syntax.is_nullable(tree) == automaton.accepts(automaton.start)
    onward = {
        byte for byte, after in enumerate(automaton.row(automaton.start)) if after != DEAD and byte < 128
    }
    assert set(regex_syntax.first_ascii(tree)) == onward
