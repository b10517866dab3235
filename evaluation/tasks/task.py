"""What an evaluation task is: items, what is relevant to what, and how a model that embeds items is scored on it.

Room: Model -> Embeddings -> **Evaluation**. Unusual: a task knows nothing of mteb or of a model. `score` asks for
vectors through one callable, so `mteb.evaluate`, peers on cached features and items with modalities removed all go one
way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..metrics import average_precision, roc_auc, separability
from ..similarity import retrieval_scores

Item = dict[str, Any]
# N items and a side ("query" or "target") to (N, D) vectors of any length; a zero row is an item without a vector.
Encode = Callable[[Sequence[Item], str], np.ndarray]

FAMILIES = ("i2i", "q2i", "cls")
KS = (1, 10, 25, 50, 100)
# Of what `score` gives for the same vectors: raise it when that changes, and what was kept is measured anew.
SCORING = 2


@dataclass(frozen=True)
class Retrieval:
    """Which of the corpus answers each query.

    Attributes:
        queries, corpus: items by id. A query may be ``{"sequence": [item, ...]}``, oldest first (section 4.3).
        relevant: for each query, one or more ids of the corpus.
        excluded: for some queries, ids of the corpus that are no candidates: the item itself, what was consumed before.
    """

    queries: Mapping[str, Item]
    corpus: Mapping[str, Item]
    relevant: Mapping[str, frozenset[str]]
    excluded: Mapping[str, frozenset[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Pairs:
    """Pairs of items, some of which belong together: ``labels`` are 1 and 0."""

    queries: Sequence[Item]
    targets: Sequence[Item]
    labels: Sequence[int]


@dataclass(frozen=True)
class Task:
    """An evaluation task.

    Attributes:
        name: unique, as mteb names tasks.
        family: "i2i", "q2i" or "cls": whose instructions go before both sides (section 3.2.2).
        group: the heading of the paper's tables under which it stands, such as "content understanding".
        description: what is asked, of what, and what of it a model may have been trained on.
        source: where the data come from, for a reader.
        licence: of the data, as an SPDX id or in words.
        date: first and last day of the data, ISO, for mteb.
        languages: by subset, ISO 639-3 and script as mteb writes them: ``{"default": ["eng-Latn"]}``.
        query_modalities, target_modalities: of "text", "image", "audio", "video".
        main_score: a key of what `score` returns.
        load: makes the data, by subset; downloads what it needs.
    """

    name: str
    family: str
    group: str
    description: str
    source: str
    licence: str
    date: tuple[str, str]
    languages: Mapping[str, Sequence[str]]
    query_modalities: Sequence[str]
    target_modalities: Sequence[str]
    main_score: str
    load: Callable[[], Mapping[str, Retrieval | Pairs]]

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"{self.name}: family={self.family!r} must be one of {FAMILIES}.")


def score(data: Retrieval | Pairs, encode: Encode, *, seed: int = 0) -> dict[str, Any]:
    """Scores of a model on a task's data.

    Args:
        data: what `Task.load` made, of one subset.
        encode: the model.
        seed: of the random negatives of the separability.

    Returns:
        Of `Retrieval`: ``recall_at_k`` (section 4.2), ``ndcg_at_k``, ``mrr_at_k`` for k in `KS`, and ``separability_*``
        (positives against random negatives). Of `Pairs`: ``auc``, ``average_precision`` and ``separability_*``. A tie
        counts against the model, in all but AUC, where it is half. All are floats but
        ``separability_histogram``: ``{"edges": (51,), "positive": (50,), "negative": (50,)}``, lists of the cosines'
        bins and of counts. ``left_out`` counts the rows of zeros of both sides: they rank last and are no part of
        ``separability_*``, which are missing where no positive or no negative is left.

    Raises:
        ValueError: a query without anything relevant, or vectors of another shape.
    """
    return _score_pairs(data, encode) if isinstance(data, Pairs) else _score_retrieval(data, encode, seed)


def _score_retrieval(data: Retrieval, encode: Encode, seed: int) -> dict[str, float]:
    place = {name: index for index, name in enumerate(data.corpus)}
    relevant = [np.array([place[one] for one in sorted(data.relevant[name])], dtype=np.int64) for name in data.queries]
    excluded = [
        np.array([place[one] for one in sorted(data.excluded.get(name, ()))], dtype=np.int64) for name in data.queries
    ]
    queries = _checked(encode(list(data.queries.values()), "query"), len(data.queries))
    targets = _checked(encode(list(data.corpus.values()), "target"), len(data.corpus))
    found = retrieval_scores(queries, targets, relevant, excluded, ks=KS)
    positive, negative = _drawn_cosines(unit(queries), unit(targets), relevant, excluded, seed)
    return found | _apart(positive, negative) | {"left_out": _zeros(queries, targets)}


def _score_pairs(data: Pairs, encode: Encode) -> dict[str, float]:
    queries = unit(_checked(encode(data.queries, "query"), len(data.queries)))
    targets = unit(_checked(encode(data.targets, "target"), len(data.targets)))
    cosine, labels = (queries * targets).sum(axis=1), np.asarray(data.labels, dtype=bool)
    there = queries.any(axis=1) & targets.any(axis=1)
    ranks = np.where(there, cosine, -2.0)  # what cannot be embedded is told from nothing: behind every cosine
    ranked = {"auc": roc_auc(ranks, labels), "average_precision": average_precision(ranks, labels)}
    apart = _apart(cosine[there & labels], cosine[there & ~labels])
    return ranked | apart | {"left_out": _zeros(queries, targets)}


def _zeros(*sides: np.ndarray) -> float:
    """How many rows are zero: a float, as every score is."""
    return float(sum(int((~side.any(axis=1)).sum()) for side in sides))


def _apart(positive: np.ndarray, negative: np.ndarray) -> dict[str, Any]:
    if not (len(positive) and len(negative)):
        return {}
    found = separability(positive, negative)
    names = ("positive_mean", "negative_mean", "overlap", "auc")
    histogram = {
        "edges": [round(edge, 6) for edge in found.edges.tolist()],
        "positive": found.positive_counts.tolist(),
        "negative": found.negative_counts.tolist(),
    }
    return {f"separability_{name}": float(getattr(found, name)) for name in names} | {
        "separability_histogram": histogram
    }


def _drawn_cosines(
    queries: np.ndarray,
    targets: np.ndarray,
    relevant: Sequence[np.ndarray],
    excluded: Sequence[np.ndarray],
    seed: int,
    most: int = 10,
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of each query with its positives, and with as many random candidates that are neither (section 4.2).

    A pair of which a side is zero has no cosine. It is drawn all the same, so that all models meet the same draws.
    """
    generator = np.random.default_rng(seed)
    there = targets.any(axis=1)
    positive, negative = [np.zeros(0)], [np.zeros(0)]
    for row, (right, out) in enumerate(zip(relevant, excluded, strict=True)):
        right = right if len(right) <= most else generator.choice(right, most, replace=False)
        drawn = _drawn_outside(np.union1d(relevant[row], out), len(targets), len(right), generator)
        if not queries[row].any():
            continue
        # Row by row: the rounding of a matrix product depends on a row's place, and would tell equal vectors apart.
        positive.append((targets[right[there[right]]] * queries[row]).sum(axis=1))
        negative.append((targets[drawn[there[drawn]]] * queries[row]).sum(axis=1))
    return np.concatenate(positive), np.concatenate(negative)


