"""What came of a request's branches: their replies, or why there are none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from aici_vllm.agents.branches.kept import Kept, Search
from aici_vllm.agents.branches.prompt import BranchPrompt
from aici_vllm.agents.errors import ModelCallError
from aici_vllm.agents.messages import TokenSequence
from aici_vllm.agents.models.base import Reply

if TYPE_CHECKING:
    from aici_vllm.offline import BranchResult, ControllerResult


def failure(error: Exception) -> ModelCallError:
    """What a sampler raises for an exception of the engine."""
    wrapped = ModelCallError(f"vLLM failed: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


def result_of(output: Any) -> ControllerResult | ModelCallError:
    """What a finished request tells of its branches. `output` may also be the error that took its place."""
    from aici_vllm.offline import ControllerResult

    if isinstance(output, ModelCallError):
        return output
    found = (getattr(output, "kv_transfer_params", None) or {}).get("controller")
    if found is None:
        return ModelCallError("vLLM ended the request without the results of its branches.")
    return ControllerResult.from_json(found)


def never_began(result: ControllerResult | ModelCallError) -> bool:
    """Whether the engine took the request and not even the first line of its program was reached."""
    from aici_vllm.agents.branches.program import SPLICED

    return not isinstance(result, ModelCallError) and SPLICED not in result.variables


def replies_of(
    result: ControllerResult | ModelCallError,
    count: int,
    prompt: BranchPrompt,
    search: Search,
    tokenizer: str,
) -> Sequence[Reply | ModelCallError]:
    """For each of the `count` branches that were asked for, its reply to `prompt` or its error."""
    if isinstance(result, ModelCallError):
        return [result] * count
    if len(result.branches) < count:
        error = f"The request failed before its branches began: {result.branches[0].error}"
        return [ModelCallError(error)] * count
    return [_reply(result, branch, prompt, search, tokenizer) for branch in result.branches]


def computed_prompt(
    result: ControllerResult | ModelCallError, prompt: BranchPrompt, search: Search
) -> BranchPrompt | None:
    """`prompt` as the engine has it after a request that only computed it; None when that went wrong."""
    if isinstance(result, ModelCallError) or result.branches[0].checkpoint is None:
        return None
    (branch,) = result.branches
    tokens = (*prompt.token_ids, *branch.token_ids)
    return BranchPrompt(prompt.text, tokens, "", Kept(search, str(branch.checkpoint)))


def _reply(
    result: ControllerResult, branch: BranchResult, prompt: BranchPrompt, search: Search, tokenizer: str
) -> Reply | ModelCallError:
    from aici_vllm.agents.branches.program import SPLICED, Outcome, outcome_of

    if branch.error is not None:
        return ModelCallError(f"Branch {branch.index} of the request failed in the engine: {branch.error}")
    spliced, shown = json.loads(result.variables[SPLICED])
    text, reply_ids = branch.text[shown:], branch.token_ids[spliced:]
    told = result.variables.get(outcome_of(branch.index))
    outcome = Outcome("length", 0, None) if told is None else Outcome(*json.loads(told))
    sequence = TokenSequence(
        prompt.text,
        (*prompt.token_ids, *branch.token_ids[:spliced]),
        text,
        tuple(reply_ids),
        tokenizer,
        None if branch.checkpoint is None else Kept(search, branch.checkpoint),
    )
    tokens = (len(sequence.prompt_ids), len(reply_ids) + outcome.closing)
    return Reply(text[: outcome.cut], finish_reason=outcome.reason, tokens=tokens, sequence=sequence)
