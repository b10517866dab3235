"""Metrics of retrieval, alignment and ranking: pure functions of scores and clusters (SAIL-Embedding, section 4.2).

Unusual: wherever there is a choice, a tie counts against the model, so that a collapsed embedding earns nothing; in AUC
it is half. Recall is of tensors; the others take arrays, or whatever numpy makes one of. What takes embeddings and goes
block by block is in `similarity.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.sparse import csr_matrix
from scipy.stats import kendalltau, rankdata
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

SAME_COSINE = 1e-9  # cosines that are nearer than this are a tie: far above the rounding of float64, in which they are
OUTSIDE = 1e-2  # by how much the rounding of vectors, bfloat16 at worst, may take a cosine beyond 1


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


def bijective_accuracy(
    queries: ArrayLike, targets: ArrayLike, excluded: ArrayLike | Sequence[ArrayLike] | None = None, *, chunk: int = 128
) -> float:
    """Share of queries whose nearest target's nearest query is the query itself, by cosine (section 4.2).

    Args:
        queries: (N, D), not zero.
        targets: (N, D), not zero; pair i is query i and target i.
        excluded: query i and target j that must not meet: (N, N) booleans, or a list or tuple with, for each query, the
            places of its targets. Where an item is query in one pair and target in another it is its own nearest, and
            a hit that tells nothing: exclude it from itself.
        chunk: rows of cosines at a time. It takes about 10 * chunk * N bytes, and 16 * N * D for the vectors.

    Returns:
        A number in [0, 1]. Another query that is as near is a miss; of targets that are equally near the first is
        taken. "As near" is within `SAME_COSINE`.

    Raises:
        ValueError: shapes differ, a vector is zero or not finite, a pair is excluded, or chunk is below 1.
    """
    one, other = _unit(queries, "queries"), _unit(targets, "targets")
    if one.shape != other.shape:
        raise ValueError(f"queries {one.shape} and targets {other.shape} must have one shape: row i of both is a pair.")
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 row of cosines.")
    apart = _excluded(excluded, len(one))
    back = apart.T.tocsr()  # by target
    hits = sum(_bijective(one, other, apart, back, start, chunk) for start in range(0, len(one), chunk))
    return hits / len(one)


def _bijective(one: np.ndarray, other: np.ndarray, apart: csr_matrix, back: csr_matrix, start: int, chunk: int) -> int:
    """How many of ``chunk`` queries from ``start`` on are the nearest query of their nearest target."""
    cosine = one[start : start + chunk] @ other.T  # (C, N)
    cosine[apart[start : start + chunk].nonzero()] = -np.inf
    best = cosine.max(axis=1, keepdims=True)
    nearest = (cosine >= best - SAME_COSINE).argmax(axis=1)
    rows = np.arange(len(nearest))
    own = cosine[rows, nearest]
    np.matmul(other[nearest], one.T, out=cosine)  # (C, N), row i: all queries beside the nearest target of query i
    cosine[back[nearest].nonzero()] = -np.inf
    cosine[rows, start + rows] = -np.inf
    return int((own > cosine.max(axis=1) + SAME_COSINE).sum())


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
    scores, labels = _events(scores, labels)
    groups = np.asarray(groups)
    if groups.shape != scores.shape:
        raise ValueError(f"scores {scores.shape} and groups {groups.shape}: (N,) of each is needed.")
    _, group = np.unique(groups, return_inverse=True)
    order = np.argsort(group, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(group[order])) + 1)
    parts = [part for part in parts if len(np.unique(labels[part])) == 2]
    if not parts:
        raise ValueError(f"None of {len(np.unique(group))} groups has both labels; GAUC needs one that has.")
    sizes = [len(part) for part in parts]
    values = [roc_auc(scores[part], labels[part]) for part in parts]
    return GroupedAUC(float(np.average(values, weights=sizes)), sum(sizes) / len(scores))


def roc_auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs in which the positive scores higher.

    The Mann-Whitney statistic from ranks, O(N log N); sklearn's `roc_auc_score` up to its rounding.

    Args:
        scores: (N,) of events; infinite ones are in order.
        labels: (N,) booleans, or 0 and 1; of each at least one.

    Returns:
        A number in [0, 1], a tie being half: a constant score has 0.5.

    Raises:
        ValueError: shapes differ, a score is NaN, a label is neither 0 nor 1, or there is one label only.
    """
    scores, labels = _events(scores, labels)
    num_positive, num_negative = int(labels.sum()), int((~labels).sum())
    if not num_positive or not num_negative:
        raise ValueError(f"{num_positive} positive and {num_negative} negative events: AUC needs one of each at least.")
    ranks = rankdata(scores)  # from 1; halves, so that sums are exact
    beaten = ranks[labels].sum() - num_positive * (num_positive + 1) / 2
    return float(beaten / num_positive / num_negative)


