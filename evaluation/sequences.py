"""The paper's sequence tests on any behaviour data (SAIL-Embedding, sections 4.2, 4.3).

    cases = vanilla_cases(interactions, split.time)
    sequence_recall(scores_of(embeddings, cases), cases, interactions)

Room: evaluation, after training.recommendation. Unusual: a sequence may hold events after the split, as they are known
when the recommendation is asked for, but none from the target's on; training may use only those before the split.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

import numpy as np

from ..training.recommendation.behaviour import History, Interactions, check_whole
from ..training.recommendation.evidence import jaccard
from ..training.recommendation.interests import Candidates, Limits, Pair, candidates
from .item_to_item import cosine_matrix, has_vector, unit_vectors

UNRANKED = np.iinfo(np.int64).max  # rank of a target that has no score: in no top k


# --- cases ----------------------------------------------------------------------------------------------------------


def vanilla_cases(
    interactions: Interactions,
    split_time: float,
    *,
    targets: int = 5,
    history: int = 100,
    kept: int = 10,
    positives: int = 1,
    seed: int = 0,
) -> list[Pair]:
    """The vanilla test: the newest items are the targets, and of the items before each some are drawn (section 4.3).

    The paper has one target a user, the newest of 100 videos, and draws 10 of the others. Here each of the newest few
    takes its turn as the newest: what came after it is not known.

    Args:
        interactions: validated, before and after the split. A sequence may hold what a user did after the split and
            before the target, as it is known by then; never train on that. Events of one second have the table's order.
        split_time: unix seconds; a target's event is not earlier.
        targets: of a user, at most: the newest items whose first event is after the split and shows enough positive
            behaviours. An item that the user had any event of before is no recommendation and is passed over.
        history: only so many of the newest items before the target are looked at, each at its newest positive event.
        kept: items in a sequence, at most; drawn without repetition, left in their order in time.
        positives: positive behaviours that an item needs; a target shows them at once: take 1 where each behaviour is
            an event of its own.
        seed: of the draws; that of a case does not depend on what other users or cases there are.

    Returns:
        Cases by user, then time. A target with nothing before it gives none.

    Raises:
        ValueError: a number below 1, a split time that is none, or an event without its user, item or time.
    """
    cases = []
    for user, found in _asked(interactions, split_time, targets, history, kept, positives):
        generator = random.Random(f"{seed}:{interactions.user_ids[user]}:{interactions.item_ids[found.target]}")
        drawn = sorted(generator.sample(range(len(found.items)), min(kept, len(found.items))))
        cases += _case(user, found, found.items[drawn])
    return cases


def filtered_cases(
    interactions: Interactions,
    split_time: float,
    *,
    labels: Sequence[frozenset[str]],
    clusters: np.ndarray | None = None,
    targets: int = 5,
    history: int = 1000,
    kept: int = 10,
    positives: int = 1,
    threshold: float = 0.5,
) -> list[Pair]:
    """The filtered test: of up to 1,000 items those that agree with the target in tags or cluster (section 4.3).

    The targets are those of `vanilla_cases`; a target with nothing like it before gives no case. The filter looks at
    the target, so this test asks how well an interest is met that is known to be there, not what will come next.

    Args:
        interactions: validated, before and after the split, as for `vanilla_cases`.
        split_time: unix seconds; a target's event is not earlier.
        labels: (I,) of items.
        clusters: (I,) integers, or None; an item of the target's cluster agrees, whatever its labels; a negative one is
            no cluster. Clusters of an embedding favour that embedding.
        targets, positives: as of `vanilla_cases`.
        history: only so many of the newest items before the target are looked at.
        kept: items in a sequence, at most: the newest.
        threshold: Jaccard coefficient of the labels of an item and the target.

    Returns:
        Cases by user, then time.

    Raises:
        ValueError: as `vanilla_cases`; labels or clusters of another number of items; a threshold not in [0, 1].
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold} must lie between 0 and 1.")
    for name, some in (("labels", labels), ("clusters", clusters)):
        if some is not None and len(some) != len(interactions.item_ids):
            raise ValueError(f"{name} are of {len(some)} items; the interactions name {len(interactions.item_ids)}.")
    cases = []
    for user, found in _asked(interactions, split_time, targets, history, kept, positives):
        near = np.array([jaccard(labels[item], labels[found.target]) >= threshold for item in found.items], dtype=bool)
        if clusters is not None:
            near |= (clusters[found.items] == clusters[found.target]) & (clusters[found.target] >= 0)
        cases += _case(user, found, found.items[near][-kept:])
    return cases


