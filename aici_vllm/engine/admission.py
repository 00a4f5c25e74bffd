"""What a request says about its controller, checked in the front-end before anything runs.

A request carries a controller in `SamplingParams.extra_args` (over HTTP: `vllm_xargs`):

- `controller`: source text, the name of a controller that the operator installed, or, on a server that
  stores controllers, the hash or tag of one;
- `controller_arg`: a string for it;
- `controller_checkpoint`: a name under which the engine keeps each branch when it ends, as `NAME/INDEX`;
- `controller_from`: such a branch, whose text is this request's prompt;
- `controller_drop`: a name whose checkpoints are not needed any more;
- `controller_live`: tell after every step what each branch did in it.
"""

import copy
import functools
import re
import zlib
from collections.abc import Callable, Coroutine
from importlib.metadata import entry_points
from typing import Any

from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from aici_vllm.controller.errors import BadRequestError
from aici_vllm.controller.limits import Limits

CONTROLLER = "controller"
CONTROLLER_ARG = "controller_arg"
CHECKPOINT = "controller_checkpoint"
FROM = "controller_from"
DROP = "controller_drop"
LIVE = "controller_live"
CHOICES = "controller_choices"
"""Set here for the engine: `n` of a request with more than one choice."""
STOP_TOKENS = "controller_stop_tokens"
"""Set here for the engine: the client's own stop tokens, before vLLM adds the model's to them."""

_CHECKPOINTS = (CHECKPOINT, FROM, DROP)
_KEYS = (CONTROLLER, CONTROLLER_ARG, *_CHECKPOINTS, LIVE)

INSTALLED_GROUP = "aici_vllm.controllers"
CONFIG_KEY = "aici"
SETTINGS = {"server": dict, "limits": dict, "functions": bool}
"""What an operator can set under `CONFIG_KEY`."""

NAME_LENGTH = 200
"""Characters in the name of a checkpoint."""

MOST_STOPS = 64
MOST_STOP_BYTES = 4096
"""Stop strings of a request, and their bytes: the engine looks for them in every token of every branch."""

_NAME = re.compile(r"[A-Za-z][\w.-]{0,99}|[0-9a-f]{64}")


def operator_config(vllm_config: VllmConfig) -> dict[str, Any]:
    """The operator's settings: `--additional-config '{"aici": {...}}'`.

    Raises:
        ValueError: they are no mapping, or one of them does not exist or is of another type.
    """
    config = vllm_config.additional_config
    settings = config.get(CONFIG_KEY, {}) if isinstance(config, dict) else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{CONFIG_KEY} in --additional-config must be a mapping, not {settings!r}")
    for name, value in settings.items():
        if name not in SETTINGS:
            raise ValueError(f"unknown setting {CONFIG_KEY}.{name}; there are {', '.join(SETTINGS)}")
        if not isinstance(value, SETTINGS[name]):
            kind = "a mapping" if SETTINGS[name] is dict else "true or false"
            raise ValueError(f"{CONFIG_KEY}.{name} must be {kind}, not {value!r}")
    return settings


def operator_limits(vllm_config: VllmConfig) -> Limits:
    """The operator's limits.

    Raises:
        ValueError: a setting or a limit does not exist, or a limit is no positive number.
    """
    return Limits.from_config(operator_config(vllm_config).get("limits", {}))


def runs_controllers(vllm_config: VllmConfig) -> bool:
    """Whether the engine was started with this package's scheduler."""
    scheduler = vllm_config.scheduler_config.scheduler_cls
    name = scheduler if isinstance(scheduler, str) else getattr(scheduler, "__module__", "")
    return str(name).startswith("aici_vllm")


def has_controller(arguments: dict[str, Any] | None) -> bool:
    """Whether a request's `extra_args`, or `vllm_xargs`, carry a controller."""
    return CONTROLLER in (arguments or {})


def is_controlled(params: Any) -> bool:
    """Whether these sampling parameters carry a controller."""
    return isinstance(params, SamplingParams) and has_controller(params.extra_args)


