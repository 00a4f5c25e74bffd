"""What vLLM's output of a controlled request says of its branches."""

from typing import Any

import aici_vllm


def result_of(output: Any) -> aici_vllm.ControllerResult:
    """The results of the controller."""
    return aici_vllm.ControllerResult.from_json(output.kv_transfer_params["controller"])


def branches_of(output: Any) -> list[Any]:
    """The branches, none of which has an error."""
    found = result_of(output).branches
    assert [branch.error for branch in found] == [None] * len(found)
    return found
