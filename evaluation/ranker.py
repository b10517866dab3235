"""What an embedding or its semantic IDs give a fixed ranker: LightGBM with and without them (sections 3.3.5, 4.4.6).

    rows = ranking_rows(interactions, split.time, question="chosen", items=items)
    base = base_features(rows, interactions, items)
    compare(rows, base, match_features(rows, embeddings), sid_features(rows, codes))

Room: evaluation, after training.recommendation. Unusual: the time is cut twice. What comes before the first cut is what
embeddings and teachers may learn from; the ranker learns between the cuts and is tested after the second. A row's
features know only events strictly earlier than the row: those of the same second do not see each other.
"""

from __future__ import annotations

import importlib
import logging
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from sklearn.metrics import roc_auc_score

from ..training.recommendation.behaviour import Interactions, Items, check_whole, split_by_time
from .metrics import grouped_auc

logger = logging.getLogger(__name__)

QUESTIONS = ("liked", "chosen")
SECONDS_A_DAY = 86_400.0
SMOOTHING = 5.0  # events that a share is believed to rest on before there are any
ROWS_AT_ONCE = 1024
NUM_ROUNDS = 100
# Fixed: the ranker is a gauge, no contestant. Rows and columns are drawn for each tree, so that seeds differ. Leaves
# are few and categories smoothed: a random code must not cost much. Scores do not depend on the threads, and one is the
# fastest on data of this size, as several wait for each other at each split.
SETTINGS: dict[str, Any] = {
    "objective": "binary",
    "learning_rate": 0.05,
    "num_leaves": 15,
    "min_data_in_leaf": 50,
    "feature_fraction": 0.8,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "cat_smooth": 50.0,
    "cat_l2": 50.0,
    "deterministic": True,
    "force_col_wise": True,
    "num_threads": 1,
    "verbosity": -1,
}
# Which parts each row of the table is made of.
FEATURE_SETS: dict[str, tuple[str, ...]] = {
    "base": ("base",),
    "base+match": ("base", "match"),
    "base+sids": ("base", "sids"),
    "base+match+sids": ("base", "match", "sids"),
}


# --- rows -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rows:
    """R rows for a ranker, by time, then user.

    Attributes:
        user, item: (R,) places.
        time: (R,) unix seconds at which the user was, or could have been, shown the item.
        label: (R,) bool.
        train: (R,) bool: before the second cut; the others are the test.
        history: (R, H) places of the newest positive items of the user strictly before the time, the newest first, then
            -1. An item with several positive events is there as often.
        num_items: I, of the catalogue.
        positives: positive behaviours that make an event liked, for `base_features`, too.
        test_time: the second cut, unix seconds.
    """

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    label: np.ndarray
    train: np.ndarray
    history: np.ndarray
    num_items: int
    positives: int
    test_time: float

    def __len__(self) -> int:
        return len(self.user)


def ranking_rows(
    interactions: Interactions,
    t1: float,
    *,
    question: str = "liked",
    items: Items | None = None,
    positives: int = 2,
    negatives: int = 4,
    share: float = 0.5,
    history: int = 20,
    seed: int = 0,
) -> Rows:
    """Rows of one of two questions, both on real events from ``t1`` on.

    "liked": each event is a row; its label is whether the event itself shows enough positive behaviours. In logs with
    one event for each behaviour none shows two: ask for 1.
    "chosen": each positive event is a row with label 1, and beside it items that the user had no event of up to then
    are rows with label 0, drawn uniformly from what there was by then: released, or seen in an earlier event. The
    positive must be among these, too, or having no earlier event would give it away; those that are not are left out
    and logged.

    Args:
        interactions: validated, before and after the split.
        t1: up to where embeddings and teachers have learned, unix seconds.
        question: "liked" or "chosen".
        items: for "chosen", for when items were released; without them only what was seen is there.
        positives: positive behaviours that make an event liked.
        negatives: of each positive; fewer where there are not so many.
        share: of the events from ``t1`` on that come before the second cut.
        history: H, newest positive items for `match_features` and `sid_features`.
        seed: of the draws; those of an event do not depend on other users' draws.

    Raises:
        ValueError: another question, a number below 1, items of another number, or a part that would be empty.
    """
    _check_request(interactions, items, question, positives=positives, negatives=negatives, history=history)
    after = split_by_time(interactions, time=t1).after
    test_time = split_by_time(after, share=share).time
    if question == "liked":
        user, item, time, label = after.user, after.item, after.time, after.counts >= positives
    else:
        available = available_from(interactions, items)
        found = list(_choices(interactions, available, t1, negatives, seed))
        if not found:
            raise ValueError(f"None of {len(after)} events from {t1} on is positive and of an item there was by then.")
        user, item, time, label = (np.array(column) for column in zip(*found, strict=True))
    order = np.lexsort((user, time))  # stable
    user, item, time, label = user[order], item[order], time[order].astype(np.float64), label[order].astype(bool)
    known = newest_positives(interactions, user, time, history)
    return Rows(user, item, time, label, time < test_time, known, len(interactions.item_ids), positives, test_time)


