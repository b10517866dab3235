"""Item to item, collaborative perception: films that the same people chose, told by what the films are.

Room: Evaluation. Source: SAIL-Embedding, section 4.1 (Copair). The pairs are those of `item_to_item.copair_targets`.
"""

from __future__ import annotations

from ..item_to_item import copair_targets
from .sequences import AFTER_THE_SPLIT, OF_FILMS, Behaviour, chosen, movielens
from .task import Retrieval, Task

MINIMUM = 5  # consumers of both films of a pair


def co_consumption(known: Behaviour, minimum: int = MINIMUM) -> Retrieval:
    """Each film finds the one that shares most of its consumers after the split.

    Args:
        known: of `sequences.movielens`.
        minimum: of `copair_targets`.

    Raises:
        ValueError: no two films have so many consumers and share one.
    """
    ids, corpus = known.items.ids, chosen(known)
    pairs = [(ids[one], ids[other]) for one, other in copair_targets(known.split.after, minimum=minimum)]
    return Retrieval(
        {one: corpus[one] for one, _ in pairs},
        corpus,
        {one: frozenset({other}) for one, other in pairs},
        {one: frozenset({one}) for one, _ in pairs},
    )


TASKS = [
    Task(
        name="MovieLensCoConsumption",
        family="i2i",
        group="collaborative perception",
        description=(
            "A film (title, director, cast, genres, year) finds the one that most shares its consumers (Jaccard "
            f"coefficient, {MINIMUM} consumers or more). {AFTER_THE_SPLIT}"
        ),
        **OF_FILMS,
        main_score="recall_at_50",
        load=lambda: {"default": co_consumption(movielens())},
    )
]
