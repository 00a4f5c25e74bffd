"""What each word makes of its arguments, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest

import constraints
from aici_vllm.controller import words
from aici_vllm.controller.awaits import Decide, FixedText, WaitVars
from aici_vllm.controller.branch import Branch
from aici_vllm.controller.decisions import BranchDecision, Splice
from aici_vllm.controller.errors import LimitError
from aici_vllm.controller.limits import Limits
from aici_vllm.controller.sampling import Generation
from constraints import Constraint
from constraints.guidance import GuidanceConstraint
from constraints.machine import MachineConstraint, compiled
from constraints.masks import masks
from constraints.regex_constraint import RegexConstraint
from tests.controller.native import PROMPT, group_of
from tests.controller.scripts import EOS, VOCABULARY


@pytest.fixture
def branch() -> Branch:
    return group_of(context=50, limits=Limits(variable_bytes=20, branches_made=5)).root


def splicing(*splices: tuple[list[int], list[int]]) -> BranchDecision:
    """A branch with these `when_sampled` and `ff_tokens`."""
    return BranchDecision(
        splices=[Splice(when_sampled=when, ff_tokens=ff) for when, ff in splices],
        sample_mask=VOCABULARY.all_tokens(),
    )


# Fixed text.


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("hello ab", [258, ord(" "), *b"ab"]),
        ("<eos>", list(b"<eos>")),
        (b"a\xc3", [*b"a", 0xC3]),
        ("", []),
    ],
)
def test_fixed_text_is_tokenized_and_logged(branch: Branch, text: str | bytes, tokens: list[int]) -> None:
    assert words.fixed_text(branch, text) == FixedText(tokens)
    assert str(branch.log) == f"FIXED {text!r}\n"


def test_a_quiet_branch_logs_nothing(branch: Branch) -> None:
    branch.log_level = 0
    words.fixed_text(branch, "a")
    assert str(branch.log) == ""


@pytest.mark.parametrize("text", [None, 5, ["a"], bytearray(b"a")])
def test_fixed_text_is_text(branch: Branch, text: Any) -> None:
    with pytest.raises(TypeError, match=f"FixedTokens takes str or bytes, not {type(text).__name__}"):
        words.fixed_text(branch, text)


def test_fixed_text_follows_a_mark_that_stands(branch: Branch) -> None:
    mark = branch.mark()
    assert words.fixed_text(branch, "a", mark) == FixedText([ord("a")], mark)
    with pytest.raises(ValueError, match="this label is gone"):
        words.fixed_text(branch, "a", mark + 1)


def test_a_text_that_cannot_fit_is_not_tokenized(branch: Branch, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenized: list[str | bytes] = []
    monkeypatch.setattr(VOCABULARY, "tokenize", lambda text: tokenized.append(text) or [])
    # 50 tokens of 5 bytes each, the longest ones.
    words.fixed_text(branch, "x" * 250)
    for text in "x" * 251, b"x" * 251:
        with pytest.raises(
            ValueError, match="tokens of fixed text do not fit: 251 characters are more than 50"
        ):
            words.fixed_text(branch, text)
    assert len(tokenized) == 1


# Generations.

SCHEMA = {"type": "integer"}

KINDS: list[tuple[dict[str, Any], Constraint]] = [
    ({}, constraints.AnyText(VOCABULARY)),
    ({"regex": "a|bc"}, constraints.regex(VOCABULARY, "a|bc")),
    ({"yacc": '%start A %% A: "x" | "yz" ;'}, constraints.yacc(VOCABULARY, '%start A %% A: "x" | "yz" ;')),
    ({"substring": "ab cd"}, constraints.substring(VOCABULARY, "ab cd", '"')),
    (
        {"substring": "ab cd", "substring_end": "."},
        constraints.substring(VOCABULARY, "ab cd", "."),
    ),
    ({"options": ["a", "b"]}, constraints.options(VOCABULARY, ["a", "b"])),
    ({"options": ("a", "b")}, constraints.options(VOCABULARY, ["a", "b"])),
    ({"options": []}, constraints.options(VOCABULARY, [])),
    ({"grammar": 'start: "p" | "q"'}, constraints.lark(VOCABULARY, 'start: "p" | "q"')),
    ({"json_schema": SCHEMA}, constraints.json_schema(VOCABULARY, SCHEMA)),
    ({"constraint": constraints.regex(VOCABULARY, "k")}, constraints.regex(VOCABULARY, "k")),
]


@pytest.mark.parametrize("given, expected", KINDS, ids=lambda value: str(value)[:30])
def test_each_keyword_makes_its_constraint(
    branch: Branch, given: dict[str, Any], expected: Constraint
) -> None:
    made = words.generate(branch, **given)
    assert (made.constraint.mask_row() == expected.mask_row()).all()
    assert made.constraint.eos_allowed() == expected.eos_allowed()
    assert made.shared == ("constraint" in given)
    assert (made.max_tokens, made.min_tokens, made.stop_at, made.store_var) == (20, 0, None, None)


def test_what_is_asked_for_is_passed_on(branch: Branch) -> None:
    made = words.generate(
        branch, max_tokens=7, min_tokens=2, stop_at="é", store_var="v", temperature=0.5, top_p=1
    )
    assert (made.max_tokens, made.min_tokens, made.stop_at) == (7, 2, "é".encode())
    assert (made.store_var, made.temperature, made.top_p) == ("v", 0.5, 1)
    assert words.generate(branch, stop_at="").stop_at is None


def test_at_most_one_constraint_an_empty_one_counts(branch: Branch) -> None:
    with pytest.raises(ValueError, match="at most one constraint may be given, not regex and options"):
        words.generate(branch, regex="", options=[])


@pytest.mark.parametrize(
    "given, kind, says",
    [
        ({"max_tokens": -1}, ValueError, "max_tokens must be 0 or more, not -1"),
        ({"max_tokens": 1.5}, ValueError, "max_tokens must be 0 or more, not 1.5"),
        ({"max_tokens": 51}, ValueError, "max_tokens=51 is more than the model's context of 50 tokens"),
        ({"min_tokens": -1}, ValueError, "min_tokens must be from 0 to max_tokens, not -1"),
        ({"min_tokens": 5, "max_tokens": 4}, ValueError, "min_tokens must be from 0 to max_tokens, not 5"),
        ({"temperature": -0.1}, ValueError, "temperature must be 0 or more, not -0.1"),
        ({"temperature": math.nan}, ValueError, "temperature must be 0 or more, not nan"),
        ({"temperature": math.inf}, ValueError, "temperature must be 0 or more, not inf"),
        ({"temperature": "hot"}, ValueError, "temperature must be 0 or more, not 'hot'"),
        ({"top_p": "x"}, ValueError, "top_p must be over 0 and at most 1, not 'x'"),
        ({"top_p": 0}, ValueError, "top_p must be over 0 and at most 1, not 0"),
        ({"top_p": 1.1}, ValueError, r"top_p must be over 0 and at most 1, not 1\.1"),
        ({"top_p": math.nan}, ValueError, "top_p must be over 0 and at most 1, not nan"),
        ({"stop_at": b"x"}, TypeError, "stop_at must be a string, not bytes"),
        ({"store_var": 5}, TypeError, "a variable's name must be a string, not int"),
        ({"constraint": "a+"}, TypeError, "constraint must be a Constraint, not str"),
        ({"constraint": Constraint}, TypeError, "constraint must be a Constraint, not type"),
        ({"options": "abc"}, ValueError, "options must be a list of strings"),
        ({"options": ["a", 5]}, ValueError, "options must be a list of strings"),
        ({"regex": "(a"}, ValueError, "regex|pattern|group"),
        ({"yacc": "nonsense"}, ValueError, "grammar|yacc"),
        ({"grammar": "nonsense"}, ValueError, "grammar"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_at_the_line_that_made_them(
    branch: Branch, given: dict[str, Any], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        words.generate(branch, **given)


def test_the_largest_generation_fits_the_context_exactly(branch: Branch) -> None:
    assert words.generate(branch, max_tokens=50).max_tokens == 50
    assert words.generate(branch, max_tokens=0).max_tokens == 0


def test_a_constraint_without_a_vocabulary_gets_the_models(branch: Branch) -> None:
    constraint = Constraint()
    made = words.generate(branch, constraint=constraint)
    assert made.constraint is constraint and constraint.vocabulary is VOCABULARY
    assert constraint.token_allowed(EOS) and constraint.token_allowed(97)


WARM = [
    {},
    {"regex": "(one|two|three)"},
    {"regex": "forced [a-z]+"},
    {"regex": "forced"},
    {"yacc": '%start A %% A: "x" A | "yz" ;'},
    {"options": ["hello", "help"]},
    {"options": []},
    {"substring": "ab cd"},
    {"grammar": 'start: "pre" ("p" | "q")'},
    {"json_schema": {"type": "object", "properties": {"a": SCHEMA}, "required": ["a"]}},
]


@pytest.mark.parametrize("kind", WARM, ids=str)
def test_what_the_engine_asks_first_was_found_out_before(
    branch: Branch, kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled.clear()
    masks.clear()
    made: list[Constraint] = []
    for cls in Constraint, MachineConstraint, RegexConstraint, GuidanceConstraint:
        make_row = cls._make_row

        def noted(self: Constraint, make_row: Any = make_row) -> Any:
            made.append(self)
            return make_row(self)

        monkeypatch.setattr(cls, "_make_row", noted)
    request = words.generate(branch, **kind)
    words.prepare(branch, request)
    by_then = len(made)
    generation = Generation(request, VOCABULARY)
    generation.take_forced()
    if not generation.finished:
        generation.mask_row()
    assert len(made) == by_then
    words.prepare(branch, words.generate(branch, **kind))
    assert len(made) == by_then, "the second time it is all known"


def test_finding_out_moves_nothing(branch: Branch) -> None:
    request = words.generate(branch, regex="forced [a-z]+")
    words.prepare(branch, request)
    assert VOCABULARY.detokenize(request.constraint.forced_tokens()).startswith(b"forced")
    assert request.constraint.token_allowed(ord("f"))


# Forks and waits.


def test_a_number_of_branches_is_so_many_that_do_nothing(branch: Branch) -> None:
    forked = words.fork(branch, 3)
    assert isinstance(forked, Decide) and forked.result.branches == [BranchDecision.noop()] * 3
    one = BranchDecision.noop()
    assert words.fork(branch, [one]).result.branches[0] is one


@pytest.mark.parametrize(
    "branches, kind, says",
    [
        (0, ValueError, "needs at least 1 branch"),
        (-5, ValueError, "needs at least 1 branch"),
        ([], ValueError, "needs at least 1 branch"),
        (6, LimitError, r"too many forks \(a request may make 5 branches in all\)"),
        ("ab", TypeError, "branches must be a list of Branch"),
        ([1], TypeError, "branches must be a list of Branch"),
        (2.0, TypeError, "branches must be a list of Branch"),
    ],
    ids=str,
)
def test_a_fork_of_nothing_or_of_anything_else_is_refused(
    branch: Branch, branches: Any, kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        words.fork(branch, branches)


@pytest.mark.parametrize(
    "branches, says",
    [
        ([BranchDecision.noop()] * 6, r"too many forks \(a request may make 5 branches in all\)"),
        ([splicing(([], [1] * 51))], "a splice of 51 tokens does not fit: the context holds 50"),
        (
            [splicing(*[([1], [2])] * 261)],
            "the splices of a branch name 261 tokens, and the vocabulary has 260",
        ),
        ([splicing(([1] * 261, []))], "the splices of a branch name 261 tokens"),
    ],
)
def test_a_decision_that_cannot_be_carried_out_is_refused(
    branch: Branch, branches: list[BranchDecision], says: str
) -> None:
    for word in words.decide, words.fork:
        with pytest.raises(LimitError, match=says):
            word(branch, branches)


def test_a_decision_that_just_fits_is_taken(branch: Branch) -> None:
    branches = [splicing(([], [1] * 50)), *[splicing(*[([1], [2])] * 260)] * 4]
    assert words.decide(branch, branches).result.branches == branches


def test_wait_vars_takes_names(branch: Branch) -> None:
    assert words.wait_vars(branch, ["a", "b"]) == WaitVars(("a", "b"))
    assert words.wait_vars(branch, ()) == WaitVars(())
    with pytest.raises(TypeError, match="a variable's name must be a string, not bytes"):
        words.wait_vars(branch, ["a", b"b"])  # type: ignore[list-item]


def test_a_name_that_is_given_again_is_waited_for_once(branch: Branch) -> None:
    names = ["b", "a", "b"]
    waited = words.wait_vars(branch, names)
    assert waited == WaitVars(("b", "a"))
    assert words.in_order(names, waited, [b"2", b"1"]) == [b"2", b"1", b"2"]


def test_wait_vars_takes_so_many_names(branch: Branch) -> None:
    names = [str(number) for number in range(words.MOST_NAMES)]
    assert words.wait_vars(branch, names) == WaitVars(tuple(names))
    with pytest.raises(LimitError, match=r"wait_vars\(\) takes 256 names at most, not 257"):
        words.wait_vars(branch, ["again"] * 257)


# Variables.


def test_variables_hold_bytes(branch: Branch) -> None:
    assert words.get_var(branch, "v") is None
    words.append_var(branch, "v", "é")
    words.append_var(branch, "v", b"\xff")
    assert words.get_var(branch, "v") == b"\xc3\xa9\xff"
    words.set_var(branch, "v", bytearray(b"x"))
    assert words.get_var(branch, "v") == b"x"


@pytest.mark.parametrize("word", [words.set_var, words.append_var])
def test_a_variable_is_named_by_a_string_and_holds_text(branch: Branch, word: Any) -> None:
    with pytest.raises(TypeError, match="a variable's name must be a string, not int"):
        word(branch, 5, "x")
    with pytest.raises(TypeError, match="a variable holds str or bytes, not int"):
        word(branch, "v", 5)
    with pytest.raises(UnicodeEncodeError):
        word(branch, "\ud800", "x")
    with pytest.raises(LimitError, match="may hold 20 bytes together"):
        word(branch, "v", "x" * 20)
    assert branch.group.variables.snapshot() == {}


def test_bytes_decide_what_a_variable_holds(branch: Branch) -> None:
    with pytest.raises(AssertionError, match=r"^Variable v is unset$"):
        words.check_var(branch, "v", "x")
    words.set_var(branch, "v", b"\xff")
    words.check_var(branch, "v", b"\xff")
    with pytest.raises(AssertionError, match=r"^Variable v: '\ufffd' != '\ufffd'$"):
        words.check_var(branch, "v", "\ufffd")
    words.set_var(branch, "w", "é")
    words.check_vars(branch, {"w": "é"})
    with pytest.raises(AssertionError, match="Variable w: 'é' != 'e'"):
        words.check_vars(branch, {"w": "e"})
    with pytest.raises(TypeError, match=r"check_vars\(\) takes a dict, not list"):
        words.check_vars(branch, ["w"])  # type: ignore[arg-type]


# Marks.


def test_what_stands_after_a_mark(branch: Branch) -> None:
    start = branch.mark()
    branch.awaits = 1
    mark = branch.mark()
    branch.sequence.splice(len(PROMPT), [0xC3, 258])
    assert (words.position(branch, start), words.position(branch, mark)) == (0, len(PROMPT))
    assert words.tokens_since(branch, mark) == [0xC3, 258]
    assert (
        words.text_since(branch, mark) == "\ufffdhello" and words.text_since(branch, start) == "pq\ufffdhello"
    )
    assert words.get_tokens(branch) == [*PROMPT, 0xC3, 258]
    words.get_tokens(branch).clear()
    assert len(branch.sequence) == 4
    branch.sequence.splice(0, [])
    for word in words.position, words.tokens_since, words.text_since:
        with pytest.raises(ValueError, match="this label is gone"):
            word(branch, mark)
    assert words.text_since(branch, start) == ""