def newest_positives(interactions: Interactions, user: np.ndarray, time: np.ndarray, num_items: int) -> np.ndarray:
    """What users had liked strictly before a time: (R, num_items) places, the newest first, then -1.

    Args:
        interactions: sorted by user and time, as they are.
        user: (R,) places.
        time: (R,) unix seconds.
        num_items: of each row, at most.
    """
    positive = interactions.take(interactions.counts > 0)
    starts = np.searchsorted(positive.user, np.arange(len(interactions.user_ids) + 1))
    found = np.full((len(user), num_items), -1, dtype=np.int64)
    for place in np.unique(user):
        part = slice(starts[place], starts[place + 1])
        rows = np.flatnonzero(user == place)
        ends = np.searchsorted(positive.time[part], time[rows], side="left")  # (r,) events strictly before
        back = ends[:, None] - 1 - np.arange(num_items)  # (r, num_items)
        there = back >= 0
        found[rows] = np.where(there, np.append(positive.item[part], -1)[np.where(there, back, -1)], -1)
    return found


def available_from(interactions: Interactions, items: Items | None = None) -> np.ndarray:
    """(I,) unix seconds from which on an item is there: its release, if known, or right after its first event.

    Infinity for an item that never has an event: it may be the twin of another (`validate`), and no negative of it.
    """
    first = np.full(len(interactions.item_ids), np.inf)
    np.minimum.at(first, interactions.item, interactions.time)
    seen = np.nextafter(first, np.inf)  # an event tells of its item only what comes after it
    return seen if items is None else np.where(np.isinf(first), np.inf, np.fmin(seen, items.released))


def _choices(
    interactions: Interactions, available: np.ndarray, t1: float, negatives: int, seed: int
) -> Iterator[tuple[int, int, float, bool]]:
    """(user, item, time, label) of each positive event from t1 on and of what is drawn beside it."""
    by_time = np.argsort(available, kind="stable")  # what is there at a time is a beginning of this
    place_of, rising = np.argsort(by_time), available[by_time]
    positive, left_out = interactions.counts > 0, 0
    for user, events in _together(interactions):
        if events[0] == 0 or interactions.user[events[0] - 1] != user:
            consumed: set[int] = set()
        time = float(interactions.time[events[0]])
        consumed.update(place_of[interactions.item[events]].tolist())
        if time < t1:
            continue
        there = int(np.searchsorted(rising, time, side="right"))
        for event in events[positive[events]]:
            item = int(interactions.item[event])
            if place_of[item] >= there:
                left_out += 1
                continue
            generator = random.Random(f"{seed}:{interactions.user_ids[user]}:{interactions.item_ids[item]}:{time}")
            drawn = _draw(there, {place for place in consumed if place < there}, negatives, generator)
            yield user, item, time, True
            yield from ((user, int(by_time[place]), time, False) for place in drawn)
    if left_out:
        logger.info("ranking rows: %d positive events are of items that were neither released nor seen.", left_out)


def _together(interactions: Interactions) -> Iterator[tuple[int, np.ndarray]]:
    """Each user's events of each time, in order: (user, places)."""
    changes = (np.diff(interactions.user) != 0) | (np.diff(interactions.time) != 0)
    for events in np.split(np.arange(len(interactions)), np.flatnonzero(changes) + 1):
        yield int(interactions.user[events[0]]), events


def _draw(size: int, taken: set[int], number: int, generator: random.Random) -> list[int]:
    """So many different places below ``size`` that are not taken; all of them where they are no more."""
    if size - len(taken) <= number:
        return [place for place in range(size) if place not in taken]
    drawn: list[int] = []
    while len(drawn) < number:
        place = generator.randrange(size)
        if place not in taken and place not in drawn:
            drawn.append(place)
    return drawn


def _check_request(interactions: Interactions, items: Items | None, question: str, **numbers: int) -> None:
    check_whole(interactions)
    if question not in QUESTIONS:
        raise ValueError(f"question={question!r} is not one of {', '.join(QUESTIONS)}.")
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}={number} must be at least 1.")
    if items is not None:
        _check_items(len(items), len(interactions.item_ids), "items")


