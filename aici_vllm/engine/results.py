"""What a client is told about its controller when the request is over, as plain JSON."""

import base64
from typing import Any

from aici_vllm.controller.branch import Branch
from aici_vllm.engine.controlled import Controlled, ControlledGroup

RESULTS_KEY = "controller"
"""Where the results stand in a response's `kv_transfer_params`."""


def results(group: ControlledGroup) -> dict[str, Any]:
    """Branches, variables and usage.

    A variable that is no UTF-8 stands under `variables_base64` instead of `variables`.
    """
    texts, binaries = {}, {}
    for name, value in group.group.variables.snapshot().items():
        try:
            texts[name] = value.decode()
        except UnicodeDecodeError:
            binaries[name] = base64.b64encode(value).decode()
    members = [group.members[index] for index in sorted(group.members)]
    return {
        "branches": [_branch(member) for member in members],
        "variables": texts,
        "variables_base64": binaries,
        "usage": usage(members),
    }


def _branch(member: Controlled) -> dict[str, Any]:
    branch = member.branch
    sequence = branch.sequence
    parts = _parts(branch)
    return {
        "index": branch.index,
        "text": b"".join(text for _, text in parts).decode(errors="replace"),
        "token_ids": sequence.tokens[sequence.prompt_len :],
        "parts": [{"source": source, "text": text.decode(errors="replace")} for source, text in parts],
        "sources": [list(run) for run in sequence.sources()],
        "logprobs": member.logprobs and member.logprobs.chosen(sequence, sequence.prompt_len),
        "finish_reason": branch.finish_reason,
        "stop_reason": branch.stopped_by and branch.stopped_by.reason,
        "error": branch.error,
        "logs": str(branch.log),
        "checkpoint": member.checkpoint,
    }


def _parts(branch: Branch) -> list[tuple[str, bytes]]:
    """The text in runs of one source, less what a client's stop hides at its end.

    A character split between two runs shows as U+FFFD in both.
    """
    parts, at = [], branch.sequence.prompt_len
    for source, count in branch.sequence.sources():
        parts.append((source, branch.group.vocabulary.detokenize(branch.sequence.tokens[at : at + count])))
        at += count
    hidden = branch.stopped_by.hidden if branch.stopped_by is not None else 0
    while hidden:
        source, text = parts.pop()
        if len(text) > hidden:
            parts.append((source, text[:-hidden]))
        hidden = max(hidden - len(text), 0)
    return parts


def usage(members: list[Controlled]) -> dict[str, int]:
    """What the branches of a request cost so far, together."""
    return {
        "sampled_tokens": sum(member.branch.sequence.sampled for member in members),
        "spliced_tokens": sum(member.branch.sequence.spliced for member in members),
        "forward_passes": sum(member.forward_passes for member in members),
        "computed_tokens": sum(member.computed_tokens for member in members),
        "discarded_rows": sum(member.discarded for member in members),
    }
