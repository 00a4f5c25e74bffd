"""Samplers that let an engine make the samples of a round as branches of one request."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

from aici_vllm.agents.branches.condition import PrefixCondition, prefix_check
from aici_vllm.agents.branches.kept import Kept, Search, names_over, search_of
from aici_vllm.agents.branches.prompt import BranchPrompt, ChatTemplate
from aici_vllm.agents.branches.questions import Asked, BranchModel, Questions
from aici_vllm.agents.branches.replies import (
    computed_prompt,
    failure,
    never_began,
    replies_of,
    result_of,
)
from aici_vllm.agents.errors import ModelCallError
from aici_vllm.agents.messages import Conversation
from aici_vllm.agents.models.base import Reply
from aici_vllm.agents.models.vllm import sampling_params
from aici_vllm.agents.rounds import SampleRound

if TYPE_CHECKING:
    from aici_vllm.agents.branches.program import BranchPlan
    from aici_vllm.offline import ControllerResult, Usage

REFUSED = ("logprobs", "prompt_logprobs", "ignore_eos")
"""Sampling parameters that a branch cannot follow."""


@dataclass
class EngineRequest:
    """What is sent to the engine for a fork.

    `start` is the checkpoint it goes on from. `output` is what came back, or the error that was raised.
    """

    prompt: dict[str, Any]
    params: Any
    start: Kept | None
    output: Any = None


@dataclass
class Fork:
    """One request: the branches that continue one prompt under the same parameters.

    `owners` names for each branch the question that its reply belongs to. Without branches the request
    computes the prompt, for others to go on from.
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
        options, tokenizer = dict(chat_template_kwargs or {}), str(engine.model_config.tokenizer)
        self._template = ChatTemplate(engine.renderer, chat_template, options, tokenizer)
        self._condition = condition
        self._context = int(engine.model_config.max_model_len)
        self._max_branches = max_branches or branch_limit(self._vllm_config())
        self._rng = rng
        self._searches: weakref.WeakSet[Search] = weakref.WeakSet()
        self._costs: Counter[str] = Counter()

    @property
    def usage(self) -> Usage:
        """What the requests of this sampler cost so far, in sum."""
        from aici_vllm.offline import Usage

        return Usage(**{name: self._costs[name] for name in Usage.__dataclass_fields__})

    def _vllm_config(self) -> Any:
        return self.engine.vllm_config

    def _questions(self, round: SampleRound) -> Questions:
        return Questions(round, BranchModel(self._rng))

    def _search_of(self, round: SampleRound) -> Search:
        search = search_of(round.conversation, self.engine)
        self._searches.add(search)
        return search

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

    def _answering(
        self, asked: Sequence[Asked], round: SampleRound, search: Search
    ) -> Iterator[list[EngineRequest]]:
        """Answer the questions: yields requests to send together, and reads their outputs after that."""
        forks = self._forks(asked)
        yield from self._compute_shared(forks, round, search)
        for fork, result in (yield from self._sending(forks, round, search)):
            replies = replies_of(result, len(fork.owners), fork.prompt, search, self._template.tokenizer)
            for owner, reply in zip(fork.owners, replies, strict=True):
                if isinstance(reply, Reply):
                    owner.replies.append(reply)
                else:
                    owner.error = owner.error or reply

    def _compute_shared(
        self, forks: list[Fork], round: SampleRound, search: Search
    ) -> Generator[list[EngineRequest], None, None]:
        """Have a prompt that several of the requests continue computed once, before they start from it.

        Where that goes wrong they start from where it started, and find the error themselves.
        """
        counts = Counter(fork.prompt for fork in forks)
        shared = [Fork(prompt, {}) for prompt, count in counts.items() if count > 1]
        for one, result in (yield from self._sending(shared, round, search)):
            computed = computed_prompt(result, one.prompt, search) or one.prompt
            for fork in forks:
                if fork.prompt == one.prompt:
                    fork.prompt = computed

    def _sending(
        self, forks: list[Fork], round: SampleRound, search: Search
    ) -> Generator[list[EngineRequest], None, list[tuple[Fork, ControllerResult | ModelCallError]]]:
        """Each fork with its result; one whose checkpoint is gone is sent once more, with its tokens."""
        finished = []
        while forks:
            requests = [self._request(fork, number, round, search) for number, fork in enumerate(forks)]
            yield requests
            again = []
            for fork, request in zip(forks, requests, strict=True):
                result = result_of(request.output)
                if not isinstance(result, ModelCallError):
                    self._costs.update(asdict(result.usage))
                if request.start is not None and never_began(result):
                    request.start.gone = True
                    again.append(fork)
                else:
                    finished.append((fork, result))
            forks = again
        return finished

    def _request(self, fork: Fork, number: int, round: SampleRound, search: Search) -> EngineRequest:
        """What the engine gets: where the branches start, and sampling parameters that carry the program.

        `number` counts the requests that are sent together: seeded ones must not draw the same.
        """
        import aici_vllm
        from aici_vllm.agents.branches.program import branches_of

        # A greedy request forgets top_k, so one that is not comes first where they differ.
        temperature = max(fork.temperatures, default=0.0)
        params = sampling_params({**fork.api_kwargs, "temperature": temperature}, final_only=True)
        plan = self._plan(fork, params, round)
        params.stop, params.stop_token_ids, params.max_tokens = [], [], None
        params.min_tokens, params.structured_outputs = 0, None
        if params.seed is not None:
            params.seed += number
        kept, over = fork.prompt.kept, names_over(self.engine)
        start = kept if kept is not None and kept.is_in(self.engine) else None
        params = aici_vllm.request_params(
            branches_of(plan),
            sampling_params=params,
            checkpoint=search.next_name(),
            from_checkpoint=None if start is None else start.name,
            drop_checkpoints=over.popleft() if over else None,
        )
        tokens = list(fork.prompt.token_ids) if start is None else []
        return EngineRequest({"prompt_token_ids": tokens}, params, start)

    def _forgetting(self) -> dict[Search, EngineRequest]:
        """Requests that tell the engine to forget all that it keeps for this sampler."""
        import aici_vllm
        from aici_vllm.agents.branches.program import nothing

        requests = {}
        for search in list(self._searches):
            params = aici_vllm.request_params(nothing, drop_checkpoints=search.name)
            requests[search] = EngineRequest({"prompt_token_ids": []}, params, None)
        return requests

    def _forgot(self, requests: Mapping[Search, EngineRequest]) -> None:
        """The engine was told. Raises the error of a request that did not reach it."""
        for search, request in requests.items():
            if isinstance(request.output, ModelCallError):
                raise request.output
            search.end()
            self._searches.discard(search)

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
    call needs none. A round's prompt is computed once; a retry goes on from the sample it continues, which
    the engine keeps, and adds the feedback; a `PrefixCondition` ends a branch as soon as it must fail (its
    reply then has the finish reason "condition"). More samples than the operator allows branches become
    several requests.

    The engine forgets a call's samples when the call is gone, when others need their place, and when the
    sampler is closed or left as a context manager; it can be used again after that.

    Raises ModelCallError when the engine refuses or a branch fails; the samples before it stay in the tree.
    """

    def sample(self, round: SampleRound) -> Iterator[Conversation]:
        """Yield the samples of the round, in the order in which one call after the other gives them."""
        questions, search = self._questions(round), self._search_of(round)
        try:
            while questions.begin():
                while asked := questions.open():
                    for requests in self._answering(asked, round, search):
                        self._generate(requests)
                    questions.answered()
                yield from questions.samples()
        finally:
            questions.close()

    def close(self) -> None:
        """Have the engine forget the samples now. Raises ModelCallError when it cannot be told."""
        requests = self._forgetting()
        self._generate(list(requests.values()))
        self._forgot(requests)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _vllm_config(self) -> Any:
        return self.engine.llm_engine.vllm_config

    def _generate(self, requests: list[EngineRequest]) -> None:
        prompts = [request.prompt for request in requests]
        params = [request.params for request in requests]
        try:
            outputs = self.engine.generate(prompts, params, use_tqdm=False) if requests else []
        except Exception as error:
            outputs = [failure(error)] * len(requests)
        for request, output in zip(requests, outputs, strict=True):
            request.output = output


class AsyncEngineSampler(_BranchSampler):
    """`EngineSampler` for vLLM's asynchronous engine, for `run_async` and `airetry_async`.

    engine: an `AsyncLLM` whose engine arguments hold `**aici_vllm.engine_args()`. Cancelling a round aborts
        its requests.
    """

    _numbers = itertools.count(1)

    async def sample_async(self, round: SampleRound) -> AsyncIterator[Conversation]:
        """Yield the samples of the round, in the order in which one call after the other gives them."""
        questions, search = self._questions(round), self._search_of(round)
        try:
            while questions.begin():
                while asked := questions.open():
                    for requests in self._answering(asked, round, search):
                        await self._generate_all(requests)
                    questions.answered()
                for sample in questions.samples():
                    yield sample
        finally:
            questions.close()

    async def close(self) -> None:
        """Have the engine forget the samples now. Raises ModelCallError when it cannot be told."""
        requests = self._forgetting()
        await self._generate_all(list(requests.values()))
        self._forgot(requests)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _generate_all(self, requests: Sequence[EngineRequest]) -> None:
        await asyncio.gather(*(self._generate(request) for request in requests))

    async def _generate(self, request: EngineRequest) -> None:
        request_id = f"agents-branches-{os.getpid()}-{next(self._numbers)}"
        try:
            async for output in self.engine.generate(request.prompt, request.params, request_id):
                request.output = output
        except Exception as error:
            request.output = failure(error)


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
