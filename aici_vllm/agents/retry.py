"""Checks on samples, and retries from the most promising one until a check passes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self, TypeAlias

from aici_vllm.agents.calls import AICall, run_round
from aici_vllm.agents.errors import RetryBudgetExceeded
from aici_vllm.agents.feedback import add_feedback
from aici_vllm.agents.rounds import Sampler, effective_verbose
from aici_vllm.agents.samples import SampleNode, backpropagate, pre_order
from aici_vllm.agents.scoring import select_best

logger = logging.getLogger("aici_vllm.agents")

Condition: TypeAlias = Callable[[AICall], bool]
Feedback: TypeAlias = str | Callable[[AICall], str]


class Evaluation:
    """One check over a call's samples, as a context: all of it but calling the user's functions.

    For each of `questions()` the function it names is called, and its value is put into `answer`. On leaving,
    the call shows the sample it showed before. If an exception leaves the context, the statistics, flags and
    feedback of the samples are put back as well, so the check can be repeated.

    Raises TypeError for a condition that cannot be called, and for feedback that is neither a string nor a
    function.
    """

    def __init__(
        self, condition: Any, call: AICall, feedback: Any, evaluate_all: bool, feedback_expensive: bool
    ) -> None:
        if not callable(condition):
            raise TypeError(f"The condition must be a function of the call, got {type(condition).__name__}.")
        if not (isinstance(feedback, str) or callable(feedback)):
            raise TypeError(
                f"Feedback must be a string or a function of the call, got {type(feedback).__name__}."
            )
        self.call = call
        self.answer: Any = None
        self._condition, self._feedback = condition, _as_function(feedback)
        self._evaluate_all, self._expensive = evaluate_all, feedback_expensive
        self._passed: SampleNode | None = None
        self._chosen = call.samples
        self._conversation, self._active = call.conversation, call.active_sample_id
        self._before = [
            (node, (node.wins, node.visits, node.success, node.feedback)) for node in pre_order(call.samples)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            error.add_note(
                f"Raised while checking sample {self.call.active_sample_id}; the call is as it was before."
            )
            for node, stats in self._before:
                node.wins, node.visits, node.success, node.feedback = stats
        self.call.conversation, self.call.active_sample_id = self._conversation, self._active

    def questions(self) -> Iterator[Callable[[AICall], Any]]:
        """The user's functions in the order in which they are asked; the call shows the sample in question.

        Raises TypeError for an answer of the wrong type.
        """
        for node in self._candidates():
            yield self._condition
            passed = self._record(node)
            if not passed and self._feedback is not None and not self._expensive:
                yield self._feedback
                node.feedback += self._feedback_text()
            backpropagate(node, wins=passed, visits=1)
        if self._passed is None:
            config = self.call.config
            # Once only: a scoring method may draw at random.
            self._chosen = select_best(self.call.samples, config.scoring, config.ordering)
            if self._feedback is not None and self._expensive:
                self._show(self._chosen)
                yield self._feedback
                self._chosen.feedback = self._feedback_text()

    def result(self) -> tuple[bool, SampleNode]:
        """After the last question: whether a sample passed, and the last that did, else the best one."""
        return (False, self._chosen) if self._passed is None else (True, self._passed)

    def _candidates(self) -> Iterator[SampleNode]:
        """The samples to check, in pre-order, each shown by the call when it is handed out."""
        for node in pre_order(self.call.samples):
            is_active = node.id == self._active
            if is_active or (self._evaluate_all and node.success is True):
                self._show(node)
                yield node

    def _show(self, node: SampleNode) -> None:
        self.call.conversation, self.call.active_sample_id = node.data, node.id

    def _record(self, node: SampleNode) -> bool:
        """Mark the sample by the condition's answer."""
        if not isinstance(self.answer, bool):
            raise TypeError(f"The condition must return True or False, got {type(self.answer).__name__}.")
        if self.answer:
            self._passed = node
        else:
            node.success = False
        return self.answer

    def _feedback_text(self) -> str:
        """Feedback as a node keeps it, on a line of its own."""
        if not isinstance(self.answer, str):
            raise TypeError(f"Feedback must be a string, got {type(self.answer).__name__}.")
        return "\n" + self.answer


def _as_function(feedback: Feedback) -> Callable[[AICall], str] | None:
    """Feedback as a function of the call; None when there is none."""
    if isinstance(feedback, str):
        return (lambda call: feedback) if feedback else None
    return feedback


