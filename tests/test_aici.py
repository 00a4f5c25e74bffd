"""The words of a native controller, as a script uses them, in whole requests without a model."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import constraints
from aici_vllm import aici
from aici_vllm.controller import words
from aici_vllm.controller.program import Controller
from constraints import Constraint
from tests.controller.fake_engine import FakeEngine
from tests.controller.native import PROMPT, engine_of, error, logs, reasons, run, saying, texts
from tests.controller.scripts import EOS, VOCABULARY


def ran(controller: Controller, says: str = "", **group: Any) -> FakeEngine:
    """A request that must end well: what a controller asserts about itself holds."""
    engine = run(controller, saying(says), **group)
    assert reasons(engine) == ["stop"] * len(engine.group.branches), engine.group.root.error
    return engine


def root_text(engine: FakeEngine) -> str:
    return engine.text(engine.group.root)


def sampled(engine: FakeEngine) -> int:
    return engine.group.root.sequence.sampled


# The module.


def test_everything_it_promises_is_there() -> None:
    assert sorted(aici.__all__) == aici.__all__ and all(hasattr(aici, name) for name in aici.__all__)


@pytest.mark.parametrize(
    "word",
    [
        aici.Label,
        aici.TokenSet,
        aici.get_tokens,
        aici.eos_token,
        lambda: aici.FixedTokens("a"),
        lambda: aici.set_var("a", "b"),
        lambda: aici.RegexConstraint("a"),
    ],
)
def test_words_need_a_running_controller(word: Any) -> None:
    with pytest.raises(RuntimeError, match="only works inside a running controller"):
        word()


def test_start_says_where_it_belongs() -> None:
    async def controller() -> None: ...

    for start in aici.start, aici.test:
        for made in controller, controller():
            with pytest.raises(RuntimeError, match=r"aici\.start\(\) belongs in a script"):
                start(made)


# Text and tokens.


def test_tokens_and_their_text() -> None:
    async def controller() -> None:
        assert aici.tokenize("hello") == [258] and aici.tokenize(b"a\xc3") == [97, 0xC3]
        assert aici.detokenize([258, EOS, 33]) == b"hello!"
        assert aici.token_repr(258) == '"hello"' and aici.token_repr(EOS) == "EOS"
        assert aici.tokens_repr([97, 258]) == '"a‧hello"'
        assert aici.eos_token() == EOS
        assert aici.get_tokens() == PROMPT and aici.get_prompt_len() == len(PROMPT)
        assert aici.controller_arg() == "the arg"

    ran(controller, arg="the arg")


def test_what_this_host_can_do() -> None:
    async def controller() -> None:
        assert [aici.get_config(name) for name in ("fork", "backtrack", "ff_tokens", "fly")] == [1, 1, 1, 0]
        assert aici.fork_supported() and aici.backtrack_supported()

    ran(controller)


def test_a_token_set_is_as_large_as_the_vocabulary() -> None:
    async def controller() -> None:
        tokens = aici.TokenSet()
        assert isinstance(tokens, constraints.TokenSet)
        assert len(tokens) == VOCABULARY.size and tokens.num_set() == 0
        tokens[EOS] = True
        assert tokens[EOS] and repr(tokens) == f"TokenSet: 1/{VOCABULARY.size}; EOS"
        assert aici.all_tokens().num_set() == VOCABULARY.size
        assert (tokens | aici.all_tokens()) == aici.all_tokens()

    ran(controller)


def test_get_tokens_is_a_copy() -> None:
    async def controller() -> None:
        aici.get_tokens().clear()
        assert aici.get_tokens() == PROMPT

    ran(controller)


# Labels.


def test_a_label_marks_the_end_of_the_text_and_dies_with_it() -> None:
    async def controller() -> None:
        await aici.FixedTokens("ab")
        label = aici.Label()
        assert (label.ptr, label.tokens_since(), label.text_since()) == (4, [], "")
        await aici.FixedTokens("hello")
        inner = aici.Label()
        await aici.gen_tokens(max_tokens=1)
        assert label.tokens_since() == [258, ord("x")] and label.text_since() == "hellox"
        assert inner.text_since() == "x"
        await aici.FixedTokens("y", following=label)
        assert label.text_since() == "y"
        await aici.FixedTokens("long enough to cover where the inner one stood")
        for use in (
            lambda: inner.ptr,
            inner.tokens_since,
            inner.text_since,
            lambda: aici.FixedTokens("", following=inner),
        ):
            with pytest.raises(ValueError, match="this label is gone: the text it marked was backtracked"):
                use()

    ran(controller, "x")


def test_following_takes_a_label() -> None:
    async def controller() -> None:
        with pytest.raises(TypeError, match="following= takes a Label, not int"):
            aici.FixedTokens("a", following=3)  # type: ignore[arg-type]

    ran(controller)


def test_a_label_that_nobody_has_holds_nothing_back() -> None:
    async def controller() -> None:
        await aici.FixedTokens("a")
        aici.Label()
        held = [aici.Label()]
        await aici.FixedTokens("b")
        await aici.gen_tokens(max_tokens=1)
        held.clear()
        await aici.gen_tokens(max_tokens=1)

    engine = engine_of(controller)
    root = engine.group.root
    assert root.settled == len(PROMPT) + 1
    engine.round()
    assert root.settled == len(root.sequence) == len(PROMPT) + 3


# Variables.


def test_variables() -> None:
    async def controller() -> None:
        assert aici.get_var("v") is None
        aici.append_var("v", "a")
        aici.append_var("v", b"\xff")
        assert aici.get_var("v") == b"a\xff"
        aici.set_var("v", "é")
        assert await aici.wait_vars("v") == ["é".encode()]

    assert ran(controller).group.variables.snapshot() == {"v": "é".encode()}


def test_check_var_says_what_differs() -> None:
    async def controller() -> None:
        aici.set_var("x", "a")
        aici.check_var("x", "a")
        aici.check_vars({"x": "a"})
        with pytest.raises(AssertionError, match=r"^Variable x: 'a' != 'b'$"):
            aici.check_var("x", "b")
        with pytest.raises(AssertionError, match=r"^Variable y is unset$"):
            aici.check_vars({"x": "a", "y": "b"})
        aici.set_var("z", b"\xff")
        with pytest.raises(AssertionError, match=r"^Variable z: '\ufffd' != 'b'$"):
            aici.check_var("z", "b")

    ran(controller)


# Generations.


def test_gen_tokens_takes_its_arguments_in_upstreams_order() -> None:
    order = ["regex", "yacc", "substring", "substring_end", "options", "store_var", "stop_at", "max_tokens"]
    assert list(inspect.signature(aici.gen_tokens).parameters)[:8] == order
    offered = {name: p.default for name, p in inspect.signature(aici.gen_tokens).parameters.items()}
    known = {name: p.default for name, p in inspect.signature(words.generate).parameters.items()}
    assert offered == {name: default for name, default in known.items() if name != "branch"}
    assert offered["max_tokens"] == 20 and offered["substring_end"] == '"'


def test_gen_tokens_returns_the_end_and_gen_text_does_not_show_it() -> None:
    async def controller() -> None:
        assert await aici.gen_tokens() == [*b"ab", EOS]
        await aici.FixedTokens("|")
        assert await aici.gen_text(regex="[x-z]{2}") == "xx"
        assert await aici.gen_text("[x-z]", max_tokens=1) == "x"

    engine = ran(controller, "ab")
    assert root_text(engine) == "ab|xxx"


def test_gen_text_shows_broken_characters() -> None:
    async def controller() -> None:
        assert await aici.gen_text(max_tokens=2) == "a\ufffd"

    ran(controller, "aé")


def test_store_var_gets_the_text() -> None:
    async def controller() -> None:
        await aici.gen_tokens(store_var="v")
        assert aici.get_var("v") == b"ab"

    ran(controller, "ab")


def test_stop_at_keeps_the_stop_and_the_rest_of_its_token() -> None:
    async def controller() -> None:
        assert await aici.gen_text(stop_at="b\nc", max_tokens=50) == "aab\nc"
        assert await aici.gen_text(regex="(hello)+", stop_at="el") == "hello"

    ran(controller, "aab\nc")


def test_nothing_is_generated_in_no_steps() -> None:
    async def controller() -> None:
        assert await aici.gen_tokens(max_tokens=0, store_var="v") == []
        assert aici.get_var("v") == b""

    assert ran(controller).steps == 0


def test_min_tokens_delays_the_end() -> None:
    async def controller() -> None:
        assert len(await aici.gen_tokens(min_tokens=3)) == 4

    engine = ran(controller)
    assert engine.group.root.sequence.tokens[-1] == EOS and sampled(engine) == 4


@pytest.mark.parametrize("says, got", [("a", "a"), ("ab", "abc"), ("x", "xyz")])
def test_options_with_one_inside_another(says: str, got: str) -> None:
    async def controller() -> None:
        assert await aici.gen_text(options=["a", "abc", "xyz"]) == got
        await aici.FixedTokens("!")

    engine = ran(controller, says)
    assert root_text(engine) == f"{got}!"
    # Only choices are sampled: the first letter, and whether "a" goes on.
    assert sampled(engine) == (1 if got == "xyz" else 2)


@pytest.mark.parametrize(
    "given, says, got",
    [
        ({"regex": "yes|no"}, "n", "no"),
        ({"yacc": '%start A %% A: "x" | "(" A ")" ;'}, "((x", "((x))"),
        ({"substring": "one two three"}, 'tw"', 'two"'),
        ({"substring": "one two three", "substring_end": "."}, "tw.", "two."),
        ({"grammar": 'start: "<" ("p" | "q") ">"'}, "q", "<q>"),
        ({"json_schema": {"enum": ["red", "blue"]}}, "b", '"blue"'),
        ({"json_schema": {"const": 5}}, "", "5"),
    ],
)
def test_each_constraint_shapes_the_text(given: dict[str, Any], says: str, got: str) -> None:
    async def controller() -> None:
        assert await aici.gen_text(max_tokens=40, **given) == got

    engine = run(controller, _insisting(says))
    assert engine.group.root.error is None and root_text(engine) == got


def _insisting(text: str) -> Any:
    """A model that says the letters of `text` in order, each as soon as it may."""
    left = list(text.encode())

    def choose(branch: Any, allowed: list[int]) -> int:
        if left and left[0] in allowed:
            return left.pop(0)
        return allowed[0]

    return choose


def test_temperature_and_top_p_hold_for_one_generation() -> None:
    async def controller() -> None:
        await aici.gen_tokens(max_tokens=1, temperature=0.25, top_p=0.5)
        await aici.gen_tokens(max_tokens=1)

    engine = engine_of(controller)
    seen = []
    while not engine.group.finished:
        sampling = engine.group.root.sampling
        assert sampling is not None
        seen.append((sampling.temperature, sampling.top_p))
        engine.round()
    assert seen == [(0.25, 0.5), (None, None)]


def test_bad_arguments_stand_at_their_line() -> None:
    async def controller() -> None:
        with pytest.raises(ValueError, match="at most one constraint"):
            await aici.gen_tokens(regex="a", options=["b"])
        with pytest.raises(ValueError, match="max_tokens=2000 is more than the model's context of 1000"):
            await aici.gen_text(max_tokens=2000)

    ran(controller)


# Constraints under the names that scripts know.


def test_constraints_by_their_names() -> None:
    async def controller() -> None:
        for made, text in [
            (aici.RegexConstraint("a|bc"), b"bc"),
            (aici.CfgConstraint('%start A %% A: "x" | "yz" ;'), b"yz"),
            (aici.LarkConstraint('start: "p" | "q"'), b"q"),
            (aici.SubStrConstraint("ab cd", "."), b"cd."),
            (aici.ChooseConstraint(["s", "tu"]), b"tu"),
        ]:
            assert isinstance(made, Constraint) and not made.eos_allowed()
            assert not made.token_allowed(ord("!"))
            for token in text:
                assert made.token_allowed(token)
                made.append_token(token)
            assert made.eos_allowed() and made.eos_forced()

    ran(controller)


def test_a_lexers_identifiers_may_be_added_on_the_way() -> None:
    async def controller() -> None:
        lexer = aici.DynamicLexer()
        lexer.add("ab")
        constraint = lexer.constraint()
        assert await aici.gen_tokens(constraint=constraint, max_tokens=2) == list(b"ab")
        await aici.gen_tokens(constraint=constraint, max_tokens=1)
        lexer.add("cd")
        assert await aici.gen_tokens(constraint=constraint, max_tokens=2) == list(b"cd")

    assert root_text(ran(controller, "a c")) == "ab cd"


# Tokens one by one.


def test_constrained_tokens_build_their_constraint_once() -> None:
    async def controller() -> None:
        made = []

        def make() -> Constraint:
            made.append(aici.RegexConstraint("[ab]c[de]"))
            return made[-1]

        step = aici.ConstrainedToken(make)
        assert made == []
        text = b""
        while True:
            text += aici.detokenize(await step)
            if step.finished:
                break
        assert text == b"bce" and len(made) == 1

    engine = ran(controller, "bce")
    assert sampled(engine) == 3, "a token at a time, forced or not"


def test_a_constrained_token_at_a_dead_end_is_the_end() -> None:
    async def controller() -> None:
        step = aici.ConstrainedToken(lambda: aici.ChooseConstraint([]))
        assert await step == [EOS] and step.finished

    engine = ran(controller, "x")
    assert "Constraint doesn't allow any tokens; adding EOS" in logs(engine)


def test_a_base_constraint_is_any_text() -> None:
    async def controller() -> None:
        step = aici.ConstrainedToken(Constraint)
        assert await step == [ord("a")] and not step.finished
        assert await step == [EOS] and step.finished

    ran(controller, "a")


class Echo(aici.NextToken):
    """Samples a letter and writes it twice; says how often it was asked and told."""

    def __init__(self) -> None:
        self.asked = 0
        self.told: list[tuple[int, list[int]]] = []

    def mid_process(self) -> aici.MidProcessResult:
        self.asked += 1
        return super().mid_process()

    def post_process(self, backtrack: int, tokens: list[int]) -> None:
        self.told.append((backtrack, tokens))
        self.value = aici.detokenize(tokens)


def test_a_users_next_token_is_asked_told_and_awaited_again() -> None:
    async def controller() -> None:
        echo = Echo()
        assert await echo == b"a" and echo.curr_tokens == [97] and not echo.finished
        assert await echo == b"b"
        assert await echo == b"" and echo.curr_tokens == [EOS] and echo.finished
        assert echo.asked == 3 and echo.told == [(0, [97]), (0, [98]), (0, [EOS])]
        assert not echo.is_fixed()

    ran(controller, "ab")


def test_a_plain_next_token_may_be_anything() -> None:
    async def controller() -> None:
        step = aici.NextToken()
        assert await step == [0] == step.value

    engine = engine_of(controller)
    assert engine.allowed(engine.group.root) == list(range(VOCABULARY.size))
    engine.round()
    assert reasons(engine) == ["stop"]


def test_a_next_token_may_skip_splice_and_fork() -> None:
    class Answering(aici.NextToken):
        def __init__(self, result: aici.MidProcessResult):
            self.result = result

        def mid_process(self) -> aici.MidProcessResult:
            return self.result

    async def controller() -> None:
        skipped = Answering(aici.MidProcessResult.skip())
        assert await skipped == skipped.curr_tokens == [] and not skipped.finished
        splice = Answering(aici.MidProcessResult.splice(1, list(b"xy")))
        assert await splice == list(b"xy") and not splice.finished
        ended = Answering(aici.MidProcessResult.splice(0, [EOS]))
        assert await ended == [EOS] and ended.finished
        both = [aici.Branch(splices=[aici.Splice(backtrack=back, ff_tokens=[98 + back])]) for back in (0, 1)]
        aici.set_var("got", "")
        got = await Answering(aici.MidProcessResult(both))
        aici.append_var("got", aici.detokenize(got))

    engine = ran(controller)
    assert texts(engine) == ["xyb", "xyc"] and engine.group.variables.get("got") == b"bc"
    assert engine.group.root.sequence.tokens == [PROMPT[0], *b"xy", EOS, ord("b")]
    assert engine.group.branches[1].sequence.tokens == [PROMPT[0], *b"xyc"]


def test_fixed_tokens_are_next_tokens_too() -> None:
    async def controller() -> None:
        await aici.FixedTokens("a")
        label = aici.Label()
        await aici.FixedTokens("bc")
        fixed = aici.FixedTokens("hello", following=label)
        assert fixed.is_fixed() and fixed.mid_process() == aici.MidProcessResult.splice(2, [258])
        assert await fixed == [258] == fixed.value and not fixed.finished

    assert root_text(ran(controller)) == "ahello"


def test_nothing_runs_after_a_stop_token() -> None:
    async def controller() -> None:
        await aici.FixedTokens("a")
        assert aici.StopToken().mid_process() == aici.MidProcessResult.stop()
        await aici.StopToken()
        await aici.FixedTokens("b")

    assert root_text(ran(controller)) == "a"


# Controllers as objects.


class Rounds(aici.AiciCallbacks):
    """Writes "x", samples two tokens, forks, and stops; stores what it was told."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, bytes, list[int]]] = []
        self.prompt: list[int] = []

    def init_prompt(self, prompt: list[int]) -> None:
        self.prompt = prompt

    def mid_process(self, backtrack: int, tokens: list[int], fork_group: list[int]) -> aici.MidProcessResult:
        self.calls.append((backtrack, aici.detokenize(tokens), fork_group))
        match len(self.calls):
            case 1:
                return aici.MidProcessResult.splice(0, list(b"x"))
            case 2 | 3:
                return aici.MidProcessResult.bias(aici.all_tokens())
            case 4:
                return aici.MidProcessResult.skip()
            case 5:
                splices = [aici.Splice(backtrack=back, ff_tokens=list(b"!")) for back in range(3)]
                return aici.MidProcessResult([aici.Branch(splices=[splice]) for splice in splices])
        aici.set_var(f"calls {fork_group[0]}", repr((self.prompt, self.calls)))
        return aici.MidProcessResult.stop()


