"""Feedback in conversations: the published examples, replacement, and in-place rules."""

from __future__ import annotations

import copy

import pytest

from aici_vllm.agents import (
    AIMessage,
    AITemplate,
    Message,
    SampleNode,
    SystemMessage,
    TemplateNotFound,
    UserMessage,
    add_feedback,
    expand,
    register_template,
)


def hello() -> list[Message]:
    return [UserMessage("I say hi!"), AIMessage("I say hi!")]


def test_feedback_is_appended() -> None:
    conversation = hello()
    sample = SampleNode(data=None, feedback="Feedback X")
    assert add_feedback(conversation, sample) is conversation
    assert conversation[:2] == hello()
    assert conversation[-1].content == "### Feedback from Evaluator\nFeedback X\n"
    assert isinstance(conversation[-1], UserMessage)
    assert len(conversation) == 3


def test_feedback_in_place() -> None:
    conversation = add_feedback(hello(), SampleNode(data=None, feedback="Feedback X"), feedback_inplace=True)
    assert [message.content for message in conversation] == [
        "I say hi!\n\n### Feedback from Evaluator\nFeedback X\n"
    ]


def test_only_the_own_feedback_is_appended() -> None:
    parent = SampleNode(data=None, feedback="\nFeedback X")
    sample = expand(parent, None)
    sample.feedback = "\nFeedback Y"
    conversation = add_feedback(hello(), sample)
    assert conversation[-1].content == "### Feedback from Evaluator\n\nFeedback Y\n"


def test_in_place_feedback_includes_ancestors() -> None:
    parent = SampleNode(data=None, feedback="\nFeedback X")
    sample = expand(parent, None, feedback="\nFeedback Y")
    (message,) = add_feedback(hello(), sample, feedback_inplace=True)
    assert message.content == (
        "I say hi!\n\n### Feedback from Evaluator\n\nFeedback X\n----------\n\nFeedback Y\n"
    )


def test_in_place_feedback_has_each_line_once() -> None:
    parent = SampleNode(data=None, feedback="\nA\nB")
    middle = expand(parent, None, feedback="\nB")
    sample = expand(middle, None, feedback="\nB\nC")
    (message,) = add_feedback(hello(), sample, feedback_inplace=True)
    assert message.content == "I say hi!\n\n### Feedback from Evaluator\n\nA\nB\n----------\n\nC\n"


def test_in_place_feedback_replaces_what_an_ancestor_added() -> None:
    parent = SampleNode(data=None, feedback="\nA")
    asked = add_feedback(hello(), parent, feedback_inplace=True)
    # The child's prompt is the amended one; the model answers it and fails again.
    sample = expand(parent, [*asked, AIMessage("second")], feedback="\nB")
    (message,) = add_feedback(list(sample.data), sample, feedback_inplace=True)
    assert message.content == "I say hi!\n\n### Feedback from Evaluator\n\nA\n----------\n\nB\n"
    # The same sample chosen again, with feedback that grew.
    sample.feedback += "\nC"
    (again,) = add_feedback(list(sample.data), sample, feedback_inplace=True)
    assert again.content == "I say hi!\n\n### Feedback from Evaluator\n\nA\n----------\n\nB\nC\n"
    assert add_feedback([again], sample, feedback_inplace=True) == [again]


def test_in_place_feedback_keeps_what_came_before_the_last_user_message() -> None:
    conversation: list[Message] = [SystemMessage("s"), UserMessage("1"), AIMessage("a"), UserMessage("2")]
    conversation += [AIMessage("b"), AIMessage("c")]
    add_feedback(conversation, SampleNode(None, feedback="F"), feedback_inplace=True)
    assert [message.content for message in conversation] == [
        "s",
        "1",
        "a",
        "2\n\n### Feedback from Evaluator\nF\n",
    ]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("blank", ["", "\n", " \n\t"])
def test_blank_feedback_changes_nothing(blank: str, inplace: bool) -> None:
    conversation = hello()
    assert add_feedback(conversation, SampleNode(None, feedback=blank), feedback_inplace=inplace) == hello()


def test_the_same_sample_chosen_again_replaces_its_message() -> None:
    conversation = hello()
    sample = SampleNode(data=conversation, feedback="\nA")
    add_feedback(conversation, sample)
    sample.feedback += "\nB"
    add_feedback(conversation, sample)
    assert len(conversation) == 3
    assert conversation[-1].content == "### Feedback from Evaluator\n\nA\nB\n"
    twin = copy.deepcopy(sample)
    twin.feedback += "\nC"
    add_feedback(twin.data, twin)
    assert len(twin.data) == 3
    assert len(conversation) == 3


def test_another_samples_message_is_not_replaced() -> None:
    conversation = hello()
    add_feedback(conversation, SampleNode(None, feedback="A"))
    add_feedback(conversation, SampleNode(None, feedback="A"))
    assert len(conversation) == 4


def test_feedback_may_contain_braces() -> None:
    for inplace in (False, True):
        conversation = add_feedback(
            hello(), SampleNode(None, feedback="{{model}} {{x}}"), feedback_inplace=inplace
        )
        assert "{{model}} {{x}}" in str(conversation[-1].content)


def test_other_templates() -> None:
    register_template("TestFeedback", [UserMessage("unused"), UserMessage("Fix: {{feedback}}")])
    for template in ("TestFeedback", AITemplate("TestFeedback")):
        conversation = add_feedback(hello(), SampleNode(None, feedback="F"), feedback_template=template)
        assert conversation[-1].content == "Fix: F"
    with pytest.raises(TemplateNotFound):
        add_feedback(hello(), SampleNode(None, feedback="F"), feedback_template="Nope")


def test_errors_leave_the_conversation() -> None:
    conversation: list[Message] = [SystemMessage("s"), AIMessage("a")]
    with pytest.raises(ValueError, match="No user messages"):
        add_feedback(conversation, SampleNode(None, feedback="F"), feedback_inplace=True)
    assert len(conversation) == 2


def test_a_deep_lineage() -> None:
    node = SampleNode(None, feedback="line 0")
    for number in range(1, 10_000):
        node = expand(node, None, feedback=f"line {number % 3}")
    (message,) = add_feedback(hello(), node, feedback_inplace=True)
    assert message.content.count("line") == 3
