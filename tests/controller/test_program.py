"""A native program: turns, prints, errors, and the replay that a fork is."""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys

import pytest

from aici_vllm import aici
from aici_vllm.controller.awaits import FixedText, GetPrompt, Stop
from aici_vllm.controller.branch import Branch
from aici_vllm.controller.program import (
    Controller,
    NativeProgram,
    Raised,
    Returned,
    _Answer,
    _Grown,
    error_line,
    running_program,
    start_controller,
)
from tests.controller.native import engine_of, error, group_of, logs, reasons, run, saying, texts
from tests.controller.scripts import EOS


def program_of(controller: Controller, arg: str = "") -> NativeProgram:
    return NativeProgram(controller, arg, group_of(arg=arg).root)


# Turns.


def test_a_turn_ends_at_an_await_and_the_next_one_begins_with_its_result() -> None:
    got: list[object] = []

    async def controller() -> None:
        got.append(await GetPrompt())
        got.append(await FixedText([1]))

    program = program_of(controller)
    assert program.poll() is None
    program.resume()
    assert program.poll() == program.poll() == GetPrompt()
    program.resume([7])
    assert program.poll() == FixedText([1])
    program.resume("anything")
    assert program.poll() == Returned()
    assert got == [[7], "anything"]


def test_an_error_is_raised_at_the_await() -> None:
    async def controller() -> None:
        try:
            await FixedText([1])
        except KeyError:
            await Stop()

    program = program_of(controller)
    program.resume()
    program.resume(error=KeyError("x"))
    assert program.poll() == Stop()


def test_an_exception_is_one_line_for_the_client_and_a_traceback_for_the_log() -> None:
    async def controller() -> None:
        raise ValueError("no such fruit\nor vegetable")

    program = program_of(controller)
    program.resume()
    turn = program.poll()
    assert isinstance(turn, Raised)
    assert turn.message.startswith("ValueError: no such fruit")
    assert "Traceback" in turn.details and 'raise ValueError("no such fruit' in turn.details


@pytest.mark.parametrize("leave", [sys.exit, GeneratorExit("left"), BaseException("odd")])
def test_a_controller_that_leaves_python_ends_its_branch_only(leave: object) -> None:
    async def controller() -> None:
        await aici.FixedTokens("a")
        if isinstance(leave, BaseException):
            raise leave
        sys.exit(3)

    engine = run(controller)
    assert reasons(engine) == ["fail"] and texts(engine) == ["a"]
    assert type(leave).__name__ in error(engine) or "SystemExit: 3" in error(engine)


def test_an_operators_interrupt_is_not_the_branchs_to_keep() -> None:
    async def controller() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        program_of(controller).resume()


def test_only_aicis_words_can_be_awaited() -> None:
    class Foreign:
        def __await__(self):  # type: ignore[no-untyped-def]
            yield "a string"

    async def controller() -> None:
        await Foreign()

    engine = run(controller)
    assert "TypeError: a controller can only await aici's own words, not 'a string'" in error(engine)


def test_a_function_that_is_not_async_says_so() -> None:
    engine = run(lambda: 5)  # type: ignore[arg-type, return-value]
    assert "a controller must be an async function" in error(engine) and "returned int" in error(engine)


# The argument.


async def _takes(arg: str) -> None: ...
async def _takes_any(*args: str) -> None: ...
async def _takes_keyword_only(*, arg: str = "") -> None: ...
async def _takes_nothing() -> None: ...


@pytest.mark.parametrize(
    "controller, given",
    [
        (_takes, True),
        (_takes_any, True),
        (_takes_nothing, False),
        (_takes_keyword_only, False),
        (functools.partial(_takes), True),
        (functools.partial(_takes, "bound"), False),
    ],
)
def test_the_argument_goes_to_whoever_takes_one(controller: Controller, given: bool) -> None:
    coroutine = start_controller(controller, "the arg")
    assert ("the arg" in str(coroutine.cr_frame.f_locals)) == given  # type: ignore[attr-defined]
    coroutine.close()


