"""The four interests of a user (SAIL-Embedding, section 3.3.5): pairs of a sequence of items and the item after it.

Room: recommendation, after behaviour and evidence. Unusual: each interest is a pure function of one history and of
`Evidence`; mining refuses events and evidence from after the split.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from .behaviour import History, Interactions, check_before
from .evidence import Evidence, jaccard


class Pair(NamedTuple):
    """A sequence and its target.

    Attributes:
        user: place in ``Interactions.user_ids``.
        sequence: places of items, oldest first, each once, never the target.
        target: place of the item.
        time: of the target's event, unix seconds; no event of the sequence is later.
    """

    user: int
    sequence: tuple[int, ...]
    target: int
    time: float


@dataclass(frozen=True)
class Limits:
    """The thresholds; the defaults are the paper's where it names one.

    Attributes:
        history: only so many of the newest events are looked at.
        kept: items in a sequence, at most.
        shortest: items in a sequence, at least.
        single_peak, multi_peak: positive behaviours that an item needs.
        similarity: of the content of an item and the target; not in the paper.
        labels: Jaccard coefficient of the labels of an item and the target.
        behaviour: Jaccard coefficient of their consumers; the paper's 0.5 is for labels. On small data hardly any two
            items share half of their consumers: lower it.
        targets: newest items of a user that become targets, each with what came before it. The paper's is 1; with few
            users more of them are more to learn from.
    """

    history: int = 1000
    kept: int = 10
    shortest: int = 1
    single_peak: int = 3
    multi_peak: int = 1
    similarity: float = 0.5
    labels: float = 0.5
    behaviour: float = 0.5
    targets: int = 1

    def __post_init__(self) -> None:
        for name in ("history", "kept", "shortest", "single_peak", "multi_peak", "targets"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.shortest > self.kept:
            raise ValueError(f"shortest={self.shortest} must not be above kept={self.kept}.")
        for name, lowest in (("similarity", -1), ("labels", 0), ("behaviour", 0)):
            if not lowest <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie between {lowest} and 1.")

    def positives(self, interest: str) -> int:
        """Positive behaviours that an item needs for an interest, by its name."""
        return self.single_peak if interest.endswith("single_peak") else self.multi_peak


DEFAULTS = Limits()


# --- candidates -----------------------------------------------------------------------------------------------------


class Candidates(NamedTuple):
    """What a sequence is chosen from.

    Attributes:
        target: the item of the newest event that qualifies.
        time: of that event.
        events: (E,) items of the events that qualify before it, without the target's; an item may be there again.
        items: (C,) the same, each item once, at its newest event; oldest first.
    """

    target: int
    time: float
    events: np.ndarray
    items: np.ndarray


def candidates(history: History, positives: int, limits: Limits = DEFAULTS) -> Candidates | None:
    """The target and what came before it; None if no event has enough positive behaviours.

    Args:
        history: of one user; it is cut to its newest events first.
        positives: positive behaviours that an event's item needs by then.
        limits: for ``history``.
    """
    recent = history.newest(limits.history)
    qualified = np.flatnonzero(recent.counts >= positives)
    if not len(qualified):
        return None
    target = recent.items[qualified[-1]]
    events = recent.items[qualified]
    events = events[events != target]
    _, backwards = np.unique(events[::-1], return_index=True)  # the first from behind is the newest
    newest = np.sort(len(events) - 1 - backwards)
    return Candidates(int(target), float(recent.times[qualified[-1]]), events, events[newest])


def earlier(history: History, positives: int, limits: Limits = DEFAULTS) -> Iterator[History]:
    """The history as it was when each of its newest ``targets`` qualified items was last chosen, the whole one first.

    Always one at least: a history without such an item is what its reason is told by.
    """
    yield history
    places = np.flatnonzero(history.counts >= positives)[::-1]  # the newest first
    _, newest = np.unique(history.items[places], return_index=True)
    for end in places[np.sort(newest)][1 : limits.targets] + 1:
        yield History(history.user, history.items[:end], history.times[:end], history.counts[:end])


def _pair(history: History, found: Candidates, places: Sequence[int] | np.ndarray, limits: Limits) -> Pair | None:
    """The pair with the newest ``kept`` of the chosen candidates; None if they are too few."""
    chosen = np.sort(np.asarray(places, dtype=np.int64))[-limits.kept :]
    if len(chosen) < limits.shortest:
        return None
    return Pair(history.user, tuple(found.items[chosen].tolist()), found.target, found.time)


def _by_cluster(found: Candidates, clusters: np.ndarray) -> tuple[Counter[int], dict[int, list[int]]]:
    """How many of the user's events each cluster has, and the places of its candidates, oldest first."""
    places: dict[int, list[int]] = {}
    for place, cluster in enumerate(clusters[found.items].tolist()):
        places.setdefault(cluster, []).append(place)
    return Counter(clusters[found.events].tolist()), places