@functools.cache
def installed_controllers() -> dict[str, str]:
    """Name → `module:function` of every controller that the operator installed."""
    return {entry.name: entry.value for entry in entry_points(group=INSTALLED_GROUP)}


@functools.cache
def load_installed(name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
    """The coroutine function behind an installed name.

    Raises:
        BadRequestError: nothing of that name is installed.
    """
    for entry in entry_points(group=INSTALLED_GROUP):
        if entry.name == name:
            controller: Callable[..., Coroutine[Any, Any, Any]] = entry.load()
            return controller
    known = ", ".join(sorted(installed_controllers())) or "none is installed"
    raise BadRequestError(f"unknown controller {name!r}; installed: {known}")


Resolve = Callable[[str], str | None]
"""The source behind the name of a stored controller; None where the name is an installed one."""


def _no_store(name: str) -> str | None:
    return None


_resolve: Resolve = _no_store


def resolve_names_with(resolve: Resolve) -> None:
    """Have every name that a request brings to this process looked up by `resolve` first."""
    global _resolve
    _resolve = resolve


def is_name(controller: str) -> bool:
    """Whether the text can only be a name: one word, no Python."""
    return _NAME.fullmatch(controller) is not None


def admit(vllm_config: VllmConfig, prompt: Any, params: Any) -> tuple[Any, Any]:
    """Check a request that carries a controller.

    Returns its prompt, filled if it was empty, and its parameters, with what the engine must know.

    Raises:
        BadRequestError: what is wrong and what to change. The server answers HTTP 400.
    """
    if not is_controlled(params):
        return prompt, params
    args = checked_arguments(vllm_config, params)
    _check_prompt(vllm_config, prompt, args)
    # A copy: the caller may use its own for other requests.
    params = copy.copy(params)
    params.extra_args = {**args, CHOICES: params.n, STOP_TOKENS: list(params.stop_token_ids or [])}
    return _fill_empty(vllm_config, prompt), params


def checked_arguments(vllm_config: VllmConfig, params: SamplingParams) -> dict[str, Any]:
    """The part of `admit` that needs no prompt.

    Returns the `extra_args` of a request that carries a controller, a stored name's text in its place.

    Raises:
        BadRequestError: what is wrong and what to change.
    """
    _check_flags(vllm_config)
    _check_engine(vllm_config)
    _check_parameters(params)
    args = dict(params.extra_args or {})
    args[CONTROLLER] = _checked_controller(vllm_config, args[CONTROLLER])
    for key, value in args.items():
        if key.startswith(CONTROLLER) and key not in (*_KEYS, CHOICES, STOP_TOKENS):
            raise BadRequestError(f"unknown argument {key!r}; there are {', '.join(_KEYS)}")
        if isinstance(value, str) or key in (CONTROLLER_ARG, *_CHECKPOINTS):
            _encoded(key, value)
        if key in _CHECKPOINTS and not 0 < len(value) <= NAME_LENGTH:
            raise BadRequestError(f"{key} must be a name of 1 to {NAME_LENGTH} characters")
    return args


def choose_engine(vllm_config: VllmConfig, request: EngineCoreRequest) -> None:
    """Keep what one engine must have together in one, where data parallelism has several.

    vLLM sends each choice of a request to an engine of its own.

    Raises:
        BadRequestError: nobody says which engine has the checkpoint.
    """
    if not is_controlled(request.sampling_params) or request.data_parallel_rank is not None:
        return
    parallel = vllm_config.parallel_config
    local = parallel.local_engines_only
    engines = parallel.data_parallel_size_local if local else parallel.data_parallel_size
    assert request.sampling_params is not None
    if engines == 1:
        return
    if not set(_CHECKPOINTS).isdisjoint(request.sampling_params.extra_args or {}):
        raise BadRequestError(
            f"a checkpoint stays in one of this server's {engines} engines: name the same one in each request"
            f" that makes, uses or drops it, with the header X-data-parallel-rank: 0 to {engines - 1}"
        )
    if request.sampling_params.n > 1:
        request.data_parallel_rank = zlib.crc32(request.request_id.encode()) % engines


def _check_flags(vllm_config: VllmConfig) -> None:
    if not runs_controllers(vllm_config):
        raise BadRequestError(
            "this server does not run controllers: it must be started with "
            "--scheduler-cls aici_vllm.Scheduler --worker-cls aici_vllm.Worker (or with `aici serve`)"
        )


def _check_engine(vllm_config: VllmConfig) -> None:
    for feature, used in {
        "speculative decoding on Model Runner V1": (
            vllm_config.speculative_config is not None and not vllm_config.use_v2_model_runner
        ),
        "a KV connector": vllm_config.kv_transfer_config is not None,
        "speculative decoding with pipeline parallelism": (
            vllm_config.speculative_config is not None
            and vllm_config.parallel_config.pipeline_parallel_size > 1
        ),
        "a diffusion model": vllm_config.model_config.is_diffusion,
        "an encoder-decoder model": vllm_config.model_config.is_encoder_decoder,
    }.items():
        if used:
            raise BadRequestError(f"this server uses {feature}, with which controllers do not work")


def _check_parameters(params: SamplingParams) -> None:
    if params.structured_outputs is not None:
        raise BadRequestError(
            "a request with a controller cannot use structured outputs too: constrain inside the script"
        )
    if params.prompt_logprobs is not None and FROM in (params.extra_args or {}):
        raise BadRequestError(f"{FROM} computes no prompt, so there are no prompt_logprobs of it")
    if params.prompt_logprob_token_ids is not None:
        raise BadRequestError(
            "a request with a controller cannot use prompt_logprob_token_ids: use prompt_logprobs"
        )
    stops = [params.stop] if isinstance(params.stop, str) else params.stop or []
    size = sum(len(_encoded("stop", text)) for text in stops)
    if len(stops) > MOST_STOPS or size > MOST_STOP_BYTES:
        raise BadRequestError(
            f"a request with a controller may have {MOST_STOPS} stop strings of {MOST_STOP_BYTES} bytes in "
            f"all, and this one has {len(stops)} of {size}: send fewer, or look for them in the script"
        )


def _checked_controller(vllm_config: VllmConfig, controller: Any) -> str | bytes:
    """What the engine is to run, which knows no store: a stored name's text in its place."""
    if isinstance(controller, bytes):
        if not operator_config(vllm_config).get("functions"):
            raise BadRequestError("this engine takes no pickled functions: send source text or a name")
        return controller
    if not isinstance(controller, str):
        raise BadRequestError(f"{CONTROLLER} must be a string, not {type(controller).__name__}")
    source = _resolve(controller) if is_name(controller) else controller
    if source is None:
        load_installed(controller)
        return controller
    # Most requests bring a name or nothing: only source needs the parser.
    from aici_vllm.controller.check import check_source

    check_source(source, operator_limits(vllm_config))
    return source


def _encoded(key: str, text: Any) -> bytes:
    """The bytes of a client's text: what has none cannot be sent to the engine."""
    if not isinstance(text, str):
        raise BadRequestError(f"{key} must be a string, not {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise BadRequestError(
            f"{key} holds half a character (a lone surrogate) at {error.start}: take it out"
        ) from None


def _check_prompt(vllm_config: VllmConfig, prompt: Any, args: dict[str, Any]) -> None:
    if not isinstance(prompt, dict):
        return
    if prompt.get("type", "token") != "token":
        raise BadRequestError("a request with a controller takes text and tokens only as its prompt")
    tokens = prompt.get("prompt_token_ids")
    if FROM in args and tokens and tokens != empty_prompt(vllm_config):
        raise BadRequestError(f"{FROM} brings its own text: send an empty prompt and splice what follows")


def _fill_empty(vllm_config: VllmConfig, prompt: Any) -> Any:
    if isinstance(prompt, dict) and prompt.get("prompt_token_ids") == []:
        return {**prompt, "prompt_token_ids": empty_prompt(vllm_config)}
    return prompt


def empty_prompt(vllm_config: VllmConfig) -> list[int]:
    """What stands for an empty prompt, since a model needs a token: BOS, or a space without BOS."""
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
    if tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id]
    return list(tokenizer.encode(" ", add_special_tokens=False))[:1]
