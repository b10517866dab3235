"""Item to label: categories at several levels, and names, of which an item has one among hundreds.

Room: Evaluation. Source: SAIL-Embedding, sections 3.2.2 and 4.1 (cls). Unusual: labels are texts and are embedded, so
no classifier is fitted, and labels that nobody has seen are no other matter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .held_out import ENGLISH, OF_GCOMPRIS, OF_TUX_PAINT, UNSEEN_STAMPS, Row, gcompris, item_of, spoken, tuxpaint
from .names import BOTH, item_to_name
from .task import Retrieval, Task

GROUP = "classification"


def labels_of(category: str) -> list[str]:
    """A label for each level of a folder: ``animals/birds`` is of "animals" and of "animals > birds"."""
    levels = [re.sub(r"^\d+ ", "", level.replace("_", " ")) for level in category.split("/")]
    return [" > ".join(levels[: depth + 1]) for depth in range(len(levels))]


def item_to_labels(rows: Sequence[Row]) -> Retrieval:
    """Whole items (title, picture, speech) find the labels of all levels of their category."""
    relevant = {row["id"]: frozenset(f"label/{label}" for label in labels_of(row["category"])) for row in rows}
    labels = sorted({label for row in rows for label in labels_of(row["category"])})
    return Retrieval(
        {row["id"]: item_of(row, "title", "image", "audio") for row in rows},
        {f"label/{label}": {"text": label} for label in labels},
        relevant,
    )


def picture_to_name(rows: Sequence[Row]) -> Mapping[str, Retrieval]:
    """By language of the names: English for all pictures, both names for those that are spoken."""
    return {"en": item_to_name(rows, ("en",), "image"), "en-fr": item_to_name(spoken(rows), BOTH, "image")}


def speech_to_name(rows: Sequence[Row]) -> Mapping[str, Retrieval]:
    """By language of the names; what is spoken is French."""
    known = spoken(rows)
    return {"fr": item_to_name(known, ("fr",), "audio"), "en-fr": item_to_name(known, BOTH, "audio")}


def both_to_name(rows: Sequence[Row]) -> Mapping[str, Retrieval]:
    """Picture and speech together."""
    return {"en-fr": item_to_name(spoken(rows), BOTH, "image", "audio")}


_COMMON: dict[str, Any] = {
    "family": "cls",
    "group": GROUP,
    "target_modalities": ["text"],
    "main_score": "recall_at_10",
}

TASKS = [
    Task(
        name="TuxPaintCategories",
        **_COMMON | {"main_score": "ndcg_at_10"},
        description=(
            "An item (English title, picture, its French name spoken where it is recorded) finds the labels of its "
            f'category at every level, such as "animals" and "animals > birds". {UNSEEN_STAMPS} Labels are trained on '
            "by no recipe."
        ),
        **OF_TUX_PAINT,
        languages={"default": ["eng-Latn", "fra-Latn"]},
        query_modalities=["text", "image", "audio"],
        load=lambda: {"default": item_to_labels(tuxpaint())},
    ),
    Task(
        name="TuxPaintPictureToName",
        **_COMMON,
        description=f"A picture finds its English name among all, or (en-fr) both names in one text. {UNSEEN_STAMPS}",
        **OF_TUX_PAINT,
        languages={"en": ["eng-Latn"], "en-fr": ["eng-Latn", "fra-Latn"]},
        query_modalities=["image"],
        load=lambda: picture_to_name(tuxpaint()),
    ),
    Task(
        name="TuxPaintSpeechToName",
        **_COMMON,
        description=f"A spoken French name finds its text, alone or (en-fr) after the English one. {UNSEEN_STAMPS}",
        **OF_TUX_PAINT,
        languages={"fr": ["fra-Latn"], "en-fr": ["eng-Latn", "fra-Latn"]},
        query_modalities=["audio"],
        load=lambda: speech_to_name(tuxpaint()),
    ),
    Task(
        name="TuxPaintPictureSpeechToName",
        **_COMMON,
        description=f"A picture with its French name spoken finds its names, English and French. {UNSEEN_STAMPS}",
        **OF_TUX_PAINT,
        languages={"en-fr": ["eng-Latn", "fra-Latn"]},
        query_modalities=["image", "audio"],
        load=lambda: both_to_name(tuxpaint()),
    ),
    Task(
        name="GComprisPictureToName",
        **_COMMON,
        description=(
            "A photograph or drawing of an early word (an animal, a colour, an instrument) finds its English name. No "
            "recipe trains on its pictures; its names, common words, are seen with other pictures."
        ),
        **OF_GCOMPRIS,
        languages=ENGLISH,
        query_modalities=["image"],
        load=lambda: {"default": item_to_name(gcompris(), ("en",), "image")},
    ),
]
