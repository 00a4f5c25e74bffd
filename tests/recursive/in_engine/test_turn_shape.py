"""Turns of the shape are never malformed, wherever they are cut short."""

from __future__ import annotations

import re

import pytest

from aici_vllm.recursive import extract_code_blocks
from aici_vllm.recursive.finalize import ContextGuard, find_marker
from aici_vllm.recursive.in_engine.turn_shape import (
    FENCE,
    FINAL,
    STRICT_TURN,
    TURN,
    missing_end,
    missing_final,
    missing_opening,
)

BLOCKS = [
    "```repl\nprint(1)\n```",
    "I look at it.\nThen I think.\n```repl\nprint(context[:10])\nx = 'a`b``c'\n```",
    "\n\n```repl\n  deep()\n\n\n```",
    "`x` and ``y``\n```repl\n`\n```",
    "Fine, FINAL is near\nFI\n```repl\nFINAL(1)\n```",
]
FINALS = ["FINAL(42)", "I know.\nFINAL(f(x(1), (2)) = 3)", "FINAL_VAR(result)", 'FINAL("")', "Ä\nFINAL(ö)"]
MALFORMED = [
    "",
    "prose",
    "```python\nx\n```",
    "```repl\n\n```",
    "```repl\nx",
    "a ```repl\nx\n```",
    "```repl\nx\n```\nREPL output: 5",
    "```repl\nx\n```\n```repl\ny\n```",
    "FINAL(1) and more",
    "FINAL(a))",
    "FINAL(1)\n```repl\nx\n```",
]


@pytest.mark.parametrize("turn", BLOCKS)
def test_a_block_is_found_whole_and_alone(turn: str) -> None:
    assert re.fullmatch(TURN, turn) and re.fullmatch(STRICT_TURN, turn)
    assert extract_code_blocks(turn) == [turn.split(FENCE)[1].removesuffix("\n```").strip()]


@pytest.mark.parametrize("turn", FINALS)
def test_a_final_answer_is_found_and_strict_turns_have_none(turn: str) -> None:
    assert re.fullmatch(TURN, turn) and not re.fullmatch(STRICT_TURN, turn)
    marker = find_marker(turn, ContextGuard(""))
    assert marker is not None and not extract_code_blocks(turn)
    assert f"({marker.answer})" in turn.replace('"', "") or marker.answer in turn


@pytest.mark.parametrize("turn", MALFORMED)
def test_anything_else_is_no_turn(turn: str) -> None:
    assert not re.fullmatch(TURN, turn)


@pytest.mark.parametrize("turn", BLOCKS + FINALS)
@pytest.mark.parametrize("strict", [False, True])
def test_a_turn_cut_anywhere_can_be_completed(turn: str, strict: bool) -> None:
    shape = STRICT_TURN if strict else TURN
    for end in range(len(turn)):
        if strict and turn in FINALS and turn[:end].endswith("```"):
            continue
        completed = turn[:end] + missing_end(turn[:end], strict)
        assert re.fullmatch(shape, completed), completed


@pytest.mark.parametrize("turn", BLOCKS + FINALS)
def test_prose_is_given_a_block_and_nothing_else_is(turn: str) -> None:
    for end in range(len(turn)):
        opening = missing_opening(turn[:end])
        if opening is None:
            assert FENCE in turn[:end] or "FINAL" in turn[:end]
        else:
            assert re.fullmatch(TURN, f"{turn[:end]}{opening}x\n```") or "FINAL" in turn[:end]


@pytest.mark.parametrize("turn", ["FINAL(a(b)c)", "FINAL_VAR(x)"])
def test_a_final_answer_cut_anywhere_can_be_completed(turn: str) -> None:
    for end in range(len(turn)):
        assert re.fullmatch(FINAL, turn[:end] + missing_final(turn[:end]))
