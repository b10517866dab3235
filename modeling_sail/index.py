"""Exact search over an encoded Parquet file with FAISS."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.parquet as pq
import torch

from .sentence_transformer_sail import SailSentenceTransformer


@dataclass(frozen=True)
class Index:
    """Ids of the items that could be encoded, and their normalised vectors in a FAISS inner-product index."""

    names: list[str]
    vectors: faiss.Index


def load_embeddings(path: Path) -> tuple[list[str], np.ndarray]:
    """Ids and (N, D) float32 vectors of what `sail encode` wrote; rows with status "error" are left out.

    Raises:
        ValueError: no file, another schema, or no good row.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}; write one with `sail encode`")
    table = pq.read_table(path)
    missing = {"id", "embedding", "status"} - set(table.column_names)
    if missing:
        raise ValueError(f"{path} lacks the columns {sorted(missing)}; write one with `sail encode`")
    rows = [row for row in table.to_pylist() if row["status"] == "ok"]
    if not rows:
        raise ValueError(f"{path} has no item that could be encoded; its column 'reason' says why")
    return [row["id"] for row in rows], np.asarray([row["embedding"] for row in rows], dtype=np.float32)


def load_index(path: Path) -> Index:
    """An index of what `sail encode` wrote.

    Raises:
        ValueError: as `load_embeddings`.
    """
    return index_of(*load_embeddings(path))


def index_of(names: list[str], vectors: np.ndarray) -> Index:
    """An index of N names and their (N, D) float32 normalised vectors."""
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors))
    return Index(names, index)


def search(
    module: SailSentenceTransformer, index: Index, queries: list[Any], instruction: str = "", top: int = 10
) -> list[list[tuple[str, float]]]:
    """The ``top`` nearest (id, cosine) of each query, best first.

    Raises:
        ValueError: ``top`` below 1, or the index was written with another model's dimension.
    """
    if top < 1:
        raise ValueError(f"top={top} must be at least 1")
    with torch.inference_mode():
        vectors = module(module.preprocess(queries, prompt=instruction))["sentence_embedding"]
    dim = index.vectors.d
    if dim > vectors.shape[1]:
        raise ValueError(
            f"the index has {dim} dimensions, the model only {vectors.shape[1]}: not the model it was made with"
        )
    cut = torch.nn.functional.normalize(vectors[:, :dim], dim=-1).float().cpu().numpy()
    scores, places = index.vectors.search(np.ascontiguousarray(cut), min(top, len(index.names)))
    return [
        [(index.names[place], float(score)) for place, score in zip(row, found, strict=True)]
        for row, found in zip(places, scores, strict=True)
    ]
