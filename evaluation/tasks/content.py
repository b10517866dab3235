"""Item to item, content understanding: the same thing, the same category, the same tags, the same in another modality.

Room: Evaluation. Source: SAIL-Embedding, section 4.1, whose content tests are of films, brands and phones; these ask
the same of open pictures and sounds.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .held_out import (
    ENGLISH,
    OF_GCOMPRIS,
    OF_ILLUSTRATIONS,
    OF_TUX_PAINT,
    UNSEEN_ILLUSTRATIONS,
    UNSEEN_STAMPS,
    Row,
    gcompris,
    illustrations,
    item_of,
    key_of,
    spoken,
    tuxpaint,
    words,
)
from .task import Item, Retrieval, Task

ALIKE = 0.3  # Jaccard coefficient of tags: artists choose few, and seldom the same
STYLES = {"cartoon"}  # folders that say how a thing is drawn, not what it is
# Recordings that are silent, and one that stands for two animals.
MUTE = {
    f"tuxpaint/animals/{path}"
    for path in (
        "birds/nandou",
        "lizards/iguana",
        "mammals/badger",
        "mammals/giraffe",
        "mammals/rodents/beaver",
        "marsupials/wombat",
    )
}


# --- relations ------------------------------------------------------------------------------------------------------


def among(
    items: Mapping[str, Item], alike: Callable[[str, str], bool], barred: Callable[[str, str], bool] = operator.eq
) -> Retrieval:
    """Items that are to find those like them, never themselves; who is like nobody is no query, but can be found.

    Args:
        items: by id.
        alike: of two ids, symmetric.
        barred: of two ids, whether they are no candidates for each other; of one id with itself it must be.
    """
    out = {one: frozenset(other for other in items if barred(one, other)) for one in items}
    relevant = {one: frozenset(other for other in items if alike(one, other)) - out[one] for one in items}
    asked = {one: found for one, found in relevant.items() if found}
    return Retrieval({one: items[one] for one in asked}, items, asked, {one: out[one] for one in asked})


def same_name(rows: Sequence[Row]) -> Retrieval:
    """Pictures of one English name find each other."""
    keys = {row["id"]: key_of(row) for row in rows}
    return among({row["id"]: item_of(row, "image") for row in rows}, lambda one, other: keys[one] == keys[other])


def category_of(row: Row) -> str:
    """The first two levels of a stamp's folders, without the style: "animals/birds"."""
    return "/".join([level for level in row["category"].split("/") if level not in STYLES][:2])


def same_category(rows: Sequence[Row]) -> Retrieval:
    """Whole items (title, picture, speech) of one category find each other."""
    categories = {row["id"]: category_of(row) for row in rows}
    items = {row["id"]: item_of(row, "title", "image", "audio") for row in rows}
    return among(items, lambda one, other: categories[one] == categories[other])


def same_tags(rows: Sequence[Row], threshold: float = ALIKE) -> Retrieval:
    """Pictures find those whose tags are like theirs by the Jaccard coefficient."""
    tags = {row["id"]: words(row["tags"]) for row in rows}

    def alike(one: str, other: str) -> bool:
        return len(tags[one] & tags[other]) >= threshold * len(tags[one] | tags[other]) > 0

    return among({row["id"]: item_of(row, "image") for row in rows}, alike)


def picture_to_speech(rows: Sequence[Row]) -> Retrieval:
    """A picture finds the recordings of its name, those of other pictures of that name too."""
    rows = spoken(rows)
    return _across(
        {row["id"]: (key_of(row), item_of(row, "image")) for row in rows},
        {f"{row['id']}/speech": (key_of(row), item_of(row, "audio")) for row in rows},
    )


def picture_to_sound(stamps: Sequence[Row], named: Sequence[Row]) -> Retrieval:
    """A picture finds what it sounds like: rows of Tux Paint with an "effect", and of GCompris with a "sound"."""
    known = [row for row in stamps if not row["category"].startswith("symbols") and row["id"] not in MUTE]
    sounds = [(row, row["effect"]) for row in known] + [(row, row["sound"]) for row in named]
    sounds = [(row, path) for row, path in sounds if path]
    return _across(
        {row["id"]: (key_of(row), item_of(row, "image")) for row, _ in sounds},
        {f"{row['id']}/sound": (key_of(row), {"audio": path}) for row, path in sounds},
    )


