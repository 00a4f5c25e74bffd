"""The branches of one request: forks, waits, chains of wakes, deadlocks and ends."""

from __future__ import annotations

import pytest

from aici_vllm import aici
from aici_vllm.controller.branch import Branch, Next
from aici_vllm.controller.limits import Limits
from aici_vllm.controller.program import Program
from tests.controller.fake_engine import FakeEngine
from tests.controller.native import PROMPT, engine_of, error, group_of, logs, reasons, run, saying, texts

TOO_MANY = "too many forks (max=16)"


# Forks.


def test_fork_of_a_number_makes_equal_branches_and_tells_each_its_index() -> None:
    async def controller() -> None:
        await aici.FixedTokens("a")
        me = await aici.fork(3)
        await aici.FixedTokens(f"[{me}]")
        await aici.gen_tokens(max_tokens=1)

    engine = run(controller, saying({0: "x", 1: "y", 2: "z"}))
    assert texts(engine) == ["a[0]x", "a[1]y", "a[2]z"] and engine.steps == 1
    assert [branch.index for branch in engine.group.branches] == [0, 1, 2]
    assert reasons(engine) == ["stop"] * 3 and engine.group.finished


def test_fork_of_one_goes_on_as_it_is() -> None:
    async def controller() -> None:
        assert await aici.fork(1) == 0
        await aici.FixedTokens("a")

    engine = run(controller)
    assert texts(engine) == ["a"] and engine.steps == 0


@pytest.mark.parametrize("count", [0, -1, []])
def test_fork_needs_a_branch(count: int) -> None:
    async def controller() -> None:
        with pytest.raises(ValueError, match=r"fork\(\) needs at least 1 branch"):
            await aici.fork(count)
        await aici.FixedTokens("on")

    assert texts(run(controller)) == ["on"]


def test_fork_of_a_list_gives_each_branch_its_own_beginning() -> None:
    async def controller() -> None:
        await aici.FixedTokens("ab")
        mask = aici.TokenSet()
        mask[ord("q")] = True
        made = [
            aici.Branch(splices=[aici.Splice(ff_tokens=list(b"c"))]),
            aici.Branch(splices=[aici.Splice(backtrack=1, ff_tokens=list(b"XY"))]),
            aici.Branch.noop(),
            aici.Branch(sample_mask=mask),
        ]
        me = await aici.fork(made)
        made.clear()
        await aici.FixedTokens(str(me))

    engine = run(controller)
    assert texts(engine) == ["abc0", "aXY1", "ab2", "abq3"] and engine.steps == 1


def test_a_wrong_branch_in_a_list_is_the_scripts_error_and_forks_nothing() -> None:
    async def controller() -> None:
        wrong = aici.Branch(splices=[aici.Splice(ff_tokens=[10**6])])
        with pytest.raises(ValueError, match="over the vocabulary's"):
            await aici.fork([aici.Branch.noop(), wrong])
        with pytest.raises(TypeError, match="branches must be a list of Branch"):
            await aici.fork([5])  # type: ignore[list-item]
        await aici.FixedTokens("on")

    assert texts(run(controller)) == ["on"]


def test_a_branch_of_a_fork_may_fail_alone() -> None:
    async def controller() -> None:
        splices = [aici.Splice(backtrack=back, ff_tokens=list(b"x")) for back in (0, 99, 1)]
        await aici.fork([aici.Branch(splices=[splice]) for splice in splices])
        await aici.gen_tokens(max_tokens=1)

    engine = run(controller)
    assert reasons(engine) == ["stop", "fail", "stop"]
    assert "cannot backtrack 99 tokens: the sequence has 2" in error(engine, 1)


def test_the_excess_of_a_fork_fails_and_the_others_go_on() -> None:
    async def controller() -> None:
        me = await aici.fork(20)
        await aici.FixedTokens(str(me))

    engine = run(controller)
    assert reasons(engine) == ["stop"] * 16 + ["fail"] * 4
    assert [branch.error for branch in engine.group.branches[16:]] == [TOO_MANY] * 4
    assert texts(engine)[:16] == [str(index) for index in range(16)]


def test_the_limit_is_of_branches_that_live_at_the_same_time() -> None:
    async def controller() -> None:
        for _ in range(4):
            me = await aici.fork(2)
            if me:
                await aici.FixedTokens("x")
                return

    engine = run(controller, limits=Limits(branches=2))
    assert reasons(engine) == ["stop"] * 5

    async def nested() -> None:
        await aici.fork(2)
        await aici.fork(2)
        await aici.gen_tokens(max_tokens=1)

    engine = run(nested, limits=Limits(branches=3))
    assert reasons(engine).count("stop") == 3
    failed = [branch.error for branch in engine.group.branches if branch.finish_reason == "fail"]
    assert failed == ["too many forks (max=3)"]