def test_callbacks_are_asked_before_every_token_and_told_what_came() -> None:
    engine = ran(aici.controller_from(Rounds), "ab")
    assert texts(engine) == ["xab!", "xa!", "x!"]
    first = [(0, b"", [0]), (0, b"x", [0]), (0, b"a", [0]), (0, b"b", [0]), (0, b"", [0])]
    for me, group in enumerate([[0, 1, 2], [1, 0, 2], [2, 0, 1]]):
        told = (PROMPT, [*first, (me, b"!", group)])
        assert engine.group.variables.get(f"calls {me}") == repr(told).encode()


def test_callbacks_must_answer() -> None:
    engine = run(aici.controller_from(aici.AiciCallbacks))
    assert "NotImplementedError: an AiciCallbacks object must answer mid_process" in error(engine)

    class Wrong(aici.AiciCallbacks):
        def mid_process(self, *args: Any) -> Any:
            return None

    assert "AttributeError" in error(run(aici.controller_from(Wrong)))


def test_a_controller_is_an_async_function_or_a_class_of_callbacks() -> None:
    async def controller() -> None:
        await aici.FixedTokens("a")

    assert aici.controller_from(controller) is controller
    assert aici.controller_from(aici.AiciAsync(controller)) is controller
    for wrong in (Rounds(), int, lambda: None, "source", None):
        with pytest.raises(TypeError, match="a controller is an async function or a class of AiciCallbacks"):
            aici.controller_from(wrong)
    with pytest.raises(TypeError, match="AiciAsync takes an async function"):
        aici.AiciAsync(5)  # type: ignore[arg-type]
