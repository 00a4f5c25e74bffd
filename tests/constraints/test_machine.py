"""What machines remember is bounded, and equal sources share one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterator
from random import Random
from threading import Barrier, Thread

import pytest

from constraints import machine, regex
from constraints.lexer import Lexer
from constraints.literals import OptionsMachine, SubstringMachine
from constraints.machine import Machine
from constraints.regex_constraint import RegexMachine
from constraints.yacc_constraint import YaccMachine
from constraints.yacc_grammar import read_grammar
from tests.constraints.walks import small_vocabulary

VOCABULARY = small_vocabulary("ab", "a", "b", "abab")


def test_a_machine_with_too_many_states_is_replaced(monkeypatch: pytest.MonkeyPatch):
    one = regex(VOCABULARY, "(a|b)*b{3}")
    assert regex(VOCABULARY, "(a|b)*b{3}").machine is one.machine
    for _ in range(3):
        one.append_token(VOCABULARY.greedy(b"b")[0])
    monkeypatch.setattr(machine, "MAX_STATES", 1)
    two = regex(VOCABULARY, "(a|b)*b{3}")
    assert two.machine is not one.machine
    # The sequence on the old machine goes on, and nobody confuses the states of the two.
    assert one.mask_row().any() and one.state_key()[0] != two.state_key()[0]


def test_remembered_steps_and_runs_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "MAX_STEPS", 5)
    made = RegexMachine(VOCABULARY, "(ab){1,50}")
    state, tokens = made.start, []
    token = VOCABULARY.greedy(b"ab")[0]
    for _ in range(40):
        made.following(state)
        made.forced_run(state, tokens)
        after = made.advance(state, token)
        assert after is not None
        state, tokens = after, [*tokens, token]
    assert max(sum(map(len, made.steps.values())), len(made._following), len(made._runs)) <= 6


def test_forced_bytes_end_where_there_is_a_choice():
    made = OptionsMachine(VOCABULARY, [b"abab", b"abba", b"abbab"])
    assert made.forced_bytes(made.start) == (b"ab", b"ab")
    state = made.step(made.start, b"abb")
    assert state is not None and made.forced_bytes(state) == (b"a", b"b")
    assert made.forced_run(made.start, []) == []


def walked(made: Machine, state: Hashable, most: int) -> tuple[bytes, bytes]:
    """The forced bytes, one after another."""
    forced = b""
    while len(forced) < most and not made.accepts(state) and len(follow := made.next_bytes(state)) == 1:
        state, forced = made.step(state, follow), forced + follow
    return forced, made.next_bytes(state)


@pytest.mark.parametrize("most", [1, 3, 7, 100])
def test_forced_bytes_are_the_same_from_wherever_they_were_asked_before(
    most: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(machine, "MAX_RUN", most)
    texts = [b"abaabbabaababbababb", b"abaabbabaabbbaab", b"b"]
    for seed in range(10):
        made, rng = OptionsMachine(VOCABULARY, texts), Random(seed)
        for _ in range(30):
            text = rng.choice(texts)
            state = made.step(made.start, text[: rng.randrange(len(text))])
            assert state is not None and made.forced_bytes(state) == walked(made, state, most)


def test_a_forced_run_is_walked_once_however_often_it_is_asked_for():
    made = OptionsMachine(VOCABULARY, [b"ab" * 5_000])
    steps = 0

    def step(state: int, text: bytes) -> int | None:
        nonlocal steps
        steps += 1
        return OptionsMachine.step(made, state, text)

    made.step = step
    for state in range(10_000):
        made.has_choice(state)
        made.forced_bytes(state)
    assert steps == 10_000


class Made:
    """Something compiled, of a size."""

    def __init__(self, states: int):
        self.states = states

    def num_states(self) -> int:
        return self.states


def test_what_is_kept_is_bounded_in_number_and_in_states():
    kept = machine.Compiled()
    first = kept.get("first", lambda: Made(0))
    assert kept.get("first", lambda: Made(0)) is first
    for number in range(machine.MAX_MACHINES):
        kept.get(number, lambda: Made(0))
    again = kept.get("first", lambda: Made(0))
    assert again is not first
    large = machine.MAX_STATES
    for number in range(10 * machine.COUNTED_EVERY):
        kept.get(("large", number), lambda: Made(large))
    assert kept.num_states() <= machine.MAX_ALL_STATES + machine.COUNTED_EVERY * large
    assert kept.get("first", lambda: Made(0)) is not again
    worn = kept.get("worn", lambda: Made(large + 1))
    assert kept.get("worn", lambda: Made(1)) is not worn


# Threads.

NUM_THREADS = 4
LETTERS = small_vocabulary(
    "ab", "if ", "(a", "a)", "1.5", "[1", "el", " a b", single='abcdefils()[].,;=+-*/ 0123456789"_'
)
GRAMMAR = """%% S: S T | T ;
    T: "if" E "else" E ";" | ID "=" E ";" ;
    E: E "+" F | E "-" F | F ;
    F: "(" E ")" | "[" A "]" | ID | '/[0-9]+(\\.[0-9]+)?/' | '/"[a-z ]*"/' ;
    A: E | A "," E ;
    ID: '/[a-z_][a-z0-9_]*/' ;
    SKIP: " " ;"""
MACHINES: dict[str, Callable[[], Machine]] = {
    "yacc": lambda: YaccMachine(LETTERS, GRAMMAR),
    "substring": lambda: SubstringMachine(LETTERS, b"if a b is a else a bed is a field as if a b " * 3, b'"'),
    "regex": lambda: RegexMachine(LETTERS, r"([a-f]{1,9}|if (a|b)|\[[0-9]{1,7}\]){1,30}"),
}


@pytest.fixture
def tiny_switch_interval() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(work: Callable[[int], None]) -> None:
    """Let `work` run in several threads that start at once."""
    barrier, errors = Barrier(NUM_THREADS), []

    def run(number: int) -> None:
        barrier.wait()
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [Thread(target=run, args=(number,)) for number in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def masks_of(made: Machine, seed: int) -> list[bytes]:
    """The masks along a random walk, which is the same in equal machines."""
    rng, state, found = Random(seed), made.start, []
    for _ in range(30):
        made.state_key(state)
        row = made.text_row(state, [])
        found.append(row.tobytes())
        onward = [token for token in range(LETTERS.size) if row[token >> 5] >> (token & 31) & 1]
        if not onward:
            break
        state = made.advance(state, rng.choice(onward))
        assert state is not None
        made.has_choice(state)
    return found


@pytest.mark.parametrize("kind", MACHINES)
def test_threads_that_walk_one_machine_see_the_masks_of_one_that_is_alone(
    kind: str, tiny_switch_interval: None
):
    wanted = [masks_of(MACHINES[kind](), number % 2) for number in range(NUM_THREADS)]
    for _ in range(10 if kind == "yacc" else 5):
        shared, got = MACHINES[kind](), [[] for _ in wanted]
        together(lambda number, shared=shared, got=got: got[number].extend(masks_of(shared, number % 2)))
        assert got == wanted


def test_threads_that_step_one_lexer_agree_on_its_states(tiny_switch_interval: None):
    terminals = read_grammar(GRAMMAR).terminals

    def lexemes(lexer: Lexer, seed: int) -> list[tuple[int, int]]:
        rng, state, found = Random(seed), 0, []
        for _ in range(300):
            state = lexer.row(state)[rng.choice(b'abcdefils()[].=09 "/')]
            state = max(state, 0)
            found.append((lexer.winner[state], lexer.reachable[state]))
        return found

    wanted = [lexemes(Lexer(terminals), number % 2) for number in range(NUM_THREADS)]
    for _ in range(30):
        lexer, got = Lexer(terminals), [[] for _ in wanted]
        together(lambda number, lexer=lexer, got=got: got[number].extend(lexemes(lexer, number % 2)))
        assert got == wanted