def _asked(
    interactions: Interactions, split_time: float, targets: int, history: int, kept: int, positives: int
) -> Iterator[tuple[int, Candidates]]:
    """Each user's targets, oldest first, with the newest items before each."""
    for name, number in (("targets", targets), ("history", history), ("kept", kept), ("positives", positives)):
        if number < 1:
            raise ValueError(f"{name}={number} must be at least 1.")
    if not math.isfinite(split_time):
        raise ValueError(f"split_time={split_time} must be unix seconds, such as split_by_time(...).time.")
    for whole in interactions.histories():
        for place in _targets(whole, split_time, positives)[-targets:]:
            known = whole._replace(**{name: getattr(whole, name)[: place + 1] for name in ("items", "times", "counts")})
            found = candidates(known, positives, Limits(history=len(known.items)))
            assert found is not None and found.target == whole.items[place], "the target's event qualifies"
            yield whole.user, found._replace(items=found.items[-history:])


def _targets(history: History, split_time: float, positives: int) -> np.ndarray:
    """Places of events after the split that are the first of their item and positive enough, rising."""
    _, first = np.unique(history.items, return_index=True)
    first.sort()
    return first[(history.times[first] >= split_time) & (history.counts[first] >= positives)]


def _case(user: int, found: Candidates, sequence: np.ndarray) -> list[Pair]:
    return [Pair(user, tuple(sequence.tolist()), found.target, found.time)] if len(sequence) else []


# --- scores and ranks -----------------------------------------------------------------------------------------------


def pooled(embeddings: np.ndarray, cases: Sequence[Pair]) -> np.ndarray:
    """The paper's default sequence model: the mean of the items' L2-normalised embeddings (section 3.3.5).

    Args:
        embeddings: (I, D) of any length; an item without a vector has a zero row and is left out of the mean.
        cases: Q of them.

    Returns:
        (Q, D) float32, not normalised again; a zero row where no item of the sequence has a vector.

    Raises:
        ValueError: embeddings of another shape or not finite, or cases of other items.
    """
    unit = unit_vectors(embeddings)
    _check_places(cases, len(unit))
    there = has_vector(unit)
    means = np.zeros((len(cases), unit.shape[1]), dtype=np.float32)
    for row, case in enumerate(cases):
        places = [item for item in case.sequence if there[item]]
        if places:
            means[row] = unit[places].mean(axis=0)
    return means


def scores_of(embeddings: np.ndarray, cases: Sequence[Pair]) -> np.ndarray:
    """Cosine of each case's pooled sequence and each item.

    Args:
        embeddings: (I, D) of any length; a zero row is an item without a vector.
        cases: Q of them.

    Returns:
        (Q, I) float32; -inf for items without a vector, and all over for cases without one.

    Raises:
        ValueError: as `pooled`.
    """
    return cosine_matrix(pooled(embeddings, cases), embeddings)


def target_ranks(
    scores: np.ndarray, cases: Sequence[Pair], interactions: Interactions, candidates: np.ndarray | None = None
) -> np.ndarray:
    """Rank of each case's target among what its user had not consumed by then; one by one, for cold and warm, say.

    Args:
        scores: (Q, I) of items for cases, by whatever model; -inf is an item that cannot be found.
        cases: Q of them.
        interactions: all events, before and after the split. What the user has any event of before the target's event
            is no candidate, whether it is in the sequence or not.
        candidates: places of the items that compete, which all targets are among; None: all. An item whose content an
            earlier one has, too, ties with its twin and gets no event (`validate`): ``np.unique(interactions.item)``
            leaves such out.

    Returns:
        (Q,) int64, 0 is the first. A tie counts against the target; one that scores -inf is `UNRANKED`.

    Raises:
        ValueError: scores of another shape or NaN, candidates that are no places, a target that is not among them, or
            a case whose target's event is not among the interactions.
    """
    num_items = len(interactions.item_ids)
    scores = np.asarray(scores)
    if scores.shape != (len(cases), num_items) or np.isnan(scores).any():
        raise ValueError(f"Scores of shape ({len(cases)}, {num_items}) without NaN are needed; got {scores.shape}.")
    _check_places(cases, num_items)
    competing = _competing(candidates, num_items)
    rows, targets = np.arange(len(cases)), np.array([case.target for case in cases], dtype=np.int64)
    if not competing[targets].all():
        raise ValueError(
            f"The targets of {int((~competing[targets]).sum())} cases are not among the candidates; leave those out."
        )
    rivals = np.repeat(competing[None], len(cases), axis=0)  # (Q, I)
    for row, items in enumerate(consumed_before(cases, interactions)):
        rivals[row, items] = False
    rivals[rows, targets] = False
    own = scores[rows, targets]
    return np.where(own == -np.inf, UNRANKED, (rivals & (scores >= own[:, None])).sum(axis=1))


