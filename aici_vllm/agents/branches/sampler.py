"""Samplers that let an engine make the samples of a round as branches of one request."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aici_vllm.agents.branches.condition import PrefixCondition, prefix_check
from aici_vllm.agents.branches.prompt import BranchPrompt, ChatTemplate
from aici_vllm.agents.branches.questions import Asked, BranchModel, Questions
from aici_vllm.agents.errors import ModelCallError
from aici_vllm.agents.messages import Conversation, TokenSequence
from aici_vllm.agents.models.base import Reply
from aici_vllm.agents.models.vllm import sampling_params
from aici_vllm.agents.rounds import SampleRound

if TYPE_CHECKING:
    from aici_vllm.agents.branches.program import BranchPlan
    from aici_vllm.offline import BranchResult, ControllerResult

REFUSED = ("logprobs", "prompt_logprobs", "ignore_eos")
"""Sampling parameters that a branch cannot follow."""


@dataclass
class Fork:
    """One request: the branches that continue one prompt under the same parameters.

    `owners` names for each branch the question that its reply belongs to.
    """

    prompt: BranchPrompt
    api_kwargs: dict[str, Any]
    owners: list[Asked] = field(default_factory=list)
    temperatures: list[float] = field(default_factory=list)


class _BranchSampler:
    """What the two samplers share.

    sampling: default sampling parameters by name; a call's `api_kwargs` override them.
    chat_template, chat_template_kwargs: as for `AsyncVLLMModel`.
    condition: the condition whose prefix check applies in rounds that are told of none, as in a plain `run`.
    max_branches: samples per request; by default as many as the engine's operator allows.
    rng: source of the random run ids.
    """

    def __init__(
        self,
        engine: Any,
        *,
        sampling: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        condition: PrefixCondition | None = None,
        max_branches: int | None = None,
        rng: random.Random | None = None,
    ) -> None:
        if max_branches is not None and max_branches < 1:
            raise ValueError(f"max_branches must be at least 1, got {max_branches}.")
        self.engine = engine
        self._sampling = dict(sampling or {})
        self._template = ChatTemplate(engine.renderer, chat_template, dict(chat_template_kwargs or {}))
        self._condition = condition
        self._context = int(engine.model_config.max_model_len)
        self._max_branches = max_branches or branch_limit(self._vllm_config())
        self._rng = rng

    def _vllm_config(self) -> Any:
        return self.engine.vllm_config

    def _questions(self, round: SampleRound) -> Questions:
        return Questions(round, BranchModel(self._rng))

    def _forks(self, asked: Sequence[Asked]) -> list[Fork]:
        """The requests that answer these questions: equal ones together, up to `max_branches` in one."""
        forks: list[Fork] = []
        for question in asked:
            api_kwargs = {**self._sampling, **question.request.api_kwargs}
            api_kwargs.pop("n", None)
            temperature = float(api_kwargs.pop("temperature", 1.0))
            prompt = self._template.prompt(question.request.prompt)
            for _ in range(question.request.n):
                fork = self._fork_with_room(forks, prompt, api_kwargs)
                fork.owners.append(question)
                fork.temperatures.append(temperature)
        return forks

    def _fork_with_room(self, forks: list[Fork], prompt: BranchPrompt, api_kwargs: dict[str, Any]) -> Fork:
        for fork in forks:
            same = fork.prompt == prompt and fork.api_kwargs == api_kwargs
            if same and len(fork.owners) < self._max_branches:
                return fork
        forks.append(Fork(prompt, api_kwargs))
        return forks[-1]

    def _request(self, fork: Fork, number: int, round: SampleRound) -> tuple[dict[str, Any], Any]:
        """What the engine gets: the prompt's tokens, and sampling parameters that carry the program.

        `number` counts the requests that are sent together: seeded ones must not draw the same.
        """
        import aici_vllm
        from aici_vllm.agents.branches.program import branches_of

        # A greedy request forgets top_k, so one that is not comes first where they differ.
        params = sampling_params({**fork.api_kwargs, "temperature": max(fork.temperatures)}, final_only=True)
        plan = self._plan(fork, params, round)
        params.stop, params.stop_token_ids, params.max_tokens = [], [], None
        params.min_tokens, params.structured_outputs = 0, None
        if params.seed is not None:
            params.seed += number
        return (
            {"prompt_token_ids": list(fork.prompt.token_ids)},
            aici_vllm.request_params(branches_of(plan), sampling_params=params),
        )

    def _plan(self, fork: Fork, params: Any, round: SampleRound) -> BranchPlan:
        from aici_vllm.agents.branches.program import BranchPlan

        for name in REFUSED:
            if fork.api_kwargs.get(name):
                raise ValueError(f"Branches cannot use the sampling parameter {name}; use VLLMModel for it.")
        return BranchPlan(
            tail=fork.prompt.tail,
            temperatures=tuple(fork.temperatures),
            max_tokens=params.max_tokens,
            context=self._context,
            min_tokens=params.min_tokens,
            stop=tuple(params.stop or ()),
            stop_token_ids=tuple(params.stop_token_ids or ()),
            keep_stop=params.include_stop_str_in_output,
            shape=_shape(params.structured_outputs),
            may_still_pass=prefix_check(self._condition if round.condition is None else round.condition),
        )


class EngineSampler(_BranchSampler):
    """Samples of a round as branches of one request to a `vllm.LLM` made with `**aici_vllm.engine_args()`.

    Pass it as `sampler=` to a call, to `run` or to `airetry`. It takes the place of the call's model, so the
    call needs none. A round's prompt is computed once; a retry goes on from the tokens of the sample it
    continues; a `PrefixCondition` ends a branch as soon as it must fail (its reply then has the finish reason
    "condition"). More samples than the operator allows branches become several requests.

    Raises ModelCallError when the engine refuses or a branch fails; the samples before it stay in the tree.
    """

    def sample(self, round: SampleRound) -> Iterator[Conversation]:
        """Yield the samples of the round, in the order in which one call after the other gives them."""
        questions = self._questions(round)
        try:
            while questions.begin():
                while asked := questions.open():
                    self._answer(self._forks(asked), round)
                    questions.answered()
                yield from questions.samples()
        finally:
            questions.close()

    def _vllm_config(self) -> Any:
        return self.engine.llm_engine.vllm_config

    def _answer(self, forks: list[Fork], round: SampleRound) -> None:
        requests = [self._request(fork, number, round) for number, fork in enumerate(forks)]
        prompts, params = [list(column) for column in zip(*requests, strict=True)]
        try:
            outputs = self.engine.generate(prompts, params, use_tqdm=False)
        except Exception as error:
            outputs = [failure(error)] * len(forks)
        for fork, output in zip(forks, outputs, strict=True):
            settle(fork, output)


class AsyncEngineSampler(_BranchSampler):
    """`EngineSampler` for vLLM's asynchronous engine, for `run_async` and `airetry_async`.

    engine: an `AsyncLLM` whose engine arguments hold `**aici_vllm.engine_args()`. Cancelling a round aborts
        its requests.
    """

    _numbers = itertools.count(1)

    async def sample_async(self, round: SampleRound) -> AsyncIterator[Conversation]:
        """Yield the samples of the round, in the order in which one call after the other gives them."""
        questions = self._questions(round)
        try:
            while questions.begin():
                while asked := questions.open():
                    forks = enumerate(self._forks(asked))
                    await asyncio.gather(*(self._answer(fork, number, round) for number, fork in forks))
                    questions.answered()
                for sample in questions.samples():
                    yield sample
        finally:
            questions.close()

    async def _answer(self, fork: Fork, number: int, round: SampleRound) -> None:
        prompt, params = self._request(fork, number, round)
        request_id = f"agents-branches-{os.getpid()}-{next(self._numbers)}"
        final: Any = None
        try:
            async for output in self.engine.generate(prompt, params, request_id):
                final = output
        except Exception as error:
            final = failure(error)
        settle(fork, final)


def branch_limit(vllm_config: Any) -> int:
    """How many branches of one request the operator of this engine lets live at the same time."""
    from aici_vllm.controller.limits import Limits

    config = vllm_config.additional_config
    settings = config.get("aici", {}) if isinstance(config, dict) else {}
    return Limits.from_config(settings.get("limits", {})).branches


def _shape(structured: Any) -> tuple[str, Any] | None:
    """What vLLM's structured outputs ask for, as a plan's shape."""
    if structured is None:
        return None
    if structured.json_object:
        return "json", {"type": "object"}
    for kind in ("json", "regex", "choice"):
        if getattr(structured, kind) is not None:
            return kind, getattr(structured, kind)
    raise ValueError("Branches can follow structured outputs of json, regex and choice; use one of these.")


def failure(error: Exception) -> ModelCallError:
    """What a sampler raises for an exception of the engine."""
    wrapped = ModelCallError(f"vLLM failed: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


def settle(fork: Fork, output: Any) -> None:
    """Give each question the replies of its branches in a finished request, or the error that took them."""
    try:
        replies = _replies(fork, output)
    except ModelCallError as error:
        for owner in fork.owners:
            owner.error = owner.error or error
        return
    for owner, reply in zip(fork.owners, replies, strict=True):
        if isinstance(reply, Reply):
            owner.replies.append(reply)
        else:
            owner.error = owner.error or reply


def _replies(fork: Fork, output: Any) -> list[Reply | ModelCallError]:
    from aici_vllm.offline import ControllerResult

    if isinstance(output, ModelCallError):
        raise output
    found = (getattr(output, "kv_transfer_params", None) or {}).get("controller")
    if found is None:
        raise ModelCallError("vLLM ended the request without the results of its branches.")
    result = ControllerResult.from_json(found)
    if len(result.branches) < len(fork.owners):
        raise ModelCallError(f"The request failed before its branches began: {result.branches[0].error}")
    return [_reply(fork.prompt, result, branch) for branch in result.branches]


def _reply(prompt: BranchPrompt, result: ControllerResult, branch: BranchResult) -> Reply | ModelCallError:
    from aici_vllm.agents.branches.program import SPLICED, Outcome, outcome_of

    if branch.error is not None:
        return ModelCallError(f"Branch {branch.index} of the request failed in the engine: {branch.error}")
    spliced, shown = json.loads(result.variables[SPLICED])
    text, reply_ids = branch.text[shown:], branch.token_ids[spliced:]
    told = result.variables.get(outcome_of(branch.index))
    outcome = Outcome("length", len(reply_ids), None) if told is None else Outcome(*json.loads(told))
    prompt_ids = (*prompt.token_ids, *branch.token_ids[:spliced])
    sequence = TokenSequence(prompt.text, prompt_ids, text, tuple(reply_ids[: outcome.tokens]))
    tokens = (len(prompt_ids), len(reply_ids))
    return Reply(text[: outcome.cut], finish_reason=outcome.reason, tokens=tokens, sequence=sequence)