# Which program runs.


def test_words_outside_a_controller_say_where_they_work() -> None:
    with pytest.raises(RuntimeError, match=r"inside a running controller: use aici_vllm\.run"):
        running_program()


def test_the_running_program_is_current_only_while_it_runs() -> None:
    seen: list[NativeProgram] = []

    async def controller() -> None:
        seen.append(running_program())
        await FixedText([1])

    program = program_of(controller)
    program.resume()
    assert seen == [program]
    with pytest.raises(RuntimeError):
        running_program()


def test_error_line_is_the_last_line_of_a_traceback() -> None:
    assert error_line(ValueError("x")) == "ValueError: x"


# Prints.


def test_prints_of_both_streams_go_to_the_branchs_log_and_nowhere_else(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def controller() -> None:
        print("one", end=" ")
        print("two", file=sys.stderr)
        await aici.gen_tokens(max_tokens=1)
        print("three")

    engine = run(controller)
    assert logs(engine).startswith("one two\n") and logs(engine).endswith("three\n")
    print("ours")
    assert capsys.readouterr() == ("ours\n", "")


def test_only_text_can_be_printed() -> None:
    async def controller() -> None:
        sys.stdout.write(b"bytes")  # type: ignore[arg-type]

    engine = run(controller)
    assert "write() takes str, not bytes" in error(engine)
    assert "Traceback" in logs(engine)


# Ends.


def test_closing_runs_what_the_controller_left_open_and_may_happen_twice() -> None:
    closed: list[str] = []

    async def controller() -> None:
        try:
            await aici.gen_tokens()
        finally:
            closed.append("closed")
            aici.set_var("left", "yes")

    engine = engine_of(controller)
    engine.group.abort()
    engine.group.abort()
    engine.group.root.program.close()  # type: ignore[union-attr]
    assert closed == ["closed"] and engine.group.variables.get("left") == b"yes"
    program_of(controller).close()


def test_a_finally_that_fails_or_awaits_is_logged_and_stays_in_its_branch() -> None:
    async def fails() -> None:
        try:
            await aici.gen_tokens()
        finally:
            raise KeyError("in finally")

    async def awaits() -> None:
        try:
            await aici.gen_tokens()
        finally:
            await aici.FixedTokens("more")

    for controller, says in (fails, "KeyError: 'in finally'"), (awaits, "coroutine ignored GeneratorExit"):
        engine = engine_of(controller)
        engine.group.abort()
        assert reasons(engine) == ["abort"] and says in logs(engine)


# Forks: the second run is told what the first one was.


async def branches_of_everything() -> None:
    """Asks and awaits every kind before it forks, and tells what it knows after."""
    start = aici.Label()
    prompt = await aici.GetPrompt()
    text = aici.Label()
    await aici.FixedTokens("ab")
    tokens = await aici.gen_tokens(regex="[x-z]+", max_tokens=2)
    tokens.append(1)
    known = aici.get_tokens()
    known.clear()
    aici.set_var("v", "w")
    (waited,) = await aici.wait_vars("v")
    (await aici.FixedTokens("!")).clear()
    noop = aici.Noop()
    await noop
    me = await aici.fork(2)
    print(
        start.ptr, prompt, text.text_since(), tokens, known, waited, noop.curr_tokens, aici.get_var("v"), me
    )


def test_a_fork_replays_every_answer_even_those_the_script_has_changed() -> None:
    engine = run(branches_of_everything, saying("xy"))
    assert texts(engine) == ["abxy!", "abxy!"] and reasons(engine) == ["stop", "stop"]
    expected = "0 [112, 113] abxy! [120, 121, 1] [] b'w' [] b'w' {}\n"
    assert logs(engine, 0).endswith(expected.format(0))
    assert logs(engine, 1) == expected.format(1), "what came before a fork is the parent's to log"


def test_lists_that_grow_are_remembered_once_and_replayed_whole() -> None:
    async def controller() -> None:
        label, seen = aici.Label(), []
        for _ in range(50):
            await aici.FixedTokens("a")
            seen.append((len(aici.get_tokens()), len(label.tokens_since())))
        await aici.FixedTokens("bc", following=label)
        seen.append((len(aici.get_tokens()), len(label.tokens_since())))
        for _ in range(2):
            await aici.fork(2)
            seen.append((len(aici.get_tokens()), len(label.tokens_since())))
        aici.append_var("seen", f"{seen}\n")

    engine = run(controller)
    expected = [(number + 2, number + 2) for number in range(1, 51)] + [(2, 2)] * 3
    assert engine.group.variables.get("seen") == f"{expected}\n".encode() * 4
    for branch in engine.group.branches:
        assert isinstance(branch.program, NativeProgram)
        remembered = [told.value for told in branch.program._told if isinstance(told, _Answer)]
        assert sum(len(value.added) for value in remembered if isinstance(value, _Grown)) <= 2 * (52 + 2)


def test_what_a_script_told_the_world_is_not_told_again() -> None:
    async def controller() -> None:
        aici.append_var("v", "x")
        await aici.FixedTokens("a")
        await aici.fork(3)

    engine = run(controller)
    assert engine.group.variables.get("v") == b"x"
    assert engine.group.root.sequence.spliced == 1
    assert [branch.sequence.spliced for branch in engine.group.branches[1:]] == [0, 0]


def test_an_error_that_the_first_run_caught_is_raised_in_the_second_too() -> None:
    async def controller() -> None:
        caught = []
        early = aici.Label()
        await aici.FixedTokens("a")
        late = aici.Label()
        await aici.FixedTokens("b", following=early)
        for ask in (lambda: late.ptr, lambda: aici.set_var(5, "x"), lambda: aici.get_var("x")):  # type: ignore[arg-type]
            try:
                caught.append(ask())
            except (ValueError, TypeError) as error:
                caught.append(type(error).__name__)
        try:
            await aici.GetPrompt()
        except RuntimeError:
            caught.append("RuntimeError")
        me = await aici.fork(2)
        await aici.FixedTokens(f"{me}{caught}")

    engine = run(controller)
    caught = "['ValueError', 'TypeError', None, 'RuntimeError']"
    assert texts(engine) == [f"b0{caught}", f"b1{caught}"]


def test_forks_of_forks_are_told_what_their_own_parent_was() -> None:
    async def controller() -> None:
        path = [await aici.fork(2)]
        path.append(int(await aici.gen_text(regex="[0-9]", max_tokens=1)))
        path.append(await aici.fork(2))
        path.append(int(await aici.gen_text(regex="[0-9]", max_tokens=1)))
        path.append(await aici.fork(2))
        await aici.FixedTokens(str(path))

    engine = run(controller, saying({0: "12", 1: "34", 2: "56", 3: "78"}))
    paths = sorted(text[2:] for text in texts(engine))
    assert len(engine.group.branches) == 8 and set(reasons(engine)) == {"stop"}
    first = {0: 1, 1: 3}
    seconds = {(0, 0): 2, (0, 1): 5, (1, 0): 4, (1, 1): 7}
    expected = [str([a, first[a], b, seconds[a, b], c]) for a, b, c in itertools.product((0, 1), repeat=3)]
    assert paths == sorted(expected)


def test_a_constraint_that_the_script_holds_stands_in_the_copy_where_it_stood() -> None:
    async def controller() -> None:
        constraint = aici.RegexConstraint("abcde|abxyz")
        await aici.gen_tokens(constraint=constraint, max_tokens=3)
        me = await aici.fork(2)
        await aici.gen_tokens(constraint=constraint, max_tokens=me + 1)

    engine = run(controller, saying("abc"))
    # "de" is all that is left of the pattern, so it is spliced, at most as many as were asked for.
    assert texts(engine) == ["abcd", "abcde"]


def test_labels_die_in_each_branch_for_itself() -> None:
    async def controller() -> None:
        label = aici.Label()
        await aici.FixedTokens("a")
        after = aici.Label()
        me = await aici.fork(2)
        if me:
            del label
        await aici.gen_tokens(max_tokens=1)
        await aici.FixedTokens("b", following=after)
        await aici.gen_tokens(max_tokens=1)

    engine = engine_of(controller)
    engine.round()
    parent, child = engine.group.branches
    assert (parent.settled, child.settled) == (0, 3)
    assert parent.sequence.tokens == child.sequence.tokens


# Controllers that do not repeat themselves.


def differing(first: Controller, second: Controller) -> Controller:
    """Does `first` when it is run first, `second` when it is run again, then tells its branch."""
    runs = itertools.count()

    async def controller() -> None:
        await (second if next(runs) else first)()
        me = await aici.fork(2)
        await aici.FixedTokens(str(me))

    return controller


async def nothing() -> None: ...


async def fixed_a() -> None:
    await aici.FixedTokens("a")


async def fixed_b() -> None:
    await aici.FixedTokens("b")


async def generates() -> None:
    await aici.gen_tokens(max_tokens=1)


async def generates_longer() -> None:
    await aici.gen_tokens(max_tokens=2)


async def waits() -> None:
    await aici.wait_vars()


async def forks_alone() -> None:
    await aici.fork(1)


async def asks() -> None:
    aici.get_var("x")


async def asks_else() -> None:
    aici.get_tokens()


async def raises() -> None:
    raise OSError("the disk is gone")


async def asks_and_hides_the_answer() -> None:
    with contextlib.suppress(Exception):
        aici.get_var("x")


@pytest.mark.parametrize(
    "first, second",
    [
        pair
        for pair in itertools.permutations(
            [nothing, fixed_a, fixed_b, generates, generates_longer, waits, asks, asks_else], 2
        )
    ]
    + [(fixed_a, raises), (nothing, raises), (nothing, asks_and_hides_the_answer), (forks_alone, nothing)],
)
def test_a_second_run_that_differs_fails_its_branch_clearly(first: Controller, second: Controller) -> None:
    engine = run(differing(first, second))
    assert reasons(engine) == ["stop", "fail"], "the parent goes on"
    assert engine.text(engine.group.root).endswith("0")
    assert "ReplayError: cannot fork: the controller" in error(engine, 1)
    assert "must do the same each time" in error(engine, 1)


def test_an_exception_of_the_second_run_is_named() -> None:
    engine = run(differing(fixed_a, raises))
    assert "OSError: the disk is gone" in error(engine, 1)


def test_a_copy_that_is_given_up_is_closed() -> None:
    closed: list[int] = []
    runs = itertools.count()

    async def controller() -> None:
        run = next(runs)
        try:
            await aici.FixedTokens("a" if run == 0 else "b")
            await aici.fork(2)
        finally:
            closed.append(run)

    run(controller)
    assert closed == [1, 0]


def test_the_same_random_choice_is_no_difference_until_it_shows() -> None:
    """Only what a controller asks and awaits counts: what it computes in between is its own."""
    runs = itertools.count()

    async def controller() -> None:
        hidden = next(runs)
        await aici.FixedTokens("a")
        await aici.fork(2)
        await aici.FixedTokens(str(hidden))

    assert texts(run(controller)) == ["a0", "a1"]


def test_a_branch_is_told_by_its_own_program() -> None:
    async def controller() -> None:
        await aici.fork(2)
        mine: Branch = running_program().branch
        await aici.FixedTokens(str(mine.index))
        assert aici.eos_token() == EOS

    assert texts(run(controller)) == ["0", "1"]
