"""Sequence to item on MovieLens, vanilla and filtered: the cases of evaluation/sequences.py as tasks.

Room: Evaluation. Source: SAIL-Embedding, section 4.3. Unusual: a query is a sequence of items; what its user had
consumed before the target is no candidate, as in `sequences.target_ranks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ...training.data.movielens import load_movielens
from ...training.recommendation.behaviour import Interactions, Items, Split, split_by_time
from ...training.recommendation.interests import Pair
from ...training.recommendation.validation import validate
from ..sequences import consumed_before, filtered_cases, vanilla_cases
from .held_out import ENGLISH
from .task import Item, Retrieval, Task


class Behaviour(NamedTuple):
    """Validated events, the items that they speak of, and the events split by time, as `mini-cre` is trained with."""

    interactions: Interactions
    items: Items
    split: Split


@lru_cache(maxsize=1)
def movielens() -> Behaviour:
    """MovieLens-100K, the last fifth of the events held out.

    Raises:
        RuntimeError: a package cannot be fetched.
    """
    events, films = load_movielens()
    items = Items.from_table(films)
    interactions, _ = validate(Interactions.from_table(events), items)
    return Behaviour(interactions, items, split_by_time(interactions))


def content_of(items: Items, place: int) -> Item:
    """An item without its id."""
    return {name: value for name, value in items.records[place].items() if name != "id"}


def chosen(known: Behaviour) -> dict[str, Item]:
    """The items that anybody has an event of, by id."""
    return {known.items.ids[place]: content_of(known.items, place) for place in np.unique(known.interactions.item)}


def as_retrieval(known: Behaviour, cases: Sequence[Pair]) -> Retrieval:
    """Cases as queries ``{"sequence": items}`` with one relevant item each, and what is no candidate for its user."""
    ids, users = known.items.ids, known.interactions.user_ids
    corpus = chosen(known)
    names = [f"{users[case.user]}/{ids[case.target]}" for case in cases]
    before = consumed_before(cases, known.interactions)
    return Retrieval(
        {
            name: {"sequence": [corpus[ids[item]] for item in case.sequence]}
            for name, case in zip(names, cases, strict=True)
        },
        corpus,
        {name: frozenset({ids[case.target]}) for name, case in zip(names, cases, strict=True)},
        {name: frozenset(ids[item] for item in items) for name, items in zip(names, before, strict=True)},
    )


def vanilla(known: Behaviour) -> Retrieval:
    """`vanilla_cases` with the defaults: five targets a user, ten films before each, drawn of a hundred."""
    return as_retrieval(known, vanilla_cases(known.interactions, known.split.time))


def filtered(known: Behaviour) -> Retrieval:
    """`filtered_cases` with the defaults: ten films before a target that have its genres, or half of them."""
    return as_retrieval(known, filtered_cases(known.interactions, known.split.time, labels=known.items.labels))


GROUP = "sequences"
# What tasks on films say of their data: all of them are of text.
OF_FILMS: dict[str, Any] = {
    "source": "MovieLens-100K (in recbole's wheel), with directors and cast of bokeh-sampledata's movies.db",
    "licence": "GroupLens: for research, no redistribution; CC0",
    "date": ("1997-09-20", "1998-04-22"),
    "languages": ENGLISH,
    "query_modalities": ["text"],
    "target_modalities": ["text"],
}
AFTER_THE_SPLIT = (
    "Right answers are of events after the split at four fifths of all; `mini` learns nothing of films' behaviour, "
    "`mini-cre` from the events before the split, and from the films' texts."
)
_COMMON: dict[str, Any] = {**OF_FILMS, "family": "i2i", "group": GROUP, "main_score": "recall_at_25"}

TASKS = [
    Task(
        name="MovieLensVanilla",
        description=(
            "Ten films that a user chose, drawn of the last hundred, find the next one among all but those that the "
            f"user had seen (title, director, cast, genres, year). {AFTER_THE_SPLIT}"
        ),
        load=lambda: {"default": vanilla(movielens())},
        **_COMMON,
    ),
    Task(
        name="MovieLensFiltered",
        description=(
            "The newest ten films of a user that have the genres of the next one, or half of them, find it among all "
            f"but those that the user had seen. The filter looks at the target. {AFTER_THE_SPLIT}"
        ),
        load=lambda: {"default": filtered(movielens())},
        **_COMMON,
    ),
]