def _check_items(given: int, needed: int, what: str) -> None:
    if given != needed:
        raise ValueError(f"{what} are of {given} items; the interactions name {needed}: give one for each, in order.")


# --- features -------------------------------------------------------------------------------------------------------


class Features(NamedTuple):
    """Columns for a ranker.

    Attributes:
        matrix: (R, F) float32; NaN is what is not known.
        categorical: columns that are numbers of categories.
        names: of the columns.
    """

    matrix: np.ndarray
    categorical: tuple[int, ...] = ()
    names: tuple[str, ...] = ()


def base_features(rows: Rows, interactions: Interactions, items: Items) -> Features:
    """What a ranker knows without embeddings: counts over all users' events strictly earlier than a row, and labels.

    Shares are smoothed: they begin at the next wider share (of a label at the user's, of a user or an item at
    everybody's) and rest on it with the weight of 5 events.

    Args:
        rows: of these interactions.
        interactions: all events; one pass through them in the order of time, whatever the order of the rows.
        items: their labels and release.

    Returns:
        Of the item ``item_positives`` (events), ``item_liked_share``, ``item_age_days``, one ``label=...`` each; of the
        user ``user_events``, ``user_liked_share``; of both ``pair_positives`` (positive events of this user with this
        item), ``label_share`` (the item's labels among those of the user's positive events) and ``label_liked_share``
        (mean of the user's liked share over the item's labels).

    Raises:
        ValueError: items of another number, or events that lack a part.
    """
    check_whole(interactions)
    _check_items(len(items), len(interactions.item_ids), "items")
    _check_items(rows.num_items, len(interactions.item_ids), "rows")
    names = sorted(set().union(*items.labels))
    labels = np.array([[name in some for name in names] for some in items.labels], dtype=bool).reshape(len(items), -1)
    counts = _Counts(len(interactions.user_ids), labels)
    positive, liked = interactions.counts > 0, interactions.counts >= rows.positives
    crossed = np.empty((len(rows), len(_Counts.NAMES)))
    events = iter(np.argsort(interactions.time, kind="stable").tolist())
    event = next(events, None)
    for row in np.argsort(rows.time, kind="stable").tolist():
        while event is not None and interactions.time[event] < rows.time[row]:
            counts.add(interactions.user[event], interactions.item[event], positive[event], liked[event])
            event = next(events, None)
        crossed[row] = counts.of(rows.user[row], rows.item[row])
    age = (rows.time - items.released[rows.item]) / SECONDS_A_DAY  # (R,) NaN where the release is unknown
    matrix = np.column_stack([crossed, age, labels[rows.item]]).astype(np.float32)
    return Features(matrix, names=(*_Counts.NAMES, "item_age_days", *(f"label={name}" for name in names)))


class _Counts:
    """What all events so far come to; U users, I items, G labels."""

    NAMES = (
        "item_positives",
        "item_liked_share",
        "user_events",
        "user_liked_share",
        "pair_positives",  # without it any embedding, noise too, would gain by knowing an item again in the history
        "label_share",
        "label_liked_share",
    )

    def __init__(self, num_users: int, labels: np.ndarray) -> None:
        self.labels = [np.flatnonzero(some) for some in labels]
        self.all = np.zeros(2)  # events, liked
        self.item, self.user = np.zeros((len(labels), 3)), np.zeros((num_users, 2))  # events, liked (, positive)
        self.user_label = np.zeros((num_users, labels.shape[1], 3))
        self.pair_positives: Counter[tuple[int, int]] = Counter()
        self.positive_labels = np.zeros(num_users)  # of the user's positive events, with repetition

    def add(self, user: int, item: int, positive: bool, liked: bool) -> None:
        """One more event."""
        one, labels = (1, liked, positive), self.labels[item]
        self.all += one[:2]
        self.item[item] += one
        self.user[user] += one[:2]
        self.user_label[user, labels] += one
        self.positive_labels[user] += positive * len(labels)
        if positive:
            self.pair_positives[user, item] += 1

    def of(self, user: int, item: int) -> tuple[float, ...]:
        """The features `NAMES` of a user and an item; NaN without labels, or before there are any events."""
        everybody = self.all[1] / self.all[0] if self.all[0] else np.nan
        own = _smoothed(self.user[user], everybody)
        labels = self.labels[item]
        known = self.user_label[user, labels]  # (g, 3)
        share = known[:, 2].sum() / self.positive_labels[user] if self.positive_labels[user] and len(labels) else np.nan
        liked = _smoothed(known.T, own).mean() if len(labels) else np.nan
        of_item = self.item[item, 2], _smoothed(self.item[item], everybody)
        return *of_item, self.user[user, 0], own, self.pair_positives[user, item], share, liked


