"""Search over encoded items: exact in memory, or a folder that `sail index` built for as many as a disk holds.

Unusual: whatever finds the candidates (all vectors, or FAISS codes of their leading dimensions), cosines are always of
the full vectors, and those stay on disk, memory-mapped. An index answers with min(top, N) items, never fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import torch

from .checked_files import check_files
from .embedding_files import EmbeddingFiles, open_embeddings, read_manifest
from .sentence_transformer_sail import SailSentenceTransformer

FORMAT, VERSION = "sail-index", 2
VECTORS, IDS, ID_ENDS, FIRST, MANIFEST = "vectors.npy", "ids.npy", "id_ends.npy", "first.faiss", "manifest.json"
SPARE = 8  # candidates beyond those asked for: FAISS's last digit may order near ties otherwise than the exact cosine
GATHERED = 1 << 26  # bytes of full vectors that are looked at together


@dataclass(frozen=True)
class FirstPass:
    """Finds candidates by the leading dimensions of unit vectors.

    Attributes:
        index: FAISS's, of inner products or, of sign bits, of Hamming distances.
        dim: leading dimensions that it sees, normalised again.
    """

    index: Any
    dim: int

    @property
    def binary(self) -> bool:
        """Whether it holds sign bits."""
        return isinstance(self.index, faiss.IndexBinary)

    def view(self, vectors: np.ndarray) -> np.ndarray:
        """(n, D) unit vectors as the FAISS index takes them: (n, d) float32, or (n, d / 8) uint8 of sign bits."""
        cut = vectors[:, : self.dim]
        if self.binary:
            return np.packbits(cut > 0, axis=1)  # a last byte that is not full ends in zeros on both sides
        padded = np.zeros((len(cut), self.index.d), np.float32)  # product codes need a multiple of their parts
        padded[:, : self.dim] = unit(cut) if self.dim < vectors.shape[1] else cut
        return padded

    def candidates(self, queries: np.ndarray, count: int) -> np.ndarray:
        """(Q, count) places of the items that seem nearest; -1 where it found fewer."""
        return self.index.search(self.view(queries), count)[1]


@dataclass(frozen=True)
class Index:
    """Ids of N items and their unit vectors, with or without a first pass.

    Attributes:
        ids: large strings.
        vectors: (N, D) float32, normalised; an array, or a memory map.
        first: finds the candidates; None compares with every vector.
        factor: candidates of the first pass for each item asked for.
        manifest: what is known of how it was made; ``model`` is the hash of the embeddings' model.
    """

    ids: pa.LargeStringArray
    vectors: np.ndarray
    first: FirstPass | None = None
    factor: int = 1
    manifest: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dim(self) -> int:
        """D."""
        return self.vectors.shape[1]

    def search(self, vectors: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        """The nearest items of each query, best first; equal cosines in the items' order.

        Args:
            vectors: (Q, D), of any length but zero.
            top: how many; K = min(top, N) are found.

        Returns:
            (Q, K) ids, as objects, and (Q, K) float32 cosines.

        Raises:
            ValueError: ``top`` below 1, another D, or numbers that are not finite.
        """
        places, cosines = self.places(vectors, top)
        ids = self.ids.take(pa.array(places.ravel())).to_numpy(zero_copy_only=False)
        return np.asarray(ids, dtype=object).reshape(places.shape), cosines

    def places(self, vectors: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        """As `search`, with (Q, K) int64 places of the items in place of their ids."""
        if top < 1:
            raise ValueError(f"top={top} must be at least 1")
        queries = self._checked(vectors)
        count = min(len(self), top * self.factor + SPARE)
        step = max(1, GATHERED // (count * self.dim * 4))
        found = [self._nearest(queries[i : i + step], min(top, len(self)), count) for i in range(0, len(queries), step)]
        if not found:
            return np.empty((0, min(top, len(self))), np.int64), np.empty((0, min(top, len(self))), np.float32)
        places, cosines = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return places, cosines

    def _checked(self, vectors: np.ndarray) -> np.ndarray:
        queries = np.asarray(vectors, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(f"queries have the shape {queries.shape}; (number, {self.dim}) is needed")
        if not np.isfinite(queries).all():
            bad = int(np.isfinite(queries).all(axis=1).argmin())
            raise ValueError(f"query {bad} holds numbers that are not finite; leave it out")
        return unit(queries)

    def _nearest(self, queries: np.ndarray, top: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        if self.first is None:
            places = faiss.knn(queries, self.vectors, count, metric=faiss.METRIC_INNER_PRODUCT)[1]
        else:
            places = self.first.candidates(queries, count)
            short = np.flatnonzero((places >= 0).sum(axis=1) < top)  # too few lists or links were followed
            if len(short):
                places[short] = faiss.knn(queries[short], self.vectors, count, metric=faiss.METRIC_INNER_PRODUCT)[1]
        return self._ranked(queries, places, top)

    def _ranked(self, queries: np.ndarray, places: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        """(Q, top) places and exact cosines of (Q, count) candidates."""
        places = np.sort(places, axis=1)  # equal cosines then come in the items' order; a disk is read forwards
        step = max(1, GATHERED // (len(queries) * self.dim * 4))
        # Not a matrix product: its sums, and so ties, depend on what stands beside a vector.
        cosines = np.concatenate(
            [
                np.einsum("qd,qcd->qc", queries, self.vectors[np.maximum(places[:, i : i + step], 0)])
                for i in range(0, places.shape[1], step)
            ],
            axis=1,
        )  # (Q, count)
        order = np.argsort(np.where(places < 0, np.inf, -cosines), axis=1, kind="stable")[:, :top]
        return np.take_along_axis(places, order, axis=1), np.take_along_axis(cosines, order, axis=1)


def unit(vectors: np.ndarray) -> np.ndarray:
    """(n, D) float32 vectors at length 1; zeros stay zeros."""
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))[:, None]
    return vectors / np.maximum(lengths, np.float32(1e-30))


# --- where an index comes from --------------------------------------------------------------------------------------


def load_embeddings(path: Path) -> tuple[list[str], np.ndarray]:
    """Ids and (N, D) float32 vectors of what `sail encode` wrote; rows with status "error" are left out.

    Raises:
        ValueError: as `open_embeddings`.
    """
    return _in_memory(open_embeddings(path))


def _in_memory(files: EmbeddingFiles) -> tuple[list[str], np.ndarray]:
    vectors, row = np.empty((files.ok, files.dim), np.float32), 0
    for batch in files.vectors():
        vectors[row : row + len(batch)] = batch
        row += len(batch)
    return [name for batch in files.ids() for name in batch.to_pylist()], vectors


def index_of(names: Sequence[str], vectors: np.ndarray, manifest: dict[str, Any] | None = None) -> Index:
    """An exact index of N names and their (N, D) vectors, in memory."""
    if len(names) != len(vectors):
        raise ValueError(f"{len(names)} names for {len(vectors)} vectors; one each is needed")
    return Index(pa.array(names, pa.large_string()), unit(np.asarray(vectors, np.float32)), manifest=manifest or {})


def load_index(path: Path, verify: bool = False) -> Index:
    """An index: of what `sail encode` wrote, exact and in memory, or the folder that `sail index` built.

    Args:
        path: a Parquet file or a folder.
        verify: hash all files of a folder of `sail index`. Otherwise that is done for what FAISS reads and for files
            up to 64 MiB, larger ones are told by their sizes and places spread over them (see `checked_files`).

    Raises:
        ValueError: as `open_embeddings`; a folder of `sail index` that is broken or of another version.
    """
    path = Path(path)
    manifest = read_manifest(path / MANIFEST)
    if manifest.get("format") == FORMAT:
        return _load_folder(path, manifest, verify)
    files = open_embeddings(path)
    return index_of(*_in_memory(files), manifest={"model": files.model})


def _load_folder(folder: Path, manifest: dict[str, Any], verify: bool) -> Index:
    if manifest.get("version") != VERSION:
        raise ValueError(f"{folder} is an index of version {manifest.get('version')}, not {VERSION}; build it again")
    try:
        check_files(folder, {name: manifest["files"][name] for name in (VECTORS, IDS, ID_ENDS)}, verify)
        ids, vectors = map_items(folder)
        if vectors.shape != (manifest["items"], manifest["dim"]):
            raise ValueError(f"{VECTORS} has the shape {vectors.shape}")
        first = None if manifest["first"] is None else _load_first(folder, manifest, len(vectors))
        return Index(ids, vectors, first, int(manifest["parameters"]["factor"]), manifest)
    except (KeyError, TypeError, AttributeError, ValueError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise ValueError(f"{folder} is a broken index ({reason[0]}); build it again with `sail index`") from error


def map_items(folder: Path) -> tuple[pa.LargeStringArray, np.ndarray]:
    """Ids and (N, D) vectors of an index folder, memory-mapped."""
    vectors, ends, text = (np.load(folder / name, mmap_mode="r") for name in (VECTORS, ID_ENDS, IDS))
    if len(ends) != len(vectors) + 1 or ends[-1] != len(text):
        raise ValueError(f"{VECTORS} and {IDS} do not fit together")
    return pa.LargeStringArray.from_buffers(len(vectors), pa.py_buffer(ends), pa.py_buffer(text)), vectors


def _load_first(folder: Path, manifest: dict[str, Any], items: int) -> FirstPass:
    known = manifest["first"]
    check_files(folder, {FIRST: manifest["files"][FIRST]}, whole=True)  # FAISS may crash on a broken file
    read = faiss.read_index_binary if known["binary"] else faiss.read_index
    index = read(str(folder / FIRST))
    if index.ntotal != items:
        raise ValueError(f"{FIRST} holds {index.ntotal} items, not {items}")
    return FirstPass(index, int(known["dim"]))


def require_model(index: Index, digest: str) -> None:
    """Refuse a model that did not make the items' embeddings; an index that does not say which is let through.

    Raises:
        ValueError: the hashes differ.
    """
    known = index.manifest.get("model")
    if known and known != digest:
        raise ValueError(
            f"the items were encoded with another model (hash {known[:12]}) than this one ({digest[:12]}): "
            "name that model, or encode the items again"
        )


# --- queries --------------------------------------------------------------------------------------------------------


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
    if index.dim > vectors.shape[1]:
        raise ValueError(
            f"the index has {index.dim} dimensions, the model only {vectors.shape[1]}: not the model it was made with"
        )
    ids, cosines = index.search(vectors[:, : index.dim].float().cpu().numpy(), top)
    return [list(zip(*pair, strict=True)) for pair in zip(ids.tolist(), cosines.tolist(), strict=True)]
