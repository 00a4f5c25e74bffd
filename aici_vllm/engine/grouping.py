"""The group that a client's request becomes: vLLM sends each of its choices as a request of its own."""

from typing import Any

from vllm.sampling_params import RequestOutputKind
from vllm.v1.request import Request

from aici_vllm.controller.errors import BadRequestError
from aici_vllm.controller.group import Group
from aici_vllm.controller.limits import Limits
from aici_vllm.engine.admission import CHECKPOINT, CHOICES, CONTROLLER, CONTROLLER_ARG, DROP, FROM
from aici_vllm.engine.checkpoints import Checkpoints
from aici_vllm.engine.controlled import ControlledGroup, client_stops
from constraints import Vocabulary


def arguments(request: Request) -> dict[str, Any]:
    """What a request says about its controller."""
    assert request.sampling_params is not None
    return request.sampling_params.extra_args or {}


def root_id(request: Request) -> str:
    """The id of the request that carries the first choice: vLLM calls them `0_id`, `1_id`, …"""
    if arguments(request).get(CHOICES, 1) == 1:
        return request.request_id
    return f"0_{request.request_id.split('_', 1)[1]}"


def choice_index(request: Request) -> int:
    """Which of the client's choices a request is."""
    return 0 if root_id(request) == request.request_id else int(request.request_id.split("_", 1)[0])


def make_group(
    request: Request, vocabulary: Vocabulary, limits: Limits, context: int, checkpoints: Checkpoints
) -> ControlledGroup:
    """The group of a request, made from whichever of its choices arrives first.

    Args:
        context: tokens that a sequence may have.
    """
    params, prompt, args = request.sampling_params, request.prompt_token_ids, arguments(request)
    assert params is not None and prompt is not None
    start, refused = _checkpoint_of(request, args, checkpoints)
    group = Group(
        vocabulary,
        prompt if start is None else list(start.all_token_ids),
        max_tokens=request.max_tokens,
        min_tokens=request.max_tokens if params.ignore_eos else params.min_tokens,
        context=context,
        limits=limits,
        arg=args.get(CONTROLLER_ARG, ""),
        stops=client_stops(params),
    )
    return ControlledGroup(
        group,
        root_id(request),
        args[CONTROLLER],
        args.get(CHOICES, 1),
        params.output_kind is RequestOutputKind.DELTA,
        start=start,
        refused=refused,
        checkpoint=args.get(CHECKPOINT),
        drop=args.get(DROP),
    )


def _checkpoint_of(
    request: Request, args: dict[str, Any], checkpoints: Checkpoints
) -> tuple[Request | None, str | None]:
    """The checkpoint a request goes on from, if any, or why it cannot."""
    if FROM not in args:
        return None, None
    try:
        return checkpoints.find(args[FROM], request), None
    except BadRequestError as error:
        return None, str(error)
