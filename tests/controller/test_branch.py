"""One branch: what each await does to its tokens, what it wants next, and how it ends."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from aici_vllm import aici
from aici_vllm.controller.branch import Branch, Next
from aici_vllm.controller.check import TakesBack
from aici_vllm.controller.limits import Limits
from constraints import Constraint
from tests.controller.fake_engine import FakeEngine
from tests.controller.native import PROMPT, engine_of, error, logs, reasons, run, saying, texts
from tests.controller.scripts import EOS, VOCABULARY


def root_text(engine: FakeEngine) -> str:
    return engine.text(engine.group.root)


# Fixed text.


def test_fixed_texts_are_one_splice_across_labels_and_following() -> None:
    async def controller() -> None:
        await aici.FixedTokens("ab")
        label = aici.Label()
        await aici.FixedTokens("cd")
        await aici.FixedTokens("XY", following=label)
        await aici.gen_tokens(max_tokens=1)

    engine = engine_of(controller, saying("z"))
    # Before the engine has done anything, all three are one list of tokens after what it holds.
    sequence = engine.group.root.sequence
    assert sequence.tokens == [*PROMPT, *b"abXY"] and sequence.kept == len(PROMPT)
    assert engine.group.root.next is Next.SAMPLE and engine.steps == 0
    engine.round()
    assert root_text(engine) == "abXYz" and sequence.kept == len(sequence)


def test_what_follows_fixed_text_runs_before_its_tokens_reach_the_model() -> None:
    async def controller() -> None:
        await aici.FixedTokens("a")
        aici.set_var("after", "set")
        await aici.gen_tokens(max_tokens=1)

    engine = engine_of(controller)
    assert engine.group.variables.get("after") == b"set" and engine.steps == 0
    assert engine.group.root.sequence.kept == len(PROMPT)


def test_an_exception_after_fixed_text_does_not_lose_it() -> None:
    async def controller() -> None:
        await aici.FixedTokens("kept")
        raise ValueError("later")

    engine = run(controller)
    assert root_text(engine) == "kept" and error(engine) == "ValueError: later"
    assert engine.group.root.settled == len(engine.group.root.sequence)
    assert "Traceback" in logs(engine)


def test_fixed_text_alone_takes_no_forward_pass() -> None:
    async def controller() -> None:
        assert await aici.FixedTokens("ab") == list(b"ab")
        assert await aici.FixedTokens("") == []

    engine = run(controller)
    assert engine.steps == 0 and reasons(engine) == ["stop"] and root_text(engine) == "ab"


def test_fixed_text_may_be_bytes_and_is_logged() -> None:
    async def controller() -> None:
        await aici.FixedTokens(b"\xff")
        aici.log_level = 0
        await aici.FixedTokens("quiet")

    try:
        engine = run(controller)
    finally:
        aici.log_level = 1
    assert engine.group.root.sequence.tokens == [*PROMPT, *"\ufffd".encode(), *b"quiet"]
    assert logs(engine) == "FIXED b'\\xff'\n"


def test_pure_backtracking_and_a_label_gone_between_construction_and_await() -> None:
    async def controller() -> None:
        await aici.FixedTokens("ab")
        early = aici.Label()
        await aici.FixedTokens("cd")
        late = aici.Label()
        again = aici.FixedTokens("x", following=late)
        await aici.FixedTokens("", following=early)
        with pytest.raises(ValueError, match="this label is gone: the text it marked was backtracked over"):
            await again

    engine = run(controller)
    assert root_text(engine) == "ab" and reasons(engine) == ["stop"]


# The prompt.


def test_the_prompt_is_given_to_the_first_await_only() -> None:
    async def controller() -> None:
        assert await aici.GetPrompt() == PROMPT
        with pytest.raises(RuntimeError, match=r"GetPrompt\(\) must be the first thing"):
            await aici.GetPrompt()
        await aici.FixedTokens("ok")

    assert root_text(run(controller)) == "ok"


def test_the_prompt_can_be_taken_back() -> None:
    async def controller() -> None:
        start = aici.Label()
        await aici.gen_tokens(max_tokens=2)
        await aici.FixedTokens("new", following=start)
        assert aici.get_tokens() == list(b"new") and aici.get_prompt_len() == len(PROMPT)
        await aici.gen_tokens(max_tokens=1)

    engine = run(controller, saying("abc"))
    sequence = engine.group.root.sequence
    assert sequence.tokens == list(b"newc") and sequence.prompt_len == 0
    assert sequence.sources() == [("spliced", 3), ("sampled", 1)]


def test_a_prompt_taken_back_frees_its_budget() -> None:
    async def controller() -> None:
        start = aici.Label()
        await aici.FixedTokens("abcd")
        await aici.FixedTokens("efghi", following=start)
        await aici.gen_tokens(max_tokens=5)

    engine = run(controller, saying("xyz"), max_tokens=6)
    assert root_text(engine) == "efghix" and reasons(engine) == ["length"]


def test_without_any_token_the_model_has_nothing_to_go_on_from() -> None:
    async def controller() -> None:
        start = aici.Label()
        await aici.FixedTokens("", following=start)
        for word in (lambda: aici.gen_tokens(max_tokens=1), aici.NextToken):
            with pytest.raises(ValueError, match="the model needs a token to go on from"):
                await word()
        await aici.gen_tokens(regex="ab[cd]")

    engine = run(controller)
    assert engine.group.root.sequence.tokens == list(b"abc") and reasons(engine) == ["stop"]


# Ends.


def test_the_ends_of_a_branch() -> None:
    async def returns() -> None: ...

    async def stops() -> None:
        await aici.StopToken()
        aici.set_var("after", "never")

    async def stops_by_answer() -> None:
        class Stopping(aici.NextToken):
            def mid_process(self) -> aici.MidProcessResult:
                return aici.MidProcessResult.stop()

        await Stopping()
        aici.set_var("after", "never")

    for controller in returns, stops, stops_by_answer:
        engine = run(controller)
        assert reasons(engine) == ["stop"] and engine.group.root.error is None
        assert engine.group.variables.get("after") is None


def test_the_first_end_stands_and_closes_the_program() -> None:
    closed = []

    async def controller() -> None:
        try:
            await aici.gen_tokens()
        finally:
            closed.append(True)

    engine = engine_of(controller)
    root = engine.group.root
    root.end("abort")
    root.fail("later")
    root.end("stop")
    assert (root.finish_reason, root.error, root.next) == ("abort", None, Next.END)
    assert closed == [True]


def test_a_next_token_that_yields_itself_is_refused_in_the_script() -> None:
    class Old(aici.NextToken):
        def __await__(self) -> Generator[Any, Any, Any]:
            return (yield self)

    async def controller() -> None:
        with pytest.raises(TypeError, match=r"a controller cannot yield .*Old"):
            await Old()

    assert reasons(run(controller)) == ["stop"]


# Budgets.


def test_tokens_over_the_budget_end_with_length() -> None:
    async def controller() -> None:
        await aici.FixedTokens("ab")
        await aici.gen_tokens(max_tokens=20)

    engine = run(controller, saying("xyzxyz"), max_tokens=5)
    assert root_text(engine) == "abxyz" and reasons(engine) == ["length"]
    assert engine.group.root.error is None


@pytest.mark.parametrize(
    "before, text, reason, got",
    [("", "abcd", "stop", "abcd"), ("", "abcde", "length", "abcd"), ("xyz", "ab", "length", "xyza")],
)
def test_fixed_text_over_the_budget_is_cut_there(before: str, text: str, reason: str, got: str) -> None:
    async def controller() -> None:
        await aici.FixedTokens(before)
        await aici.FixedTokens(text)

    engine = run(controller, max_tokens=4)
    assert reasons(engine) == [reason] and root_text(engine) == got
    assert engine.group.root.sequence.spliced == len(got)


def test_a_budget_used_up_by_fixed_text_leaves_none_to_sample() -> None:
    async def controller() -> None:
        await aici.FixedTokens("abcd")
        assert await aici.gen_tokens(max_tokens=0) == []
        await aici.gen_tokens(max_tokens=1)

    engine = run(controller, max_tokens=4)
    assert reasons(engine) == ["length"] and engine.steps == 0


def test_a_generation_that_ends_exactly_at_the_budget_is_no_end_of_the_branch() -> None:
    async def controller() -> None:
        await aici.gen_tokens(max_tokens=3, store_var="v")

    engine = run(controller, saying("abc"), max_tokens=3)
    assert reasons(engine) == ["stop"] and engine.group.variables.get("v") == b"abc"


def test_taken_back_tokens_give_their_budget_back() -> None:
    async def controller() -> None:
        for _ in range(5):
            label = aici.Label()
            await aici.FixedTokens("abc")
            await aici.FixedTokens("", following=label)
        await aici.FixedTokens("abc")

    engine = run(controller, max_tokens=3)
    assert reasons(engine) == ["stop"] and root_text(engine) == "abc"
    assert engine.group.root.sequence.spliced == 18


def test_fixed_text_over_the_context_fails_with_numbers() -> None:
    async def controller() -> None:
        await aici.FixedTokens("abc")
        await aici.FixedTokens("defgh")

    engine = run(controller, max_tokens=100, context=9)
    assert error(engine) == (
        "ValueError: 5 tokens of fixed text do not fit: the sequence would have 10 tokens and the model's "
        "context holds 9"
    )
    assert root_text(engine) == "abc"
    assert reasons(run(controller, max_tokens=100, context=10)) == ["stop"]


def test_text_that_the_budget_cuts_before_the_context_ends_ends_with_length() -> None:
    async def controller() -> None:
        await aici.FixedTokens("abcdefghij")

    engine = run(controller, max_tokens=3, context=9)
    assert reasons(engine) == ["length"] and root_text(engine) == "abc"


def test_sampling_ends_at_the_context_with_length() -> None:
    async def controller() -> None:
        await aici.gen_tokens(max_tokens=9)

    engine = run(controller, saying("abcdefghijkl"), max_tokens=100, context=9)
    assert reasons(engine) == ["length"] and len(engine.group.root.sequence) == 9


def test_a_forced_run_over_the_context_is_cut_there_like_a_sampled_one() -> None:
    async def controller() -> None:
        await aici.FixedTokens("abc")
        await aici.gen_tokens(regex="defghijkl", max_tokens=9)

    engine = run(controller, max_tokens=100, context=9)
    assert reasons(engine) == ["length"] and root_text(engine) == "abcdefg"
    engine = run(controller, max_tokens=5, context=9)
    assert reasons(engine) == ["length"] and root_text(engine) == "abcde"
    engine = run(controller, max_tokens=100, context=14)
    assert reasons(engine) == ["stop"] and root_text(engine) == "abcdefghijkl"


def test_a_generation_larger_than_the_context_is_an_error_of_the_script() -> None:
    async def controller() -> None:
        with pytest.raises(ValueError, match="max_tokens=10 is more than the model's context of 9 tokens"):
            await aici.gen_tokens(max_tokens=10)

    assert reasons(run(controller, context=9)) == ["stop"]


# Decisions.


class Deciding(aici.NextToken):
    """Decides one thing and remembers what it was told."""

    def __init__(self, result: aici.MidProcessResult):
        self.result = result
        self.told: tuple[int, list[int]] | None = None

    def mid_process(self) -> aici.MidProcessResult:
        return self.result

    def post_process(self, backtrack: int, tokens: list[int]) -> None:
        self.told = backtrack, tokens


def masked(*tokens: int, splices: list[aici.Splice] | None = None) -> aici.MidProcessResult:
    mask = aici.TokenSet()
    for token in tokens:
        mask[token] = True
    return aici.MidProcessResult([aici.Branch(sample_mask=mask, splices=splices or [])])


@pytest.mark.parametrize(
    "when, backtrack, ff, text, told",
    [
        ([ord("y")], 1, "Z", "abx", (0, "x")),
        ([ord("x")], 0, "Z", "abxZ", (0, "xZ")),
        ([ord("x")], 1, "Z", "abZ", (0, "Z")),
        ([ord("x")], 1, "", "ab", (0, "")),
        ([ord("x")], 2, "Z", "aZ", (1, "Z")),
        ([ord("y"), ord("x")], 3, "", "", (2, "")),
        ([], 1, "Z", "abZ", (0, "Z")),
    ],
)
def test_a_splice_that_matches_counts_the_sampled_token(
    when: list[int], backtrack: int, ff: str, text: str, told: tuple[int, str]
) -> None:
    async def controller() -> None:
        await aici.FixedTokens("ab")
        splice = aici.Splice(when_sampled=when, backtrack=backtrack, ff_tokens=list(ff.encode()))
        deciding = Deciding(masked(ord("x"), splices=[splice]))
        tokens = await deciding
        assert deciding.told == (told[0], list(told[1].encode()))
        assert tokens == deciding.curr_tokens == list(told[1].encode())
        await aici.StopToken()

    engine = run(controller)
    assert reasons(engine) == ["stop"] and root_text(engine) == text and engine.steps == 1


def test_the_first_splice_that_matches_is_done() -> None:
    async def controller() -> None:
        x = ord("x")
        splices = [
            aici.Splice(when_sampled=[x + 1], ff_tokens=[1]),
            aici.Splice(when_sampled=[x], ff_tokens=list(b"!")),
            aici.Splice(when_sampled=[x], ff_tokens=[2]),
        ]
        await Deciding(masked(x, splices=splices))

    assert root_text(run(controller)) == "x!"


@pytest.mark.parametrize("backtrack", [3, 9])
def test_backtracking_past_the_start_fails_clearly(backtrack: int) -> None:
    async def controller() -> None:
        await Deciding(aici.MidProcessResult.splice(backtrack, []))

    engine = run(controller)
    assert error(engine) == f"ValueError: cannot backtrack {backtrack} tokens: the sequence has 2"


def test_a_sampled_token_and_everything_before_it_can_be_taken_back_but_no_more() -> None:
    def controller_of(backtrack: int) -> Any:
        async def controller() -> None:
            splice = aici.Splice(when_sampled=[ord("x")], backtrack=backtrack, ff_tokens=list(b"new"))
            await Deciding(masked(ord("x"), splices=[splice]))

        return controller

    assert run(controller_of(3)).group.root.sequence.tokens == list(b"new")
    assert "cannot backtrack 4 tokens: the sequence has 3" in error(run(controller_of(4)))


@pytest.mark.parametrize(
    "result, says",
    [
        (lambda: masked(), "sample_mask allows no token"),
        (lambda: aici.MidProcessResult.bias(aici.TokenSet(5)), "sample_mask is over 5 tokens"),
        (lambda: aici.MidProcessResult.splice(0, [VOCABULARY.size]), "a token id over the vocabulary's"),
    ],
)
def test_a_decision_that_does_not_fit_is_an_error_at_its_await(result: Any, says: str) -> None:
    async def controller() -> None:
        with pytest.raises(ValueError, match=says):
            await Deciding(result())
        await aici.FixedTokens("on")

    assert root_text(run(controller)) == "on"


def test_a_noop_changes_nothing_and_lets_the_engine_go_on_first() -> None:
    async def controller() -> None:
        noop = aici.Noop()
        assert noop.is_fixed() and await noop == [] and not noop.finished
        await aici.gen_tokens(max_tokens=1)

    engine = engine_of(controller)
    assert engine.group.root.next is Next.THINK and len(engine.group.root.sequence) == len(PROMPT)
    engine.round()
    assert reasons(engine) == ["stop"] and engine.steps == 1


def test_a_mask_holds_what_it_held_when_it_was_decided() -> None:
    kept: list[aici.MidProcessResult] = []

    async def controller() -> None:
        kept.append(masked(ord("x")))
        await Deciding(kept[0])

    engine = engine_of(controller)
    mask = kept[0].branches[0].sample_mask
    assert mask is not None
    mask.set_all(True)
    assert engine.allowed(engine.group.root) == [ord("x")]


# Generations.


def test_the_end_of_a_sequence_ends_the_current_generation_only() -> None:
    async def controller() -> None:
        assert await aici.gen_tokens() == [*b"ab", EOS]
        await aici.FixedTokens("c")
        assert await aici.gen_text() == ""

    engine = run(controller, saying("ab"))
    assert reasons(engine) == ["stop"]
    assert engine.group.root.sequence.tokens == [*PROMPT, *b"ab", EOS, *b"c", EOS]


def test_forced_tokens_are_spliced_and_the_rest_is_sampled() -> None:
    async def controller() -> None:
        await aici.gen_tokens(regex="abc[xy]def")
        await aici.gen_tokens(regex="ghi")

    engine = run(controller)
    assert root_text(engine) == "abcxdefghi" and engine.steps == 1
    sequence = engine.group.root.sequence
    assert sequence.sources() == [("spliced", 3), ("sampled", 1), ("spliced", 6)]
    assert (sequence.sampled, sequence.spliced) == (1, 9)


def test_accept_says_whether_the_branch_just_samples_on() -> None:
    async def controller() -> None:
        await aici.gen_tokens(regex="[ab][ab]c[ab]")

    engine = engine_of(controller)
    root = engine.group.root
    assert [root.accept(ord(char)) for char in "aba"] == [True, False, False]
    assert root_text(engine) == "abca" and root.next is Next.END


def test_a_variable_that_does_not_fit_is_an_error_at_the_generation() -> None:
    async def controller() -> None:
        with pytest.raises(Exception, match="the variables of a request may hold 10 bytes together"):
            await aici.gen_tokens(max_tokens=8, store_var="abc")
        await aici.FixedTokens("!")

    engine = run(controller, saying("12345678"), limits=Limits(variable_bytes=10))
    assert root_text(engine) == "12345678!" and reasons(engine) == ["stop"]


def test_what_was_generated_is_logged_and_a_dead_end_is_said() -> None:
    async def controller() -> None:
        assert await aici.gen_tokens(options=[]) == [EOS]
        assert await aici.gen_text(max_tokens=2) == "ab"

    engine = run(controller, saying("?ab"))
    assert logs(engine) == "Constraint doesn't allow any tokens; adding EOS\nGEN: ''\nGEN: 'ab'\n"


@pytest.mark.parametrize("method", ["eos_allowed", "eos_forced", "append_token", "mask_row", "state_key"])
def test_a_users_constraint_that_raises_is_an_error_at_its_await(method: str) -> None:
    def fail(*args: object) -> object:
        raise OSError(f"{method} is broken")

    broken = type("Broken", (Constraint,), {method: fail})

    async def controller() -> None:
        with pytest.raises(OSError, match=f"{method} is broken"):
            await aici.gen_tokens(constraint=broken(), max_tokens=3)
        await aici.FixedTokens("on")

    engine = run(controller)
    assert reasons(engine) == ["stop"] and root_text(engine).endswith("on")


def test_a_token_that_a_constraint_refuses_leaves_the_branch_to_its_script() -> None:
    async def controller() -> None:
        with pytest.raises(ValueError, match="is not allowed here"):
            await aici.gen_tokens(regex="[ab]+")
        await aici.FixedTokens("on")
        await aici.gen_tokens(max_tokens=1)

    engine = engine_of(controller)
    assert engine.group.root.accept(ord("z")) is False
    assert root_text(engine) == "zon" and engine.group.root.next is Next.SAMPLE


def test_each_step_of_a_script_has_its_own_room_in_the_log() -> None:
    async def controller() -> None:
        for step in "abc":
            print(step * 20)
            await aici.gen_tokens(max_tokens=1)

    try:
        aici.log_level = 0
        engine = run(controller, limits=Limits(log_bytes=5))
    finally:
        aici.log_level = 1
    assert logs(engine) == "aaaa\nbbbb\ncccc\n"


# What may be streamed.


def test_a_live_label_holds_back_what_it_can_take_back() -> None:
    async def controller() -> None:
        await aici.FixedTokens("ab")
        label = aici.Label()
        await aici.gen_tokens(max_tokens=2)
        later = aici.Label()
        await aici.gen_tokens(max_tokens=1)
        del label
        await aici.gen_tokens(max_tokens=1)
        await aici.FixedTokens("", following=later)
        del later
        await aici.gen_tokens(max_tokens=2)

    engine = engine_of(controller, saying("1234567"))
    root = engine.group.root
    seen = [root.settled - len(PROMPT)]
    while not engine.group.finished:
        engine.round()
        seen.append(root.settled - len(PROMPT))
    assert seen == [2, 2, 2, 4, 4, 5, 6] and root_text(engine) == "ab1256"


def test_the_end_settles_everything_and_a_script_without_labels_all_along() -> None:
    kept: list[aici.Label] = []

    async def labelled() -> None:
        kept.append(aici.Label())
        await aici.gen_tokens(max_tokens=2)

    engine = engine_of(labelled)
    root = engine.group.root
    assert root.settled == 0
    root.takes_back = TakesBack.NOTHING
    assert root.settled == len(PROMPT)
    root.takes_back = TakesBack.MARKED
    engine.round()
    assert root.settled == 0
    engine.round()
    assert root.next is Next.END and root.settled == len(root.sequence) == 4


def test_nothing_settles_before_the_end_where_text_goes_without_a_label() -> None:
    class Back(aici.NextToken):
        def mid_process(self) -> aici.MidProcessResult:
            return aici.MidProcessResult.splice(2, list(b"XY"))

    async def controller() -> None:
        await aici.gen_tokens(max_tokens=2)
        await Back()
        await aici.gen_tokens(max_tokens=1)

    engine = engine_of(controller, saying("abz"))
    root = engine.group.root
    root.takes_back = TakesBack.ANYTHING
    while not engine.group.finished:
        assert root.settled == len(PROMPT)
        engine.round()
    assert root.settled == len(root.sequence) and root_text(engine) == "XYz"


def test_a_label_is_at_the_prompts_start_until_something_is_awaited() -> None:
    async def controller() -> None:
        first = aici.Label()
        await aici.GetPrompt()
        second = aici.Label()
        assert (first.ptr, second.ptr) == (0, len(PROMPT))
        assert first.tokens_since() == PROMPT and second.tokens_since() == []
        await aici.FixedTokens(b"\xc3")
        await aici.FixedTokens("\xa9")
        assert (first.text_since(), second.text_since()) == ("pq\ufffd\xa9", "\ufffd\xa9")

    assert reasons(run(controller)) == ["stop"]


def test_a_branch_counts_what_it_sampled_and_spliced_even_if_taken_back() -> None:
    async def controller() -> None:
        label = aici.Label()
        await aici.gen_tokens(max_tokens=3)
        await aici.FixedTokens("ab", following=label)

    branch: Branch = run(controller, saying("xyz")).group.root
    assert (branch.sequence.sampled, branch.sequence.spliced) == (3, 2)
    assert branch.sequence.sources() == [("spliced", 2)]


def test_texts_of_the_shared_model_are_what_was_said() -> None:
    async def controller() -> None:
        await aici.gen_tokens()

    assert texts(run(controller, saying("hé"))) == ["hé"]
