"""Query to item, retrieval: a name in some language finds items of picture and speech, a tag finds pictures.

Room: Evaluation. Source: SAIL-Embedding, section 4.1 (q2i).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .held_out import (
    ENGLISH,
    OF_ILLUSTRATIONS,
    OF_TUX_PAINT,
    UNSEEN_ILLUSTRATIONS,
    UNSEEN_STAMPS,
    Row,
    illustrations,
    item_of,
    spoken,
    tuxpaint,
    words,
)
from .names import BOTH, LANGUAGES, name_to_item
from .task import Retrieval, Task

GROUP = "retrieval"
AGREED = 2  # pictures that a tag needs: one that a single artist ever gave is often a slip


def names_to_items(rows: Sequence[Row]) -> Mapping[str, Retrieval]:
    """By language of the names, and "en-fr" for both names in one query; the items are the same in all subsets."""
    known = spoken(rows)
    subsets = {name: (language,) for name, (language, _) in LANGUAGES.items()} | {"-".join(BOTH): BOTH}
    return {name: name_to_item(known, languages, "image", "audio") for name, languages in subsets.items()}


def tag_to_picture(rows: Sequence[Row], agreed: int = AGREED) -> Retrieval:
    """Tags as queries: all pictures that have the tag are right."""
    found: dict[str, set[str]] = {}
    for row in rows:
        for word in sorted(words(row["tags"])):
            found.setdefault(word, set()).add(row["id"])
    asked = {word: bearers for word, bearers in sorted(found.items()) if len(bearers) >= agreed}
    return Retrieval(
        {f"tag/{word}": {"text": word} for word in asked},
        {row["id"]: item_of(row, "image") for row in rows},
        {f"tag/{word}": frozenset(bearers) for word, bearers in asked.items()},
    )


_COMMON: dict[str, Any] = {"family": "q2i", "group": GROUP, "query_modalities": ["text"]}

TASKS = [
    Task(
        name="TuxPaintNameToItem",
        **_COMMON,
        description=(
            "A name finds its items: a picture, and the French name spoken. The items are the same in every subset, "
            "only the language of the names differs (en-fr has both names in one query; in fr the query is what is "
            f"spoken). {UNSEEN_STAMPS}"
        ),
        **OF_TUX_PAINT,
        languages={name: [code] for name, (_, code) in LANGUAGES.items()} | {"en-fr": ["eng-Latn", "fra-Latn"]},
        target_modalities=["image", "audio"],
        main_score="recall_at_10",
        load=lambda: names_to_items(tuxpaint()),
    ),
    Task(
        name="TagToIllustration",
        **_COMMON,
        description=(
            f"A tag that {AGREED} pictures or more have finds all that have it. {UNSEEN_ILLUSTRATIONS} Artists give "
            "few tags: some pictures that count as wrong are not."
        ),
        **OF_ILLUSTRATIONS,
        languages=ENGLISH,
        target_modalities=["image"],
        main_score="ndcg_at_10",
        load=lambda: {"default": tag_to_picture(illustrations())},
    ),
]
