"""From item to item: what an embedding finds near an item, and how alike it sees what the same users choose.

Room: evaluation. Source: SAIL-Embedding, sections 4.2 and 4.3. Unusual: a row of zeros is an item without a vector: it
finds nothing and is not found.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse import csr_matrix
from sklearn.cluster import KMeans

from ..training.recommendation.behaviour import Interactions, Items
from ..training.recommendation.evidence import Consumers
from .metrics import bijective_accuracy, normalized_mutual_information, recall_at
from .similarity import embedding_agreement

BETWEEN_NAMES = re.compile(r",(?!\s*(?:jr|sr)\b)", re.IGNORECASE)  # "Ed Begley, Jr., Cary Elwes" are two
SHUFFLES = 10  # of the targets, for the NMI that is due to chance


# --- vectors --------------------------------------------------------------------------------------------------------


def unit_vectors(vectors: np.ndarray) -> np.ndarray:
    """(N, D) float32 of length 1; zero rows, which are items without a vector, stay.

    Raises:
        ValueError: of another shape, or not finite.
    """
    vectors = np.asarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise ValueError(f"Embeddings of shape (I, D), all finite, are needed; got {vectors.shape}.")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)


def has_vector(unit: np.ndarray) -> np.ndarray:
    """(N,) bool: the row is not zero."""
    return np.asarray(unit.any(axis=1))


def cosine_matrix(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(N, M) float32; -inf where either is zero."""
    one, other = unit_vectors(one), unit_vectors(other)
    cosines = one @ other.T
    cosines[~has_vector(one)] = -np.inf
    cosines[:, ~has_vector(other)] = -np.inf
    return cosines


# --- item to item ---------------------------------------------------------------------------------------------------


def content_pairs_relevant(items: Items) -> np.ndarray:
    """Relations of content that neither behaviour nor labels know: a common ``nickname``, or two of ``ocr``.

    Of films: a director, or two of the cast. Both are fields that an embedding reads, so this asks whether it still
    tells what it read (the paper's content understanding) after it was aligned with behaviour.

    Args:
        items: names in a field are lists, or text with commas between; case does not matter.

    Returns:
        (I, I) bool, symmetric, False on the diagonal.
    """
    relevant = (_common_names(items, "nickname") >= 1) | (_common_names(items, "ocr") >= 2)
    np.fill_diagonal(relevant, False)
    return relevant


def _common_names(items: Items, field: str) -> np.ndarray:
    """(I, I) how many names two items have in common."""
    place_of: dict[str, int] = {}
    rows, columns = [], []
    for row, record in enumerate(items.records):
        value = record.get(field) or ()
        texts = [value] if isinstance(value, str) else value
        names = {name.strip().casefold() for text in texts for name in BETWEEN_NAMES.split(text)} - {""}
        rows += [row] * len(names)
        columns += [place_of.setdefault(name, len(place_of)) for name in names]
    there = csr_matrix((np.ones(len(rows), dtype=np.int64), (rows, columns)), (len(items), len(place_of) or 1))
    return (there @ there.T).toarray()


def cluster_relevant(clusters: np.ndarray) -> np.ndarray:
    """Items of the same cluster, the paper's ID-i2i: "clusters of ID embeddings" (section 4.1).

    Args:
        clusters: (I,) integers; a negative one is no cluster.

    Returns:
        (I, I) bool, symmetric, False on the diagonal.

    Raises:
        ValueError: of another shape.
    """
    clusters = np.asarray(clusters)
    if clusters.ndim != 1:
        raise ValueError(f"Clusters of shape (I,) are needed; got {clusters.shape}.")
    relevant = (clusters[:, None] == clusters) & (clusters >= 0)
    np.fill_diagonal(relevant, False)
    return relevant


def i2i_recall(embeddings: np.ndarray, relevant: np.ndarray, ks: Sequence[int] = (50, 100)) -> dict[int, float]:
    """Recall@k from item to item (section 4.2); the queries are the items that have anything relevant.

    Args:
        embeddings: (I, D); an item without a vector has a zero row: it finds nothing and is not found.
        relevant: (I, I) bool, such as `content_pairs_relevant`, False on the diagonal. The candidates are all items but
            the query.
        ks: how many candidates are looked at.

    Raises:
        ValueError: shapes differ, an item is relevant to itself, or none is to any.
    """
    cosines = cosine_matrix(embeddings, embeddings)
    relevant = np.asarray(relevant, dtype=bool)
    if relevant.shape != cosines.shape or relevant.diagonal().any() or not relevant.any():
        raise ValueError(
            f"relevant of shape {relevant.shape}: {cosines.shape} is needed, False on the diagonal and True somewhere."
        )
    np.fill_diagonal(cosines, -np.inf)
    queries = relevant.any(axis=1)
    scores, found = torch.from_numpy(cosines[queries]), torch.from_numpy(relevant[queries])
    return {k: recall_at(scores, found, k) for k in ks}


