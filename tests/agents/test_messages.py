"""Messages: placeholders, equality, rendering."""

from __future__ import annotations

import logging

import pytest

from aici_vllm.agents import AIMessage, DataMessage, SystemMessage, UserMessage, render
from aici_vllm.agents.messages import DEFAULT_SYSTEM_PROMPT, RESERVED_VARIABLES


def test_variables_keep_order_and_duplicates() -> None:
    assert UserMessage("{{b}} {{a}} {{b}} {c}").variables == ["b", "a", "b"]
    assert SystemMessage("plain").variables == []


@pytest.mark.parametrize("name", sorted(RESERVED_VARIABLES))
def test_reserved_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="reserved"):
        UserMessage("{{" + name + "}}")


def test_equality_ignores_the_run_only() -> None:
    assert AIMessage("x", run_id=1) == AIMessage("x", run_id=2)
    assert AIMessage("x", sample_id=1) != AIMessage("x", sample_id=2)
    assert AIMessage("x") != UserMessage("x")
    assert AIMessage("x") != DataMessage("x")


def test_content_must_be_text() -> None:
    with pytest.raises(TypeError, match="string"):
        UserMessage(3)  # type: ignore[arg-type]


def test_render_fills_known_placeholders_and_keeps_variables() -> None:
    prompt = render([UserMessage("{{a}} and {{b}} and {{a}}")], {"a": 1, "c": 2})
    assert [message.content for message in prompt] == [DEFAULT_SYSTEM_PROMPT, "1 and {{b}} and 1"]
    assert DEFAULT_SYSTEM_PROMPT == "Act as a helpful AI assistant"
    assert prompt[1].variables == ["a", "b", "a"]  # type: ignore[union-attr]


def test_render_does_not_fill_placeholders_that_a_value_brings() -> None:
    prompt = render([UserMessage("{{a}}{{b}}")], {"a": "{{b}}", "b": "x"}, no_system_message=True)
    assert prompt[0].content == "{{b}}x"


def test_render_fills_only_variables_of_the_message() -> None:
    message = UserMessage("{{a}}", variables=[])
    assert render([message], {"a": "x"})[1].content == "{{a}}"


def test_render_moves_the_system_message_to_the_front() -> None:
    prompt = render([UserMessage("u"), SystemMessage("s"), AIMessage("a")])
    assert prompt == [SystemMessage("s"), UserMessage("u"), AIMessage("a")]


def test_render_refuses_two_system_messages() -> None:
    with pytest.raises(ValueError, match="one system message"):
        render([SystemMessage("a"), SystemMessage("b")])


def test_render_drops_data_messages_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="aici_vllm.agents"):
        prompt = render([UserMessage("u"), DataMessage({"x": 1})])
    assert prompt[1:] == [UserMessage("u")]
    assert "Data messages" in caplog.text


def test_render_is_idempotent() -> None:
    once = render([UserMessage("{{a}}")], {"a": "x"})
    assert render(once, {"a": "y"}) == once
