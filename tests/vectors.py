"""Vectors for tests of indexes: made, exactly searched, and written as `sail encode` writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from modeling_sail.index import unit


def clustered(items: int, dim: int = 48, seed: int = 0) -> np.ndarray:
    """(N, D) unit vectors around a centre for each 20, leading dimensions largest."""
    rng = np.random.default_rng(seed)
    scale = 1 / np.sqrt(1 + np.arange(dim) / 8)
    centres = rng.normal(size=(max(1, items // 20), dim)) * scale
    near = centres[rng.integers(0, len(centres), items)] + 0.7 * rng.normal(size=(items, dim)) * scale
    return unit(near.astype(np.float32))


def table_of(names, vectors, bad: set[int] = frozenset(), kind=None) -> pa.Table:
    rows = [None if place in bad else row for place, row in enumerate(vectors.tolist())]
    return pa.table(
        {
            "id": pa.array(names, pa.string()),
            "embedding": pa.array(rows, kind or pa.list_(pa.float32())),
            "status": ["error" if place in bad else "ok" for place in range(len(names))],
            "reason": ["broken" if place in bad else "" for place in range(len(names))],
        }
    )


def write(
    path: Path, vectors, bad: set[int] = frozenset(), kind=None, model: str | None = None, first: int = 0
) -> Path:
    table = table_of([f"item {first + place}" for place in range(len(vectors))], vectors, bad, kind)
    pq.write_table(table.replace_schema_metadata({"model": model} if model else None), path)
    return path


def exact(vectors, queries, top):
    """(Q, top) places and cosines by NumPy, in float64."""
    one, other = (part / np.linalg.norm(part.astype(np.float64), axis=1, keepdims=True) for part in (queries, vectors))
    scores = one @ other.T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    return order, np.take_along_axis(scores, order, axis=1)
