"""`AICodeFixer`: rounds of running a model's code and telling it what came out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from aici_vllm.agents.calls import AICall
from aici_vllm.agents.coding.evaluation import AICode
from aici_vllm.agents.coding.feedback import aicodefixer_feedback, evaluated_code
from aici_vllm.agents.conversation import truncate_conversation
from aici_vllm.agents.messages import AIMessage, UserMessage
from aici_vllm.agents.templates import AITemplate, template_messages

FeedbackFunction = Callable[..., Mapping[str, Any]]


class AICodeFixer:
    """Runs a call, then `num_rounds` times evaluates the code it wrote and asks it to improve.

    templates: user messages with the placeholder `{{feedback}}`, or the name of a template; the first is
        sent in the first round, the last in every later one.
    round_counter: rounds done so far; kept when a round fails.
    feedback_func: from the conversation to the arguments of the next call, of which `feedback` is one.
    stop_on_success: end as soon as the code runs without an error, instead of asking for more tests.
    kwargs: leftover arguments, kept for feedback functions and templates of the user.
    """

    def __init__(
        self,
        call: AICall,
        templates: Sequence[UserMessage] | str | AITemplate = "CodeFixerRCI",
        *,
        num_rounds: int = 3,
        round_counter: int = 0,
        feedback_func: FeedbackFunction = aicodefixer_feedback,
        stop_on_success: bool = False,
        **kwargs: Any,
    ) -> None:
        if not isinstance(call, AICall):
            raise TypeError(f"A code fixer works on an AICall, got {type(call).__name__}.")
        if num_rounds < 0 or round_counter < 0:
            raise ValueError("num_rounds and round_counter must not be negative.")
        self.call = call
        self.templates = _user_messages(templates)
        self.num_rounds = num_rounds
        self.round_counter = round_counter
        self.feedback_func = feedback_func
        self.stop_on_success = stop_on_success
        self.kwargs = kwargs

    def __repr__(self) -> str:
        return f"AICodeFixer(Rounds: {self.round_counter}/{self.num_rounds})"

    def run(
        self,
        verbose: int = 1,
        *,
        max_conversation_length: int = 32000,
        num_rounds: int | None = None,
        **run_kwargs: Any,
    ) -> Self:
        """Run the call if it has not been run, then the rounds that are left.

        `num_rounds` here means that many more. The conversation is kept under `max_conversation_length`
        characters. A round whose model call fails and is caught ends the session; `call.error` says why.
        """
        if num_rounds is not None and num_rounds < 0:
            raise ValueError(f"num_rounds must not be negative, got {num_rounds}.")
        limit = self.num_rounds if num_rounds is None else self.round_counter + num_rounds
        failed = False
        if self.call.success is None:
            failed = not self.call.run(verbose, **run_kwargs).is_valid
        while self.round_counter < limit and not failed:
            code = self._last_code() if self.stop_on_success else None
            if code is not None and code.success:
                break
            self._fix(code, verbose, max_conversation_length, run_kwargs)
            failed = not self.call.is_valid
        return self

    def _last_code(self) -> AICode | None:
        last = self.call.conversation[-1] if self.call.conversation else None
        return evaluated_code(last) if isinstance(last, AIMessage) else None

    def _fix(
        self, code: AICode | None, verbose: int, max_conversation_length: int, run_kwargs: Mapping[str, Any]
    ) -> None:
        """One round: feedback on the last code, the message for it, and the next reply."""
        call = self.call
        # Code that was run to see whether it works is not run again for the feedback.
        reuse = code is not None and self.feedback_func is aicodefixer_feedback
        feedback = self.feedback_func(code if reuse else call.conversation)
        self.round_counter += 1
        call.kwargs = {**call.kwargs, **feedback}
        call.conversation.append(self.templates[0] if self.round_counter == 1 else self.templates[-1])
        call.conversation = truncate_conversation(call.conversation, max_conversation_length)
        call.run(verbose, **run_kwargs)


def _user_messages(templates: Sequence[UserMessage] | str | AITemplate) -> list[UserMessage]:
    if isinstance(templates, str | AITemplate):
        chosen = [message for message in template_messages(templates) if isinstance(message, UserMessage)]
    else:
        chosen = list(templates)
    if not chosen or not all(isinstance(message, UserMessage) for message in chosen):
        raise ValueError("A code fixer needs at least one template, each a UserMessage.")
    return chosen
