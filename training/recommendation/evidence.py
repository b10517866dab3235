"""What the interests of users are judged by: content, labels, who else consumed an item, clusters.

Room: recommendation, after behaviour. Unusual: what is learned from other users' behaviour carries the time up to which
it was learned, so that what was learned after the split can be refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .behaviour import Interactions, check_before

# Of a target, similarities to C items: (C,).
Similarity = Callable[[int, np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the interests look at, over I items; an interest needs only what its docstring names.

    Attributes:
        similarity: of content, such as `cosine_similarity` of embeddings.
        labels: (I,) sets.
        consumers: who consumed what before the split.
        label_clusters: (I,) cluster of each item's labels, such as `label_clusters`.
        clusters: (I,) cluster of each item by whatever else, such as k-means or the first level of a semantic ID.
    """

    similarity: Similarity | None = None
    labels: Sequence[frozenset[str]] | None = None
    consumers: Consumers | None = None
    label_clusters: np.ndarray | None = None
    clusters: np.ndarray | None = None

    def need(self, name: str, interest: str) -> Any:
        """A part of the evidence.

        Raises:
            ValueError: it is not there.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"The interest {interest!r} needs Evidence({name}=...), got None; give it.")
        return value

    def check(self, num_items: int, split_time: float) -> None:
        """Refuse what is of other items, or was learned from events after the split.

        Raises:
            ValueError: so it is.
        """
        for name in ("labels", "label_clusters", "clusters"):
            value = getattr(self, name)
            if value is not None and len(value) != num_items:
                raise ValueError(f"Evidence({name}=...) is of {len(value)} items; the interactions name {num_items}.")
        consumers = self.consumers
        if consumers is None:
            return
        if len(consumers.starts) != num_items + 1:
            raise ValueError(f"Consumers are of {len(consumers.starts) - 1} items; the interactions name {num_items}.")
        if consumers.split_time > split_time:
            raise ValueError(
                f"Consumers were learned up to {consumers.split_time}, after the split time {split_time}: learn them "
                "from the events before it."
            )


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """|A and B| / |A or B|; two empty sets have nothing in common: 0."""
    return len(one & other) / len(one | other) if one or other else 0.0


def cosine_similarity(embeddings: np.ndarray) -> Similarity:
    """Cosine of the embeddings of a target and of items.

    Args:
        embeddings: (I, D), of any length; a zero row is like nothing.

    Raises:
        ValueError: of another shape, or not finite.
    """
    embeddings = np.asarray(embeddings, dtype=np.float32)
    if embeddings.ndim != 2 or not np.isfinite(embeddings).all():
        raise ValueError(f"Embeddings of shape (I, D), all finite, are needed; got {embeddings.shape}.")
    unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)  # (I, D)
    return lambda target, items: unit[items] @ unit[target]  # (C,)


def label_clusters(labels: Sequence[frozenset[str]], threshold: float = 0.5) -> np.ndarray:
    """Clusters of items by their labels: (I,), numbered from 0, the largest set of labels' first.

    Each distinct set of labels, the most frequent first, joins the cluster whose first set is most like it, if their
    Jaccard coefficient reaches the threshold; else it begins a cluster. Items without labels are a cluster.
    """
    leaders: list[frozenset[str]] = []
    cluster_of: dict[frozenset[str], int] = {}
    for some, _ in sorted(Counter(labels).items(), key=lambda pair: (-pair[1], sorted(pair[0]))):
        near = [jaccard(some, leader) for leader in leaders]
        best = int(np.argmax(near)) if near else -1
        if best < 0 or near[best] < threshold:
            best = len(leaders)
            leaders.append(some)
        cluster_of[some] = best
    return np.array([cluster_of[some] for some in labels], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Consumers:
    """Who consumed which item, learned from the events before a time.

    Attributes:
        starts: (I + 1,) where each item's users begin in ``users``.
        users: (M,) places of users, rising within an item.
        split_time: nothing from it on was looked at.
    """

    starts: np.ndarray
    users: np.ndarray
    split_time: float

    @classmethod
    def from_interactions(cls, before: Interactions, split_time: float, positives: int = 1) -> Consumers:
        """Users whose events show a positive behaviour, by item.

        Args:
            before: events before the split, such as ``split_by_time(...).before``.
            split_time: unix seconds.
            positives: positive behaviours for an item that make a user its consumer.

        Raises:
            ValueError: an event at the split time or later: it would leak.
        """
        check_before(before, split_time)
        there = before.behaviours_so_far() >= positives
        pairs = np.unique(np.stack([before.item[there], before.user[there]], axis=1), axis=0)  # (M, 2)
        starts = np.searchsorted(pairs[:, 0], np.arange(len(before.item_ids) + 1))
        return cls(starts, pairs[:, 1], split_time)

    def of(self, item: int) -> np.ndarray:
        """Places of an item's consumers, rising."""
        return self.users[self.starts[item] : self.starts[item + 1]]

    def jaccard(self, target: int, items: np.ndarray, *, without: int = -1) -> np.ndarray:
        """Behaviour consistency: the Jaccard coefficient of an item's consumers and the target's.

        Args:
            target: an item.
            items: (C,) items.
            without: a user who does not count: who consumed both is no evidence for being their only consumer.

        Returns:
            (C,) float64 in [0, 1]; 0 where neither has a consumer.
        """
        groups = [self.of(item) for item in items]
        owner = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        users = np.concatenate([*groups, np.empty(0, dtype=np.int64)])
        wanted = self.of(target)
        wanted = wanted[wanted != without]
        others = users != without
        shared = np.bincount(owner, others & np.isin(users, wanted), len(groups))
        union = len(wanted) + np.bincount(owner, others, len(groups)) - shared
        return np.divide(shared, union, out=np.zeros(len(groups)), where=union > 0)
