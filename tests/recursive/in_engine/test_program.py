"""The controller of one call: what it writes, what it lets a model say, and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest

from aici_vllm.controller.group import Group
from aici_vllm.controller.program import NativeProgram
from aici_vllm.recursive.in_engine.program import CLOSING_TOKENS, Outcome, Plan, answer_call, written
from aici_vllm.recursive.in_engine.turn_shape import FINAL, STRICT_TURN, TURN
from tests.controller.fake_engine import FakeEngine
from tests.recursive.in_engine.scripted_engine import EOS, VOCABULARY, decode, encode


def run(
    said: str, shape: str = "text", *, context: int = 500, **plan: Any
) -> tuple[str, Outcome, FakeEngine]:
    """A call behind the prompt `U:` whose model wants to say `said`: the reply, the outcome, the engine."""
    script = encode(said)

    def choose(branch: Any, allowed: list[int]) -> int:
        done = len(branch.sequence) - len(encode("U:hello<end>A:"))
        wanted = script[done] if done < len(script) else EOS
        return wanted if wanted in allowed else allowed[0]

    pieces = [("hello", True), ("<end>A:", False)]
    arg = Plan(pieces, shape, context=context, **{"max_tokens": 100, **plan}).as_json()
    group = Group(VOCABULARY, encode("U:"), max_tokens=context, context=context, arg=arg)
    engine = FakeEngine(group, choose=choose)
    engine.run(lambda branch: NativeProgram(answer_call, arg, branch))
    assert group.root.error is None
    values = group.variables.snapshot()
    return values["reply"].decode(), Outcome.from_json(values["outcome"]), engine


def test_a_plain_reply_ends_where_the_model_ends_it() -> None:
    reply, outcome, engine = run("good day")
    assert (reply, outcome) == ("good day", Outcome("stop", 10, 8 + 9, 9))
    assert decode(engine.group.root.sequence.tokens) == "U:hello<end>A:good day<end>"


def test_a_reply_has_its_number_of_tokens() -> None:
    reply, outcome, _ = run("good day", max_tokens=4)
    assert (reply, outcome.reason, outcome.reply_tokens) == ("good", "length", 4)
    reply, outcome, _ = run("x", min_tokens=3, max_tokens=5)
    assert outcome.reply_tokens >= 3


@pytest.mark.parametrize("shape, pattern", [("turn", TURN), ("strict turn", STRICT_TURN), ("final", FINAL)])
@pytest.mark.parametrize("max_tokens", [1, 2, 9, 10, 30, 60])
@pytest.mark.parametrize(
    "said",
    [
        "prose without an end " * 5,
        "look\n```repl\nprint(context)\n```\nREPL output: 7",
        "FINAL(a (b) c) and more",
        "```python\nx\n```",
        "",
        "F\nFI\nFINAL",
    ],
)
def test_turns_are_never_malformed(shape: str, pattern: str, max_tokens: int, said: str) -> None:
    reply, outcome, _ = run(said, shape, max_tokens=max_tokens)
    assert re.fullmatch(pattern, reply), reply
    assert outcome.reply_tokens <= max_tokens + CLOSING_TOKENS


def test_a_turn_ends_with_its_block() -> None:
    reply, outcome, engine = run("look\n```repl\nprint(1)\n```\nREPL output: 7", "turn")
    assert (reply, outcome.reason) == ("look\n```repl\nprint(1)\n```", "stop")
    assert engine.group.root.sequence.tokens[-1] != EOS


def test_prose_may_take_half_of_a_turn() -> None:
    reply, outcome, _ = run("a" * 30 + "\n", "turn", max_tokens=20)
    assert reply.startswith("a" * 10 + "\n```repl\n") and outcome.reason == "length"


def test_patterns_are_matched_or_the_reply_is_cut_short() -> None:
    assert run("42", "regex", pattern="[0-9]{2}")[:2] == ("42", Outcome("stop", 10, 10, 2))
    assert run("42", "regex", pattern="[0-9]{5}", max_tokens=3)[1].reason == "length"
    assert run("123", "regex", pattern="[0-9]{3,5}", max_tokens=3)[1].reason == "stop"
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    reply, outcome, _ = run('{"a":7}', "json", pattern=schema)
    assert (reply, outcome.reason) == ('{"a":7}', "stop")


def test_what_cannot_be_done_computes_nothing() -> None:
    for plan, reason in [
        ({"context": 10}, "too long"),
        ({"allowance": 8}, "no budget"),
        ({"allowance": 10, "counted": 2}, "no budget"),
        ({"shape": "regex", "pattern": "["}, "bad pattern"),
    ]:
        reply, outcome, engine = run("x", **plan)
        assert (outcome.reason, outcome.spent, engine.steps) == (reason, 0, 0)
        assert ("'['" in reply) == (reason == "bad pattern")


def test_an_allowance_is_kept_to_the_token() -> None:
    reply, outcome, _ = run("good day", allowance=8 + 4)
    assert (reply, outcome.reason, outcome.spent) == ("good", "budget", 12)
    assert run("good day", allowance=8 + 9)[1] == Outcome("stop", 10, 17, 9)
    _, outcome, _ = run("prose " * 9, "turn", allowance=8 + 5 + CLOSING_TOKENS)
    assert outcome.reason == "budget" and outcome.spent <= 8 + 5 + CLOSING_TOKENS


def test_the_context_is_kept() -> None:
    _, outcome, engine = run("word " * 30, "turn", context=60)
    assert outcome.reason == "length" and len(engine.group.root.sequence) <= 60


def test_a_prefill_adds_the_text_and_no_reply() -> None:
    reply, outcome, engine = run("never", "prefill")
    assert (reply, outcome, engine.steps) == ("", Outcome("stop", 10, 8), 1)
    assert decode(engine.group.root.sequence.tokens) == "U:hello<end>A:"


def test_nothing_does_nothing() -> None:
    assert run("never", "nothing")[1] == Outcome("stop", 0, 0)
    assert run("never", "nothing")[2].steps == 0


def test_special_tokens_in_data_stay_text() -> None:
    pieces = [("a<end>b<end>", True), ("<end>", False)]
    tokens = written(pieces, VOCABULARY, [])
    assert tokens == [*b"a<end>b<end>", EOS]


def test_an_ended_reply_is_not_ended_twice() -> None:
    assert written([("<end>U:", False)], VOCABULARY, [7, EOS]) == list(b"U:")
    assert written([("<end>U:", False)], VOCABULARY, [7]) == [EOS, *b"U:"]
    assert written([("U:", False)], VOCABULARY, [EOS]) == list(b"U:")
    assert written([], VOCABULARY, [EOS]) == []
