"""Marginals hold, twins weigh alike, noise weighs least; what cannot be compared is told."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling_sail.training.balancing import balance, cluster, fusion_first, similarity, sinkhorn


def cloud(seed: int, centre: float, count: int = 400, dims: int = 16) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(0, 1, (count, dims)) + centre * np.eye(dims)[seed % dims]


@settings(max_examples=40)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 999), st.sampled_from([0.05, 0.2, 1.0]))
def test_the_plans_marginals_hold(a, b, seed, epsilon) -> None:
    generator = np.random.default_rng(seed)
    rows, columns = (part / part.sum() for part in (generator.random(a) + 0.05, generator.random(b) + 0.05))
    plan = sinkhorn(generator.random((a, b)) * 2, rows, columns, epsilon=epsilon)
    assert np.abs(plan.sum(axis=1) - rows).max() < 1e-6
    assert np.abs(plan.sum(axis=0) - columns).max() < 1e-6
    assert (plan >= 0).all()


def test_with_little_entropy_the_plan_is_the_cheapest_assignment() -> None:
    from scipy.optimize import linear_sum_assignment

    cost = np.random.default_rng(0).random((6, 6))
    mass = np.full(6, 1 / 6)
    plan = sinkhorn(cost, mass, mass, epsilon=0.005, tolerance=1e-5)
    assert (plan * cost).sum() == pytest.approx(cost[linear_sum_assignment(cost)].mean(), abs=5e-3)


def test_a_plan_that_does_not_converge_says_so() -> None:
    mass = np.full(5, 0.2)
    with pytest.raises(ValueError, match="did not converge: .* raise epsilon=0.0001"):
        sinkhorn(np.random.default_rng(0).random((5, 5)), mass, mass, epsilon=1e-4, most_rounds=3)
    with pytest.raises(ValueError, match="epsilon=0 must be above 0"):
        sinkhorn(np.ones((5, 5)), mass, mass, epsilon=0)
    with pytest.raises(ValueError, match="each must sum to 1"):
        sinkhorn(np.ones((5, 5)), mass * 2, mass)


def test_twins_weigh_alike_and_noise_weighs_least() -> None:
    near, benchmark = cloud(1, 6.0), {"b": {"fused": cloud(1, 6.0, 100)}}
    training = {
        "one": {"fused": near},
        "twin": {"fused": near},
        "far": {"fused": cloud(2, 6.0)},
        "noise": {"fused": cloud(3, 0.0)},
    }
    found = balance(training, benchmark, num_clusters=16)
    assert found.weights["one"] == pytest.approx(found.weights["twin"], rel=1e-9)
    assert sum(found.weights.values()) == pytest.approx(1.0)
    assert found.weights["one"] > found.weights["far"]
    assert min(found.weights, key=found.weights.__getitem__) in ("noise", "far")
    only = balance({name: training[name] for name in ("one", "twin", "noise")}, benchmark, num_clusters=16)
    assert min(only.weights, key=only.weights.__getitem__) == "noise"
    assert found.scores.shape == (4, 1)


def test_the_temperature_is_the_documented_one() -> None:
    found = balance(
        {"a": {"fused": cloud(1, 6.0)}, "b": {"fused": cloud(2, 3.0)}}, {"v": {"fused": cloud(1, 6.0)}}, temperature=0.1
    )
    gap = found.scores[0, 0] - found.scores[1, 0]
    assert found.weights["a"] / found.weights["b"] == pytest.approx(np.exp(gap / 0.1))


def test_fusion_comes_first_then_what_both_have() -> None:
    both = dict.fromkeys(("fused", "vision", "text"))
    assert fusion_first(both, both) == ["fused"]
    assert fusion_first(both, dict.fromkeys(("text", "vision", "audio"))) == ["vision", "text"]
    found = balance({"t": {"text": cloud(1, 3.0)}}, {"v": {"fused": cloud(1, 3.0), "text": cloud(1, 3.0)}})
    assert found.used == [["text"]]
    with pytest.raises(ValueError, match="Dataset 't' holds text, and no benchmark has that"):
        balance({"t": {"text": cloud(1, 3.0)}}, {"v": {"audio": cloud(1, 3.0)}})
    heard = {"v": {"text": cloud(1, 3.0)}, "w": {"audio": cloud(2, 3.0)}}
    found = balance({"t": {"text": cloud(1, 3.0)}, "a": {"audio": cloud(2, 3.0)}}, heard)
    assert found.used == [["text", ""], ["", "audio"]]
    assert np.isnan(found.scores).tolist() == [[False, True], [True, False]]
    assert sum(found.weights.values()) == pytest.approx(1.0)


def test_a_set_is_most_like_itself_and_clusters_share_out_its_mass() -> None:
    one, other = cluster(cloud(1, 6.0), 8), cluster(cloud(2, 6.0), 8)
    assert one.shares.sum() == pytest.approx(1.0)
    assert np.linalg.norm(one.centroids, axis=1) == pytest.approx(np.ones(len(one.centroids)), abs=1e-5)
    assert similarity(one, one) > similarity(one, other)
    assert len(cluster(cloud(1, 1.0, count=1)).shares) == 1
    with pytest.raises(ValueError, match="all finite"):
        cluster(np.full((3, 2), np.nan))
