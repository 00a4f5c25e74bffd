"""How promising a sample is: UCT, Thompson sampling, and the choice of the best node of a tree."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from aici_vllm.agents.samples import SampleNode, post_order, pre_order

Ordering: TypeAlias = Literal["PostOrderDFS", "PreOrderDFS"]
Traversal: TypeAlias = Callable[[SampleNode], Iterator[SampleNode]]

_TRAVERSALS: dict[str, Traversal] = {"PostOrderDFS": post_order, "PreOrderDFS": pre_order}


class AbstractScoringMethod:
    """Base of the scoring methods; a subclass implements `score(node, rng)`."""

    def score(self, node: SampleNode, rng: random.Random | None = None) -> float:
        """The node's score; higher is chosen first."""
        raise TypeError(f"{type(self).__name__} does not say how to score; implement its score(node, rng).")


@dataclass(frozen=True)
class UCT(AbstractScoringMethod):
    """Upper confidence bound for trees; an unvisited node scores 0.0, the root its plain win rate."""

    exploration: float = math.sqrt(2.0)

    def score(self, node: SampleNode, rng: random.Random | None = None) -> float:
        """wins/visits + exploration * sqrt(ln(parent visits) / visits); `rng` is not used."""
        if node.visits == 0:
            return 0.0
        win_rate = node.wins / node.visits
        if node.parent is None or node.parent.visits == 0:
            return win_rate
        return win_rate + self.exploration * math.sqrt(math.log(node.parent.visits) / node.visits)


@dataclass(frozen=True)
class ThompsonSampling(AbstractScoringMethod):
    """A draw from Beta(alpha + wins, beta + losses), a fresh one at every call, from `rng` when given."""

    alpha: float = 1.0
    beta: float = 1.0
    rng: random.Random | None = field(default=None, compare=False, repr=False)

    def score(self, node: SampleNode, rng: random.Random | None = None) -> float:
        """One draw; an argument `rng` wins over the one of this object."""
        return beta_sample(self.alpha + node.wins, self.beta + node.visits - node.wins, rng or self.rng)


def gamma_sample(alpha: float, theta: float, rng: random.Random | None = None) -> float:
    """One draw from Gamma(shape `alpha`, scale `theta`) by the method of Marsaglia and Tsang."""
    if alpha <= 0 or theta <= 0:
        raise ValueError(f"The gamma distribution needs a positive shape and scale, got {alpha} and {theta}.")
    draw = rng or random
    if alpha < 1:
        # 1 - random() lies in (0, 1], so the power never sees zero.
        return gamma_sample(alpha + 1, theta, rng) * float((1.0 - draw.random()) ** (1.0 / alpha))
    d = alpha - 1.0 / 3.0
    c = 1.0 / math.sqrt(9.0 * d)
    while True:
        x = draw.gauss(0.0, 1.0)
        v = (1.0 + c * x) ** 3
        if v <= 0:
            continue
        u = 1.0 - draw.random()
        if u < 1.0 - 0.0331 * x**4 or math.log(u) < 0.5 * x * x + d * (1.0 - v + math.log(v)):
            return d * v * theta


def beta_sample(alpha: float, beta: float, rng: random.Random | None = None) -> float:
    """One draw from Beta(alpha, beta), as the ratio of two gamma draws."""
    if alpha <= 0 or beta <= 0:
        raise ValueError(f"The beta distribution needs positive parameters, got {alpha} and {beta}.")
    x = gamma_sample(alpha, 1.0, rng)
    y = gamma_sample(beta, 1.0, rng)
    if x + y == 0.0:
        # Both draws underflowed: with such small parameters all the mass sits at 0 and 1.
        return float((rng or random).random() < alpha / (alpha + beta))
    return x / (x + y)


def score(node: SampleNode, scoring: AbstractScoringMethod, rng: random.Random | None = None) -> float:
    """The node's score by `scoring`. Raises TypeError for something that is not a scoring method."""
    if not isinstance(scoring, AbstractScoringMethod):
        raise TypeError(
            f"Scoring must be UCT, ThompsonSampling or a subclass of AbstractScoringMethod, got {scoring!r}."
        )
    return scoring.score(node, rng)


def traversal_of(ordering: str) -> Traversal:
    """The traversal called `ordering`. Raises ValueError naming the legal values."""
    if ordering not in _TRAVERSALS:
        raise ValueError(f"Ordering must be 'PostOrderDFS' or 'PreOrderDFS', got {ordering!r}.")
    return _TRAVERSALS[ordering]


def select_best(
    node: SampleNode,
    scoring: AbstractScoringMethod | None = None,
    ordering: str = "PostOrderDFS",
    rng: random.Random | None = None,
) -> SampleNode:
    """The node of the whole subtree with the highest score; of equals the first in the ordering.

    Every node counts, the root and failed ones included. `scoring` defaults to `UCT()`.
    """
    scoring = UCT() if scoring is None else scoring
    traversal = traversal_of(ordering)
    best, best_score = node, -math.inf
    for candidate in traversal(node):
        candidate_score = score(candidate, scoring, rng)
        if candidate_score > best_score:
            best, best_score = candidate, candidate_score
    return best
