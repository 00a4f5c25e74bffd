"""Which sibling has the KV of a branch's text, or is about to compute it.

Branches of a group share what one of them computes. A branch whose text another one has computed
further goes on from there; one whose text another is about to compute lets that one go first.
"""

from dataclasses import dataclass

from aici_vllm.engine.controlled import Controlled


@dataclass(frozen=True)
class Source:
    """`num_tokens` of a branch's text have KV in `member`'s request; not yet, if `promised`."""

    member: Controlled
    num_tokens: int
    promised: bool


def best_source(member: Controlled, siblings: list[Controlled]) -> Source | None:
    """The sibling that saves `member` most of the tokens it would compute now; None when none does.

    The last token is always the branch's own to compute: its logits are what it samples from.
    """
    tokens = member.branch.sequence.tokens
    best = None
    saved = member.request.num_computed_tokens
    for sibling in siblings:
        if sibling is member or sibling.finished:
            continue
        reach = sibling.request.num_tokens if sibling.will_compute() else sibling.computed
        common = _common_prefix(tokens, sibling.request._all_token_ids, saved, min(reach, len(tokens) - 1))
        if common > saved:
            saved = common
            best = Source(sibling, common, promised=common > sibling.computed)
    return best


def _common_prefix(left: list[int], right: list[int], known: int, limit: int) -> int:
    """How many of the first `limit` tokens are equal; `known` or fewer are not worth counting."""
    if limit <= known or left[known] != right[known]:
        return known
    if left[:limit] == right[:limit]:
        return limit
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if left[:middle] == right[:middle] else (low, middle)
    return low