def test_a_request_makes_so_many_branches_and_no_more() -> None:
    async def controller() -> None:
        made = 1
        while True:
            if await aici.fork(2):
                return
            made += 1
            await aici.FixedTokens(f"{made} ")

    engine = run(controller, limits=Limits(branches_made=5))
    assert reasons(engine) == ["fail"] + ["stop"] * 4
    assert error(engine) == "too many forks (a request may make 5 branches in all)"
    assert texts(engine)[0] == "2 3 4 5 "


def test_a_fork_beyond_all_measure_is_refused_before_it_costs_anything() -> None:
    async def controller() -> None:
        await aici.fork(10**12)

    class Decider(aici.NextToken):
        def mid_process(self) -> aici.MidProcessResult:
            return aici.MidProcessResult([aici.Branch.noop()] * 257)

    async def decider() -> None:
        await Decider()

    for engine in run(controller), run(decider):
        assert "too many forks (a request may make 256 branches in all)" in error(engine)


def test_nested_forks_have_their_own_indexes_and_share_what_came_before() -> None:
    async def controller() -> None:
        first = await aici.fork(2)
        await aici.FixedTokens(str(first))
        second = await aici.fork(3)
        await aici.FixedTokens(str(second))

    engine = run(controller)
    assert sorted(texts(engine)) == ["00", "01", "02", "10", "11", "12"]
    assert texts(engine)[:2] == ["00", "10"], "a parent goes on as its first branch"


def test_a_child_inherits_its_parents_place_and_counts_its_own_tokens() -> None:
    async def controller() -> None:
        await aici.gen_tokens(max_tokens=2)
        aici.log_level = 0
        await aici.FixedTokens("x")
        await aici.fork(2)
        await aici.gen_tokens(max_tokens=1)

    try:
        engine = run(controller, saying({0: "abc", 1: "d"}))
    finally:
        aici.log_level = 1
    parent, child = engine.group.branches
    assert (child.initial_prompt_len, child.log_level) == (len(PROMPT), 0)
    assert (parent.sequence.sampled, parent.sequence.spliced) == (3, 1)
    assert (child.sequence.sampled, child.sequence.spliced) == (1, 0)
    assert child.sequence.sources() == parent.sequence.sources()


# Waiting.


def test_values_that_are_there_are_returned_at_once_in_order() -> None:
    async def controller() -> None:
        aici.set_var("a", "1")
        aici.set_var("b", b"2")
        assert await aici.wait_vars("b", "a", "b") == [b"2", b"1", b"2"]
        assert await aici.wait_vars() == []
        await aici.FixedTokens("on")

    engine = run(controller)
    assert texts(engine) == ["on"] and engine.steps == 0


def test_a_waiting_branch_sleeps_until_all_its_variables_are_set() -> None:
    async def controller() -> None:
        me = await aici.fork(3)
        if me == 0:
            one, two = await aici.wait_vars("one", "two")
            await aici.FixedTokens(one + b"," + two)
            return
        await aici.gen_tokens(max_tokens=2 * me, store_var=["", "one", "two"][me])

    engine = engine_of(controller, saying({1: "ab", 2: "cdef"}))
    waiting = []
    while not engine.group.finished:
        engine.round()
        waiting.append(engine.group.root.next is Next.WAIT)
    assert waiting == [True, True, True, True, False]
    assert texts(engine)[0] == "ab,cdef" and engine.steps == 4
    assert engine.group.root.sequence.sampled == 0


def test_wakes_form_chains_in_any_direction_within_one_step() -> None:
    async def controller() -> None:
        me = await aici.fork(6)
        if me != 3:
            # 5 waits for 3's, 4 for 5's, 0 for 4's, ...
            order = [3, 5, 4, 0, 2, 1]
            before = order[order.index(me) - 1]
            await aici.wait_vars(f"v{before}")
        aici.append_var("order", str(me))
        aici.set_var(f"v{me}", "x")

    engine = engine_of(controller)
    for _ in range(6):
        engine.round()
    assert engine.group.variables.get("order") == b"354021"
    assert reasons(engine) == ["stop"] * 6 and engine.steps == 0


def test_a_branch_that_polls_with_noops_lets_the_others_go_on() -> None:
    async def controller() -> None:
        me = await aici.fork(3)
        if me == 0:
            while aici.get_var("x") is None:
                await aici.Noop()
        elif me == 1:
            await aici.gen_tokens(max_tokens=2, store_var="x")
            await aici.wait_vars("y")
        else:
            await aici.wait_vars("x")
            aici.set_var("y", "z")
            while aici.get_var("never") is None:
                await aici.Noop()

    engine = engine_of(controller)
    for _ in range(10):
        engine.round()
    assert reasons(engine) == ["stop", "stop", None] and not engine.group.finished
    engine.group.abort()


def test_polling_tells_of_the_branches_that_did_something() -> None:
    async def controller() -> None:
        if await aici.fork(2):
            aici.set_var("x", "y")
            await aici.Noop()
            await aici.Noop()
        else:
            await aici.wait_vars("x")

    group = engine_of(controller).group
    group.fork(group.root)
    first, second = group.branches
    assert (first.next, second.next) == (Next.WAIT, Next.THINK)
    assert group.poll() == [second] and second.next is Next.THINK
    assert not group.end_deadlock() and group.wake() == [first]
    assert group.poll() == [second] and group.poll() == [] and group.finished


