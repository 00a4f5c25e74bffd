"""One vLLM request that a branch controls: the engine's copy of its tokens, and what was sent of them."""

import copy
from dataclasses import dataclass, field

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.request import Request

from aici_vllm.controller.branch import Branch, Next
from aici_vllm.controller.group import Group
from aici_vllm.controller.sampling import Sampling
from aici_vllm.controller.stops import Stops
from aici_vllm.engine.admission import STOP_TOKENS
from aici_vllm.engine.logprobs import BranchLogprobs, certain
from aici_vllm.engine.masks import LANE

FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}
"""How vLLM calls the ends that it knows; every other end is an abort to it."""


@dataclass(eq=False, slots=True)
class Controlled:
    """A branch and the request that computes it.

    Attributes:
        request: that of its parent for a branch that failed in its fork.
        params: sampling parameters as the client set them, before a script changes any.
        lane: where its slot stands in the masks of a step.
        choice: the output has a reader: a choice of the client's request. Other branches are only
            reported in the results.
        parked: the request is in none of vLLM's queues.
        awaited: a sibling waits for the KV that this branch computes next.
        reach: how many tokens of a step with drafts were sampled under the branch's masks.
        forward_passes: steps in which this branch was computed.
        computed_tokens: tokens computed in them.
        discarded: rows computed in vain because a splice overtook them.
        scheduled: the number of the step that computes it or did last; 0 once a splice, a park or the end
            took the request out of the queues, which makes its row stale.
        flows: the client gets each token as it comes, and has all so far.
        sent: tokens after the prompt that the client already has.
        checkpoint: the name under which the ended branch is kept.
        logprobs: of the tokens that the branch sampled, if the client asked for any.
    """

    request: Request
    branch: Branch
    group: "ControlledGroup"
    params: SamplingParams
    lane: int = -1
    choice: bool = True
    parked: bool = True
    awaited: bool = False
    reach: int = 1
    forward_passes: int = 0
    computed_tokens: int = 0
    discarded: int = 0
    scheduled: int = 0
    flows: bool = False
    sent: int = 0
    checkpoint: str | None = None
    finished: bool = False
    logprobs: BranchLogprobs | None = None

    def __post_init__(self) -> None:
        if (num_logprobs := self.params.num_logprobs) is not None:
            self.logprobs = BranchLogprobs(num_logprobs)

    @property
    def computed(self) -> int:
        """How many tokens have their KV for sure: steps in flight do not count."""
        return self.request.num_computed_tokens - self.request.num_output_placeholders

    def adopt_tokens(self) -> None:
        """Make the request's tokens those of the branch, from `kept` on."""
        request, sequence = self.request, self.branch.sequence
        prompt_len = sequence.prompt_len
        del request._all_token_ids[sequence.kept :]
        request._all_token_ids.extend(sequence.tokens[sequence.kept :])
        request._output_token_ids[:] = sequence.tokens[prompt_len:]
        request.prompt_token_ids = sequence.tokens[:prompt_len]
        request.num_prompt_tokens = prompt_len
        request.max_tokens = self.branch.group.max_tokens
        if request.num_output_tokens:
            # vLLM keeps prefill statistics only of requests that start with nothing but a prompt.
            request.num_preemptions = max(request.num_preemptions, 1)
        sequence.kept = len(sequence)

    def must_splice(self) -> bool:
        """Whether the branch's tokens differ from those the engine holds."""
        sequence = self.branch.sequence
        return sequence.kept < self.request.num_tokens or len(sequence) > self.request.num_tokens

    def will_compute(self) -> bool:
        """Whether the request is queued, and for the tokens that the branch wants."""
        return not self.parked and self.branch.next is Next.SAMPLE and not self.must_splice()

    def set_sampling(self, sampling: Sampling) -> bool:
        """Sample as a script asks, else as the client asked; True if that differs from before."""
        temperature = self.params.temperature if sampling.temperature is None else sampling.temperature
        top_p = self.params.top_p if sampling.top_p is None else sampling.top_p
        current = self.request.sampling_params
        assert current is not None
        if current.temperature == temperature and current.top_p == top_p:
            return False
        params = copy.copy(self.params)
        params.temperature, params.top_p = temperature, top_p
        params.__dict__.pop("sampling_type", None)
        params.__post_init__()
        self.request.sampling_params = params
        return True

    def discard_row(self) -> None:
        """Count a row in flight as computed in vain, once."""
        if self.request.num_in_flight_tokens > self.request.num_stale_output_tokens:
            self.forward_passes -= 1
            self.discarded += 1

    def take_settled(self) -> list[int]:
        """The tokens that the client may see next."""
        return self._take(self.branch.settled)

    def settled_outputs(self) -> list[EngineCoreOutput]:
        """Outputs with the tokens that the client may see next."""
        return self._outputs(self.branch.settled)

    def rest_outputs(self) -> list[EngineCoreOutput]:
        """Outputs with all tokens that the client has not seen."""
        return self._outputs(len(self.branch.sequence))

    def eos_output(self, token: int) -> EngineCoreOutput:
        """An output of one token that no branch has."""
        return EngineCoreOutput(
            self.request.request_id, [token], new_logprobs=None if self.logprobs is None else certain(token)
        )

    def _outputs(self, end: int) -> list[EngineCoreOutput]:
        sequence, request_id = self.branch.sequence, self.request.request_id
        start = sequence.prompt_len + self.sent
        tokens = self._take(end)
        if self.logprobs is None or not tokens:
            return [EngineCoreOutput(request_id, tokens)] if tokens else []
        runs = self.logprobs.runs(sequence, start, end)
        return [EngineCoreOutput(request_id, run, new_logprobs=rows) for run, rows in runs]

    def _take(self, end: int) -> list[int]:
        sequence = self.branch.sequence
        tokens = sequence.tokens[sequence.prompt_len + self.sent : end]
        self.sent += len(tokens)
        return tokens


