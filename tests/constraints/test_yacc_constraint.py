"""Yacc constraints against an Earley parser, tried on every token."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from constraints import ConstraintError, yacc, yacc_constraint
from constraints.lr import make_tables
from constraints.machine import MachineConstraint
from constraints.yacc_constraint import (
    MAX_REDUCTIONS,
    MAX_TOP,
    STACKS_IN_A_STATE,
    Reading,
    Stack,
    YaccMachine,
    neighbours,
)
from constraints.yacc_grammar import Production, read_grammar
from tests.constraints.grammar_oracle import GrammarOracle, Rules, as_yacc
from tests.constraints.walks import small_vocabulary, walk

VOCABULARY = small_vocabulary(
    "if",
    "if ",
    "ab",
    "a+b",
    "+(",
    "((",
    "))",
    ") ",
    "1.5",
    ".5",
    "12",
    "a1",
    "a=1;",
    "; ",
    "else",
    " \n",
    "é",
    '"a"',
    '",',
    "[a",
    "a,b",
    ",",
    "fif",
    b"\xc3",
    b"\xa9",
    "//",
    "/*",
    "*/",
    single='abifelse+*()12.;= ,"[]é\n/',
)

SUM: Rules = {
    "E": [["E", "'+'", "T"], ["T"]],
    "T": [["T", "'*'", "F"], ["F"]],
    "F": [["'('", "E", "')'"], ["'/[0-9]+(\\.[0-9]+)?/'"], ["ID"]],
    "ID": [["'/[a-z][a-z0-9]*/'"]],
    "SKIP": [["'/[ \\n]+/'"]],
}
KEYWORDS: Rules = {
    "S": [["S", "I"], ["I"]],
    "I": [
        ["'if'", "'/[a-z]+/'", "';'"],
        ["'if'", "'/[a-z]+/'", "'else'", "I"],
        ["'/[a-z]+/'", "'='", "'/[0-9]+/'", "';'"],
    ],
    "SKIP": [["' '"], ["'/\\n/'"], ["'///[^\\n]*/'"]],
}
LISTS: Rules = {
    "L": [["'['", "O", "']'"]],
    "O": [[], ["V"], ["V", "','", "O"]],
    "V": [["L"], ['\'/"[^"]*"/\''], ["'/é+/'"]],
}
# LR(1) and not LALR(1): merging its states would give a conflict between the two reductions.
NOT_LALR: Rules = {
    "S": [["'a'", "E", "'1'"], ["'b'", "E", "'2'"], ["'a'", "F", "'2'"], ["'b'", "F", "'1'"]],
    "E": [["'e'"]],
    "F": [["'e'"]],
}
EMPTY: Rules = {"S": [["A", "B", "'a'"], []], "A": [[], ["'1'"]], "B": [[], ["'2'"]], "SKIP": [["' '"]]}


@pytest.mark.parametrize(
    "rules", [SUM, KEYWORDS, LISTS, NOT_LALR, EMPTY], ids=["sum", "keywords", "lists", "lr1", "empty"]
)
def test_masks_are_brute_force_along_walks(rules: Rules):
    oracle = GrammarOracle(rules)
    for seed in range(4):
        walk(yacc(VOCABULARY, as_yacc(rules)), VOCABULARY, oracle.viable, oracle.ends, Random(seed), steps=10)


TERMINALS = st.sampled_from(
    ["'a'", "'b'", "'if'", "'/[a-f]+/'", "'('", "')'", "'/[0-9]+/'", "'+'", "'='", "'==1'"]
)
SYMBOLS = st.one_of(TERMINALS, st.sampled_from(["A", "B", "C"]))
BODIES = st.lists(st.lists(SYMBOLS, max_size=3), min_size=1, max_size=3, unique_by=tuple)


@settings(max_examples=100, deadline=None)
@given(BODIES, BODIES, BODIES, st.booleans(), st.integers(0, 1 << 16))
def test_masks_of_generated_grammars_are_brute_force(a, b, c, skip: bool, seed: int):
    rules: Rules = {"A": a, "B": b, "C": c} | ({"SKIP": [["' '"]]} if skip else {})
    try:
        constraint = yacc(VOCABULARY, as_yacc(rules))
    except ConstraintError as error:
        assume("no text" not in str(error) and "no terminal" not in str(error))
        raise
    assume(not constraint.machine.tables.ambiguous)
    oracle = GrammarOracle(rules)
    walk(constraint, VOCABULARY, oracle.viable, oracle.ends, Random(seed), steps=6)


def test_precedence_decides_conflicts():
    grammar = """%left "+"
        %left "*"
        %%
        E: E "+" E | E "*" E | "(" E ")" | "/[0-9]+/" ;"""
    constraint = yacc(VOCABULARY, grammar)
    assert not constraint.machine.tables.ambiguous
    for token in VOCABULARY.greedy(b"1+2*(1+1)"):
        constraint.append_token(token)
    assert constraint.eos_allowed()


def test_a_dangling_else_is_shifted():
    grammar = '%% S: "if" S | "if" S "else" S | "a" ;'
    constraint = yacc(VOCABULARY, grammar)
    assert constraint.machine.tables.ambiguous
    for token in VOCABULARY.greedy(b"ififaelsea"):
        constraint.append_token(token)
    assert constraint.eos_allowed()


def test_the_lexer_takes_back_one_byte_only():
    constraint = yacc(VOCABULARY, """%% S: '/1(\\.\\.1)?/' R ; R: "." "+" ;""")
    for token in VOCABULARY.greedy(b"1."):
        constraint.append_token(token)
    # "1." could become "1..1", so after it only that is left.
    assert constraint.machine.next_bytes(constraint._state) == b"."


def test_the_key_of_a_state_is_as_deep_as_its_mask_looks():
    grammar = as_yacc({"S": [["'('", "S", "')'"], ["'a'"]]})
    masks = {}
    for depth in range(2, 30):
        constraint = yacc(VOCABULARY, grammar)
        for token in VOCABULARY.greedy(b"(" * depth):
            constraint.append_token(token)
        masks.setdefault(constraint.state_key(), constraint.mask_row().tobytes())
        assert masks[constraint.state_key()] == constraint.mask_row().tobytes()
    # `))` is the longest run of closing parentheses in a token, so the stack matters no deeper.
    assert len(masks) <= 4


DEEP = '%% S: "(" S ")" | "a" ;'


def test_a_stack_shares_what_is_below_its_top():
    made = YaccMachine(VOCABULARY, DEEP)
    state = made.start
    for _ in range(1_000):
        after = made.step(state, b"(")
        assert after is not None and after == made.step(state, b"(")
        # What is on top may have become another when the lexeme ended, so the parser is one behind.
        assert after[0] is state[0] or after[0].below is state[0]
        state = after
    assert len(made._stacks) == 999 and made.num_states() >= 999 // STACKS_IN_A_STATE


def test_stacks_are_forgotten_when_they_are_many(monkeypatch: pytest.MonkeyPatch):
    def masks(made: YaccMachine) -> list[bytes]:
        constraint, found = MachineConstraint(made), []
        for token in VOCABULARY.greedy(b"(" * 150 + b"a" + b")" * 150):
            found.append(constraint.mask_row().tobytes())
            assert constraint.token_allowed(token) and constraint.place() is not None
            constraint.append_token(token)
            assert not constraint.has_choice() or constraint.state_key()
        assert constraint.eos_allowed()
        return found

    wanted = masks(YaccMachine(VOCABULARY, DEEP))
    monkeypatch.setattr(yacc_constraint, "MAX_STACKS", 20)
    made = YaccMachine(VOCABULARY, DEEP)
    assert masks(made) == wanted
    assert max(map(len, (made._stacks, made.steps, made.choices, made._names))) <= 60


def test_whether_a_list_may_end_is_not_found_out_anew_for_each_entry(monkeypatch: pytest.MonkeyPatch):
    reductions, reduce = 0, Reading._reduce

    def counted(reading: Reading, *args: Any) -> Any:
        nonlocal reductions
        reductions += 1
        return reduce(reading, *args)

    monkeypatch.setattr(Reading, "_reduce", counted)
    made = YaccMachine(VOCABULARY, '%% L: "a" L | "a" ;')
    state = made.start
    for _ in range(1_000):
        after = made.step(state, b"a")
        assert after is not None and made.accepts(after)
        state = after
    assert reductions <= 2 * 1_000


def test_a_list_of_any_length_may_end():
    made = YaccMachine(VOCABULARY, '%% L: "a" L | "a" ;')
    state = made.step(made.start, b"a" * (MAX_REDUCTIONS + 2))
    assert state is not None and made.accepts(state)


def test_a_mask_that_depends_on_all_of_a_deep_stack_is_named_by_it():
    constraint, names = yacc(VOCABULARY, '%% S: L ";" ; L: "a" L | "a" ;'), set()
    token = VOCABULARY.greedy(b"a")[0]
    for _ in range(2 * MAX_TOP):
        constraint.append_token(token)
        names.add(constraint.state_key())
        semicolon = VOCABULARY.greedy(b";")[0]
        assert constraint.token_allowed(token) and constraint.token_allowed(semicolon)
        row = constraint.mask_row()
        assert row[semicolon >> 5] >> (semicolon & 31) & 1
    assert len(names) == 2 * MAX_TOP
    assert all(isinstance(name[1][1], Stack) or len(name[1][1]) <= MAX_TOP for name in names)


def test_a_deep_stack_is_given_up_in_one_piece():
    stack = Stack(0)
    for state in range(200_000):
        stack = Stack(state, stack)
    del stack


@pytest.mark.parametrize("grammar", [5, None, b"%% S: 'a' ;"])
def test_a_grammar_is_a_string(grammar: object):
    with pytest.raises(ConstraintError, match="a yacc grammar is a string, not"):
        yacc(VOCABULARY, grammar)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("%start S\n%%\nS: x ;", r"line 3, column 4: rule x is used but not defined"),
        ("%%\nS 'a' ;", r"line 2, column 3: expected ':'"),
        ("%%\nS: 'a' ", r"expected '\|' or ';'"),
        ("%% S: '/(/' ;", r"terminal .* never closed at character 0"),
        ("%% S: '/a*/' ;", "matches the empty text"),
        ("%% S: S 'a' ;", "rule S describes no text"),
        ("%% S: '' ;", "terminal cannot be empty"),
        ("%% ", "there is no rule"),
        ("%foo x %% S: 'a' ;", "'%foo' is not supported"),
        ("%% S: 'a' ; SKIP: 'a' ;", "both skipped and used"),
        ("%% S: ; ", "no terminal"),
        ("%% S: 'a' %prec", r"column 16: expected a terminal after '%prec'"),
        ("%% S: 'a' %prec ;", r"column 17: expected a terminal after '%prec'"),
        ("%% S: 'a' | 'a' %prec | 'a' ;", r"expected a terminal after '%prec'"),
        ("%% S: " + "'a' " * 20_000 + ";", "line 1, column 79995: the grammar has more than 20000 symbols"),
        ("%% S: '" + "a" * 200_000 + "' ;", "it has 200010 characters; 200000 are allowed"),
        ("%% S: 'a' $ ;", r"column 11: unexpected '\$'"),
    ],
)
def test_grammar_errors_say_what_and_where(grammar: str, message: str):
    with pytest.raises(ConstraintError, match=message):
        yacc(VOCABULARY, grammar)


class Passes(list[Production]):
    """Productions that count how often all of them are looked at."""

    passes = 0

    def __iter__(self) -> Iterator[Production]:
        self.passes += 1
        return super().__iter__()


def test_rules_that_hang_on_one_another_are_looked_at_once():
    chain = " ".join(f"A{n}: A{n + 1} ;" for n in range(200))
    for text in (f"%start A0 %% {chain} A200: 'x' ;", f"%start A0 %% A200: 'x' ; {chain}"):
        grammar = read_grammar(text)
        grammar.productions = passes = Passes(grammar.productions)
        make_tables(grammar)
        neighbours(grammar)
        assert passes.passes < 20


def test_the_lookaheads_of_reductions_are_counted(monkeypatch: pytest.MonkeyPatch):
    # Hundreds of reductions, each on hundreds of terminals.
    after = " | ".join(f"A 't{n}'" for n in range(150))
    grammar = read_grammar(f"%% S: {after} ; A: " + " | ".join(f"'u{n}'" for n in range(150)) + " ;")
    make_tables(grammar)
    monkeypatch.setattr("constraints.lr.MAX_WORK", 5_000)
    with pytest.raises(ConstraintError, match="takes too long to make"):
        make_tables(grammar)


def test_the_neighbours_of_terminals_are_counted(monkeypatch: pytest.MonkeyPatch):
    rules = " ".join(f"A{n}: 'y' A{n + 1} | 'x{n}' ;" for n in range(100))
    grammar = read_grammar(f"%% {rules} A100: 'x' ;")
    monkeypatch.setattr("constraints.lr.MAX_WORK", 200)
    with pytest.raises(ConstraintError, match="takes too long to make"):
        neighbours(grammar)
