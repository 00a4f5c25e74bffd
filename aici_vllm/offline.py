"""Controllers on an in-process vLLM: `run(llm, controller, prompts)`."""

import base64
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams


@dataclass(slots=True)
class BranchResult:
    """One branch when the request was over.

    Attributes:
        text, token_ids: what follows the prompt.
        sources: runs of tokens of one origin: [("spliced", 5), ("sampled", 2)].
        finish_reason: stop, length, fail, deadlock or abort.
        stop_reason: the client's stop string or token that ended it; None if none did.
        logprobs: of each token, 0.0 for spliced ones; None unless the client asked for logprobs.
        error: why it failed; None unless it did.
        logs: what the script printed, and what it fixed and generated.
        checkpoint: the name under which the engine kept the branch; None if it did not.
    """

    index: int
    text: str
    token_ids: list[int]
    sources: list[tuple[str, int]]
    finish_reason: str
    error: str | None
    logs: str
    checkpoint: str | None
    stop_reason: str | int | None = None
    logprobs: list[float] | None = None


@dataclass(slots=True)
class Usage:
    """What a request cost.

    Attributes:
        sampled_tokens, spliced_tokens: all that branches got, those taken back later too.
        forward_passes: steps a branch was computed in, summed over the branches.
        computed_tokens: tokens whose KV these steps computed; the rest was shared or cached.
        discarded_rows: rows computed in vain because a splice overtook them (async scheduling), a token
            each.
    """

    sampled_tokens: int
    spliced_tokens: int
    forward_passes: int
    computed_tokens: int
    discarded_rows: int


@dataclass(slots=True)
class ControllerResult:
    """What came of one prompt."""

    branches: list[BranchResult]
    variables: dict[str, bytes]
    usage: Usage
    prompt_token_ids: list[int] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text of the first branch."""
        return self.branches[0].text

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "ControllerResult":
        """From the `controller` object of a response's `kv_transfer_params`."""
        variables = {name: text.encode() for name, text in found["variables"].items()}
        variables |= {name: base64.b64decode(text) for name, text in found["variables_base64"].items()}
        branches = [_branch_result(branch) for branch in found["branches"]]
        return cls(branches, variables, Usage(**found["usage"]))


def _branch_result(found: dict[str, Any]) -> BranchResult:
    values = {name: found[name] for name in BranchResult.__dataclass_fields__ if name in found}
    return BranchResult(**{**values, "sources": [(kind, count) for kind, count in found["sources"]]})


def engine_args(**limits: Any) -> dict[str, Any]:
    """Arguments for `vllm.LLM` that let it run controllers: `LLM(model, **engine_args())`.

    Args:
        limits: operator's limits, by the names of `aici_vllm.controller.limits.Limits`.
    """
    return {
        "scheduler_cls": "aici_vllm.Scheduler",
        "worker_cls": "aici_vllm.Worker",
        "additional_config": {"aici": {"functions": True, "limits": limits}},
    }


def run(
    llm: "LLM",
    controller: Callable[..., Any] | str | Path,
    prompts: str | Sequence[Any],
    sampling_params: "SamplingParams | None" = None,
    *,
    controller_arg: str = "",
    checkpoint: str | None = None,
    from_checkpoint: str | None = None,
    use_tqdm: bool = False,
) -> list[ControllerResult]:
    """Run a controller on every prompt; one result per prompt, in order.

    Args:
        llm: made with `**engine_args()`.
        controller: a coroutine function (plain Python, in the engine's process); or, for the sandbox, the
            path of a script or its text.
        prompts: strings, or whatever else `llm.generate` takes.
        sampling_params: greedy and as long as the context allows by default.
        checkpoint: a name under which the engine keeps each branch when it ends, as `checkpoint/index`.
        from_checkpoint: such a name: the branch's text is the prompt, and `prompts` is `""`.

    Raises:
        vllm.exceptions.VLLMValidationError: the engine, the script or a prompt cannot do this; nothing ran.
        TypeError: `controller` is no coroutine function.
        ValueError: several prompts and one `checkpoint`.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if checkpoint is not None and len(prompts) != 1:
        raise ValueError(f"checkpoint={checkpoint!r} names the branches of one prompt, not of {len(prompts)}")
    params = request_params(
        controller,
        controller_arg,
        sampling_params,
        checkpoint=checkpoint,
        from_checkpoint=from_checkpoint,
    )
    outputs = llm.generate([_never_empty(llm, prompt) for prompt in prompts], params, use_tqdm=use_tqdm)
    results = []
    for output in outputs:
        result = ControllerResult.from_json((output.kv_transfer_params or {})["controller"])
        result.prompt_token_ids = list(output.prompt_token_ids or [])
        results.append(result)
    return results


def request_params(
    controller: Callable[..., Any] | str | Path,
    controller_arg: str = "",
    sampling_params: "SamplingParams | None" = None,
    *,
    checkpoint: str | None = None,
    from_checkpoint: str | None = None,
    drop_checkpoints: str | None = None,
) -> "SamplingParams":
    """Sampling parameters that carry a controller, for `LLM.generate` and `AsyncLLM.generate`.

    Args:
        checkpoint: a name under which the engine keeps each branch when it ends, as `checkpoint/index`.
        from_checkpoint: such a name: the branch's text is the prompt, which must be empty.
        drop_checkpoints: a name whose checkpoints the engine forgets; `a` stands for `a/…` too.
    """
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=None) if sampling_params is None else sampling_params
    params = copy.copy(params)
    extra = {
        "controller": _to_wire(controller),
        "controller_arg": controller_arg,
        "controller_checkpoint": checkpoint,
        "controller_from": from_checkpoint,
        "controller_drop": drop_checkpoints,
    }
    given = {key: value for key, value in extra.items() if value is not None}
    params.extra_args = {**(params.extra_args or {}), **given}
    return params


def _to_wire(controller: Callable[..., Any] | str | Path) -> str | bytes:
    if isinstance(controller, Path):
        return controller.read_text()
    if isinstance(controller, str):
        is_path = "\n" not in controller and controller.endswith(".py")
        return Path(controller).read_text() if is_path else controller
    import cloudpickle

    from aici_vllm.aici import controller_from

    pickled: bytes = cloudpickle.dumps(controller_from(controller))
    return pickled


def _never_empty(llm: "LLM", prompt: Any) -> Any:
    """vLLM refuses an empty text before the plugin can fill it; an empty list of tokens it does not."""
    if prompt == "":
        from aici_vllm.engine.admission import empty_prompt

        return {"prompt_token_ids": empty_prompt(llm.llm_engine.vllm_config)}
    return prompt
