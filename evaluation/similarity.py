"""Retrieval, neighbours and agreement of embeddings by cosine, block by block (SAIL-Embedding, section 4.2).

Pure, and never N x N: a million vectors need the memory of a block. Unusual: cosines are of float64, whatever comes in,
and those that rounding may have told apart are a tie, so that a duplicate wins nothing by its place. A row of zeros is
an item without a vector: it finds nothing and is not found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .metrics import SAME_COSINE, kendall_tau, top_k_overlap

# Two float32 vectors of one direction have cosines with a third that differ by this at most, each rounded by 2^-23.
SAME_COSINE_FLOAT32 = 2.0**-22
DECIMALS = 9  # of the cosines where an order of all is needed; identical vectors then tie


# --- retrieval ------------------------------------------------------------------------------------------------------


def retrieval_scores(
    queries: ArrayLike,
    targets: ArrayLike,
    relevant: Sequence[ArrayLike],
    excluded: Sequence[ArrayLike] | None = None,
    ks: Sequence[int] = (1, 10, 25, 50, 100),
    *,
    chunk: int = 1024,
) -> dict[str, float]:
    """Recall, nDCG and MRR at k, by cosine, means over queries (section 4.2 has recall).

    Recall is that of `recall_at`: relevant retrieved in the top k / all relevant. nDCG has gains of 0 and 1 and the
    discount 1 / log2(1 + place) of sklearn's `ndcg_score`; MRR is 1 / place of the first relevant one, 0 beyond k.

    A tie counts against the relevant candidate, and relevant ones do not push each other out. Cosines tie within
    `SAME_COSINE` of two arrays of float64, within `SAME_COSINE_FLOAT32` otherwise.

    Args:
        queries: (Q, D), of any length.
        targets: (N, D), the candidates.
        relevant: for each query, the places of its relevant candidates, one or more; a repeated one counts once.
        excluded: for each query, the places of what is no candidate for it.
        ks: how many candidates are looked at.
        chunk: queries, and candidates, at a time. It takes about 40 * chunk * (chunk + D + max(ks)) bytes.

    Returns:
        ``recall_at_k``, ``ndcg_at_k`` and ``mrr_at_k`` for each k, in [0, 1].

    Raises:
        ValueError: shapes, values that are not finite, a query with nothing relevant, places that are not there or are
            both relevant and excluded, no k or one below 1, or chunk below 1.
    """
    queries, targets = _two_sides(queries, targets, chunk)
    if not len(ks) or min(ks) < 1:
        raise ValueError(f"ks={tuple(ks)}: at least one, all from 1 on, are needed.")
    shape = len(queries), len(targets)
    right = _pairs(relevant, shape, "relevant")
    out = _pairs([()] * len(queries) if excluded is None else excluded, shape, "excluded")
    if len(both := np.intersect1d(right, out, assume_unique=True)):
        raise ValueError(f"{len(both)} relevant candidates are excluded; take them from one of the two.")
    totals = np.bincount(right // shape[1], minlength=shape[0])
    if not totals.all():
        raise ValueError(f"{int((totals == 0).sum())} queries have no relevant candidate; leave them out.")
    places = np.concatenate(
        [_places(queries, targets, rows, right, out, max(ks), chunk) for rows in _slices(len(queries), chunk)]
    )
    return {name: value for k in ks for name, value in _at(places, totals, k).items()}


def _places(
    queries: np.ndarray, targets: np.ndarray, rows: slice, right: np.ndarray, out: np.ndarray, most: int, chunk: int
) -> np.ndarray:
    """(F,) places, from 0, of the relevant candidates of some queries, rising within each; `most` or more is not found.

    Only the `most` best of the others are kept: whoever is behind them all is in no top k.
    """
    one, tie = _unit(queries[rows]), _tie(queries, targets)
    best = np.full((len(one), most), -np.inf)
    found = [np.zeros((2, 0))]
    for columns in _slices(len(targets), chunk):
        cosine = _cosines(one, _unit(targets[columns]))
        inside = _inside(right, len(targets), rows, columns)
        found.append(np.stack([inside[0], cosine[inside]]))
        cosine[inside] = cosine[_inside(out, len(targets), rows, columns)] = -np.inf
        cosine = np.concatenate([best, cosine], axis=1)
        cosine.partition(-most, axis=1)
        best = cosine[:, -most:].copy()
    best.sort(axis=1)
    row, value = np.concatenate(found, axis=1)
    order = np.lexsort((-value, row))
    ends = np.searchsorted(row[order], np.arange(1, len(one)))
    parts = np.split(value[order] - tie, ends)  # of each query, falling
    ahead = [most - np.searchsorted(rivals, part) for rivals, part in zip(best, parts, strict=True)]  # >=: ties against
    return np.concatenate([count + np.arange(len(count)) for count in ahead])


def _at(places: np.ndarray, totals: np.ndarray, k: int) -> dict[str, float]:
    """Means over queries; ``places`` (F,) of all relevant candidates, ``totals`` (Q,) how many a query has."""
    query = np.repeat(np.arange(len(totals)), totals)
    found = places < k
    gains = found / np.log2(places + 2)
    ideal = np.cumsum(1 / np.log2(np.arange(min(k, int(totals.max()))) + 2))
    first = np.cumsum(totals) - totals
    values = {
        "recall": np.bincount(query, found) / totals,
        "ndcg": np.bincount(query, gains) / ideal[np.minimum(totals, k) - 1],
        "mrr": found[first] / (places[first] + 1),
    }
    return {f"{name}_at_{k}": float(value.mean()) for name, value in values.items()}


# --- neighbours -----------------------------------------------------------------------------------------------------


class Neighbours(NamedTuple):
    """What `top_k_neighbours` finds.

    Attributes:
        indices: (Q, k) int64 places of targets, the nearest first; -1 where there are no more with a vector.
        cosines: (Q, k) float64, rounded to `DECIMALS`; -inf where there are no more.
    """

    indices: np.ndarray
    cosines: np.ndarray


def top_k_neighbours(queries: ArrayLike, targets: ArrayLike, k: int, *, chunk: int = 1024) -> Neighbours:
    """The k nearest targets of each query by cosine.

    Args:
        queries: (Q, D), of any length.
        targets: (N, D), N >= k.
        k: how many.
        chunk: queries, and targets, at a time. It takes about 60 * chunk * (chunk + D + k) bytes.

    Returns:
        Places and cosines. Of targets that are equally near the first comes first, whatever the chunk.

    Raises:
        ValueError: shapes, values that are not finite, k not within 1 .. N, or chunk below 1.
    """
    queries, targets = _two_sides(queries, targets, chunk)
    if not 1 <= k <= len(targets):
        raise ValueError(f"k={k} must be at least 1 and at most the {len(targets)} targets.")
    found = [_nearest(_unit(queries[rows]), targets, k, chunk) for rows in _slices(len(queries), chunk)]
    return Neighbours(*(np.concatenate(side) for side in zip(*found, strict=True)))


def _nearest(one: np.ndarray, targets: np.ndarray, k: int, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """(C, k) places and cosines of the nearest targets of C unit queries."""
    indices, cosines = np.full((len(one), k), -1), np.full((len(one), k), -np.inf)
    for columns in _slices(len(targets), chunk):
        here = np.broadcast_to(np.arange(columns.start, columns.stop), (len(one), columns.stop - columns.start))
        indices = np.concatenate([indices, here], axis=1)  # columns in the order of places, so that the first stay
        cosines = np.concatenate([cosines, _cosines(one, _unit(targets[columns])).round(DECIMALS)], axis=1)
        kept = _first_best(cosines, k)
        indices, cosines = indices[kept].reshape(-1, k), cosines[kept].reshape(-1, k)
    order = np.argsort(-cosines, axis=1, kind="stable")
    return np.take_along_axis(indices, order, axis=1), np.take_along_axis(cosines, order, axis=1)


def _first_best(values: np.ndarray, k: int) -> np.ndarray:
    """(C, M) bool, k in each row: the best, and of those tied at the end the first."""
    least = np.partition(values, -k, axis=1)[:, -k, None]
    better, tied = values > least, values == least
    return better | (tied & (np.cumsum(tied, axis=1) <= k - better.sum(axis=1, keepdims=True)))


# --- agreement ------------------------------------------------------------------------------------------------------


class Agreement(NamedTuple):
    """What `embedding_agreement` finds: `kendall_tau` and `top_k_overlap` of two rankings."""

    kendall_tau: float
    top_k_overlap: float


def embedding_agreement(
    one: ArrayLike,
    other: ArrayLike,
    k: int,
    *,
    candidates: tuple[ArrayLike, ArrayLike] | None = None,
    chunk: int = 64,
) -> Agreement:
    """How alike two embeddings rank the same candidates: Kendall's tau and top-k overlap (section 4.2).

    Args:
        one: (Q, D), a vector for each of Q queries.
        other: (Q, E), another for each: of the same query by another model, or of its target (the paper's groups).
        k: of the overlap.
        candidates: (N, D) and (N, E), what ``one`` and what ``other`` rank. Without it every row ranks all the others.
        chunk: queries at a time. It takes about 60 * chunk * N bytes, and 8 * N * (D + E) for the vectors; the time is
            that of sorting Q times N cosines.

    Returns:
        Both as the functions of their names have them, ties included.

    Raises:
        ValueError: shapes, values that are not finite, k not within 1 .. candidates, or chunk below 1.
    """
    spaces = candidates if candidates is not None else (one, other)
    sides = [_two_sides(rows, space, chunk) for rows, space in zip((one, other), spaces, strict=True)]
    (one, one_space), (other, other_space) = [(rows, _unit(space)) for rows, space in sides]
    if len(one) != len(other) or len(one_space) != len(other_space):
        raise ValueError(
            f"{len(one)} and {len(other)} queries, {len(one_space)} and {len(other_space)} candidates: both embeddings "
            "must be of the same."
        )
    tau = overlap = 0.0
    for rows in _slices(len(one), chunk):
        scores = [_cosines(_unit(one[rows]), one_space), _cosines(_unit(other[rows]), other_space)]
        scores = [side.round(DECIMALS) if candidates else _without_own(side.round(DECIMALS), rows) for side in scores]
        tau += kendall_tau(*scores) * len(scores[0])
        overlap += top_k_overlap(*scores, k) * len(scores[0])
    return Agreement(tau / len(one), overlap / len(one))


def _without_own(cosine: np.ndarray, rows: slice) -> np.ndarray:
    """(C, N - 1) of (C, N): each row without the column of its own place."""
    kept = np.ones(cosine.shape, dtype=bool)
    kept[np.arange(len(cosine)), np.arange(rows.start, rows.stop)] = False
    return cosine[kept].reshape(len(cosine), -1)


# --- cosines in blocks ----------------------------------------------------------------------------------------------


def _two_sides(queries: ArrayLike, targets: ArrayLike, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """(Q, D) and (N, D), checked but for what is in them."""
    queries, targets = np.asarray(queries), np.asarray(targets)
    if queries.ndim != 2 or targets.ndim != 2 or queries.shape[1:] != targets.shape[1:] or not queries.size:
        raise ValueError(f"Vectors of shapes {queries.shape} and {targets.shape}: (Q, D) and (N, D) are needed.")
    if not len(targets) or chunk < 1:
        raise ValueError(f"{len(targets)} candidates and chunk={chunk}: one at least of both is needed.")
    return queries, targets


def _slices(total: int, chunk: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk, total)) for start in range(0, total, chunk))


def _tie(*vectors: np.ndarray) -> float:
    exact = all(side.dtype.kind in "iu" or side.dtype == np.float64 for side in vectors)
    return SAME_COSINE if exact else SAME_COSINE_FLOAT32


def _unit(vectors: np.ndarray) -> np.ndarray:
    """(N, D) float64 of length 1; zero rows stay."""
    vectors = np.asarray(vectors, dtype=np.float64)
    if not np.isfinite(vectors).all():
        raise ValueError("A vector is not finite; give an item that cannot be embedded a row of zeros.")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


def _cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(C, M) of C and M unit vectors; -inf where either is zero."""
    cosine = one @ other.T
    cosine[~one.any(axis=1)] = -np.inf
    cosine[:, ~other.any(axis=1)] = -np.inf
    return cosine


def _pairs(places: Sequence[ArrayLike], shape: tuple[int, int], name: str) -> np.ndarray:
    """(F,) query * N + candidate, rising, each once."""
    rows = [np.asarray(row).ravel() for row in places]
    if len(rows) != shape[0]:
        raise ValueError(f"{name} is of {len(rows)} queries; there are {shape[0]}.")
    if any(row.size and row.dtype.kind not in "iu" for row in rows):
        raise ValueError(f"{name} must be places of candidates, integers, for each query; no booleans, no names.")
    columns = np.concatenate([row.astype(np.int64) for row in rows])
    if len(columns) and not 0 <= columns.min() <= columns.max() < shape[1]:
        raise ValueError(f"{name} names candidates {columns.min()} to {columns.max()}; there are {shape[1]}.")
    pairs = np.repeat(np.arange(shape[0]), [len(row) for row in rows]) * shape[1] + columns
    pairs.sort()
    return pairs[np.diff(pairs, prepend=-1) > 0]  # np.unique hashes, which takes ten times as long


def _inside(pairs: np.ndarray, num_targets: int, rows: slice, columns: slice) -> tuple[np.ndarray, np.ndarray]:
    """Row and column, within a block, of the pairs that are in it."""
    start, stop = np.searchsorted(pairs, [rows.start * num_targets, rows.stop * num_targets])
    row, column = np.divmod(pairs[start:stop], num_targets)
    kept = (column >= columns.start) & (column < columns.stop)
    return row[kept] - rows.start, column[kept] - columns.start