# --- the four interests ---------------------------------------------------------------------------------------------


def content_single_peak(
    history: History, evidence: Evidence, limits: Limits = DEFAULTS, generator: random.Random | None = None
) -> Pair | None:
    """Items with >= 3 positive behaviours whose content is like the target's; the newest are kept.

    Args:
        history: of one user.
        evidence: ``similarity``.
        limits: ``single_peak``, ``similarity``.
        generator: unused.

    Raises:
        ValueError: the evidence is missing.
    """
    similarity = evidence.need("similarity", "content_single_peak")
    found = candidates(history, limits.single_peak, limits)
    if found is None or not len(found.items):
        return None
    near = np.asarray(similarity(found.target, found.items)) >= limits.similarity
    return _pair(history, found, np.flatnonzero(near), limits)


def content_multi_peak(
    history: History, evidence: Evidence, limits: Limits = DEFAULTS, generator: random.Random | None = None
) -> Pair | None:
    """Items with >= 1 positive behaviour whose labels overlap with the target's; the newest are kept.

    Args:
        history: of one user.
        evidence: ``labels``.
        limits: ``multi_peak``, ``labels``.
        generator: unused.

    Raises:
        ValueError: the evidence is missing.
    """
    labels = evidence.need("labels", "content_multi_peak")
    found = candidates(history, limits.multi_peak, limits)
    if found is None:
        return None
    near = [jaccard(labels[item], labels[found.target]) >= limits.labels for item in found.items]
    return _pair(history, found, np.flatnonzero(near), limits)


def collaborative_single_peak(
    history: History, evidence: Evidence, limits: Limits = DEFAULTS, generator: random.Random | None = None
) -> Pair | None:
    """Items with >= 3 positive behaviours and the target's consumers, in the proportions of the user's own history.

    Of those that share enough consumers with the target, each label cluster gets as many places as its share of the
    user's events asks for (Sainte-Laguë), and fills them with its newest; a cluster that has no more leaves its places
    to the others.

    Args:
        history: of one user.
        evidence: ``consumers``, ``label_clusters``.
        limits: ``single_peak``, ``behaviour``.
        generator: unused.

    Raises:
        ValueError: the evidence is missing.
    """
    consumers = evidence.need("consumers", "collaborative_single_peak")
    clusters = evidence.need("label_clusters", "collaborative_single_peak")
    found = candidates(history, limits.single_peak, limits)
    if found is None or not len(found.items):
        return None
    near = consumers.jaccard(found.target, found.items, without=history.user) >= limits.behaviour
    events, places = _by_cluster(found, clusters)
    near_places = {name: [place for place in some if near[place]] for name, some in places.items()}
    return _pair(history, found, in_proportion(events, near_places, limits.kept), limits)


def collaborative_multi_peak(
    history: History, evidence: Evidence, limits: Limits = DEFAULTS, generator: random.Random | None = None
) -> Pair | None:
    """Items with >= 1 positive behaviour, drawn in proportion to the clusters of the user's history.

    Args:
        history: of one user.
        evidence: ``clusters``.
        limits: ``multi_peak``.
        generator: draws; the same state gives the same pair.

    Raises:
        ValueError: the evidence or the generator is missing.
    """
    clusters = evidence.need("clusters", "collaborative_multi_peak")
    if generator is None:
        raise ValueError("collaborative_multi_peak draws: give it a random.Random(seed).")
    found = candidates(history, limits.multi_peak, limits)
    if found is None:
        return None
    events, places = _by_cluster(found, clusters)
    return _pair(history, found, drawn(events, places, limits.kept, generator), limits)


INTERESTS: dict[str, Callable[..., Pair | None]] = {
    "content_single_peak": content_single_peak,
    "content_multi_peak": content_multi_peak,
    "collaborative_single_peak": collaborative_single_peak,
    "collaborative_multi_peak": collaborative_multi_peak,
}


# --- proportions ----------------------------------------------------------------------------------------------------


