"""Indexes of every kind beside FAISS's exact one called by itself and sentence-transformers' quantised search.

    python -m modeling_sail.evaluation.benchmarks index --size 100000
    python -m modeling_sail.evaluation.benchmarks index --embeddings items.parquet

Unusual: ours are built from a Parquet file and measure their own recall while they are built, which their seconds
include; the peers get ready arrays. Recall here is on queries that no side has seen, against FAISS's exact answer.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sentence_transformers.util.quantization import quantize_embeddings, semantic_search_faiss

from ...embedding_files import BATCH
from ...index import load_embeddings, load_index, unit
from ...index_build import build_index
from .figures import figure
from .turns import in_turn

TOP = 10
QUERIES, ALONE = 1000, 100  # in all, and those that are asked one at a time
KINDS: dict[str, dict[str, Any]] = {
    "flat": {"kind": "flat"},
    "flat-int8": {"kind": "flat", "precision": "int8"},
    "flat-binary": {"kind": "flat", "precision": "binary"},
    "ivf": {"kind": "ivf"},
    "ivf-int8": {"kind": "ivf", "precision": "int8"},
    "ivf-binary": {"kind": "ivf", "precision": "binary"},
    "ivf-pq": {"kind": "ivf-pq"},
    "opq": {"kind": "opq"},
    "hnsw": {"kind": "hnsw"},
}
DEFAULT = ("flat", "flat-int8", "flat-binary", "ivf", "ivf-int8", "opq")
EXACT = "faiss.IndexFlatIP"
QUANTISED = {"int8": "uint8", "binary": "ubinary"}  # sentence-transformers' names

Search = Callable[[np.ndarray], np.ndarray]  # (Q, D) queries to (Q, TOP) places


@dataclass(frozen=True)
class Side:
    """What one side reached: its search, seconds to build it, bytes an item of what is searched."""

    search: Search
    build_seconds: float
    bytes_per_item: float


def synthetic(size: int, dim: int, seed: int = 0) -> np.ndarray:
    """(size, dim) unit vectors in clusters of 100, the leading dimensions largest, as in Matryoshka models."""
    rng = np.random.default_rng(seed)
    scale = (1 / np.sqrt(1 + np.arange(dim) / 16)).astype(np.float32)
    centres = rng.standard_normal((max(1, size // 100), dim), np.float32) * scale
    near = centres[rng.integers(0, len(centres), size)]
    near += 0.7 * rng.standard_normal((size, dim), np.float32) * scale
    return unit(near)


def faiss_exact(items: np.ndarray) -> Side:
    """FAISS's exact index by itself."""
    begun = time.perf_counter()
    index = faiss.IndexFlatIP(items.shape[1])
    index.add(items)
    return Side(lambda queries: index.search(queries, TOP)[1], time.perf_counter() - begun, 4.0 * items.shape[1])


def quantised(items: np.ndarray, precision: str) -> Side:
    """sentence-transformers' own codes, exact search over them, rescoring at its default multiplier."""
    begun = time.perf_counter()
    ranges = np.vstack([items.min(axis=0), items.max(axis=0)])
    codes = quantize_embeddings(items, precision, ranges=ranges)  # type: ignore[arg-type]
    settings: dict[str, Any] = {"corpus_precision": precision, "ranges": ranges, "top_k": TOP}
    *_, index = semantic_search_faiss(items[:1], corpus_embeddings=codes, output_index=True, **settings)
    seconds = time.perf_counter() - begun
    size = (faiss.serialize_index_binary if precision == "ubinary" else faiss.serialize_index)(index).nbytes

    def search(queries: np.ndarray) -> np.ndarray:
        found, _ = semantic_search_faiss(queries, corpus_index=index, **settings)
        return np.array([[one["corpus_id"] for one in row] for row in found])

    return Side(search, seconds, size / len(items))


def ours(path: Path, out: Path, settings: dict[str, Any]) -> Side:
    """`sail index` and a search in what it wrote."""
    begun = time.perf_counter()
    manifest = build_index(path, out, **settings)
    seconds = time.perf_counter() - begun
    index = load_index(out)
    return Side(lambda queries: index.places(queries, TOP)[0], seconds, manifest["bytes_per_item"]["searched"])