@dataclass(eq=False)
class ControlledGroup:
    """A client's request: the group that decides and the vLLM requests that compute.

    Attributes:
        root_id: id of the request that the client sent.
        choices: how many choices the client asked for; `seats` are those not taken by a branch yet.
        members: branch index → what computes it.
        start: the checkpoint that the prompt and its KV come from; `refused` says why there is none.
        checkpoint: the name under which branches are kept when they end.
        drop: the name of checkpoints to forget once the request has begun.
        unscored: the prompt is being computed by itself, for its logprobs, before the script starts.
    """

    group: Group
    root_id: str
    controller: str | bytes
    choices: int
    streamed: bool
    start: Request | None = None
    refused: str | None = None
    checkpoint: str | None = None
    drop: str | None = None
    seats: dict[int, Request] = field(default_factory=dict)
    members: dict[int, Controlled] = field(default_factory=dict)
    unscored: bool = False

    @property
    def root(self) -> Controlled:
        return self.members[0]


def worker_params(params: SamplingParams, lane: int, branch_index: int) -> SamplingParams:
    """Sampling parameters as the workers see them: masks arrive in `lane`, the script stays here.

    Stopping is the branch's business, so nothing in them may stop or forbid a token. Branches of a
    seeded request draw differently.
    """
    params = copy.copy(params)
    params.extra_args = {LANE: lane}
    params.min_tokens = 0
    params.ignore_eos = True
    if params.seed is not None and branch_index:
        params.seed = (params.seed + 0x9E3779B97F4A7C15 * branch_index) & (2**63 - 1)
    return params


def child_request(parent: Controlled, branch: Branch, request_id: str) -> Request:
    """A vLLM request for a forked branch, which inherits everything the client set."""
    source = parent.group.root.request
    return Request(
        request_id=request_id,
        prompt_token_ids=list(branch.sequence.tokens),
        sampling_params=parent.group.root.params,
        pooling_params=None,
        client_index=source.client_index,
        arrival_time=source.arrival_time,
        lora_request=source.lora_request,
        cache_salt=source.cache_salt,
        priority=source.priority,
    )


def failed_fork(parent: Controlled, branch: Branch) -> Controlled:
    """A branch that failed in its fork, as those over the limit do: it is reported, and never computed.

    Nothing is made for it in the engine, so a script cannot hold a step up with hundreds of them.
    """
    return Controlled(parent.request, branch, parent.group, parent.params, choice=False, finished=True)


def client_stops(params: SamplingParams) -> Stops | None:
    """What the client wants branches to end at; None if nothing."""
    strings = params.stop or []
    strings = [strings] if isinstance(strings, str) else strings
    tokens = (params.extra_args or {}).get(STOP_TOKENS, [])
    if not strings and not tokens:
        return None
    shown, min_tokens = params.include_stop_str_in_output, params.min_tokens
    return Stops(tuple(strings), frozenset(tokens), shown=shown, min_tokens=min_tokens)


def without_prompt_logprobs(params: SamplingParams) -> SamplingParams:
    """`params` of a request whose prompt was computed already."""
    params = copy.copy(params)
    params.prompt_logprobs = None
    # vLLM sets it because of them.
    params.skip_reading_prefix_cache = None
    return params
