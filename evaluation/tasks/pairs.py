"""Query to item, pair classification: does this item answer this query? The cosine is the score, AUC the measure.

Room: Evaluation. Source: SAIL-Embedding, section 4.2. Unusual: half of the wrong names are of the item's own category,
which a model that only knows categories cannot tell from the right ones.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from .content import category_of
from .held_out import OF_TUX_PAINT, UNSEEN_STAMPS, Row, item_of, key_of, spoken, tuxpaint
from .task import Pairs, Task


def name_item_pairs(rows: Sequence[Row], seed: int = 0) -> Pairs:
    """Each item with its English name, and with that of another: by turns one of its category and one of any.

    Args:
        rows: of Tux Paint; an item is the picture and the French name spoken. Where a category has no other name, the
            other one is of any.
        seed: of the draws.

    Raises:
        ValueError: all rows have one name.
    """
    rows = spoken(rows)
    keys, categories = [key_of(row) for row in rows], [category_of(row) for row in rows]
    if len(set(keys)) < 2:
        raise ValueError(f"The {len(rows)} spoken rows have one name; a wrong name needs another: give more rows.")
    queries, targets = [], []
    for place, row in enumerate(rows):
        others = [other for other, key in enumerate(keys) if key != keys[place]]
        near = [other for other in others if categories[other] == categories[place]]
        wrong = random.Random(f"{seed}:{row['id']}").choice(near if near and place % 2 else others)
        queries += [{"text": row["names"]["en"]}, {"text": rows[wrong]["names"]["en"]}]
        targets += [item_of(row, "image", "audio")] * 2
    return Pairs(queries, targets, [1, 0] * len(rows))


TASKS = [
    Task(
        name="TuxPaintNameItemPairs",
        family="q2i",
        group="pair classification",
        description=(
            "Is this English name that of this item (picture, French name spoken)? As many wrong names as right ones, "
            f"half of them drawn from the item's category. {UNSEEN_STAMPS}"
        ),
        **OF_TUX_PAINT,
        languages={"default": ["eng-Latn", "fra-Latn"]},
        query_modalities=["text"],
        target_modalities=["image", "audio"],
        main_score="auc",
        load=lambda: {"default": name_item_pairs(tuxpaint())},
    )
]
