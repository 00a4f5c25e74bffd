"""The template registry and the templates that ship."""

from __future__ import annotations

import pytest

from aici_vllm.agents import (
    AITemplate,
    SystemMessage,
    TemplateNotFound,
    UserMessage,
    register_template,
    template_messages,
    template_names,
)


def test_blank_system_user() -> None:
    assert template_messages("BlankSystemUser") == [SystemMessage("{{system}}"), UserMessage("{{user}}")]


def test_feedback_template_is_exact() -> None:
    (message,) = template_messages("FeedbackFromEvaluator")
    assert message.content == "### Feedback from Evaluator\n{{feedback}}\n"


@pytest.mark.parametrize(
    ("name", "count"), [("CodeFixerRCI", 2), ("CodeFixerShort", 1), ("CodeFixerTiny", 1)]
)
def test_code_fixer_templates_ask_for_feedback_only(name: str, count: int) -> None:
    messages = template_messages(AITemplate(name))
    assert len(messages) == count
    assert all(isinstance(message, UserMessage) and message.variables == ["feedback"] for message in messages)
    assert all("Julia" not in message.content for message in messages)


def test_messages_come_as_a_copy() -> None:
    template_messages("BlankSystemUser").clear()
    assert len(template_messages("BlankSystemUser")) == 2


def test_unknown_template() -> None:
    with pytest.raises(TemplateNotFound, match="'Nope' does not exist"):
        template_messages("Nope")
    with pytest.raises(ValueError):
        template_messages(AITemplate("Nope"))


def test_register() -> None:
    register_template("TestOnly", [UserMessage("hello {{name}}")])
    assert "TestOnly" in template_names()
    assert template_messages("TestOnly") == [UserMessage("hello {{name}}")]
    with pytest.raises(ValueError):
        register_template("", [UserMessage("x")])
    with pytest.raises(TypeError):
        register_template("Bad", ["x"])  # type: ignore[list-item]
