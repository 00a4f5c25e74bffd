"""Prompts, code blocks and observations; the oracles are the documented interface texts."""

import pytest

from aici_vllm.recursive import (
    RLM_SYSTEM_PROMPT,
    RLM_SYSTEM_PROMPT_QWEN,
    CodeBlockResult,
    QueryMetadata,
    REPLObservation,
    build_initial_prompt,
    build_rlm_system_prompt,
    build_user_prompt,
    extract_code_blocks,
    format_observations,
)
from aici_vllm.recursive.prompts import LAST_CHANCE


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("```repl\nx = 1\n```", ["x = 1"]),
        ("```python\nx = 1\n```", ["x = 1"]),
        ("```python\na\n```\nthen\n```repl\nb\n```\n```python\nc\n```", ["a", "b", "c"]),
        ("```repl print(1)```", ["print(1)"]),
        ("a ```repl\nx```", ["x"]),
        ('```repl\ns = "```"\nprint(s)\n```', ['s = "```"\nprint(s)']),
        ("```repl\nx```\ntext\n```repl\ny\n```", ["x", "y"]),
        ("```repl\n\n```", []),
        ("```python3\nx\n```", []),
        ("```\nx\n```", []),
        ("```py\nx\n```", []),
        ("```REPL\nx\n```", []),
        ("```repl\nx = 1", []),
        ("", []),
    ],
)
def test_code_blocks_come_in_the_order_of_the_text(text, blocks):
    assert extract_code_blocks(text) == blocks


def test_another_language_can_stand_in_for_python():
    assert extract_code_blocks("```lua\na\n```\n```python\nb\n```\n```repl\nc\n```", language="lua") == [
        "a",
        "c",
    ]


def observation(**result):
    return REPLObservation(result=CodeBlockResult(**result))


def test_an_observation_shows_code_output_and_error():
    shown = format_observations(
        [observation(stdout="4\n"), observation(stdout="", stderr="ValueError: no", success=False)],
        code_blocks=["print(2 + 2)", "raise ValueError('no')"],
    )
    assert "print(2 + 2)" in shown and "REPL output:\n4" in shown
    assert "REPL output:\n(no output)\n\nERROR: ValueError: no" in shown
    assert shown.index("print(2 + 2)") < shown.index("raise ValueError")


def test_errors_fall_back_to_the_exception_and_then_to_a_fixed_text():
    assert "ERROR: KeyError" in format_observations([observation(exception="KeyError", success=False)])
    assert "ERROR: Unknown error" in format_observations([observation(success=False)])


def test_long_output_is_cut_and_says_by_how_much():
    shown = format_observations([observation(stdout="x" * 20010)])
    assert shown.endswith("x... [10 chars truncated]")


def test_the_system_prompt_ends_with_the_lengths():
    [message] = build_rlm_system_prompt("PROMPT", QueryMetadata([3, 4], 7, "str"))
    assert message["role"] == "system"
    assert message["content"].startswith("PROMPT\n\n")
    assert "[3, 4]" in message["content"] and " 7 " in message["content"] and "str" in message["content"]


def test_of_many_lengths_a_hundred_are_listed():
    [message] = build_rlm_system_prompt("P", QueryMetadata(list(range(1000, 1103)), 1, "list"))
    assert "1099]... [3 others]" in message["content"]
    assert "1100" not in message["content"]


def test_two_runs_share_the_system_prompt_as_prefix():
    one, two = (build_rlm_system_prompt(RLM_SYSTEM_PROMPT, QueryMetadata([n], n, "str"))[0] for n in (7, 8))
    assert one["content"].startswith(RLM_SYSTEM_PROMPT.rstrip())
    assert two["content"].startswith(RLM_SYSTEM_PROMPT.rstrip())
    assert RLM_SYSTEM_PROMPT_QWEN.startswith(RLM_SYSTEM_PROMPT)


def test_every_user_prompt_quotes_the_task():
    first, later = build_user_prompt("Find Bob", 0), build_user_prompt("Find Bob", 3)
    assert first["role"] == later["role"] == "user"
    assert '"Find Bob"' in first["content"] and '"Find Bob"' in later["content"]
    assert "Do not give a final answer" in first["content"]
    assert "Do not give a final answer" not in later["content"]
    assert "None" not in build_user_prompt(None, 0)["content"]


def test_more_contexts_and_histories_are_named():
    text = build_user_prompt("t", 1, context_count=3, history_count=2)["content"]
    assert "context_2" in text and "history_1" in text
    assert "`history`" in build_user_prompt("t", 1, history_count=1)["content"]


def test_an_initial_prompt_has_task_size_preview_and_names():
    text = build_initial_prompt("Count", context_length=12, context_preview="abc", variables=["context"])
    assert all(part in text for part in ('"Count"', "12", "abc", "context"))


def test_the_last_chance_has_its_fixed_words():
    assert "run out of REPL iterations" in LAST_CHANCE
