"""Finding code in replies."""

from __future__ import annotations

import pytest

from aici_vllm.agents.coding.blocks import extract_code, looks_like_code, parses

FENCE = "```"


def fenced(code: str, name: str = "python") -> str:
    return f"{FENCE}{name}\n{code}\n{FENCE}"


def test_one_block() -> None:
    assert extract_code(f"Here:\n{fenced('x = 1')}\nDone.") == "x = 1"


def test_several_blocks_in_order() -> None:
    assert extract_code(f"{fenced('a = 1')}\ntext\n{fenced('b = 2', 'py')}") == "a = 1\nb = 2"


@pytest.mark.parametrize("name", ["python", "py", "Python", "python3"])
def test_names_of_the_language(name: str) -> None:
    assert extract_code(fenced("x = 1", name)) == "x = 1"


@pytest.mark.parametrize("name", ["pycon3x", "json", "bash", "pythonic"])
def test_other_languages_are_left(name: str) -> None:
    assert extract_code(fenced("x = 1", name)) == ""


def test_code_on_the_line_of_the_fence() -> None:
    assert extract_code(f"{FENCE}python x = 1\ny = 2\n{FENCE}") == "x = 1\ny = 2"


def test_a_block_that_does_not_close_is_no_block() -> None:
    assert extract_code(f"{FENCE}python\nx = 1") == ""


def test_the_outer_of_nested_fences_wins() -> None:
    code = f'text = """\n{fenced("inner = 1")}\n"""\nx = 2'
    assert extract_code(fenced(code)) == code


def test_a_python_block_inside_another_language_is_part_of_it() -> None:
    text = f"{FENCE}markdown\n{fenced('x = 1')}\n{FENCE}\n{fenced('y = 2')}"
    assert extract_code(text) == "y = 2"


def test_unbalanced_fences_end_at_the_first_close() -> None:
    text = f"{FENCE}python\na = 1\n{FENCE}\ntext\n{FENCE}python\nb = 2\n{FENCE}"
    assert extract_code(text) == "a = 1\nb = 2"


def test_prompts_are_stripped_and_output_dropped() -> None:
    session = ">>> def f(x):\n...     return x\n...\n>>> f(3)\n3\n>>> print('a')\na"
    assert extract_code(fenced(session)) == "def f(x):\n    return x\n\nf(3)\nprint('a')"


def test_indented_blocks_are_dedented() -> None:
    text = f"1. Do:\n   {FENCE}python\n   if a:\n       b()\n   {FENCE}"
    assert extract_code(text) == "if a:\n    b()"


def test_unnamed_fences_only_without_named_ones() -> None:
    plain = f"{FENCE}\nx = 1\n{FENCE}"
    assert extract_code(plain) == "x = 1"
    assert extract_code(f"{plain}\n{fenced('y = 2')}") == "y = 2"


@pytest.mark.parametrize("content", ["word", "'text'", "42", "not python at all", "a\nb"])
def test_unnamed_fences_without_code(content: str) -> None:
    assert extract_code(f"{FENCE}\n{content}\n{FENCE}") == ""


def test_skip_invalid() -> None:
    text = f"{fenced('x = 1')}\n{fenced('x =')}"
    assert extract_code(text) == "x = 1\nx ="
    assert extract_code(text, skip_invalid=True) == "x = 1"


def test_no_code() -> None:
    assert extract_code("") == ""
    assert extract_code("x = 1") == ""


def test_parsing() -> None:
    assert parses("x = 1")
    assert not parses("x =")
    assert not parses("x\0")
    assert not parses("(" * 10_000)
    assert looks_like_code("f()")
    assert not looks_like_code("f")
    assert not looks_like_code("")