# --- alignment ------------------------------------------------------------------------------------------------------


def copair_targets(after: Interactions, *, minimum: int = 5, positives: int = 1) -> np.ndarray:
    """Collaborative pairs of held-out behaviour: each item and the other one that most shares its consumers.

    Args:
        after: events after the split, ``split_by_time(...).after``.
        minimum: consumers that both items of a pair have, at least.
        positives: positive behaviours for an item, after the split, that make a user its consumer.

    Returns:
        (P, 2) places: the item, rising, and the one with the highest Jaccard coefficient of consumers; of equal ones
        the first. An item that shares no consumer with another gives no pair.

    Raises:
        ValueError: minimum below 1, or no such pair.
    """
    if minimum < 1:
        raise ValueError(f"minimum={minimum} must be at least 1.")
    consumers = Consumers.from_interactions(after, math.inf, positives)
    sizes = np.diff(consumers.starts)
    items = np.flatnonzero(sizes >= minimum)
    hot = np.ones(len(consumers.users), dtype=np.int64)
    there = csr_matrix((hot, consumers.users, consumers.starts), (len(sizes), len(after.user_ids)))[items]
    shared = (there @ there.T).toarray()  # (E, E)
    similarity = shared / (sizes[items, None] + sizes[items] - shared)
    np.fill_diagonal(similarity, 0)
    if not similarity.any():
        raise ValueError(f"No two of {len(items)} items with {minimum} consumers or more share one; lower `minimum`.")
    paired = similarity.any(axis=1)
    return np.stack([items[paired], items[similarity[paired].argmax(axis=1)]], axis=1)


def alignment(
    embeddings: np.ndarray, pairs: np.ndarray, *, clusters: int = 32, k: int = 50, seed: int = 0
) -> dict[str, float]:
    """How alike an embedding sees the two items of collaborative pairs (section 4.2; CRE's table in section 4.3).

    The paper does not say which queries and targets its two groups are: we take pairs of items that the same users
    consume in held-out behaviour, `copair_targets`. The clusters are k-means of all items' unit vectors; the rankings
    are those of all items, by the query's and by the target's vector; an item in both groups does not meet itself.

    Args:
        embeddings: (I, D); a zero row is an item without a vector, which is neither clustered nor ranked.
        pairs: (P, 2) places of queries and their targets, all with a vector. Compare models on the same pairs only.
        clusters: of k-means.
        k: of the overlap of the rankings.
        seed: of k-means and of the shuffles.

    Returns:
        ``nmi``; ``nmi_by_chance``, that of shuffled targets: with few pairs for the clusters it is far above 0;
        ``kendall_tau``, ``top_k_overlap``, ``bijective_accuracy`` and ``pairs``, their number.

    Raises:
        ValueError: shapes, or a pair of an item with itself, or of one without a vector; more clusters, or a k, than
            items with a vector.
    """
    unit = unit_vectors(embeddings)
    there = has_vector(unit)
    queries, targets = _sides(pairs, there)
    if not 1 <= clusters <= there.sum():
        raise ValueError(
            f"clusters={clusters} must be at least 1 and at most the {int(there.sum())} items with a vector."
        )
    found = np.full(len(unit), -1)
    found[there] = KMeans(clusters, n_init=3, random_state=seed).fit_predict(unit[there])
    agreement = embedding_agreement(unit[queries], unit[targets], k, candidates=(unit[there], unit[there]))
    generator = np.random.default_rng(seed)
    shuffled = [found[generator.permutation(targets)] for _ in range(SHUFFLES)]
    return {
        "nmi": normalized_mutual_information(found[queries], found[targets]),
        "nmi_by_chance": float(np.mean([normalized_mutual_information(found[queries], some) for some in shuffled])),
        **agreement._asdict(),
        "bijective_accuracy": bijective_accuracy(unit[queries], unit[targets], queries[:, None] == targets),
        "pairs": len(queries),
    }


def _sides(pairs: np.ndarray, there: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Queries and targets, checked."""
    pairs = np.asarray(pairs)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs) or pairs.dtype.kind not in "iu":
        raise ValueError(
            f"Pairs of shape (P, 2), integers, at least one, are needed; got {pairs.shape}, {pairs.dtype}."
        )
    if pairs.min() < 0 or pairs.max() >= len(there):
        raise ValueError(f"Pairs name items {pairs.min()} to {pairs.max()}; the embeddings are of {len(there)}.")
    wrong = (pairs[:, 0] == pairs[:, 1]) | ~there[pairs].all(axis=1)
    if wrong.any():
        raise ValueError(
            f"{int(wrong.sum())} of {len(pairs)} pairs are of an item with itself or of one without a vector; leave "
            "them out, for all the models that are compared."
        )
    return pairs[:, 0], pairs[:, 1]
