"""Feedback of failed checks, put where the model will read it."""

from __future__ import annotations

from dataclasses import replace

from aici_vllm.agents.messages import Conversation, UserMessage, fill_message
from aici_vllm.agents.samples import FEEDBACK_SEPARATOR, SampleNode, lineage
from aici_vllm.agents.templates import AITemplate, template_messages


def add_feedback(
    conversation: Conversation,
    sample: SampleNode,
    *,
    feedback_inplace: bool = False,
    feedback_template: str | AITemplate = "FeedbackFromEvaluator",
) -> Conversation:
    """Add the feedback of `sample` to `conversation` itself and return it; blank feedback changes nothing.

    Normally the sample's own feedback is appended as a user message; a message that was appended for the same
    sample before is replaced. With `feedback_inplace` the last user message is extended by the feedback of
    the sample and its ancestors, each line once, and everything after that message is removed. Raises
    ValueError if there is no user message to extend, TemplateNotFound for an unknown template.
    """
    text = _lineage_feedback(sample) if feedback_inplace else sample.feedback
    if not text.strip():
        return conversation
    message = _feedback_message(text, feedback_template)
    if feedback_inplace:
        _extend_last_user_message(conversation, sample, message)
        return conversation
    if conversation and conversation[-1] is sample.feedback_message:
        conversation.pop()
    conversation.append(message)
    sample.feedback_message = message
    return conversation


def _feedback_message(text: str, template: str | AITemplate) -> UserMessage:
    message = fill_message(template_messages(template)[-1], {"feedback": text})
    if not isinstance(message, UserMessage):
        raise ValueError(f"The last message of feedback template {template!r} must be a UserMessage.")
    # A message of its own, so that identity tells whose feedback ends a conversation.
    return replace(message)


def _lineage_feedback(sample: SampleNode) -> str:
    """Feedback from the root to the sample, joined, without lines that stand in it before."""
    seen: set[str] = set()
    parts = []
    for node in reversed(list(lineage(sample))):
        kept = []
        for line in node.feedback.split("\n"):
            if not line.strip() or line not in seen:
                kept.append(line)
            seen.add(line)
        if any(line.strip() for line in kept):
            parts.append("\n".join(kept))
    return FEEDBACK_SEPARATOR.join(parts)


def _extend_last_user_message(conversation: Conversation, sample: SampleNode, message: UserMessage) -> None:
    index = next(
        (i for i in reversed(range(len(conversation))) if isinstance(conversation[i], UserMessage)), None
    )
    if index is None:
        raise ValueError("No user messages detected: in-place feedback needs a user message to extend.")
    asked = conversation[index]
    assert isinstance(asked, UserMessage)
    del conversation[index:]
    addition = f"\n\n{message.content}"
    content = _without_additions(asked.content, sample) + addition
    variables = list(dict.fromkeys([*asked.variables, *message.variables]))
    conversation.append(replace(asked, content=content, variables=variables))
    if addition not in sample.inplace_additions:
        sample.inplace_additions.append(addition)


def _without_additions(content: str, sample: SampleNode) -> str:
    """The content without the in-place feedback that the sample or an ancestor added to it."""
    additions = [addition for node in lineage(sample) for addition in node.inplace_additions]
    fitting = [addition for addition in additions if content.endswith(addition)]
    return content.removesuffix(max(fitting, key=len)) if fitting else content