def _drawn_outside(taken: np.ndarray, total: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """(count,) of the places below ``total`` that are not ``taken`` (rising), with replacement; none where all are."""
    free = total - len(taken)
    drawn = generator.integers(free, size=count) if free else np.zeros(0, dtype=np.int64)  # the how manieth free place
    return drawn + np.searchsorted(taken - np.arange(len(taken)), drawn, side="right")


def unit(vectors: np.ndarray) -> np.ndarray:
    """(N, D) float32 of length 1; zero rows, which are items without a vector, stay."""
    lengths = np.linalg.norm(vectors.astype(np.float32), axis=1, keepdims=True)
    return vectors.astype(np.float32) / np.where(lengths > 0, lengths, 1)


def with_sequences(encode: Encode) -> Encode:
    """`encode` for queries that are sequences too: the mean of their items' normalised vectors (section 3.3.5).

    Items of sequences are embedded as targets, each once; a query that is none as what it is, beside them.
    """

    def encode_all(items: Sequence[Item], side: str) -> np.ndarray:
        if not any("sequence" in item for item in items):
            return encode(items, side)
        plain = {row: item for row, item in enumerate(items) if "sequence" not in item}
        members = {_identity(member): member for item in items for member in item.get("sequence", ())}
        if not plain and not members:
            raise ValueError(f"All of {len(items)} sequences are empty; leave such queries out.")
        own, of_member = _units(encode, plain, side), _units(encode, members, "target")
        vectors = np.zeros((len(items), len(next(iter((own or of_member).values())))), dtype=np.float32)
        for row, item in enumerate(items):
            known = [of_member[_identity(member)] for member in item["sequence"]] if row not in own else [own[row]]
            there = [vector for vector in known if vector.any()]
            vectors[row] = np.mean(there, axis=0) if there else 0.0
        return vectors

    return encode_all


def _units(encode: Encode, items: Mapping[Any, Item], side: str) -> dict[Any, np.ndarray]:
    """Unit vectors of items by their keys; of none, none."""
    return dict(zip(items, unit(encode([*items.values()], side)), strict=True)) if items else {}


def _identity(value: Any) -> Any:
    """What two equal items have in common: text and numbers by value, pictures and sounds by object.

    Their text would not do: numpy writes only the ends of a long array, and sounds often begin and end alike.
    """
    if isinstance(value, Mapping):
        return tuple((name, _identity(value[name])) for name in sorted(value))
    if isinstance(value, list | tuple):
        return tuple(_identity(one) for one in value)
    return value if isinstance(value, str | int | float | None) else id(value)


def _checked(vectors: Any, count: int) -> np.ndarray:
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or len(vectors) != count or not np.isfinite(vectors).all():
        raise ValueError(
            f"The model gave vectors of shape {vectors.shape} for {count} items; ({count}, D), all finite, is needed: "
            "give an item that cannot be embedded a row of zeros."
        )
    return vectors
