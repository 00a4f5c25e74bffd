"""The loop of vLLM's engine core around the real scheduler, and the clients that it answers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

import aici_vllm.engine.scheduler as scheduler_module
from aici_vllm.controller.branch import Next
from aici_vllm.engine.admission import CHECKPOINT, CHOICES, CONTROLLER, DROP, FROM, LIVE
from aici_vllm.engine.live import EVENTS
from aici_vllm.engine.masks import MaskTable
from aici_vllm.engine.results import RESULTS_KEY
from tests.simulator.model import EOS, PLAIN_TOKENS, TEXT_TOKENS, Prefix, allowed_by, vocabulary
from tests.simulator.programs import SimulatedPrograms
from tests.simulator.reference import run_plain, run_program
from tests.simulator.scripts import TALLY, Program, takes_back_unmarked
from tests.simulator.settings import Settings, kv_cache_config, vllm_config
from tests.simulator.worker import UNKNOWN, Worker, WorkerV1, WorkerV2

VOCABULARY = vocabulary()


class EngineError(AssertionError):
    """The scheduler broke a promise."""


def block_hash(content: Any) -> bytes:
    """A hash of a block for the prefix cache: quick, and as good as tests need."""
    return hash(content).to_bytes(8, "little", signed=True)


init_none_hash(block_hash)


@dataclass
class Job:
    """A client's request.

    Attributes:
        program: None for a request without a controller.
        choices: ids of the vLLM requests it became, one per choice.
        sent: request id → tokens that the client got.
        closed: request ids whose last output came.
        gone: request ids that the client gave up.
        aborted: the engine gave it up.
        refused: the checkpoint that it goes on from did not exist.
        adapter: number of its LoRA adapter, 0 for none.
        told: branch index → its tokens, the prompt's too, after the events that a watching client got.
    """

    name: str
    prompt: list[int]
    max_tokens: int
    program: Program | None
    salt: str | None
    adapter: int
    streamed: bool
    choices: list[str]
    sent: dict[str, list[int]] = field(default_factory=dict)
    closed: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    aborted: bool = False
    refused: bool = False
    told: dict[int, list[int]] = field(default_factory=dict)
    results: dict[str, Any] | None = None

    @property
    def waits(self) -> bool:
        """Whether the client still waits for an output."""
        return any(choice not in self.closed | self.gone for choice in self.choices)


class Engine:
    """An engine core with a fake worker. `step` goes through what vLLM's does, one call at a time."""

    def __init__(self, settings: Settings, scheduler_class: type | None = None) -> None:
        self.settings = settings
        self.roots: dict[tuple[str | None, int], Prefix] = {}
        """Salt and adapter → the empty sequence of requests with both."""
        self.jobs: dict[str, Job] = {}
        self.steps = 0
        self.resets = 0
        self._job_of: dict[str, Job] = {}
        self._hasher = get_request_block_hasher(settings.block_size, block_hash)
        self.scheduler = self._scheduler(scheduler_class or scheduler_module.Scheduler)
        self.programs = SimulatedPrograms(settings.slow_scripts)
        self.scheduler.programs = self.programs
        self.worker = self._worker()
        self._queue: deque[tuple[Any, Any]] = deque()
        self._queue_size = settings.stages + settings.asynchronous
        self._aborts: list[str] = []
        self.free_at_start = self.pool.get_num_free_blocks()

    @property
    def pool(self) -> Any:
        """vLLM's pool of KV blocks."""
        return self.scheduler.kv_cache_manager.block_pool

    # What clients do.

    def add_plain(
        self,
        prompt: list[int],
        max_tokens: int,
        salt: str | None = None,
        priority: int = 0,
        adapter: int = 0,
    ) -> Job:
        """A request without a controller."""
        job = self._new_job(prompt, max_tokens, None, salt, 1, False, adapter)
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        params._eos_token_id = EOS
        self._add(job, job.name, params, priority)
        return job

    def add_controlled(
        self,
        program: Program,
        prompt: list[int],
        max_tokens: int,
        *,
        choices: int = 1,
        streamed: bool = False,
        salt: str | None = None,
        priority: int = 0,
        checkpoint: bool = False,
        start: str | None = None,
        drop: str | None = None,
        live: bool = False,
        adapter: int = 0,
    ) -> Job:
        """A request whose controller runs `program`.

        Args:
            checkpoint: keep its branches, under the job's name.
            start: the checkpoint that it goes on from, whose tokens take the place of `prompt`.
            drop: the checkpoint to forget.
            live: the client watches every branch.
        """
        job = self._new_job(prompt, max_tokens, program, salt, choices, streamed, adapter)
        self.programs.scripts[job.name] = program
        extra = {CHECKPOINT: job.name if checkpoint else None, FROM: start, DROP: drop}
        if start is not None:
            kept = self.scheduler.checkpoints._requests.get(start)
            job.refused = kept is None or (kept.cache_salt, _number(kept)) != (salt, adapter)
            job.prompt = job.prompt if kept is None or job.refused else list(kept.all_token_ids)
        for choice in job.choices:
            args: dict[str, Any] = {CONTROLLER: job.name}
            args |= {key: value for key, value in extra.items() if value is not None}
            args |= {LIVE: True} if live else {}
            if choices > 1:
                args[CHOICES] = choices
            kind = RequestOutputKind.DELTA if streamed else RequestOutputKind.FINAL_ONLY
            params = SamplingParams(temperature=0.0, max_tokens=max_tokens, extra_args=args, output_kind=kind)
            self._add(job, choice, params, priority)
        return job

    def abort_all(self) -> None:
        """The engine ends every request, and tells the clients."""
        for request in self.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED):
            job = self._job_of[request.request_id]
            job.aborted = True
            if request.request_id in job.closed:
                raise EngineError(f"{request.request_id} was aborted after its end")
            job.closed.add(request.request_id)

    def abort(self, request_ids: Iterable[str], during_step: bool) -> None:
        """Clients go away: now, or while the step that is dispatched next runs."""
        ids = list(request_ids)
        for request_id in ids:
            self._job_of[request_id].gone.add(request_id)
        if during_step:
            self._aborts += ids
        else:
            self.scheduler.finish_requests(ids, RequestStatus.FINISHED_ABORTED)

    def pause(self, state: PauseState) -> None:
        self.scheduler.set_pause_state(state)

    def reset_prefix_cache(self, running_too: bool) -> None:
        self.resets += running_too
        self.scheduler.reset_prefix_cache(running_too)

    # The loop.

    @property
    def busy(self) -> bool:
        """Whether vLLM's loop would go on: it sleeps otherwise."""
        return bool(self._queue) or bool(self.scheduler.has_requests())

    def step(self) -> int:
        """One turn of the loop; how many tokens were scheduled or arrived in it."""
        self.steps += 1
        return self._step_with_queue() if self._queue_size > 1 else self._step()

    def _step(self) -> int:
        if not self.scheduler.has_requests():
            return 0
        output = self._dispatch()
        masks = self.scheduler.get_grammar_bitmask(output)
        result = self._sample(output, masks)
        done = int(output.total_num_scheduled_tokens) + self._finish(output, result)
        if self.settings.drafts and output.total_num_scheduled_tokens:
            self.scheduler.update_draft_token_ids(self._drafts)
        return done

    def _step_with_queue(self) -> int:
        deferred = None
        done = 0
        if self.scheduler.has_requests():
            output = self._dispatch()
            done = int(output.total_num_scheduled_tokens)
            if done and output.pending_structured_output_tokens:
                deferred = output
            else:
                masks = self.scheduler.get_grammar_bitmask(output) if done else None
                self._queue.appendleft((output, self._sample(output, masks)))
                if len(self._queue) < self._queue_size and (done or self.scheduler.has_requests()):
                    return done
        elif not self._queue:
            return 0
        if deferred is None or self._queue:
            done += self._finish(*self._queue.pop())
        if deferred is not None:
            if self.settings.drafts:
                self.scheduler.update_draft_token_ids_in_output(self._drafts, deferred)
            masks = self.scheduler.get_grammar_bitmask(deferred)
            self._queue.appendleft((deferred, self._sample(deferred, masks)))
        return done

    def _dispatch(self) -> Any:
        output = self.scheduler.schedule(self.settings.throttled and self.steps % 3 != 0)
        self._check_scheduled(output)
        self.worker.execute_model(output)
        return output

    def _sample(self, output: Any, masks: Any) -> ModelRunnerOutput:
        if not output.total_num_scheduled_tokens:
            return ModelRunnerOutput(req_ids=[], req_id_to_index={})
        order, sampled = self.worker.sample_tokens(masks)
        self._note_drafts(output, order)
        index = {request_id: at for at, request_id in enumerate(order)}
        return ModelRunnerOutput(req_ids=order, req_id_to_index=index, sampled_token_ids=sampled)

    def _note_drafts(self, output: Any, order: list[str]) -> None:
        """What the worker tells of its drafts, if vLLM asks for them after this step."""
        unknown = [UNKNOWN] * self.settings.drafts
        told = output.has_structured_output_requests
        drafts = [self.worker.rows[name].drafts if told else unknown for name in order]
        self._drafts = DraftTokenIds(order, [list(draft or unknown) for draft in drafts])

    def _draft(self, request_id: str, prefix: Prefix, sampled: list[int]) -> list[int]:
        """Guess what comes next, right more often than not."""
        member = self.scheduler._controlled.get(request_id)
        sampling = None if member is None else member.branch.sampling
        drafts: list[int] = []
        for _ in range(self.settings.drafts):
            allowed = PLAIN_TOKENS
            if sampling is not None:
                known = [*sampled, *drafts]
                reached = sampling.ahead(known)
                allowed = allowed_by(reached[-1].mask_row()) if len(reached) == len(known) else TEXT_TOKENS
            wrong = prefix.number % 4 == 0
            drafts.append(allowed[(prefix.number + wrong) % len(allowed)])
            prefix = prefix.then(drafts[-1])
        return drafts

    def _finish(self, output: Any, result: ModelRunnerOutput) -> int:
        if self._aborts:
            aborts, self._aborts = self._aborts, []
            self.scheduler.finish_requests(aborts, RequestStatus.FINISHED_ABORTED)
        answers = self.scheduler.update_from_output(output, result)
        self.worker.delivered(result.req_ids)
        for answer in answers.values():
            for found in answer.outputs:
                self._deliver(found)
        return sum(map(len, result.sampled_token_ids))

    def _check_scheduled(self, output: Any) -> None:
        for request_id in output.num_scheduled_tokens:
            member = self.scheduler._controlled.get(request_id)
            if member is not None and member.branch.next is not Next.SAMPLE:
                raise EngineError(f"{request_id} was scheduled and wants {member.branch.next}")

    # Answers.

    def _deliver(self, output: Any) -> None:
        job = self._job_of[output.request_id]
        if output.request_id in job.gone or (job.aborted and output.request_id in job.closed):
            return
        if output.request_id in job.closed:
            raise EngineError(f"{output.request_id} got {output} after its end")
        job.sent.setdefault(output.request_id, []).extend(output.new_token_ids)
        told = output.kv_transfer_params or {}
        for event in told.get(EVENTS, ()):
            self._watch(job, event)
        if output.finish_reason is not None:
            job.closed.add(output.request_id)
            job.results = told.get(RESULTS_KEY, job.results)

    def _watch(self, job: Job, event: dict[str, Any]) -> None:
        """Do to the tokens of each branch what the event says was done."""
        for fork in event["forks"]:
            tokens = job.told.setdefault(fork["index"], list(job.prompt))
            for change, changed in fork["changes"]:
                if change != "taken_back":
                    tokens += changed
                elif tokens[-len(changed) :] == changed or len(changed) > len(tokens) - len(job.prompt):
                    del tokens[-len(changed) :]
                else:
                    raise EngineError(f"{job.name}: {changed} are said to be taken back from {tokens}")

    # What was asked for, and what came.

    def check_job(self, job: Job) -> None:
        """Compare what a client got with the reference; of a plain request given up, the beginning."""
        root, context = self.roots[job.salt, job.adapter], self.settings.context
        if job.program is None:
            tokens = run_plain(root, job.prompt, job.max_tokens, context)
            self._check_sent(job, job.choices[0], tokens)
            return
        if job.gone or job.aborted:
            return
        results = job.results
        if results is None:
            raise EngineError(f"{job.name} has no results")
        if job.refused:
            if [branch["finish_reason"] for branch in results["branches"]] != ["fail"]:
                raise EngineError(f"{job.name} went on from nothing: {results}")
            return
        expected = run_program(root, job.program, job.prompt, job.max_tokens, context)
        got = sorted((_path(b), b["token_ids"], b["finish_reason"]) for b in results["branches"])
        wanted = sorted(outcome.key() for outcome in expected.outcomes)
        if got != wanted:
            raise EngineError(f"{job.name} came to\n{got}\nand must come to\n{wanted}")
        variables = dict(results["variables"])
        if TALLY in variables:
            variables[TALLY] = "".join(sorted(variables[TALLY]))
        if variables != expected.variables:
            raise EngineError(f"{job.name} has the variables {variables}, and must have {expected.variables}")
        for branch in results["branches"]:
            if branch["index"] < len(job.choices) and not takes_back_unmarked(job.program):
                choice = job.choices[branch["index"]]
                nothing = job.streamed and not branch["token_ids"]
                self._check_sent(job, choice, [EOS] if nothing else branch["token_ids"])
            told = job.told.get(branch["index"])
            if told is not None and told[len(told) - len(branch["token_ids"]) :] != branch["token_ids"]:
                raise EngineError(f"{job.name}: events told of {told}, and branch {branch} came of it")
        if job.told and len(job.told) < len(results["branches"]):
            raise EngineError(f"{job.name}: events told only of the branches {sorted(job.told)}")
        self._check_usage(job, results["usage"], expected.sampled, expected.spliced)

    def _check_sent(self, job: Job, choice: str, tokens: list[int]) -> None:
        sent = job.sent.get(choice, [])
        if sent != (tokens[: len(sent)] if choice in job.gone or job.aborted else tokens):
            raise EngineError(f"{choice} was sent {sent}, and must be sent {tokens}")

    def _check_usage(self, job: Job, usage: dict[str, int], sampled: int, spliced: int) -> None:
        ids = [i for i in self.worker.rows_run if i in job.choices or i.startswith(f"{job.choices[0]}/")]
        rows = sum(self.worker.rows_run[i] for i in ids)
        partial = sum(self.worker.rows_partial.get(i, 0) for i in ids)
        passes = usage["forward_passes"]
        if (usage["sampled_tokens"], usage["spliced_tokens"]) != (sampled, spliced):
            raise EngineError(
                f"{job.name} counts {usage}, and must count {sampled} sampled, {spliced} spliced"
            )
        if passes + usage["discarded_rows"] != rows:
            raise EngineError(f"{job.name} counts {usage}, and {rows} rows were run")
        if not self.resets and not self.settings.drafts and passes - partial != sampled:
            raise EngineError(f"{job.name} counts {usage}, and {partial} rows were partial")

    # Making.

    def _scheduler(self, scheduler_class: type) -> Any:
        real, scheduler_module.model_vocabulary = scheduler_module.model_vocabulary, lambda config: VOCABULARY
        try:
            scheduler = scheduler_class(
                vllm_config=vllm_config(self.settings),
                kv_cache_config=kv_cache_config(self.settings),
                structured_output_manager=_NoGrammars(),
                block_size=self.settings.block_size,
                log_stats=self.settings.log_stats,
            )
        finally:
            scheduler_module.model_vocabulary = real
        scheduler.use_v2_model_runner = self.settings.v2
        if self.settings.few_masks:
            scheduler.masks = MaskTable(2 * self.settings.most_running * (1 + self.settings.drafts))
        return scheduler

    def _worker(self) -> Worker:
        settings = self.settings
        windows = [None] if settings.window is None else [None, settings.window]
        shape = (settings.num_blocks, settings.block_size, windows, settings.most_running, self._root_of)
        if not settings.v2:
            return WorkerV1(*shape, asynchronous=settings.asynchronous)
        worker = WorkerV2(*shape)
        if settings.drafts:
            worker.most_drafts, worker.draft = settings.drafts, self._draft
        return worker

    def _root_of(self, request_id: str) -> Prefix:
        request = self.scheduler.requests[request_id]
        return self._root(request.cache_salt, _number(request))

    def _root(self, salt: str | None, adapter: int) -> Prefix:
        return self.roots.setdefault((salt, adapter), Prefix(root=f"{salt or ''}{adapter or ''}"))

    def _new_job(
        self,
        prompt: list[int],
        max_tokens: int,
        program: Program | None,
        salt: Any,
        choices: int,
        streamed: bool,
        adapter: int = 0,
    ) -> Job:
        self._root(salt, adapter)
        name = f"r{len(self.jobs)}"
        ids = [name] if choices == 1 else [f"{index}_{name}" for index in range(choices)]
        job = Job(name, prompt, max_tokens, program, salt, adapter, streamed, ids)
        self.jobs[name] = job
        self._job_of |= dict.fromkeys(ids, job)
        return job

    def _add(self, job: Job, request_id: str, params: SamplingParams, priority: int) -> None:
        request = Request(
            request_id,
            list(job.prompt),
            params,
            None,
            arrival_time=float(len(self.jobs)),
            cache_salt=job.salt,
            lora_request=LoRARequest(*lora_names(job.adapter)) if job.adapter else None,
            priority=priority,
            block_hasher=self._hasher if self.settings.prefix_caching else None,
        )
        self.scheduler.add_request(request)


def lora_names(adapter: int) -> tuple[str, int, str]:
    """Name, number and folder of a LoRA adapter that nobody loads."""
    return f"adapter {adapter}", adapter, "nowhere"


def _number(request: Request) -> int:
    return 0 if request.lora_request is None else request.lora_request.lora_int_id


class _NoGrammars:
    """vLLM's structured outputs, which nobody here asks for."""

    def validate_tokens(self, request: Any, tokens: list[int]) -> list[int]:
        return tokens

    def accept_tokens(self, request: Any, tokens: list[int]) -> bool:
        return True


def _path(branch: dict[str, Any]) -> str:
    paths = [line[1:] for line in branch["logs"].splitlines() if line.startswith("@")]
    return paths[-1] if paths else ""