def index_benchmark(
    size: int, dim: int, rounds: int, kinds: Sequence[str] = DEFAULT, embeddings: Path | None = None
) -> Iterator[dict[str, Any]]:
    """Figures of each kind beside its peers: recall@10, queries/s, bytes an item, seconds to build.

    Args:
        size: items of the synthetic set; with ``embeddings``, all of theirs are taken.
        dim: D of the synthetic set.
        rounds: of the searches that are timed.
        kinds: some of `KINDS`.
        embeddings: what `sail encode` wrote.

    Raises:
        ValueError: too few items, no dimension, or `load_embeddings`.
    """
    if embeddings is None and (size < 2 * TOP or dim < 1):
        raise ValueError(f"--size {size}, --dim {dim}: at least {2 * TOP} items and 1 dimension are needed.")
    vectors = synthetic(size + QUERIES, dim) if embeddings is None else unit(load_embeddings(embeddings)[1])
    held = QUERIES if embeddings is None else min(QUERIES, len(vectors) // 10)
    if not held or len(vectors) - held < 2 * TOP:
        raise ValueError(f"{len(vectors)} items are too few to hold queries out of; {3 * TOP} are needed")
    order = np.random.default_rng(0).permutation(len(vectors))
    items, queries = vectors[np.sort(order[held:])], vectors[order[:held]]
    peers = {EXACT: faiss_exact(items)}
    right = peers[EXACT].search(queries)
    source = f"N = {len(items)}, D = {items.shape[1]}, {'synthetic' if embeddings is None else embeddings.name}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "items.parquet"
        _write(path, items)
        for kind in kinds:
            beside = _beside(peers, items, KINDS[kind].get("precision", ""))
            side = ours(path, Path(folder) / kind, KINDS[kind])
            yield from _figures(f"{kind}, {source}", side, beside, queries, right, rounds)


def _write(path: Path, items: np.ndarray) -> None:
    """A file as `sail encode` writes it."""
    schema = pa.schema([("id", pa.string()), ("embedding", pa.list_(pa.float32())), ("status", pa.string())])
    with pq.ParquetWriter(path, schema, use_dictionary=["status"]) as file:
        for start in range(0, len(items), BATCH):
            rows = items[start : start + BATCH]
            ends = pa.array(np.arange(len(rows) + 1, dtype=np.int32) * items.shape[1])
            columns = [
                pa.array([str(start + place) for place in range(len(rows))]),
                pa.ListArray.from_arrays(ends, pa.array(rows.ravel())),
                pa.array(["ok"] * len(rows)),
            ]
            file.write_batch(pa.record_batch(columns, schema=schema))


def _beside(peers: dict[str, Side], items: np.ndarray, precision: str) -> dict[str, Side]:
    """The exact peer, and the one that quantises likewise; each is built once."""
    if precision not in QUANTISED:
        return {EXACT: peers[EXACT]}
    name = f"sentence_transformers semantic_search_faiss, {QUANTISED[precision]}"
    if name not in peers:
        peers[name] = quantised(items, QUANTISED[precision])
    return {EXACT: peers[EXACT], name: peers[name]}


def _figures(
    case: str, side: Side, beside: dict[str, Side], queries: np.ndarray, right: np.ndarray, rounds: int
) -> Iterator[dict[str, Any]]:
    sides = {"ours": side, **beside}

    def one_at_a_time(search: Search) -> None:
        for query in queries[:ALONE]:
            search(query[None])

    together = in_turn({name: lambda one=one: one.search(queries) for name, one in sides.items()}, rounds)
    alone = in_turn({name: lambda one=one: one_at_a_time(one.search) for name, one in sides.items()}, rounds)
    recalls = {name: _recall(found, right) for name, found in together.results.items()}
    for name, peer in beside.items():
        yield figure("index", case, f"recall@{TOP}", "", recalls["ours"], recalls[name], name)
        for said, turns, count in (("together", together, len(queries)), ("one at a time", alone, ALONE)):
            speeds = {key: min(count, len(queries)) / turns.seconds[key] for key in ("ours", name)}
            yield figure("index", case, f"queries {said}", "queries/s", speeds["ours"], speeds[name], name)
        yield figure("index", case, "searched", "bytes/item", side.bytes_per_item, peer.bytes_per_item, name)
        yield figure("index", case, "build", "s", side.build_seconds, peer.build_seconds, name)
    spread = max(together.spread, alone.spread)
    yield figure("index", case, "spread of the rounds, over the median", "", spread, None, "")


def _recall(found: np.ndarray, right: np.ndarray) -> float:
    return float((found[:, :, None] == right[:, None, :]).any(axis=1).mean())