# Deadlocks.


def test_when_every_live_branch_waits_all_end_at_once_with_the_names() -> None:
    async def controller() -> None:
        me = await aici.fork(3)
        if me == 2:
            aici.set_var("set", "x")
            await aici.gen_tokens(max_tokens=2)
            return
        await aici.wait_vars("set", "missing", f"own{me}")

    engine = run(controller)
    assert reasons(engine) == ["deadlock", "deadlock", "stop"] and engine.steps == 2
    assert [branch.error for branch in engine.group.branches] == [
        "deadlock: every live branch waits, this one for 'missing', 'own0'",
        "deadlock: every live branch waits, this one for 'missing', 'own1'",
        None,
    ]


def test_a_deadlock_names_a_few_variables_briefly() -> None:
    async def controller() -> None:
        await aici.wait_vars(*(str(number) for number in range(11)), "x" * 1000)

    (found,) = [branch.error for branch in run(controller).group.branches]
    assert found and found.endswith("this one for " + ", ".join(f"'{n}'" for n in range(10)) + " and 2 more")

    async def one() -> None:
        await aici.wait_vars("x" * 1000)

    (found,) = [branch.error for branch in run(one).group.branches]
    assert found and found.endswith("this one for '" + "x" * 100 + "'")


def test_a_single_branch_that_waits_for_nobody_ends_at_once() -> None:
    async def controller() -> None:
        await aici.FixedTokens("kept")
        await aici.wait_vars("x")

    engine = run(controller)
    assert reasons(engine) == ["deadlock"] and texts(engine) == ["kept"] and engine.steps == 0


def test_no_deadlock_while_somebody_can_go_on() -> None:
    async def controller() -> None:
        if await aici.fork(2):
            await aici.gen_tokens(max_tokens=1)
            aici.set_var("x", "y")
        else:
            await aici.wait_vars("x")

    group = engine_of(controller).group
    group.fork(group.root)
    assert not group.end_deadlock()
    group.branches[1].accept(1)
    assert group.branches[1].next is Next.END
    assert not group.end_deadlock(), "the waiting one only has to be woken"
    assert group.wake() == [group.root] and group.finished
    assert not group.end_deadlock()


def test_who_waits_for_a_branch_that_failed_is_told() -> None:
    async def controller() -> None:
        me = await aici.fork(3)
        if me == 0:
            await aici.wait_vars("x")
        await aici.gen_tokens(max_tokens=me)
        if me == 1:
            raise ValueError("no x today")
        aici.set_var("y", "z")

    engine = run(controller)
    assert reasons(engine) == ["deadlock", "fail", "stop"]
    assert error(engine, 1) == "ValueError: no x today"
    assert engine.group.root.error == "deadlock: every live branch waits, this one for 'x'"
    assert "no x today" in logs(engine, 1) and "no x today" not in logs(engine, 2)


# Ends.


def test_a_program_that_cannot_be_made_fails_the_request() -> None:
    def new_program(branch: Branch) -> Program:
        raise LookupError("no such controller")

    group = group_of()
    group.start(new_program)
    assert group.finished and group.root.error == "LookupError: no such controller"
    assert group.poll() == [] and group.wake() == [] and not group.end_deadlock()


def test_abort_ends_what_still_lives() -> None:
    async def controller() -> None:
        me = await aici.fork(3)
        if me == 1:
            return
        if me == 2:
            await aici.wait_vars("x")
        await aici.gen_tokens()

    engine = engine_of(controller)
    engine.round()
    assert [branch.index for branch in engine.group.live] == [0, 2]
    engine.group.abort()
    assert reasons(engine) == ["abort", "stop", "abort"] and engine.group.finished


def test_variables_limit_is_of_all_branches_together_and_an_error_where_it_is_broken() -> None:
    async def controller() -> None:
        me = await aici.fork(2)
        aici.append_var("v", "1234")
        await aici.FixedTokens(str(me))

    engine = run(controller, limits=Limits(variable_bytes=6))
    assert reasons(engine) == ["stop", "fail"]
    assert "LimitError: the variables of a request may hold 6 bytes together" in error(engine, 1)


def test_an_argument_reaches_every_branch() -> None:
    async def controller(arg: str) -> None:
        me = await aici.fork(2)
        await aici.FixedTokens(f"{arg}{me}{aici.controller_arg()}")

    assert texts(run(controller, arg="hé")) == ["hé0hé", "hé1hé"]


def test_requests_know_nothing_of_each_other() -> None:
    async def controller() -> None:
        assert aici.get_var("x") is None
        aici.set_var("x", "y")
        await aici.gen_tokens(max_tokens=2)

    engines: list[FakeEngine] = [engine_of(controller) for _ in range(2)]
    while not all(engine.group.finished for engine in engines):
        for engine in engines:
            engine.round()
    assert [reasons(engine) for engine in engines] == [["stop"], ["stop"]]
