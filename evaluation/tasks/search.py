"""Item to item as one search would bring them together: items that answer the same search words.

Room: Evaluation. Source: SAIL-Embedding, section 4.1, whose items of one search are those that users clicked after one
query. Unusual: open data have no such clicks; the words that emojibase gives for searching, and the tags that artists
gave for it, stand for the queries.
"""

from __future__ import annotations

from collections.abc import Sequence

from .content import among
from .held_out import (
    ENGLISH,
    OF_ILLUSTRATIONS,
    OF_TUX_PAINT,
    UNSEEN_ILLUSTRATIONS,
    Row,
    illustrations,
    item_of,
    key_of,
    tuxpaint,
    words,
)
from .task import Retrieval, Task

SHARED = 2  # words: of one alone, such as "animal", too much is an answer


def search_words(rows: Sequence[Row], illustrated: Sequence[Row]) -> dict[str, frozenset[str]]:
    """By id: an item's name, its tags, and the keywords of the emoji of that name; not of items that have but a name.

    Args:
        rows: items of any source.
        illustrated: rows of `held_out.illustrations`.
    """
    keywords = {key_of(row): words(row["tags"]) for row in illustrated if row["id"].startswith("emoji/")}
    found = {row["id"]: words(row.get("tags", ())) | keywords.get(key_of(row), frozenset()) for row in rows}
    return {row["id"]: found[row["id"]] | {key_of(row)} for row in rows if found[row["id"]]}


def same_search(stamps: Sequence[Row], illustrated: Sequence[Row]) -> Retrieval:
    """Items with name and picture find those of another name that share `SHARED` search words with them.

    Those of the same name are no candidates: the title alone would tell.
    """
    rows = [*stamps, *illustrated]
    found = search_words(rows, illustrated)
    items = {row["id"]: item_of(row, "title", "image") for row in rows if row["id"] in found}
    keys = {row["id"]: key_of(row) for row in rows}
    return among(
        items,
        lambda one, other: len(found[one] & found[other]) >= SHARED,
        lambda one, other: keys[one] == keys[other],
    )


TASKS = [
    Task(
        name="SearchWordNeighbors",
        family="i2i",
        group="search",
        description=(
            "An item (English title and picture: a stamp, a drawing, an emoji) finds those of other names that the "
            f"same searches bring: they share {SHARED} search words or more, which are its name, its tags, and the "
            f"keywords of the emoji of that name. {UNSEEN_ILLUSTRATIONS} Of Tux Paint, held-out names alike."
        ),
        source=f"{OF_TUX_PAINT['source']}, {OF_ILLUSTRATIONS['source']}",
        licence="GPL-2.0-or-later, public domain and MIT",
        date=(OF_TUX_PAINT["date"][0], OF_ILLUSTRATIONS["date"][1]),
        languages=ENGLISH,
        query_modalities=["text", "image"],
        target_modalities=["text", "image"],
        main_score="ndcg_at_10",
        load=lambda: {"default": same_search(tuxpaint(), illustrations())},
    )
]