def in_proportion(weights: Counter[int], places: dict[int, list[int]], total: int) -> list[int]:
    """The last places of each cluster, so many of each as its weight asks for (Sainte-Laguë's highest averages).

    Args:
        weights: of the clusters, above 0.
        places: of each cluster, in order; a cluster without any leaves its share to the others.
        total: places to choose, or all that there are.
    """
    stacks = {name: list(some) for name, some in places.items() if some}
    taken: Counter[int] = Counter()
    chosen: list[int] = []
    while stacks and len(chosen) < total:
        # Of two clusters with equal claims, the one whose next is the later.
        name = max(stacks, key=lambda name: (weights[name] / (2 * taken[name] + 1), stacks[name][-1]))
        chosen.append(stacks[name].pop())
        taken[name] += 1
        if not stacks[name]:
            del stacks[name]
    return chosen


def drawn(weights: Counter[int], places: dict[int, list[int]], total: int, generator: random.Random) -> list[int]:
    """Draw a cluster by its weight, then one of its places, until there are enough; no place is drawn twice.

    Args:
        weights: of the clusters, above 0.
        places: of each cluster.
        total: places to draw, or all that there are.
        generator: draws.
    """
    left = {name: list(some) for name, some in sorted(places.items()) if some}
    chosen: list[int] = []
    while left and len(chosen) < total:
        name = generator.choices(list(left), [weights[name] for name in left])[0]
        chosen.append(left[name].pop(generator.randrange(len(left[name]))))
        if not left[name]:
            del left[name]
    return chosen


# --- all users ------------------------------------------------------------------------------------------------------


class Interests(NamedTuple):
    """What `mine_interests` finds.

    Attributes:
        pairs: by interest, in the order of the users.
        statistics: by interest ``histories`` (users, or with several targets more), ``kept``, ``share``,
            ``mean_length``, ``full`` (sequences of ``kept`` items) and ``dropped`` (histories by the reason); JSON can
            hold it.
    """

    pairs: dict[str, list[Pair]]
    statistics: dict[str, dict[str, Any]]


def mine_interests(
    before: Interactions,
    evidence: Evidence,
    *,
    split_time: float,
    interests: Sequence[str] = tuple(INTERESTS),
    limits: Limits = DEFAULTS,
    seed: int = 0,
    progress: bool = True,
) -> Interests:
    """At most ``targets`` pairs of each interest for each user.

    Args:
        before: validated events before the split.
        evidence: of ``before.item_ids``, in this order.
        split_time: unix seconds.
        interests: names in `INTERESTS`.
        limits: the thresholds.
        seed: of the draws; those of a user do not depend on who else is there.
        progress: show a bar.

    Raises:
        ValueError: an unknown interest, evidence that is missing or of another number of items, or what would leak: an
            event at the split time or later, consumers learned with such events.
    """
    unknown = sorted(set(interests) - set(INTERESTS))
    if unknown:
        raise ValueError(f"There are no interests {unknown}; take some of {list(INTERESTS)}.")
    check_before(before, split_time)
    evidence.check(len(before.item_ids), split_time)
    pairs: dict[str, list[Pair]] = {name: [] for name in interests}
    dropped: dict[str, Counter[str]] = {name: Counter() for name in interests}
    bar = tqdm(before.histories(), "interests", total=before.num_users, unit="user", disable=not progress)
    for history in bar:
        for name in interests:
            positives = limits.positives(name)
            for number, known in enumerate(earlier(history, positives, limits)):
                said = f":{number}" if number else ""
                generator = random.Random(f"{seed}:{name}:{before.user_ids[history.user]}{said}")
                pair = INTERESTS[name](known, evidence, limits, generator)
                if pair is None:
                    dropped[name][_why(known, positives, limits)] += 1
                else:
                    pairs[name].append(pair)
    return Interests(pairs, {name: _statistics(pairs[name], dropped[name], limits) for name in interests})


def _why(history: History, positives: int, limits: Limits) -> str:
    """Why a history gives no pair."""
    found = candidates(history, positives, limits)
    if found is None:
        return "no item with enough positive behaviours"
    if len(found.items) < limits.shortest:
        return "too few items before the target"
    return "too few items like the target"


def _statistics(pairs: list[Pair], dropped: Counter[str], limits: Limits) -> dict[str, Any]:
    lengths = [len(pair.sequence) for pair in pairs]
    histories = len(pairs) + dropped.total()
    return {
        "histories": histories,
        "kept": len(pairs),
        "share": len(pairs) / histories if histories else 0.0,
        "mean_length": float(np.mean(lengths)) if lengths else 0.0,
        "full": lengths.count(limits.kept),
        "dropped": dict(dropped),
    }
