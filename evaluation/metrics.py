"""Metrics of retrieval, alignment and ranking: pure functions of scores and clusters (SAIL-Embedding, section 4.2).

Unusual: wherever there is a choice, a tie counts against the model, so that a collapsed embedding earns nothing. Recall
is of tensors; the others take arrays, or whatever numpy makes one of. Plain AUC is sklearn's `roc_auc_score`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.stats import kendalltau
from sklearn.metrics import normalized_mutual_info_score, roc_auc_score
from torch import Tensor

SAME_COSINE = 1e-9  # cosines that are nearer than this are a tie: vectors of float32 say no more


def recall_at(scores: Tensor, relevant: Tensor, k: int) -> float:
    """Recall@k: relevant retrieved in the top k / all relevant, averaged over queries (section 4.2).

    Args:
        scores: (Q, N) similarities of Q queries and N candidates.
        relevant: (Q, N) booleans; every query has at least one.
        k: how many candidates are looked at.

    Returns:
        A number in [0, 1]. A tie counts against the relevant candidate, so a constant score earns nothing.

    Raises:
        ValueError: shapes differ, or a query has nothing relevant.
    """
    if scores.shape != relevant.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and relevant {tuple(relevant.shape)} must have one shape.")
    total = relevant.sum(dim=1)
    if not bool((total > 0).all()):
        raise ValueError(f"{int((total == 0).sum())} queries have no relevant candidate; leave them out.")
    # Rank of each relevant candidate among the irrelevant ones; relevant ones do not push each other out of the top.
    worse = torch.where(relevant, float("-inf"), scores).sort(dim=1).values  # (Q, N) ascending
    above = scores.shape[1] - torch.searchsorted(worse, scores.contiguous(), side="left")  # >= counts ties against
    order = torch.where(relevant, above, scores.shape[1]).sort(dim=1).values
    place = order + torch.arange(scores.shape[1], device=scores.device)
    found = ((place < k) & (order < scores.shape[1])).sum(dim=1)
    return float((found / total).double().mean())


def normalized_mutual_information(query_clusters: ArrayLike, target_clusters: ArrayLike) -> float:
    """NMI = 2 I(Lq; Lt) / (H(Lq) + H(Lt)) of the clusters of queries and of their targets (section 4.2).

    Two independent groups are above 0, and the more so the more clusters and the fewer pairs there are: compare only
    values of the same pairs and the same number of clusters, or with that of shuffled targets.

    Args:
        query_clusters: (N,) integers, the cluster of each query.
        target_clusters: (N,) integers, the cluster of its target; the names of clusters do not matter.

    Returns:
        A number in [0, 1]. Where both groups are one cluster the formula is 0 / 0 and this is 0 (sklearn says 1): they
        tell nothing of each other.

    Raises:
        ValueError: shapes differ, are not (N,), or N is 0.
    """
    one, other = np.asarray(query_clusters), np.asarray(target_clusters)
    if one.shape != other.shape or one.ndim != 1 or not len(one):
        raise ValueError(f"Clusters of shapes {one.shape} and {other.shape}: (N,) of both is needed, a pair at least.")
    if (one == one[0]).all() and (other == other[0]).all():
        return 0.0
    return float(normalized_mutual_info_score(one, other, average_method="arithmetic"))


def kendall_tau(one: ArrayLike, other: ArrayLike) -> float:
    """Kendall's tau = (C - D) / (C + D) of two rankings of the same candidates, mean over rows (section 4.2).

    With ties it is tau-b, (C - D) / sqrt((C + D + T1)(C + D + T2)) with T the pairs that only one of them ties: the
    paper's formula would leave ties out and give 1 to a score that tells apart two candidates and no more.

    Args:
        one: (Q, N) scores of N candidates for each of Q rows.
        other: (Q, N), the same rows and candidates by another score.

    Returns:
        A number in [-1, 1]. A row in which a score is constant has no order and counts as 0.

    Raises:
        ValueError: shapes differ, are not (Q, N) with N of 2 or more, or a score is NaN.
    """
    one, other = _two_scores(one, other, fewest=2)
    rows = [
        kendalltau(*pair, variant="b").statistic for pair in zip(one, other, strict=True)
    ]  # older ones have no axis
    return float(np.nan_to_num(rows, nan=0.0).mean())


def top_k_overlap(one: ArrayLike, other: ArrayLike, k: int) -> float:
    """Items that two rankings have in common in their top k, as a share of k, mean over rows ("Inter.", section 4.2).

    Args:
        one: (Q, N) scores of N candidates for each of Q rows.
        other: (Q, N), the same rows and candidates by another score.
        k: how many candidates are looked at.

    Returns:
        A number in [0, 1]. A candidate is in the top k if at most k, with itself, score as high: of those tied at the
        end none is, and a constant row has nothing in its top k < N.

    Raises:
        ValueError: shapes differ, are not (Q, N), a score is NaN, or k is not within 1 .. N.
    """
    one, other = _two_scores(one, other, fewest=1)
    if not 1 <= k <= one.shape[1]:
        raise ValueError(f"k={k} must be at least 1 and at most the {one.shape[1]} candidates.")
    return float((_in_top(one, k) & _in_top(other, k)).sum(axis=1).mean() / k)


def bijective_accuracy(queries: ArrayLike, targets: ArrayLike, excluded: ArrayLike | None = None) -> float:
    """Share of queries whose nearest target's nearest query is the query itself, by cosine (section 4.2).

    Args:
        queries: (N, D), not zero.
        targets: (N, D), not zero; pair i is query i and target i.
        excluded: (N, N) booleans, query i and target j that must not meet. Where an item is query in one pair and
            target in another it is its own nearest, and a hit that tells nothing: exclude it from itself.

    Returns:
        A number in [0, 1]. Another query that is as near is a miss; of targets that are equally near the first is
        taken.

    Raises:
        ValueError: shapes differ, a vector is zero or not finite, or a pair is excluded.
    """
    one, other = _unit(queries, "queries"), _unit(targets, "targets")
    if one.shape != other.shape:
        raise ValueError(f"queries {one.shape} and targets {other.shape} must have one shape: row i of both is a pair.")
    cosine = one @ other.T  # (N, N)
    if excluded is not None:
        cosine[_excluded(excluded, len(one))] = -np.inf
    rows = np.arange(len(one))
    nearest = cosine.argmax(axis=1)
    own = cosine[rows, nearest]
    back = cosine[:, nearest].T  # (N, N), row i: all queries beside the nearest target of query i
    back[rows, rows] = -np.inf
    return float((own > back.max(axis=1) + SAME_COSINE).mean())


class GroupedAUC(NamedTuple):
    """What `grouped_auc` finds.

    Attributes:
        value: GAUC.
        share: of the events that count, those in groups of both labels.
    """

    value: float
    share: float


def grouped_auc(scores: ArrayLike, labels: ArrayLike, groups: ArrayLike) -> GroupedAUC:
    """GAUC: AUC within each group, such as a user, weighted by its number of events.

    Source: Deep Interest Network (arXiv 1706.06978, "Metrics"). The paper's section 4.2 has AUC over all pairs, in
    which a score earns something for telling eager users from others; that is no ranking for any of them.

    Args:
        scores: (N,) of events.
        labels: (N,) booleans, or 0 and 1.
        groups: (N,) group of each event, of whatever can be sorted. One with a single label has no AUC and is left out.

    Returns:
        The value in [0, 1], a tie being half, and the share of the events that count.

    Raises:
        ValueError: shapes differ, a score is NaN, a label is neither 0 nor 1, or no group has both.
    """
    scores, labels, groups = np.asarray(scores, dtype=np.float64), np.asarray(labels), np.asarray(groups)
    if not scores.shape == labels.shape == groups.shape or scores.ndim != 1:
        raise ValueError(
            f"scores {scores.shape}, labels {labels.shape}, groups {groups.shape}: (N,) of each is needed."
        )
    if np.isnan(scores).any() or not np.isin(labels, (0, 1)).all():
        raise ValueError("A score is NaN or a label is neither 0 nor 1; leave such events out.")
    _, group = np.unique(groups, return_inverse=True)
    order = np.argsort(group, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(group[order])) + 1)
    parts = [part for part in parts if len(np.unique(labels[part])) == 2]
    if not parts:
        raise ValueError(f"None of {len(np.unique(group))} groups has both labels; GAUC needs one that has.")
    sizes = [len(part) for part in parts]
    values = [roc_auc_score(labels[part], scores[part]) for part in parts]
    return GroupedAUC(float(np.average(values, weights=sizes)), sum(sizes) / len(scores))


def _two_scores(one: ArrayLike, other: ArrayLike, fewest: int) -> tuple[np.ndarray, np.ndarray]:
    """Two (Q, N) matrices of the same rows and candidates."""
    one, other = np.asarray(one), np.asarray(other)
    if one.shape != other.shape or one.ndim != 2 or not len(one) or one.shape[1] < fewest:
        raise ValueError(
            f"Scores of shapes {one.shape} and {other.shape}: (Q, N) of both is needed, N from {fewest} on."
        )
    if np.isnan(one).any() or np.isnan(other).any():
        raise ValueError("A score is NaN, which has no place in a ranking; give -inf to what cannot be found.")
    return one, other


def _in_top(scores: np.ndarray, k: int) -> np.ndarray:
    """(Q, N) bool: at most k candidates, with itself, score as high."""
    num_candidates = scores.shape[1]
    if k == num_candidates:
        return np.ones_like(scores, dtype=bool)
    place = num_candidates - k - 1  # of the best that is not in the top k, from the lowest
    return scores > np.partition(scores, place, axis=1)[:, place : place + 1]


def _unit(vectors: ArrayLike, name: str) -> np.ndarray:
    """(N, D) float64, of length 1."""
    vectors = np.asarray(vectors, dtype=np.float64)
    if vectors.ndim != 2 or not len(vectors) or not np.isfinite(vectors).all():
        raise ValueError(f"{name} of shape {vectors.shape}: (N, D), all finite, is needed, a row at least.")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not lengths.all():
        raise ValueError(f"{int((lengths == 0).sum())} of {len(vectors)} {name} are zero; leave those pairs out.")
    return vectors / lengths


def _excluded(excluded: ArrayLike, num_pairs: int) -> np.ndarray:
    """(N, N) bool, no pair among them."""
    excluded = np.asarray(excluded, dtype=bool)
    if excluded.shape != (num_pairs, num_pairs) or excluded.diagonal().any():
        raise ValueError(
            f"excluded of shape {excluded.shape}: ({num_pairs}, {num_pairs}) is needed, False on the diagonal, where "
            "the pairs are."
        )
    return excluded