def average_precision(scores: ArrayLike, labels: ArrayLike) -> float:
    """Mean over positives of the precision of the list that ends with them.

    Args:
        scores: (N,) of events.
        labels: (N,) booleans, or 0 and 1; at least one is positive.

    Returns:
        A number in (0, 1]. A tie counts against: negatives come before the positives that score the same, while
        sklearn's `average_precision_score`, the same without ties, gives all of a tie the precision at its end. A
        constant score has the least there is, mean of i / (i + negatives) over the i-th positives.

    Raises:
        ValueError: shapes differ, a score is NaN, a label is neither 0 nor 1, or nothing is positive.
    """
    scores, labels = _events(scores, labels)
    if not labels.any():
        raise ValueError(f"None of {len(labels)} events is positive; average precision needs one at least.")
    positive, negative = np.sort(scores[labels])[::-1], np.sort(scores[~labels])
    before = len(negative) - np.searchsorted(negative, positive, side="left")  # >= counts ties against
    found = np.arange(1, len(positive) + 1)
    return float((found / (found + before)).mean())


class Separability(NamedTuple):
    """What `separability` finds.

    Attributes:
        positive_mean: of the cosines of positives.
        negative_mean: of those of negatives.
        overlap: sum over bins of the lesser share of the two histograms: 0 apart, 1 alike.
        auc: of positives against negatives.
        edges: (bins + 1,) of the bins, from -1 to 1.
        positive_counts: (bins,) how many positives; those of several runs may be added.
        negative_counts: (bins,) how many negatives.
    """

    positive_mean: float
    negative_mean: float
    overlap: float
    auc: float
    edges: np.ndarray
    positive_counts: np.ndarray
    negative_counts: np.ndarray


def separability(positive: ArrayLike, negative: ArrayLike, bins: int = 50) -> Separability:
    """How far the cosines of positives lie from those of random negatives (section 4.2, "positive-negative ...").

    Args:
        positive: (P,) cosines of pairs that belong together.
        negative: (M,) cosines of pairs that do not.
        bins: of equal width from -1 to 1, whatever the cosines are: histograms of models lie on one axis.

    Returns:
        Means, overlap, AUC and histograms. The overlap depends on the bins: compare values of the same number only. A
        constant embedding has an overlap of 1 and an AUC of 0.5.

    Raises:
        ValueError: shapes, no positive or no negative, something that is no cosine, or bins below 1.
    """
    positive, negative = _cosines(positive, "positive"), _cosines(negative, "negative")
    if bins < 1:
        raise ValueError(f"bins={bins} must be at least 1.")
    edges = np.linspace(-1, 1, bins + 1)
    one, other = (np.histogram(side, edges)[0] for side in (positive, negative))
    scores = np.concatenate([positive, negative])
    auc = roc_auc(scores, np.arange(len(scores)) < len(positive))
    overlap = float(np.minimum(one / len(positive), other / len(negative)).sum())
    return Separability(float(positive.mean()), float(negative.mean()), overlap, auc, edges, one, other)


def _cosines(values: ArrayLike, name: str) -> np.ndarray:
    """(N,) float64 within -1 .. 1, to which rounding beyond them is taken back."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not (np.abs(values) <= 1 + OUTSIDE).all():  # NaN is not <= either
        raise ValueError(f"{name} of shape {values.shape}: (N,) cosines, at least one, within -1 .. 1, are needed.")
    return np.clip(values, -1, 1)


def _events(scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """(N,) float64 and (N,) bool."""
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if scores.shape != labels.shape or scores.ndim != 1:
        raise ValueError(f"scores {scores.shape} and labels {labels.shape}: (N,) of each is needed.")
    if np.isnan(scores).any() or not np.isin(labels, (0, 1)).all():
        raise ValueError("A score is NaN or a label is neither 0 nor 1; leave such events out.")
    return scores, labels.astype(bool)


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


def _excluded(excluded: ArrayLike | Sequence[ArrayLike] | None, num_pairs: int) -> csr_matrix:
    """(N, N) sparse bool, no pair among them."""
    if excluded is None:
        return csr_matrix((num_pairs, num_pairs), dtype=bool)
    found = _from_places(excluded, num_pairs) if _are_places(excluded) else np.asarray(excluded, dtype=bool)
    if found.shape != (num_pairs, num_pairs) or found.diagonal().any():
        raise ValueError(
            f"excluded of shape {found.shape}: ({num_pairs}, {num_pairs}), or places for each of {num_pairs} queries, "
            "is needed, False on the diagonal, where the pairs are."
        )
    return csr_matrix(found)


def _are_places(excluded: ArrayLike | Sequence[ArrayLike]) -> bool:
    """A list or tuple of places for each query, and no matrix of booleans that is written as lists."""
    if not isinstance(excluded, list | tuple):
        return False
    rows = [np.asarray(row) for row in excluded]
    return all(not row.size or row.dtype.kind in "iu" for row in rows)


def _from_places(excluded: Sequence[ArrayLike], num_pairs: int) -> csr_matrix:
    """(queries, N) sparse bool."""
    rows = [np.asarray(row, dtype=np.int64).ravel() for row in excluded]
    columns = np.concatenate([np.zeros(0, dtype=np.int64), *rows])
    if len(columns) and not 0 <= columns.min() <= columns.max() < num_pairs:
        raise ValueError(f"excluded names targets {columns.min()} to {columns.max()}; there are {num_pairs}.")
    starts = np.cumsum([0, *map(len, rows)])
    return csr_matrix((np.ones(len(columns), dtype=bool), columns, starts), (len(rows), num_pairs))