def _across(queries: Mapping[str, tuple[str, Item]], corpus: Mapping[str, tuple[str, Item]]) -> Retrieval:
    """Keys and items: those of one key find each other; a query that finds nothing is none."""
    by_key: dict[str, set[str]] = {}
    for name, (key, _) in corpus.items():
        by_key.setdefault(key, set()).add(name)
    asked = {name: item for name, (key, item) in queries.items() if key in by_key}
    relevant = {name: frozenset(by_key[queries[name][0]]) for name in asked}
    return Retrieval(asked, {name: item for name, (_, item) in corpus.items()}, relevant)


# --- tasks ----------------------------------------------------------------------------------------------------------

GROUP = "content understanding"
_COMMON: dict[str, Any] = {"family": "i2i", "group": GROUP}

TASKS = [
    Task(
        name="TuxPaintSameName",
        **_COMMON,
        description=(
            "A picture finds the other pictures of the same name: a drawing and a photograph, two of a kind, a letter "
            f"in lower and upper case, filled and outlined (many are letters). {UNSEEN_STAMPS}"
        ),
        **OF_TUX_PAINT,
        languages=ENGLISH,
        query_modalities=["image"],
        target_modalities=["image"],
        main_score="recall_at_10",
        load=lambda: {"default": same_name(tuxpaint())},
    ),
    Task(
        name="TuxPaintSameCategory",
        **_COMMON,
        description=(
            "An item (English title, picture, its French name spoken where it is recorded) finds those of its category "
            f"(two levels of folders, as animals/birds). {UNSEEN_STAMPS} Other things of the category are trained on."
        ),
        **OF_TUX_PAINT,
        languages={"default": ["eng-Latn", "fra-Latn"]},
        query_modalities=["text", "image", "audio"],
        target_modalities=["text", "image", "audio"],
        main_score="ndcg_at_10",
        load=lambda: {"default": same_category(tuxpaint())},
    ),
    Task(
        name="IllustrationSameTags",
        **_COMMON,
        description=(
            "A picture finds those with like tags (openclipart's, or an emoji's keywords): a Jaccard coefficient of "
            f"{ALIKE} or more. {UNSEEN_ILLUSTRATIONS} Few: differences of some points are noise."
        ),
        **OF_ILLUSTRATIONS,
        languages=ENGLISH,
        query_modalities=["image"],
        target_modalities=["image"],
        main_score="ndcg_at_10",
        load=lambda: {"default": same_tags(illustrations())},
    ),
    Task(
        name="TuxPaintPictureToSpeech",
        **_COMMON,
        description=f"A picture finds its French name, spoken. {UNSEEN_STAMPS}",
        **OF_TUX_PAINT,
        languages={"default": ["fra-Latn"]},
        query_modalities=["image"],
        target_modalities=["audio"],
        main_score="recall_at_10",
        load=lambda: {"default": picture_to_speech(tuxpaint())},
    ),
    Task(
        name="PictureToSound",
        **_COMMON,
        description=(
            "A picture of an animal, an instrument, a tool finds what it sounds like. No recipe trains on such sounds "
            f"at all; of Tux Paint: {UNSEEN_STAMPS[0].lower()}{UNSEEN_STAMPS[1:]} Few: differences of some points are "
            "noise."
        ),
        **OF_GCOMPRIS
        | {
            "source": f"{OF_TUX_PAINT['source']}, {OF_GCOMPRIS['source']}",
            "licence": "GPL-2.0-or-later and GPL-3.0-or-later",
        },
        languages=ENGLISH,
        query_modalities=["image"],
        target_modalities=["audio"],
        main_score="recall_at_10",
        load=lambda: {"default": picture_to_sound(tuxpaint(), gcompris())},
    ),
]
