"""Ended branches that later requests can go on from: their tokens, and their KV until somebody needs it.

A request with `controller_checkpoint=NAME` leaves each of its branches behind as `NAME/INDEX`. One with
`controller_from=NAME/INDEX` has that branch's tokens as its prompt and shares its KV. So a client goes on
with a conversation, or in several directions at once, token by token and without sending it again.
"""

from collections import OrderedDict

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import Request

from aici_vllm.controller.errors import BadRequestError
from aici_vllm.engine.blocks import move_prefix
from aici_vllm.engine.controlled import Controlled


class Checkpoints:
    """The checkpoints of an engine, at most `limit`: the one that was unused for longest goes first.

    Each is a request that never runs. `num_computed_tokens` says how many of its tokens have KV.
    """

    def __init__(self, kv_cache_manager: KVCacheManager, limit: int) -> None:
        self._manager = kv_cache_manager
        self._limit = limit
        self._requests: OrderedDict[str, Request] = OrderedDict()

    def __len__(self) -> int:
        return len(self._requests)

    def take(self, name: str, member: Controlled) -> None:
        """Keep a branch that has ended. Its KV moves here from the branch's request."""
        self._drop(name)
        source = member.request
        request = Request(
            request_id=f"checkpoint {name}",
            prompt_token_ids=list(member.branch.sequence.tokens),
            sampling_params=member.params,
            pooling_params=None,
            lora_request=source.lora_request,
            cache_salt=source.cache_salt,
            block_hasher=source._block_hasher,
        )
        computed = min(member.computed, member.branch.sequence.kept)
        request.num_computed_tokens = move_prefix(self._manager, source, request, computed)
        self._requests[name] = request
        if len(self._requests) > self._limit:
            self._drop(next(iter(self._requests)))

    def find(self, name: str, request: Request) -> Request:
        """The checkpoint that `request` goes on from.

        Raises:
            BadRequestError: it does not exist, or its KV is not that of the request's model and tenant.
        """
        if (checkpoint := self._requests.get(name)) is None:
            raise BadRequestError(
                f"there is no checkpoint {name!r}: it was never made, was dropped, or {self._limit} newer "
                "ones took its place; send the text again"
            )
        if _weights_and_tenant(checkpoint) != _weights_and_tenant(request):
            raise BadRequestError(f"checkpoint {name!r} was made with another LoRA adapter or cache_salt")
        self._requests.move_to_end(name)
        return checkpoint

    def drop(self, name: str) -> None:
        """Forget checkpoint `name`, and all called `name/…`."""
        for found in [found for found in self._requests if f"{found}/".startswith(f"{name}/")]:
            self._drop(found)

    def free_one(self) -> bool:
        """Free the KV of the checkpoint that was unused for longest; False if none has any."""
        for request in self._requests.values():
            if request.num_computed_tokens:
                self._free(request)
                return True
        return False

    def _drop(self, name: str) -> None:
        if (request := self._requests.pop(name, None)) is not None:
            self._free(request)

    def _free(self, request: Request) -> None:
        self._manager.free(request)
        request.num_computed_tokens = 0


def _weights_and_tenant(request: Request) -> tuple[str, str, str | None]:
    """What must be equal for requests to share KV; vLLM's prefix cache tells the same apart."""
    adapter = request.lora_request
    names = ("", "") if adapter is None else (adapter.lora_name, adapter.lora_path)
    return (*names, request.cache_salt)