def evaluate_condition(
    condition: Condition,
    aicall: AICall,
    feedback: Feedback = "",
    *,
    evaluate_all: bool = True,
    feedback_expensive: bool = False,
) -> tuple[bool, SampleNode]:
    """Check the call's samples and return whether one passed, and the sample to go on with.

    Checked are the active sample and, with `evaluate_all`, every sample that passed so far. The last that
    passes is returned, else the best one to retry from by `config.scoring` and `config.ordering`. A sample
    that fails is marked and gets the feedback; with `feedback_expensive` only the returned one does. While
    `condition` and a feedback function run, the call shows the sample in question. An exception from either
    leaves everything as it was before.
    """
    with Evaluation(condition, aicall, feedback, evaluate_all, feedback_expensive) as evaluation:
        for ask in evaluation.questions():
            evaluation.answer = ask(aicall)
    return evaluation.result()


class RetryLoop:
    """What happens between the checks and the runs of `airetry`: budgets, messages, feedback."""

    def __init__(
        self, call: AICall, verbose: int, throw: bool, max_retries: int | None, retry_delay: float | None
    ) -> None:
        if call.success is None:
            raise RuntimeError("The call has not been run yet; use run(call) before airetry.")
        self.call = call
        self.verbose = effective_verbose(call, verbose)
        self.throw = throw
        self.max_retries = call.config.max_retries if max_retries is None else max_retries
        self.retry_delay = call.config.retry_delay if retry_delay is None else retry_delay
        if self.max_retries < 0 or self.retry_delay < 0:
            raise ValueError("max_retries and retry_delay must not be negative.")

    def settle(self, passed: bool, node: SampleNode) -> bool:
        """Show the sample the check chose; returns whether to go on with a retry from it.

        Raises RetryBudgetExceeded when the budget is used up and `throw` was asked for.
        """
        call = self.call
        call.conversation, call.active_sample_id, call.success = node.data, node.id, passed
        if passed:
            return False
        if self._exhausted():
            self._report_exhausted()
            return False
        self._log("Condition not met. Retrying...")
        if node.feedback != "":
            self._feed_back(node)
        return True

    def _feed_back(self, node: SampleNode) -> None:
        call, config = self.call, self.call.config
        if config.feedback_inplace:
            # In-place feedback removes the reply; the sample keeps its own.
            call.conversation = list(call.conversation)
        add_feedback(
            call.conversation,
            node,
            feedback_inplace=config.feedback_inplace,
            feedback_template=config.feedback_template,
        )

    def _exhausted(self) -> bool:
        config = self.call.config
        return config.calls >= config.max_calls or config.retries >= self.max_retries

    def _report_exhausted(self) -> None:
        config = self.call.config
        spent = f"(Retries: {config.retries}/{self.max_retries}, Calls: {config.calls}/{config.max_calls})."
        if self.throw:
            raise RetryBudgetExceeded(f"Maximum retry budget reached {spent}")
        self._log(f"Condition not met, but maximum retry budget was reached {spent}")

    def _log(self, text: str) -> None:
        if self.verbose >= 1:
            logger.info("%s", text)


def airetry(
    condition: Condition,
    aicall: AICall,
    feedback: Feedback = "",
    *,
    verbose: int = 1,
    throw: bool = False,
    evaluate_all: bool = True,
    feedback_expensive: bool = False,
    max_retries: int | None = None,
    retry_delay: float | None = None,
    sampler: Sampler | None = None,
) -> AICall:
    """Check the call's samples and retry from the best one until one passes or the budget is used up.

    The call must have been run. Its conversation, active sample and `success` then show the sample that
    passed, or the best one to go on from. `max_retries` and `retry_delay` (seconds) default to the config's.
    The budgets count over all `airetry` calls on the same call. With `throw` an exhausted budget raises
    RetryBudgetExceeded. `sampler` produces the samples of the retries; it is told `condition`. Exceptions of
    the condition, of a feedback function and, unless errors are caught, of the model pass through.
    """
    loop = RetryLoop(aicall, verbose, throw, max_retries, retry_delay)
    while loop.settle(
        *evaluate_condition(
            condition, aicall, feedback, evaluate_all=evaluate_all, feedback_expensive=feedback_expensive
        )
    ):
        time.sleep(loop.retry_delay)
        aicall.config.retries += 1
        run_round(aicall, loop.verbose, None, sampler, condition, {})
    return aicall


retry = airetry
