"""What the client is told about the probability of each token of a branch.

A sampled token is reported as vLLM reports it. A spliced one was certain: its logprob is 0.0, and there is
no other token to list beside it.
"""

import numpy as np
from vllm.v1.outputs import LogprobsLists

from aici_vllm.controller.sequence import Origin, Sequence


class BranchLogprobs:
    """Logprobs of the tokens that one branch sampled, by position in its sequence.

    Args:
        num_logprobs: how many of the best tokens the client wants beside the sampled one; -1 for all.
    """

    def __init__(self, num_logprobs: int):
        self._width = num_logprobs + 1 if num_logprobs >= 0 else None
        # Positions that were taken back stay until they are sampled again: the sequence knows which
        # tokens were sampled, and each of those wrote its row last.
        self._rows: dict[int, LogprobsLists] = {}

    def add(self, position: int, row: LogprobsLists) -> None:
        """Remember the row of a token that was just sampled.

        Other requests of the batch may have asked for more, and a row is as wide as the widest.
        """
        ids, logprobs, ranks, _ = row
        width = self._width
        self._rows[position] = LogprobsLists(ids[:, :width].copy(), logprobs[:, :width].copy(), ranks.copy())

    def copy(self) -> "BranchLogprobs":
        """The same rows, for a branch that goes its own way from here."""
        copy = BranchLogprobs(-1 if self._width is None else self._width - 1)
        copy._rows = dict(self._rows)
        return copy

    def runs(self, sequence: Sequence, start: int, end: int) -> list[tuple[list[int], LogprobsLists]]:
        """Tokens `start:end` with their rows, in runs of equal width: one array holds no ragged rows."""
        runs: list[tuple[list[int], list[LogprobsLists]]] = []
        for position in range(start, end):
            token = sequence.tokens[position]
            sampled = sequence.origins[position] == Origin.SAMPLED
            row = self._rows[position] if sampled else certain(token)
            if not runs or runs[-1][1][-1].logprobs.shape[1] != row.logprobs.shape[1]:
                runs.append(([], []))
            runs[-1][0].append(token)
            runs[-1][1].append(row)
        return [(tokens, _joined(rows)) for tokens, rows in runs]

    def chosen(self, sequence: Sequence, start: int) -> list[float]:
        """The logprob of each token from `start` on."""
        return [
            float(self._rows[position].logprobs[0, 0]) if origin == Origin.SAMPLED else 0.0
            for position, origin in enumerate(sequence.origins[start:], start)
        ]


def certain(token: int) -> LogprobsLists:
    """The row of a token that nobody sampled."""
    return LogprobsLists(np.array([[token]], np.int32), np.zeros((1, 1), np.float32), np.ones(1, np.int32))


def _joined(rows: list[LogprobsLists]) -> LogprobsLists:
    return LogprobsLists(
        np.concatenate([row.logprob_token_ids for row in rows]),
        np.concatenate([row.logprobs for row in rows]),
        np.concatenate([row.sampled_token_ranks for row in rows]),
    )
