"""What an index reaches, against exact search for some of its own items, and how hard to search for it.

Unusual: recall counts cosines, not names, so that items that are equal cannot be missed. Vectors are read in blocks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from tqdm.auto import tqdm

from .index import FirstPass, Index, unit

BLOCK = 16_384  # rows read together; fixed, so that an index does not depend on how its items were cut into files
QUERIES, NEAR, FAR = 500, 10, 100  # held queries, and the two depths at which recall is measured
FACTOR, MOST = 8, 64  # candidates for each item asked for: of a first pass that is trusted, and at most
SAME = 1e-6  # two cosines that differ by less are a tie


def blocks(path: Path) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of a (N, D) float32 .npy file; read, not mapped."""
    known = np.load(path, mmap_mode="r")
    (items, dim), offset = known.shape, known.offset
    for start in range(0, items, BLOCK):
        rows = min(BLOCK, items - start)
        yield start, np.fromfile(path, np.float32, rows * dim, offset=offset + start * dim * 4).reshape(rows, dim)


# --- what is right: exact search for held items ---------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """Items that are searched for, without themselves.

    Attributes:
        path: of all vectors.
        places: (Q,) of the held items.
        queries: (Q, D).
        nearest: (Q, K) places of the true neighbours, K = min(100, N - 1).
        cosines: (Q, K), falling.
    """

    path: Path
    places: np.ndarray
    queries: np.ndarray
    nearest: np.ndarray
    cosines: np.ndarray

    def recall(self, index: Index, depth: int) -> float | None:
        """Share of the ``depth`` nearest that an index finds, ties either way; None where there is one item only."""
        depth = min(depth, self.nearest.shape[1])
        if depth < 1:
            return None
        places, cosines = _without_self(*index.places(self.queries, depth + 1), self.places)
        return float((cosines[:, :depth] >= self.cosines[:, depth - 1 : depth] - SAME).mean())


def held_items(path: Path, items: int, seed: int) -> Held:
    """Some of the items of a .npy file of (N, D) vectors, drawn by the seed, and their true neighbours."""
    places = np.sort(np.random.default_rng(seed).choice(items, min(QUERIES, items), replace=False))
    queries = np.load(path, mmap_mode="r")[places]
    nearest, cosines = _without_self(*exact_search(path, queries, min(FAR, items - 1) + 1, queries.shape[1]), places)
    return Held(path, places, queries, nearest, cosines)


def exact_search(path: Path, queries: np.ndarray, count: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """(Q, count) places and cosines of the nearest by the leading ``dim`` dimensions, block by block."""
    cut = unit(queries[:, :dim])
    places, cosines = np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
    items = len(np.load(path, mmap_mode="r"))
    for start, block in tqdm(blocks(path), total=-(-items // BLOCK), desc=f"exact search, {dim} dims"):
        near, found = faiss.knn(cut, unit(block[:, :dim]), min(count, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        places, cosines = np.hstack([places, found + start]), np.hstack([cosines, near])
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
        places, cosines = np.take_along_axis(places, order, axis=1), np.take_along_axis(cosines, order, axis=1)
    return places, cosines


def _without_self(places: np.ndarray, cosines: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(Q, K + 1) results to (Q, K): the query itself left out, or the last where equal items stand before it."""
    order = np.argsort(places == own[:, None], axis=1, kind="stable")[:, : places.shape[1] - 1]
    return np.take_along_axis(places, order, axis=1), np.take_along_axis(cosines, order, axis=1)


def inverted_lists(first: FirstPass) -> Any | None:
    """The part of a FAISS index that has inverted lists, if any."""
    if isinstance(first.index, faiss.IndexBinaryIVF):
        return first.index
    lists = None if first.binary else faiss.try_extract_index_ivf(first.index)
    return lists and faiss.downcast_index(lists)


# --- how hard to search ---------------------------------------------------------------------------------------------


def effort_of(first: FirstPass) -> tuple[Any, str, int] | None:
    """What says how hard FAISS searches: the object, its attribute and the most that makes sense."""
    lists = inverted_lists(first)
    if lists is not None:
        return lists, "nprobe", lists.nlist
    if hasattr(first.index, "hnsw"):
        return first.index.hnsw, "efSearch", min(2048, first.index.ntotal)
    return None


def _at(index: Index, factor: int, effort: int) -> Index:
    """The index with so many candidates and so much effort; FAISS's object is the same one."""
    assert index.first is not None
    knob = effort_of(index.first)
    if knob is not None:
        setattr(*knob[:2], effort)
    return replace(index, factor=factor)


def raise_effort(index: Index, held: Held, asked: float) -> Index:
    """Double effort or candidates, whichever finds more, until recall@10 is reached or both are at their most."""
    assert index.first is not None
    knob = effort_of(index.first)
    lists = inverted_lists(index.first)
    # So many lists hold what the deeper of the two asks for; with fewer, the answer would come from exact search.
    fewest = 1 if lists is None else min(lists.nlist, -(-2 * FAR * lists.nlist // len(index)))
    now, most = (index.factor, fewest), (MOST, knob[2] if knob else fewest)
    found = held.recall(_at(index, *now), NEAR)
    with tqdm(desc=f"recall@{NEAR}", unit="try") as bar:
        while found is not None and found < asked and now != most:
            steps = {(min(2 * now[0], most[0]), now[1]), (now[0], min(2 * now[1], most[1]))} - {now}
            found, now = max((held.recall(_at(index, *step), NEAR) or 0.0, step) for step in steps)
            bar.update(len(steps))
            bar.set_postfix_str(f"{found:.3f}")
    return _at(index, *now)


def milliseconds(index: Index, queries: np.ndarray) -> float:
    """Median time of a query alone, for 10 items."""
    times = []
    for query in queries:
        start = time.perf_counter()
        index.places(query[None], NEAR)
        times.append(time.perf_counter() - start)
    return round(1000 * float(np.median(times)), 3)