def _smoothed(counts: np.ndarray, prior: float) -> Any:
    """Liked share of (events, liked, ...), as if 5 events of the prior share had come before."""
    return (counts[1] + SMOOTHING * prior) / (counts[0] + SMOOTHING)


def match_features(rows: Rows, embeddings: np.ndarray) -> Features:
    """How like a user's history an item is: cosine with its mean, with its newest, and the highest with any of it.

    Args:
        rows: R of them.
        embeddings: (I, D) of any length; a zero row is an item without a vector, which a history is read without.

    Returns:
        Three columns; NaN where the item or the whole history has no vector.

    Raises:
        ValueError: embeddings of another shape or not finite.
    """
    embeddings = np.asarray(embeddings, dtype=np.float32)
    if embeddings.ndim != 2 or not np.isfinite(embeddings).all():
        raise ValueError(f"Embeddings of shape (I, D), all finite, are needed; got {embeddings.shape}.")
    _check_items(len(embeddings), rows.num_items, "embeddings")
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit = np.divide(embeddings, lengths, out=np.zeros_like(embeddings), where=lengths > 0)
    there = np.append(lengths[:, 0] > 0, False)  # -1 looks at the last
    parts = [np.empty((0, 3), dtype=np.float32)]
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        parts.append(_matches(rows.item[part], rows.history[part], unit, there))
    return Features(np.concatenate(parts), names=("match_mean", "match_newest", "match_max"))


def _matches(item: np.ndarray, history: np.ndarray, unit: np.ndarray, there: np.ndarray) -> np.ndarray:
    """(r, 3) cosines: with the mean, the newest, the nearest."""
    known = there[history]  # (r, H)
    vectors = unit[history] * known[..., None]  # (r, H, D)
    mean = vectors.sum(axis=1)  # (r, D), of any length: only its direction counts
    length = np.linalg.norm(mean, axis=1)
    cosines = np.einsum("rhd,rd->rh", vectors, unit[item])  # (r, H)
    with_mean = np.divide((mean * unit[item]).sum(axis=1), length, out=np.zeros_like(length), where=length > 1e-6)
    newest = cosines[np.arange(len(item)), known.argmax(axis=1)]
    nearest = np.where(known, cosines, -np.inf).max(axis=1)
    usable = known.any(axis=1) & there[item]
    return np.where(usable[:, None], np.stack([with_mean, newest, nearest], axis=1), np.nan).astype(np.float32)


def sid_features(rows: Rows, codes: np.ndarray, *, levels: int = 2) -> Features:
    """An item's semantic ID: its first codes as categories, and how much of the history begins with the same codes.

    Args:
        rows: R of them.
        codes: (I, L) integers from 0 on, such as ``SemanticIDs.encode``.
        levels: codes that become categories; later ones mean something only behind those before them.

    Returns:
        ``sid_1`` ... (categorical) and, for each of the L levels, ``sid_agree_...``: the share of the history whose
        codes up to that level are the item's; NaN without a history.

    Raises:
        ValueError: codes of another shape or type, or below 0.
    """
    codes = np.asarray(codes)
    if codes.ndim != 2 or not codes.shape[1] or codes.dtype.kind not in "iu" or codes.min(initial=0) < 0:
        raise ValueError(f"Codes of shape (I, L), integers from 0 on, are needed; got {codes.shape}, {codes.dtype}.")
    _check_items(len(codes), rows.num_items, "codes")
    levels = min(levels, codes.shape[1])
    known = rows.history >= 0  # (R, H)
    agree, size = known, known.sum(axis=1)
    shares = []
    for level in codes.T:  # (I,)
        agree = agree & (level[rows.history] == level[rows.item][:, None])
        shares.append(np.divide(agree.sum(axis=1), size, out=np.full(len(rows), np.nan), where=size > 0))
    names = [f"sid_{level + 1}" for level in range(levels)] + [f"sid_agree_{k + 1}" for k in range(len(shares))]
    matrix = np.column_stack([codes[rows.item, :levels], *shares]).astype(np.float32)
    return Features(matrix, tuple(range(levels)), tuple(names))


def joined(*parts: Features) -> Features:
    """The columns of several, one after another."""
    starts = np.cumsum([0, *(part.matrix.shape[1] for part in parts)]).tolist()
    categorical = [start + column for start, part in zip(starts, parts, strict=False) for column in part.categorical]
    names = tuple(name for part in parts for name in part.names)
    return Features(np.column_stack([part.matrix for part in parts]), tuple(categorical), names)


