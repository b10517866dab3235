"""Fitting semantic IDs (SAIL-Embedding, section 4.4.6), and a report on what they keep.

k-means, OPQ and product quantization are FAISS's. Unusual: `sail sid fit` reports on items that the codebooks were not
fitted on, as what is fitted flatters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ..index import load_embeddings
from ..semantic_ids_sail import SCHEMES, SemanticIDs
from .files import write_json

ROUNDS = 25  # of k-means


def fit_semantic_ids(
    embeddings: Tensor,
    *,
    scheme: str = "rq-opq",
    sizes: Sequence[int] = (256, 256),
    parts: int = 4,
    part_bits: int = 8,
    seed: int = 0,
) -> SemanticIDs:
    """Codebooks of (N, D) embeddings.

    Args:
        embeddings: N items; more than the largest codebook has entries.
        scheme: "kmeans" (one level), "rq" (residual k-means) or "rq-opq" (then product codes of the rotated rest).
        sizes: entries of each residual level.
        parts: product codes; must divide D.
        part_bits: 2 ** part_bits entries of each.
        seed: of k-means.

    Raises:
        ValueError: an unknown scheme; sizes that do not fit it; too few embeddings, or ones that are not finite.
    """
    values = _checked(embeddings, scheme, sizes, parts, part_bits)
    residual, rest = [], values
    for level, size in enumerate(sizes):
        book = _kmeans(rest, size, seed + level)
        residual.append(book)
        rest = rest - book[_assign(rest, book)]
    tensors = [torch.from_numpy(book) for book in residual]
    if scheme != "rq-opq":
        return SemanticIDs(tensors, scheme=scheme)
    rotation, product = _opq(rest, parts, part_bits)
    return SemanticIDs(tensors, torch.from_numpy(product), torch.from_numpy(rotation), scheme)


def _checked(embeddings: Tensor, scheme: str, sizes: Sequence[int], parts: int, part_bits: int) -> np.ndarray:
    if scheme not in SCHEMES:
        raise ValueError(f"scheme={scheme!r} is not one of {', '.join(SCHEMES)}.")
    if not sizes or min(sizes) < 2 or (scheme == "kmeans" and len(sizes) != 1):
        raise ValueError(
            f"sizes={tuple(sizes)} must be entries of each level, each at least 2; 'kmeans' has one level."
        )
    if embeddings.dim() != 2 or not bool(embeddings.isfinite().all()):
        raise ValueError(f"Embeddings of shape {tuple(embeddings.shape)} must be (N, D) and finite.")
    needed = max(*sizes, 2**part_bits if scheme == "rq-opq" else 0)
    if len(embeddings) < needed:
        raise ValueError(
            f"{len(embeddings)} embeddings cannot fill a codebook of {needed}; give more, or smaller books."
        )
    if scheme == "rq-opq" and (parts < 1 or embeddings.shape[1] % parts or not 1 <= part_bits <= 16):
        raise ValueError(
            f"parts={parts} must divide {embeddings.shape[1]} dimensions, part_bits={part_bits} be 1 to 16."
        )
    return np.ascontiguousarray(embeddings.detach().cpu().float().numpy())


def _kmeans(values: np.ndarray, size: int, seed: int) -> np.ndarray:
    means = faiss.Kmeans(values.shape[1], size, niter=ROUNDS, seed=seed, min_points_per_centroid=1)
    means.train(values)
    return means.centroids


def _assign(values: np.ndarray, book: np.ndarray) -> np.ndarray:
    index = faiss.IndexFlatL2(values.shape[1])
    index.add(book)
    return index.search(values, 1)[1][:, 0]


def _opq(values: np.ndarray, parts: int, part_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(D, D) rotation and (M, K, D / M) codebooks of what residual levels left."""
    dims = values.shape[1]
    matrix = faiss.OPQMatrix(dims, parts)
    matrix.pq = quantizer = faiss.ProductQuantizer(dims, parts, part_bits)
    matrix.train(values)
    rotation = faiss.vector_to_array(matrix.A).reshape(dims, dims)
    quantizer.train(np.ascontiguousarray(values @ rotation.T))
    books = faiss.vector_to_array(quantizer.centroids).reshape(parts, 2**part_bits, dims // parts)
    return rotation.copy(), books.copy()


# --- files ---------------------------------------------------------------------------------------------------------


def fit_file(path: Path, folder: Path, settings: Mapping[str, Any], held_out: float, seed: int = 0) -> dict[str, Any]:
    """Fit codebooks on what `sail encode` wrote, and keep them in a model's folder with a report.

    Args:
        path: of the embeddings.
        folder: the model's; gets ``semantic_ids.safetensors`` and ``semantic_ids.json``.
        settings: of `fit_semantic_ids`.
        held_out: share of the items that is not fitted on, but reported on; drawn by the seed.
        seed: of the draw and of k-means.

    Raises:
        ValueError: `load_embeddings`, `fit_semantic_ids`; a share that leaves nothing to report on.
    """
    names, vectors = load_embeddings(path)
    embeddings = torch.from_numpy(vectors)
    count = round(held_out * len(names))
    if not 0 < held_out < 1 or count < 2:
        raise ValueError(
            f"held_out={held_out} of {len(names)} items is {count}; a report needs two, and fitting the rest."
        )
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    ids = fit_semantic_ids(embeddings[order[count:]], **settings, seed=seed)
    found = report(ids, embeddings[order[:count]], seed=seed) | {"fitted_on": len(names) - count}
    ids.notes = {"settings": dict(settings), "seed": seed, "fitted_on": len(names) - count}
    ids.save_pretrained(folder)
    write_json(folder / "semantic_ids.json", {**ids.notes, "held_out": found})
    return found


def encode_file(path: Path, folder: Path, out: Path) -> int:
    """Codes of what `sail encode` wrote, as Parquet: ``id``, ``codes`` (a list), ``tokens`` (a word). Returns how many.

    Raises:
        ValueError: `load_embeddings`, or embeddings of another width. OSError: the folder has no semantic IDs.
    """
    names, vectors = load_embeddings(path)
    ids = SemanticIDs.from_pretrained(folder)
    codes = ids.encode(torch.from_numpy(vectors))
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    table = pa.table({"id": names, "codes": codes.int().tolist(), "tokens": ids.tokens(codes)})
    pq.write_table(table, partial)
    partial.replace(out)
    return len(names)


# --- the report -----------------------------------------------------------------------------------------------------


def report(
    ids: SemanticIDs, embeddings: Tensor, *, neighbours: int = 10, queries: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """What the codes of (N, D) embeddings keep.

    Args:
        ids: the codebooks.
        embeddings: N items; better others than those the codebooks were fitted on.
        neighbours: k of the neighbours kept.
        queries: items whose neighbours are compared, drawn without replacement.
        seed: of the draw.

    Returns:
        ``items``; ``distinct_ids``; ``collision_rate``, the share of items that share all codes with another one; for
        each level ``utilisation`` (share of its entries in use), ``entropy`` (in bits, of its entries; at most the
        logarithm of its size) and ``reconstruction_error`` (mean squared distance after this level over the mean
        squared distance from the mean: 1 says nothing, 0 everything); ``neighbours_kept``, the share of an item's k
        nearest by the embeddings that are among its k nearest by what is decoded.

    Raises:
        ValueError: fewer than two items.
    """
    if len(embeddings) < 2:
        raise ValueError(f"{len(embeddings)} item(s) have no neighbours; a report needs two.")
    codes = ids.encode(embeddings)
    _, places, counts = torch.unique(codes, dim=0, return_inverse=True, return_counts=True)
    levels = [_level(ids, embeddings.float(), codes, level) for level in range(codes.shape[1])]
    return {
        "items": len(codes),
        "distinct_ids": len(counts),
        "collision_rate": float((counts[places] > 1).float().mean()),
        "levels": levels,
        "neighbours_kept": _neighbours_kept(embeddings.float(), ids.decode(codes), neighbours, queries, seed),
    }


def _level(ids: SemanticIDs, embeddings: Tensor, codes: Tensor, level: int) -> dict[str, float]:
    counts = torch.bincount(codes[:, level], minlength=ids.sizes[level]).double()
    shares = counts[counts > 0] / counts.sum()
    left = (embeddings - ids.decode(codes, level + 1)).square().sum(dim=1).mean()
    whole = (embeddings - embeddings.mean(dim=0)).square().sum(dim=1).mean()
    return {
        "size": ids.sizes[level],
        "utilisation": float((counts > 0).double().mean()),
        "entropy": float(-(shares * shares.log2()).sum()),
        "reconstruction_error": float(left / whole.clamp(min=1e-12)),
    }


def _neighbours_kept(embeddings: Tensor, decoded: Tensor, neighbours: int, queries: int, seed: int) -> float:
    count = min(neighbours, len(embeddings) - 1)
    drawn = torch.randperm(len(embeddings), generator=torch.Generator().manual_seed(seed))[:queries]
    kept = []
    for part in drawn.split(256):
        found = [_nearest_others(one, part, count) for one in (embeddings, decoded)]
        kept.append((found[0][:, :, None] == found[1][:, None, :]).any(dim=2).float().mean(dim=1))
    return float(torch.cat(kept).mean())


def _nearest_others(vectors: Tensor, places: Tensor, count: int) -> Tensor:
    """(n, count) nearest by cosine, without the item itself."""
    units = torch.nn.functional.normalize(vectors, dim=1)
    scores = units[places] @ units.T
    scores[torch.arange(len(places)), places] = -torch.inf
    return scores.topk(count, dim=1).indices
