"""Teachers: ID embeddings of items, learned from behaviour before the split by well-kept libraries.

Room: recommendation, after behaviour and tables. Unusual: users and items without a positive event before the split are
taken out before anything is drawn, so that not even the names of those who come later change a vector. The same seed
gives the same bits, for which BPR and item2vec learn on one thread.
"""

from __future__ import annotations

import importlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_array, csr_matrix, diags_array
from tqdm.auto import tqdm

from .behaviour import Interactions, check_before, check_whole
from .tables import IDTable

logger = logging.getLogger(__name__)

LONGEST_SENTENCE = 10_000  # what is beyond gensim drops without a word (MAX_SENTENCE_LEN)


@dataclass(frozen=True)
class TeacherSettings:
    """The settings of all teachers.

    The defaults were chosen on the first four fifths of MovieLens-100K, split by time once more: by how often the next
    film of a user is among the 25 nearest to the mean of the last ten, also for the less popular half of the films.

    Attributes:
        positives: positive behaviours that a user must have shown for an item; these pairs are what is learned from.
        dim: numbers in a vector; with features, those of ``graph`` are as long as the features.
        bpr_epochs: passes over the pairs.
        bpr_learning_rate, bpr_regularization: of its gradient descent.
        als_iterations: alternations.
        als_alpha: weight of a pair; a user and an item that are no pair weigh 1.
        als_regularization: of both sides. With less data take less: from ``als_alpha`` on, the vectors of a user and an
            item that have nobody but each other shrink to nothing.
        item2vec_epochs: passes over the users' sequences.
        item2vec_window: items at most on either side that are an item's context. For each item a number up to it is
            drawn, so nearer ones count more.
        item2vec_negatives: items drawn against each pair.
        item2vec_negative_power: an item is drawn in proportion to its frequency to this power; word2vec's own is 0.75.
        item2vec_subsampling: how many times an even share of the pairs an item must have to be passed over at times;
            0: none is.
        item2vec_learning_rate: the first; it falls to nearly 0.
        graph_layers: steps of propagation.
        graph_layer_zero: whether the features themselves are part of the mean over the layers.

    Raises:
        ValueError: a number that cannot be.
    """

    positives: int = 1
    dim: int = 64
    bpr_epochs: int = 300
    bpr_learning_rate: float = 0.05
    bpr_regularization: float = 0.05
    als_iterations: int = 15
    als_alpha: float = 10.0
    als_regularization: float = 20.0
    item2vec_epochs: int = 40
    item2vec_window: int = 10
    item2vec_negatives: int = 5
    item2vec_negative_power: float = 0.25
    item2vec_subsampling: float = 0.15
    item2vec_learning_rate: float = 0.025
    graph_layers: int = 2
    graph_layer_zero: bool = False

    def __post_init__(self) -> None:
        counts = ("positives", "bpr_epochs", "als_iterations", "item2vec_epochs", "item2vec_window")
        for name in ("dim", *counts, "item2vec_negatives", "graph_layers"):
            value, lowest = getattr(self, name), 2 if name == "dim" else 1
            if not isinstance(value, int) or value < lowest:
                raise ValueError(f"{name}={value!r} must be a whole number, at least {lowest}.")
        for name in ("bpr_learning_rate", "als_alpha", "item2vec_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0 and finite.")
        for name in ("bpr_regularization", "als_regularization", "item2vec_subsampling"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and finite.")
        if not math.isfinite(self.item2vec_negative_power):
            raise ValueError(f"item2vec_negative_power={self.item2vec_negative_power} must be finite.")


DEFAULTS = TeacherSettings()


# --- positives ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Positives:
    """P pairs of a user and an item, of U users and J items that all have one.

    Attributes:
        item_ids: (J,) names, in the order of ``Interactions.item_ids``.
        items: (J,) their places there.
        num_users: U.
        user, item: (P,) below U and J; a user's pairs stand together, in the order in which they became positive.
    """

    item_ids: tuple[str, ...]
    items: np.ndarray
    num_users: int
    user: np.ndarray
    item: np.ndarray

    @classmethod
    def from_interactions(cls, before: Interactions, split_time: float, positives: int = 1) -> Positives:
        """The pairs that are positive before a time, each at the first event at which it is.

        Args:
            before: events before the split, such as ``split_by_time(...).before``.
            split_time: unix seconds.
            positives: behaviours that a user must have shown for an item by then.

        Raises:
            ValueError: an event at the split time or later (it would leak), or without its user or item, or no pair.
        """
        check_before(before, split_time)
        check_whole(before)
        there = np.flatnonzero(before.behaviours_so_far() >= positives)
        if not len(there):
            raise ValueError(
                f"None of the {len(before)} events before the split has {positives} positive behaviours; there is "
                "nothing to learn from: lower positives, or split later."
            )
        pairs = before.user[there].astype(np.int64) * len(before.item_ids) + before.item[there]
        _, first = np.unique(pairs, return_index=True)
        there = there[np.sort(first)]
        users, user = np.unique(before.user[there], return_inverse=True)
        items, item = np.unique(before.item[there], return_inverse=True)
        return cls(tuple(before.item_ids[place] for place in items), items, len(users), user, item)

    def matrix(self) -> csr_matrix:
        """(U, J) float32: 1 where there is a pair."""
        ones = np.ones(len(self.user), dtype=np.float32)
        matrix = csr_matrix((ones, (self.user, self.item)), shape=(self.num_users, len(self.items)))
        matrix.sort_indices()  # implicit searches each row by halves
        return matrix

    def sequences(self) -> Iterator[np.ndarray]:
        """Each user's items, oldest first."""
        starts = np.flatnonzero(np.diff(self.user, prepend=-1, append=self.num_users))
        for start, end in zip(starts, starts[1:], strict=False):
            yield self.item[start:end]


# --- the four teachers ----------------------------------------------------------------------------------------------


def bpr(
    pairs: Positives, settings: TeacherSettings = DEFAULTS, *, features: np.ndarray | None = None, seed: int = 0
) -> IDTable:
    """Bayesian personalised ranking (Rendle et al., 2009), by implicit; on one thread, as several race.

    The last number of a vector is the item's bias: how much it is preferred whoever the user is. It stays, as on
    MovieLens-100K the nearest by cosine are better with it, for popular films and for others, and no less alike in
    genre: what hardly anybody consumed has a vector of little meaning, and is far from the rest by its bias.

    Args:
        pairs: what is learned from.
        settings: ``dim`` (of which one is the bias), ``bpr_*``.
        features: unused.
        seed: of the first vectors and of the draws.

    Raises:
        ImportError: implicit is missing.
    """
    model = _need("implicit.cpu.bpr", "implicit").BayesianPersonalizedRanking(
        factors=settings.dim - 1,
        learning_rate=settings.bpr_learning_rate,
        regularization=settings.bpr_regularization,
        iterations=settings.bpr_epochs,
        num_threads=1,
        random_state=seed,
    )
    model.fit(pairs.matrix(), show_progress=False)
    return IDTable.of("bpr", pairs.item_ids, model.item_factors)


def als(
    pairs: Positives, settings: TeacherSettings = DEFAULTS, *, features: np.ndarray | None = None, seed: int = 0
) -> IDTable:
    """Weighted matrix factorisation by alternating least squares (Hu, Koren and Volinsky, 2008), by implicit.

    Args:
        pairs: what is learned from.
        settings: ``dim``, ``als_*``.
        features: unused.
        seed: of the first vectors.

    Raises:
        ImportError: implicit is missing.
    """
    return IDTable.of("als", pairs.item_ids, als_model(pairs, settings, seed=seed).item_factors)


def item2vec(
    pairs: Positives, settings: TeacherSettings = DEFAULTS, *, features: np.ndarray | None = None, seed: int = 0
) -> IDTable:
    """Skip-gram with negative sampling over each user's items in time (Barkan and Koenigstein, 2016), by gensim.

    On one worker, as several race. Of an item whose users have no other nothing is learned: it has no row.

    Args:
        pairs: what is learned from.
        settings: ``dim``, ``item2vec_*``.
        features: unused.
        seed: of the first vectors and of the draws.

    Raises:
        ImportError: gensim is missing. ValueError: no user has two items.
    """
    sentences = [[str(item) for item in piece.tolist()] for piece in _sentences(pairs)]
    if not sentences:
        raise ValueError(
            f"None of the {pairs.num_users} users has two positive items, and item2vec learns from items side by side: "
            "lower positives, or leave item2vec out."
        )
    model = _need("gensim.models.word2vec", "gensim").Word2Vec(
        sentences,
        vector_size=settings.dim,
        alpha=settings.item2vec_learning_rate,
        window=settings.item2vec_window,
        min_count=1,
        sample=settings.item2vec_subsampling / len(pairs.items),
        seed=seed,
        workers=1,
        sg=1,
        negative=settings.item2vec_negatives,
        ns_exponent=settings.item2vec_negative_power,
        epochs=settings.item2vec_epochs,
    )
    items = sorted(int(word) for word in model.wv.index_to_key)
    return IDTable.of("item2vec", [pairs.item_ids[item] for item in items], model.wv[[str(item) for item in items]])


def _sentences(pairs: Positives) -> Iterator[np.ndarray]:
    """Users' sequences of two items or more, in pieces that gensim takes whole."""
    for sequence in pairs.sequences():
        for start in range(0, len(sequence), LONGEST_SENTENCE):
            piece = sequence[start : start + LONGEST_SENTENCE]
            if len(piece) > 1:
                yield piece


def graph(
    pairs: Positives, settings: TeacherSettings = DEFAULTS, *, features: np.ndarray | None = None, seed: int = 0
) -> IDTable:
    """Features propagated over the graph of users and items, without parameters (TextGCN, arXiv 2510.12461).

    A user begins as the mean of the features of their items. Without features those are drawn: vectors are then a
    random projection of who consumed what together.

    Args:
        pairs: what is learned from.
        settings: ``graph_*``; ``dim`` without features.
        features: (I, F) of all items of the interactions, such as embeddings of their text, or None.
        seed: of the features that are drawn.
    """
    matrix = pairs.matrix()
    if features is None:
        items = np.random.default_rng(seed).standard_normal((len(pairs.items), settings.dim), dtype=np.float32)
    else:
        items = np.asarray(features)[pairs.items].astype(np.float32)  # (J, F)
    users = (matrix @ items) / np.diff(matrix.indptr)[:, None].astype(np.float32)  # (U, F)
    vectors = propagate(matrix, users, items, settings.graph_layers, layer_zero=settings.graph_layer_zero)
    return IDTable.of("graph", pairs.item_ids, vectors)


def propagate(
    matrix: csr_matrix, users: np.ndarray, items: np.ndarray, num_layers: int, *, layer_zero: bool = True
) -> np.ndarray:
    """Mean over the layers of symmetric propagation (LightGCN, He et al., 2020, eqs. 3, 4 and 8).

    A layer is D^-1/2 A D^-1/2 times the one before, A the adjacency matrix of users and items, D their degrees.

    Args:
        matrix: (U, J), 1 where there is a pair; every user and every item has one.
        users: (U, F) float32, layer 0.
        items: (J, F) float32, layer 0.
        num_layers: at least 1.
        layer_zero: whether layer 0 is part of the mean.

    Returns:
        (J, F) float32, of the items.
    """
    matrix = csr_array(matrix)
    by_user, by_item = (diags_array(matrix.sum(axis) ** -0.5) for axis in (1, 0))
    weights = csr_array(by_user @ matrix @ by_item)  # (U, J)
    back = csr_array(weights.T)
    total = items.copy() if layer_zero else np.zeros_like(items)
    for _ in range(num_layers):
        users, items = weights @ items, back @ users
        total += items
    return total / np.float32(num_layers + layer_zero)


# A teacher takes pairs, settings, `features` and `seed`.
TEACHERS: dict[str, Callable[..., IDTable]] = {"bpr": bpr, "als": als, "item2vec": item2vec, "graph": graph}


def train_teachers(
    before: Interactions,
    names: Sequence[str] = tuple(TEACHERS),
    *,
    split_time: float,
    settings: TeacherSettings = DEFAULTS,
    features: np.ndarray | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, IDTable]:
    """Tables of the items that have a positive event before the split.

    Args:
        before: validated events before the split.
        names: names in `TEACHERS`.
        split_time: unix seconds.
        settings: of all teachers.
        features: (I, F) of ``before.item_ids``, in this order, for ``graph``; None: drawn.
        seed: the same one gives the same tables, bit by bit, on the same machine.
        progress: show a bar.

    Returns:
        The tables by name, in the order of ``names``.

    Raises:
        ValueError: an unknown name, features of another shape or not finite, a seed that cannot be, no positive event,
            or what would leak: an event at the split time or later. ImportError: a teacher's library is missing.
    """
    unknown = sorted(set(names) - set(TEACHERS))
    if unknown or not len(names):
        raise ValueError(f"There are no teachers {unknown or list(names)}; take some of {list(TEACHERS)}.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must lie between 0 and 2^32 - 1.")
    _check_features(features, len(before.item_ids))
    pairs = Positives.from_interactions(before, split_time, settings.positives)
    tables = {}
    for name in tqdm(names, "teachers", unit="teacher", disable=not progress):
        began = time.perf_counter()
        tables[name] = TEACHERS[name](pairs, settings, features=features, seed=seed)
        took, num_pairs = time.perf_counter() - began, len(pairs.user)
        logger.info("Teacher %r: %d items from %d pairs in %.1f s.", name, len(tables[name]), num_pairs, took)
    return tables


def _check_features(features: np.ndarray | None, num_items: int) -> None:
    if features is None:
        return
    features = np.asarray(features)
    if features.ndim != 2 or len(features) != num_items or not features.shape[1] or features.dtype.kind not in "fiu":
        raise ValueError(
            f"Features of {features.dtype} {features.shape} came; numbers of shape (I, F) are needed, I = {num_items}: "
            "one row for each of the interactions' item_ids, in this order."
        )
    bad = ~np.isfinite(features.astype(np.float32)).all(1)
    if bad.any():
        raise ValueError(
            f"Features of {int(bad.sum())} items are not finite, first row {int(np.argmax(bad))}: mend them."
        )


# --- ALS for users it has not seen ----------------------------------------------------------------------------------


def als_model(pairs: Positives, settings: TeacherSettings = DEFAULTS, *, seed: int = 0) -> Any:
    """implicit's AlternatingLeastSquares, fitted; it may use all threads, as each row is solved alone.

    Args:
        pairs: what is learned from.
        settings: ``dim``, ``als_*``.
        seed: of the first vectors.

    Raises:
        ImportError: implicit is missing.
    """
    library = _need("implicit.cpu.als", "implicit")
    with _one_blas_thread():  # implicit warns of more, and sums in another order would be other bits
        model = library.AlternatingLeastSquares(
            factors=settings.dim,
            regularization=settings.als_regularization,
            alpha=settings.als_alpha,
            iterations=settings.als_iterations,
            random_state=seed,
        )
        model.fit(pairs.matrix(), show_progress=False)
    return model


def als_fold_in(
    before: Interactions,
    histories: Sequence[np.ndarray],
    *,
    split_time: float,
    settings: TeacherSettings = DEFAULTS,
    seed: int = 0,
) -> np.ndarray:
    """ALS as a recommender: learned before the split, each history's user solved for then ("fold-in").

    Args:
        before: validated events before the split.
        histories: Q of them, each the places in ``before.item_ids`` of the items that a user is positive about, from
            before the target; an item that is there twice counts once, one that ALS does not know not at all.
        split_time: unix seconds.
        settings: ``positives``, ``dim``, ``als_*``.
        seed: of the first vectors.

    Returns:
        (Q, I) float32 scores. Of an item that ALS does not know 0, which is what it would learn of an item without
        positive events; a history of which it knows nothing scores 0 throughout. Items of a history are not left out.

    Raises:
        ValueError: a place that is none, no positive event, an event at the split time or later. ImportError: implicit
            is missing.
    """
    pairs = Positives.from_interactions(before, split_time, settings.positives)
    liked = _rows_of(histories, pairs, len(before.item_ids))
    model = als_model(pairs, settings, seed=seed)
    scores = np.zeros((len(histories), len(before.item_ids)), dtype=np.float32)
    with _one_blas_thread():
        scores[:, pairs.items] = model.recalculate_user(np.arange(len(histories)), liked) @ model.item_factors.T
    return scores


def _rows_of(histories: Sequence[np.ndarray], pairs: Positives, num_items: int) -> csr_matrix:
    """(Q, J) float32: 1 where a history holds one of the J items."""
    row = np.repeat(np.arange(len(histories)), np.array([len(history) for history in histories], dtype=np.int64))
    place = np.concatenate([np.empty(0, dtype=np.int64), *histories]).astype(np.int64)
    wrong = (place < 0) | (place >= num_items)
    if wrong.any():
        first = np.argmax(wrong)
        raise ValueError(f"History {row[first]} holds place {place[first]}; the interactions name {num_items} items.")
    column = np.full(num_items, -1)
    column[pairs.items] = np.arange(len(pairs.items))
    known = column[place] >= 0
    ones = np.ones(int(known.sum()), dtype=np.float32)
    rows = csr_matrix((ones, (row[known], column[place[known]])), shape=(len(histories), len(pairs.items)))
    rows.data[:] = 1  # twice is once
    return rows


# --- libraries ------------------------------------------------------------------------------------------------------


def _need(module: str, package: str) -> Any:
    """A module that only teachers need.

    Raises:
        ImportError: it is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"This teacher needs {package} ({error}); install it: `pip install 'sail-embedding[recommend]'`."
        ) from error


def _one_blas_thread() -> AbstractContextManager[Any]:
    """Inside, BLAS uses one thread."""
    return _need("threadpoolctl", "threadpoolctl").threadpool_limits(1, "blas")
