"""Scores and the choice of the best node, against formulas and trees worked by hand."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import dataclass

import pytest

from aici_vllm.agents import (
    UCT,
    AbstractScoringMethod,
    SampleNode,
    ThompsonSampling,
    backpropagate,
    beta_sample,
    expand,
    gamma_sample,
    post_order,
    pre_order,
    score,
    select_best,
)


def visited(wins: int, visits: int, parent_visits: int | None = None) -> SampleNode:
    node = SampleNode(None)
    if parent_visits is not None:
        parent = SampleNode(None)
        parent.visits = parent_visits
        node = expand(parent, None)
    node.wins, node.visits = wins, visits
    return node


@pytest.mark.parametrize(
    ("wins", "visits", "parent_visits", "expected"),
    [
        (0, 0, 7, 0.0),
        (0, 0, None, 0.0),
        (2, 3, None, 2 / 3),
        (1, 2, 0, 0.5),
        (1, 2, 1, 0.5),
        (2, 2, 3, 1 + 1.41421356 * 0.741152),  # sqrt(ln 3 / 2)
        (1, 1, 2, 1 + 1.41421356 * 0.832555),  # sqrt(ln 2)
        (0, 1, 3, 1.41421356 * 1.048147),  # sqrt(ln 3)
        (5, 8, 12, 0.625 + 1.41421356 * 0.557329),  # sqrt(ln 12 / 8)
    ],
)
def test_uct(wins: int, visits: int, parent_visits: int | None, expected: float) -> None:
    assert score(visited(wins, visits, parent_visits), UCT()) == pytest.approx(expected, abs=1e-5)


def test_uct_exploration() -> None:
    node = visited(1, 4, 9)
    assert UCT().exploration == pytest.approx(1.4142135623730951)
    assert UCT(0.0).score(node) == 0.25
    assert UCT(2.0).score(node) == pytest.approx(0.25 + 2 * math.sqrt(math.log(9) / 4))


def reference_tree() -> tuple[SampleNode, SampleNode, SampleNode, SampleNode]:
    root = SampleNode([])
    child1 = expand(root, [])
    backpropagate(child1, wins=1, visits=1)
    child2 = expand(root, [])
    backpropagate(child2, wins=0, visits=1)
    child11 = expand(child1, [])
    backpropagate(child11, wins=1, visits=1)
    return root, child1, child2, child11


def test_the_published_tree() -> None:
    root, child1, child2, child11 = reference_tree()
    assert [round(score(node, UCT()), 2) for node in (root, child1, child11, child2)] == [
        0.67,
        2.05,
        2.18,
        1.48,
    ]
    assert select_best(root, UCT()) is child11
    assert select_best(root) is child11
    assert select_best(child2) is child2


def test_ties_go_to_the_first_in_the_ordering() -> None:
    root = SampleNode([])
    left, right = expand(root, []), expand(root, [])
    leaf = expand(left, [])
    assert select_best(root) is leaf
    assert select_best(root, ordering="PostOrderDFS") is leaf
    assert select_best(root, ordering="PreOrderDFS") is root
    backpropagate(left, 0)
    backpropagate(right, 0)
    assert select_best(root, ordering="PreOrderDFS") is left
    assert leaf.visits == 0


def test_failed_and_unvisited_nodes_are_candidates_but_unvisited_score_zero() -> None:
    root = SampleNode([])
    failed = expand(root, [], success=False)
    expand(root, [], success=True)
    backpropagate(failed, 0)
    backpropagate(failed, 0)
    assert select_best(root) is failed


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize(("ordering", "walk"), [("PostOrderDFS", post_order), ("PreOrderDFS", pre_order)])
def test_select_best_against_brute_force(seed: int, ordering: str, walk) -> None:  # type: ignore[no-untyped-def]
    rng = random.Random(seed)
    nodes = [SampleNode([])]
    for _ in range(30):
        nodes.append(expand(rng.choice(nodes), []))
    for _ in range(60):
        backpropagate(rng.choice(nodes), rng.random() < 0.4)

    def uct(node: SampleNode) -> float:
        if node.visits == 0:
            return 0.0
        bonus = math.log(node.parent.visits) / node.visits if node.parent and node.parent.visits else 0.0
        return node.wins / node.visits + math.sqrt(2) * math.sqrt(bonus)

    # max() keeps the first of equals.
    assert select_best(nodes[0], UCT(), ordering) is max(walk(nodes[0]), key=uct)


def test_bad_arguments() -> None:
    root = SampleNode([])
    with pytest.raises(ValueError, match="'PostOrderDFS' or 'PreOrderDFS'"):
        select_best(root, ordering="BFS")
    with pytest.raises(TypeError):
        score(root, "UCT")  # type: ignore[arg-type]

    class Unfinished(AbstractScoringMethod):
        pass

    with pytest.raises(TypeError, match="Unfinished"):
        score(root, Unfinished())
    for call in (gamma_sample, beta_sample):
        with pytest.raises(ValueError, match="positive"):
            call(0, 1)


def test_a_scoring_method_of_the_user() -> None:
    @dataclass(frozen=True)
    class FewestVisits(AbstractScoringMethod):
        def score(self, node: SampleNode, rng: random.Random | None = None) -> float:
            return -node.visits

    root, _, _, _ = reference_tree()
    assert select_best(root, FewestVisits()).visits == 1


@pytest.mark.parametrize("shape", [0.3, 1.0, 2.5, 20.0])
def test_gamma_moments(shape: float) -> None:
    rng = random.Random(7)
    draws = [gamma_sample(shape, 2.0, rng) for _ in range(20_000)]
    # Mean k*theta with standard error sqrt(k)*theta/sqrt(n); variance k*theta^2.
    assert statistics.fmean(draws) == pytest.approx(
        shape * 2, abs=5 * math.sqrt(shape) * 2 / math.sqrt(20_000)
    )
    assert statistics.pvariance(draws) == pytest.approx(shape * 4, rel=0.15)


@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 5), (0.5, 0.5), (30, 3)])
def test_beta_moments(a: float, b: float) -> None:
    rng = random.Random(11)
    draws = [beta_sample(a, b, rng) for _ in range(20_000)]
    variance = a * b / ((a + b) ** 2 * (a + b + 1))
    assert all(0 <= draw <= 1 for draw in draws)
    assert statistics.fmean(draws) == pytest.approx(a / (a + b), abs=5 * math.sqrt(variance / 20_000))
    assert statistics.pvariance(draws) == pytest.approx(variance, rel=0.1)


def test_beta_survives_underflow() -> None:
    rng = random.Random(0)
    draws = [beta_sample(1e-4, 1e-4, rng) for _ in range(200)]
    assert all(0 <= draw <= 1 for draw in draws)
    assert 0 < sum(draw > 0.5 for draw in draws) < 200


def test_thompson_draws_from_the_posterior_and_ignores_the_parent() -> None:
    node = visited(3, 4, parent_visits=1000)
    draws = [ThompsonSampling().score(node, random.Random(seed)) for seed in range(4000)]
    # Beta(4, 2).
    assert statistics.fmean(draws) == pytest.approx(4 / 6, abs=0.02)


def test_rng_is_injectable_everywhere() -> None:
    root, *_ = reference_tree()
    first = [select_best(root, ThompsonSampling(), rng=random.Random(seed)).id for seed in range(50)]
    assert first == [select_best(root, ThompsonSampling(), rng=random.Random(seed)).id for seed in range(50)]
    assert len(set(first)) > 1
    own = ThompsonSampling(rng=random.Random(5))
    again = ThompsonSampling(rng=random.Random(5))
    assert [own.score(root) for _ in range(3)] == [again.score(root) for _ in range(3)]
    assert own == again