def recall_of_ranks(ranks: np.ndarray, ks: Sequence[int] = (1, 10, 25)) -> dict[int, float]:
    """Recall@k of ranks: of one target each, so the share of targets in the top k (section 4.2).

    Args:
        ranks: (Q,) such as `target_ranks`; 0 is the first.
        ks: how many candidates are looked at.

    Raises:
        ValueError: there are no ranks, or a k below 1.
    """
    ranks = np.asarray(ranks)
    if ranks.ndim != 1 or not len(ranks) or min(ks) < 1:
        raise ValueError(f"Ranks of shape {ranks.shape}, ks {tuple(ks)}: a rank at least and ks from 1 on are needed.")
    return {k: float((ranks < k).mean()) for k in ks}


def sequence_recall(
    scores: np.ndarray,
    cases: Sequence[Pair],
    interactions: Interactions,
    *,
    candidates: np.ndarray | None = None,
    ks: Sequence[int] = (1, 10, 25),
) -> dict[int, float]:
    """Recall@k of a sequence test (section 4.3): `recall_of_ranks` of `target_ranks`, which see.

    Raises:
        ValueError: as those two; there are no cases.
    """
    return recall_of_ranks(target_ranks(scores, cases, interactions, candidates), ks)


def consumed_before(cases: Sequence[Pair], interactions: Interactions) -> Iterator[np.ndarray]:
    """Items of all the events of each case's user before the target's, which are no candidates for them.

    Args:
        cases: Q of them.
        interactions: all events that the cases were made of.

    Yields:
        (n,) places of items, in time; an item as often as it has events.

    Raises:
        ValueError: a case of another user, or whose target's event is not among the interactions.
    """
    check_whole(interactions)
    starts = np.searchsorted(interactions.user, np.arange(len(interactions.user_ids) + 1))
    for case in cases:
        if not 0 <= case.user < len(interactions.user_ids):
            raise ValueError(f"A case is of user {case.user}; the interactions name {len(interactions.user_ids)}.")
        part = slice(starts[case.user], starts[case.user + 1])
        items = interactions.item[part]
        events = np.flatnonzero((items == case.target) & (interactions.time[part] == case.time))
        if not len(events):
            raise ValueError(
                f"The interactions have no event of user {case.user} with item {case.target} at {case.time}; give all "
                "that the cases were made of, before and after the split."
            )
        yield items[: events[0]]


def _competing(candidates: np.ndarray | None, num_items: int) -> np.ndarray:
    """(I,) bool of places."""
    if candidates is None:
        return np.ones(num_items, dtype=bool)
    places = np.asarray(candidates)
    if places.ndim != 1 or places.dtype.kind not in "iu" or not np.isin(places, np.arange(num_items)).all():
        raise ValueError(
            f"candidates of shape {places.shape} and type {places.dtype}: places from 0 to {num_items - 1} are needed "
            "(np.flatnonzero makes them of a mask)."
        )
    return np.isin(np.arange(num_items), places)


def _check_places(cases: Sequence[Pair], num_items: int) -> None:
    places = [item for case in cases for item in (*case.sequence, case.target)]
    if places and not 0 <= min(places) <= max(places) < num_items:
        raise ValueError(
            f"Cases name items {min(places)} to {max(places)}; the embeddings or scores are of {num_items}."
        )
