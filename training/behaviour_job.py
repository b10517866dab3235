"""`sail behaviour`: what recommendation/prepare.py makes, from files or MovieLens, by the model in a folder.

Unusual: items are embedded without an instruction, as one embedding of an item serves recall and ranking alike.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..encode_job import require_folder
from ..modeling_sail import SailEmbeddingModel
from .build import load_built
from .collate import Collator
from .data.movielens import load_movielens
from .recommendation.behaviour import Interactions, Items, load_interactions, load_items
from .recommendation.prepare import Embed, Settings, known_behaviour, prepare
from .survey import PART, embed, model_hash

MOVIELENS = "movielens"


def read_behaviour(interactions: str, items: str | None = None) -> tuple[Interactions, Items]:
    """The two tables: of Parquet files or folders, or of the built-in MovieLens-100K ("movielens", without items).

    Raises:
        FileNotFoundError: nothing is there. ValueError: a table is of another form, or the items are missing.
    """
    if interactions == MOVIELENS and items is None:
        events, films = load_movielens()
        return Interactions.from_table(events), Items.from_table(films)
    if items is None:
        raise ValueError(f"{interactions} comes without a table of items; name one, or take {MOVIELENS!r}.")
    return load_interactions(interactions), load_items(items)


def embedder(model: SailEmbeddingModel, collate: Collator, progress: bool = True) -> Embed:
    """Items to (I, D) normalised embeddings; an item that cannot be read has a row of zeros, and a warning its reason.

    Args:
        model, collate: as in `survey.embed`.
        progress: show a bar.
    """

    def run(items: Sequence[dict[str, Any]]) -> np.ndarray:
        found = []
        starts = tqdm(range(0, len(items), PART), "embed items", unit="part", disable=not progress)
        for start in starts:
            vectors, reasons = embed(model, collate, items[start : start + PART])
            found.append(vectors.numpy())
            for item, reason in zip(items[start : start + PART], reasons, strict=True):
                if reason:
                    tqdm.write(f"{item['id']} has no embedding: {reason}")
        return np.concatenate(found)

    return run


def run_behaviour(interactions: str, items: str | None, model: Path, out: Path, settings: Settings) -> dict[str, Any]:
    """`prepare` of files or a built-in source by the model in a folder, on the GPU where there is one.

    Raises:
        FileNotFoundError: no such tables. ValueError: no such model; `read_behaviour`, `known_behaviour`, `prepare`.
    """
    require_folder(model)
    known = known_behaviour(*read_behaviour(interactions, items), settings, now=time.time())
    loaded, processor = load_built(model)
    loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    embed_items = embedder(loaded, Collator(processor))
    return prepare(known, embed_items, out, settings, embedded_by=model_hash(loaded))
