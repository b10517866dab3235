"""Adaptive multi-source balancing (SAIL-Embedding, section 3.1.3, Fig. 3): how often to draw from each dataset.

Embeddings of a training set and of a benchmark become k-means centroids; a transport plan between them, by Sinkhorn
on 1 - cosine, says how well the one covers the other; a softmax of the mean over the benchmarks is the sampling weight.
Pure functions of arrays; k-means is faiss's, Sinkhorn in the log domain is POT's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import faiss
import numpy as np
import ot

Embeddings = Mapping[str, np.ndarray]  # by modality combination: "fused", "vision", "audio", "text"

UNIMODAL = ("vision", "audio", "text")

NUM_CLUSTERS = 64
EPSILON = 0.1
SCALING = 2.0  # epsilon falls by it from the largest cost to its own value: each plan starts from the one before
TEMPERATURE = 0.1  # a dataset whose mean cosine is higher by 0.07 is drawn twice as often


@dataclass(frozen=True)
class Clusters:
    """Centroids of one dataset and one modality combination: (K, D) of length 1, and (K,) shares that sum to 1."""

    centroids: np.ndarray
    shares: np.ndarray


@dataclass(frozen=True)
class Balance:
    """Result of `balance`.

    Attributes:
        datasets, benchmarks: names, in the order of rows and columns.
        scores: (m, n) sum(P * C) of each dataset with each benchmark, in cosine; NaN where they share no modality.
        used: (m, n) which modality combination each was taken from; "" where there is none.
        weights: by dataset, sum 1.
        temperature: of the softmax.
    """

    datasets: list[str]
    benchmarks: list[str]
    scores: np.ndarray
    used: list[list[str]]
    weights: dict[str, float]
    temperature: float


def cluster(embeddings: np.ndarray, num_clusters: int = NUM_CLUSTERS, seed: int = 0) -> Clusters:
    """Spherical k-means by faiss.

    Args:
        embeddings: (N, D), of any length above 0; normalised here.
        num_clusters: at most; fewer where there are fewer than two embeddings for each.
        seed: of the first centroids.

    Raises:
        ValueError: no embedding, or one that is not finite.
    """
    values = np.ascontiguousarray(embeddings, dtype=np.float32)
    if values.ndim != 2 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"Embeddings of shape {values.shape} must be (N, D), N > 0, all finite.")
    values = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    count = max(1, min(num_clusters, len(values) // 2))
    means = faiss.Kmeans(values.shape[1], count, niter=25, seed=seed, spherical=True, min_points_per_centroid=1)
    means.train(values)
    places = means.index.search(values, 1)[1][:, 0]
    shares = np.bincount(places, minlength=count) / len(values)
    kept = shares > 0
    return Clusters(means.centroids[kept], shares[kept])


def sinkhorn(
    cost: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    *,
    epsilon: float = EPSILON,
    tolerance: float = 1e-7,
    most_rounds: int = 20_000,
) -> np.ndarray:
    """(a, b) transport plan of least cost with entropy, in the log domain (Cuturi, 2013), by POT.

    Args:
        cost: (a, b).
        rows, columns: (a,) and (b,) masses, each above 0, each of sum 1.
        epsilon: strength of the entropy, in the unit of the cost.
        tolerance: what the masses of the plan may be off, as a root of the sum of squares.
        most_rounds: of scaling rows and columns, for each value that epsilon falls through.

    Raises:
        ValueError: masses or epsilon do not fit, or the plan does not converge.
    """
    if cost.shape != (len(rows), len(columns)) or min(rows.min(), columns.min()) <= 0:
        raise ValueError(f"cost {cost.shape} needs {len(rows)} and {len(columns)} masses, all above 0.")
    if abs(rows.sum() - 1) > 1e-6 or abs(columns.sum() - 1) > 1e-6:
        raise ValueError(f"Masses sum to {rows.sum():.6f} and {columns.sum():.6f}; each must sum to 1.")
    if not epsilon > 0 or not np.isfinite(cost).all():
        raise ValueError(f"epsilon={epsilon} must be above 0, and every cost finite.")
    one, other, wide = rows / rows.sum(), columns / columns.sum(), np.asarray(cost, dtype=np.float64)
    settings = {"method": "sinkhorn_log", "numItermax": most_rounds, "stopThr": tolerance, "warn": False, "log": True}
    steps = max(0, int(np.log(max(wide.max(), epsilon) / epsilon) / np.log(SCALING)))
    start = None
    for power in range(steps, -1, -1):
        plan, log = ot.sinkhorn(one, other, wide, epsilon * SCALING**power, warmstart=start, **settings)
        start = log["log_u"], log["log_v"]
    off = max(np.linalg.norm(plan.sum(axis=1) - one), np.linalg.norm(plan.sum(axis=0) - other))
    if not off <= max(tolerance, 1e-12):
        raise ValueError(
            f"Sinkhorn did not converge: masses are off by {off:.2e} after {most_rounds} rounds; "
            f"raise epsilon={epsilon}."
        )
    return plan


def similarity(one: Clusters, other: Clusters, epsilon: float = EPSILON) -> float:
    """sum(P * C): the cosine that the transport plan between two sets of centroids meets on average."""
    cosine = np.clip(one.centroids @ other.centroids.T, -1.0, 1.0).astype(np.float64)
    return float((sinkhorn(1 - cosine, one.shares, other.shares, epsilon=epsilon) * cosine).sum())


def fusion_first(one: Mapping[str, Clusters], other: Mapping[str, Clusters]) -> list[str]:
    """Which combinations are compared: the fused one where both have it, else every single modality that both have."""
    if "fused" in one and "fused" in other:
        return ["fused"]
    return [name for name in UNIMODAL if name in one and name in other]


def balance(
    training: Mapping[str, Embeddings],
    validation: Mapping[str, Embeddings],
    *,
    num_clusters: int = NUM_CLUSTERS,
    epsilon: float = EPSILON,
    temperature: float = TEMPERATURE,
    seed: int = 0,
) -> Balance:
    """Sampling weights of training sets by how well they cover benchmarks (section 3.1.3).

    A dataset's score is its mean over the benchmarks that it shares a modality with.

    Args:
        training, validation: by name, (N, D) embeddings by modality combination; about 10k a dataset are enough.
        num_clusters: centroids of each.
        epsilon: of `sinkhorn`.
        temperature: of the softmax over the mean scores; lower is sharper. The paper does not publish its own.
        seed: of k-means.

    Raises:
        ValueError: nothing to compare; a dataset that shares no modality with any benchmark, by name; `sinkhorn`.
    """
    if not training or not validation or not temperature > 0:
        raise ValueError(
            f"balance needs a training set, a benchmark and a temperature above 0; got {len(training)}, "
            f"{len(validation)} and {temperature}."
        )
    clusters = [
        {
            name: {kind: cluster(part, num_clusters, seed) for kind, part in parts.items()}
            for name, parts in side.items()
        }
        for side in (training, validation)
    ]
    scores = np.full((len(training), len(validation)), np.nan)
    used = [["" for _ in validation] for _ in training]
    for row, one in enumerate(clusters[0].values()):
        for column, other in enumerate(clusters[1].values()):
            kinds = fusion_first(one, other)
            if kinds:
                scores[row, column] = np.mean([similarity(one[kind], other[kind], epsilon) for kind in kinds])
            used[row][column] = "+".join(kinds)
    for name, line in zip(training, scores, strict=True):
        if np.isnan(line).all():
            raise ValueError(
                f"Dataset {name!r} holds {', '.join(training[name])}, and no benchmark has that: there is nothing to "
                "weigh it by. Give a benchmark with such items, or leave the dataset out."
            )
    logits = np.nanmean(scores, axis=1) / temperature
    weights = np.exp(logits - logits.max())
    named = dict(zip(training, map(float, weights / weights.sum()), strict=True))
    return Balance(list(training), list(validation), scores, used, named, temperature)