# --- the ranker -----------------------------------------------------------------------------------------------------


def evaluate_ranker(
    rows: Rows, feature_sets: Mapping[str, Features | tuple[np.ndarray, Sequence[int]]], *, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Train a ranker of `SETTINGS` for each set of features on the rows before the second cut and test it after.

    Args:
        rows: R of them.
        feature_sets: by name; a plain pair is (matrix (R, F), categorical columns).
        seed: of the rows and columns that each tree is shown; the same seed gives the same trees.

    Returns:
        By name ``auc`` (of all test rows), ``gauc`` (within users, Deep Interest Network), ``gauc_share`` (of the test
        rows: those of users with both labels) and ``rows`` (tested).

    Raises:
        ImportError: lightgbm is missing.
        ValueError: a matrix of another length, or a side with one label only.
    """
    given = {name: Features(*features) for name, features in feature_sets.items()}
    for name, features in given.items():
        if features.matrix.shape[:1] != (len(rows),) or features.matrix.ndim != 2:
            raise ValueError(f"Features {name!r} are of shape {features.matrix.shape}; ({len(rows)}, F) is needed.")
    for side, there in (("train", rows.train), ("test", ~rows.train)):
        if len(np.unique(rows.label[there])) < 2:
            raise ValueError(
                f"The {int(there.sum())} rows to {side} with have not both labels; move the cuts or ask for other "
                "positives."
            )
    return {name: _scored(rows, _trained_scores(rows, features, seed)) for name, features in given.items()}


def compare(
    rows: Rows,
    base: Features,
    match: Features | None = None,
    sids: Features | None = None,
    seeds: Sequence[int] = (0, 1, 2),
) -> dict[str, dict[str, Any]]:
    """The ranker with the base features alone and with each and both of the others beside them.

    Args:
        rows: R of them.
        base, match, sids: such as `base_features`, `match_features` and `sid_features`; the sets that need one that is
            None are left out.
        seeds: one ranker each.

    Returns:
        By name, as in `FEATURE_SETS`: ``auc`` and ``gauc`` (means over the seeds), ``auc_std`` and ``gauc_std`` (0 for
        one seed), ``gauc_share``, ``rows`` and ``runs``, what `evaluate_ranker` gives for each seed. JSON can hold it.

    Raises:
        ValueError: no seeds, or as `evaluate_ranker`. ImportError: lightgbm is missing.
    """
    if not seeds:
        raise ValueError("seeds is empty; one at least is needed.")
    parts = {name: part for name, part in (("base", base), ("match", match), ("sids", sids)) if part is not None}
    sets = {
        name: joined(*(parts[part] for part in needed))
        for name, needed in FEATURE_SETS.items()
        if set(needed) <= set(parts)
    }
    runs = [evaluate_ranker(rows, sets, seed=seed) for seed in seeds]
    return {name: _summary([run[name] for run in runs]) for name in sets}


def _trained_scores(rows: Rows, features: Features, seed: int) -> np.ndarray:
    """(R',) scores of the test rows."""
    lightgbm = _need_lightgbm()
    options = {"categorical_feature": list(features.categorical), "params": SETTINGS}
    data = lightgbm.Dataset(features.matrix[rows.train], rows.label[rows.train].astype(np.float32), **options)
    model = lightgbm.train({**SETTINGS, "seed": seed}, data, NUM_ROUNDS)
    return model.predict(features.matrix[~rows.train], num_threads=SETTINGS["num_threads"])


def _scored(rows: Rows, scores: np.ndarray) -> dict[str, float]:
    label, user = rows.label[~rows.train], rows.user[~rows.train]
    grouped = grouped_auc(scores, label, user)
    auc = float(roc_auc_score(label, scores))
    return {"auc": auc, "gauc": float(grouped.value), "gauc_share": float(grouped.share), "rows": len(scores)}


def _summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    means = {name: float(np.mean([run[name] for run in runs])) for name in ("auc", "gauc")}
    spreads = {f"{name}_std": float(np.std([run[name] for run in runs], ddof=len(runs) > 1)) for name in means}
    return {**means, **spreads, "gauc_share": runs[0]["gauc_share"], "rows": runs[0]["rows"], "runs": runs}


def _need_lightgbm() -> ModuleType:
    """Import what only the ranker needs.

    Raises:
        ImportError: it is missing.
    """
    try:
        return importlib.import_module("lightgbm")
    except ImportError as error:
        raise ImportError(
            f"The ranker needs lightgbm ({error}); install the extra: `pip install 'sail-embedding[recommend]'`."
        ) from error
