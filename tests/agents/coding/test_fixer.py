"""The code fixer: rounds, messages, counters, and how it ends."""

from __future__ import annotations

from typing import Any

import pytest

from aici_vllm.agents import (
    AICode,
    AICodeFixer,
    AIGenerate,
    AITemplate,
    RetryConfig,
    ScriptedModel,
    SystemMessage,
    TemplateNotFound,
    UserMessage,
    aicodefixer_feedback,
    register_template,
    run,
    template_messages,
)

BROKEN = "```python\nx = 1 / 0\n```"
WORKS = "```python\nx = 1\n```"
TEMPLATES = [UserMessage("first: {{feedback}}"), UserMessage("again: {{feedback}}")]


def fixer(
    *replies: Any, config: RetryConfig | None = None, **options: Any
) -> tuple[AICodeFixer, ScriptedModel]:
    model = ScriptedModel(replies)
    call = AIGenerate(model, "Write code", config=config or RetryConfig())
    return AICodeFixer(call, TEMPLATES, feedback_func=short_feedback, **options), model


def short_feedback(conversation: Any) -> dict[str, str]:
    cb = conversation if isinstance(conversation, AICode) else AICode(conversation[-1])
    return {"feedback": "ok" if cb.success else type(cb.error).__name__}


def contents(codefixer: AICodeFixer) -> list[Any]:
    return [message.content for message in codefixer.call.conversation[1:]]


def test_rounds_and_templates() -> None:
    codefixer, model = fixer(BROKEN, BROKEN, WORKS, num_rounds=2)
    assert str(codefixer) == "AICodeFixer(Rounds: 0/2)"
    assert model.calls == []
    assert run(codefixer) is codefixer
    assert contents(codefixer) == [
        "Write code",
        BROKEN,
        "first: ZeroDivisionError",
        BROKEN,
        "again: ZeroDivisionError",
        WORKS,
    ]
    assert str(codefixer) == "AICodeFixer(Rounds: 2/2)"
    assert codefixer.call.kwargs == {}
    run(codefixer)
    assert len(model.calls) == 3


def test_it_does_not_stop_early_unless_asked() -> None:
    codefixer, model = fixer(WORKS, WORKS, WORKS, WORKS)
    run(codefixer)
    assert (len(model.calls), codefixer.round_counter) == (4, 3)
    codefixer, model = fixer(BROKEN, WORKS, stop_on_success=True)
    run(codefixer)
    assert (len(model.calls), codefixer.round_counter) == (2, 1)
    codefixer, model = fixer(WORKS, stop_on_success=True)
    assert run(codefixer).round_counter == 0


def test_additional_rounds() -> None:
    codefixer, model = fixer(*[BROKEN] * 6, num_rounds=1)
    run(codefixer)
    run(codefixer, num_rounds=2)
    assert (codefixer.round_counter, codefixer.num_rounds, len(model.calls)) == (3, 1, 4)
    assert str(codefixer) == "AICodeFixer(Rounds: 3/1)"
    run(codefixer, num_rounds=0)
    assert len(model.calls) == 4


def test_no_rounds_still_runs_the_call() -> None:
    codefixer, model = fixer(BROKEN, num_rounds=0)
    run(codefixer)
    assert len(model.calls) == 1


def test_a_call_that_was_run_is_not_run_again() -> None:
    codefixer, model = fixer(BROKEN, WORKS, num_rounds=1)
    run(codefixer.call)
    run(codefixer)
    assert len(model.calls) == 2


def test_run_kwargs_reach_the_model() -> None:
    codefixer, model = fixer(BROKEN, WORKS, num_rounds=1)
    run(codefixer, seed=5)
    assert [request.kwargs["seed"] for request in model.calls] == [5, 5]


def test_long_conversations_are_cut() -> None:
    codefixer, model = fixer(*[BROKEN] * 4, num_rounds=3)
    run(codefixer, max_conversation_length=80)
    sent = [str(message.content) for message in model.calls[-1].prompt]
    assert sent[-2:] == [BROKEN, "again: ZeroDivisionError"]
    assert sum(map(len, sent)) <= 80


def test_the_round_counter_survives_a_failure() -> None:
    codefixer, model = fixer(BROKEN, BROKEN, ConnectionError("down"), WORKS)
    with pytest.raises(ConnectionError):
        run(codefixer)
    assert codefixer.round_counter == 2
    assert len(model.calls) == 3


def test_a_caught_failure_ends_the_session() -> None:
    codefixer, model = fixer(BROKEN, ConnectionError("down"), WORKS, config=RetryConfig(catch_errors=True))
    run(codefixer)
    assert (codefixer.round_counter, len(model.calls)) == (1, 2)
    assert isinstance(codefixer.call.error, ConnectionError)
    codefixer, model = fixer(ConnectionError("down"), config=RetryConfig(catch_errors=True))
    assert run(codefixer).round_counter == 0


def test_default_template_and_feedback() -> None:
    model = ScriptedModel([BROKEN, WORKS, WORKS])
    codefixer = AICodeFixer(AIGenerate(model, "Write code"), num_rounds=2)
    assert codefixer.templates == template_messages("CodeFixerRCI")
    assert codefixer.feedback_func is aicodefixer_feedback
    run(codefixer)
    first, second = model.calls[1].prompt[-1].content, model.calls[2].prompt[-1].content
    assert "**ZeroDivisionError**:\ndivision by zero" in first
    assert "### Feedback from the User" in first
    assert "Execution has been successful" in second
    assert len(second) < len(first)


def test_stop_on_success_with_the_default_feedback_runs_code_once() -> None:
    model = ScriptedModel([BROKEN, WORKS])
    codefixer = AICodeFixer(AIGenerate(model, "Write code"), "CodeFixerTiny", stop_on_success=True)
    run(codefixer)
    assert codefixer.round_counter == 1
    assert "ZeroDivisionError" in str(model.calls[1].prompt[-1].content)


def test_templates_by_name() -> None:
    call = AIGenerate("x")
    assert len(AICodeFixer(call, AITemplate("CodeFixerShort")).templates) == 1
    register_template("TestFixer", [SystemMessage("s"), UserMessage("{{feedback}}")])
    assert AICodeFixer(call, "TestFixer").templates == [UserMessage("{{feedback}}")]
    assert AICodeFixer(call, "TestFixer", extra=1).kwargs == {"extra": 1}


def test_bad_arguments() -> None:
    call = AIGenerate("x")
    with pytest.raises(TemplateNotFound):
        AICodeFixer(call, "Nope")
    register_template("TestNoUser", [SystemMessage("s")])
    for templates in ([], "TestNoUser", [SystemMessage("s")]):
        with pytest.raises(ValueError, match="at least one"):
            AICodeFixer(call, templates)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="negative"):
        AICodeFixer(call, num_rounds=-1)
    with pytest.raises(ValueError, match="negative"):
        run(AICodeFixer(call), num_rounds=-1)
    with pytest.raises(TypeError, match="AICall"):
        AICodeFixer("x")  # type: ignore[arg-type]
