"""Semantic IDs: an embedding as a few discrete codes that a recommender can use (SAIL-Embedding, section 4.4.6).

Three schemes: "kmeans", one code; "rq", residual k-means, each level codes what the levels before left; "rq-opq",
residual codes that items share, then product codes of the rotated rest, which tell items apart (SMILE). Unusual: only
encoding and decoding are here, so a Hub folder needs no FAISS; codebooks are fitted in training/semantic_ids.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import cached_file

SCHEMES = ("kmeans", "rq", "rq-opq")
FILE_NAME = "semantic_ids.safetensors"
ROWS_AT_ONCE = 8192


class SemanticIDs:
    """Codebooks, and what they make of embeddings.

    Args:
        residual: (K_l, D) centroids of each residual level.
        product: (M, K, D / M) centroids of each part of the rotated rest; None without.
        rotation: (D, D), orthogonal, before the rest is cut into parts; None without ``product``.
        scheme: one of `SCHEMES`.
        notes: what else is known of them: data, seed, report; kept in the file.

    Raises:
        ValueError: shapes that do not fit each other, or an unknown scheme.
    """

    def __init__(
        self,
        residual: list[Tensor],
        product: Tensor | None = None,
        rotation: Tensor | None = None,
        scheme: str = "rq",
        notes: dict[str, Any] | None = None,
    ) -> None:
        if scheme not in SCHEMES:
            raise ValueError(f"scheme={scheme!r} is not one of {', '.join(SCHEMES)}.")
        if not residual or any(book.dim() != 2 or book.shape[1] != residual[0].shape[1] for book in residual):
            raise ValueError(f"residual codebooks {[tuple(b.shape) for b in residual]} must all be (K, D) of one D.")
        dims = residual[0].shape[1]
        if (product is None) != (rotation is None) or (product is not None) != (scheme == "rq-opq"):
            raise ValueError(f"scheme={scheme!r}: 'rq-opq' has product codebooks and a rotation, the others neither.")
        if product is not None and rotation is not None:
            if rotation.shape != (dims, dims) or product.dim() != 3 or product.shape[0] * product.shape[2] != dims:
                raise ValueError(
                    f"rotation {tuple(rotation.shape)} and product {tuple(product.shape)} do not fit {dims} dimensions."
                )
        self.residual, self.product, self.rotation = residual, product, rotation
        self.scheme, self.notes = scheme, dict(notes or {})

    @property
    def dims(self) -> int:
        """D, of the embeddings."""
        return self.residual[0].shape[1]

    @property
    def sizes(self) -> list[int]:
        """How many values each code has, in the order of the codes: residual levels, then product parts."""
        parts = [] if self.product is None else [self.product.shape[1]] * self.product.shape[0]
        return [len(book) for book in self.residual] + parts

    def encode(self, embeddings: Tensor) -> Tensor:
        """(N, D) embeddings, on any device, to (N, L) codes; code l is in [0, sizes[l]).

        Raises:
            ValueError: another width, or values that are not finite.
        """
        if embeddings.dim() != 2 or embeddings.shape[1] != self.dims:
            raise ValueError(f"Embeddings of shape {tuple(embeddings.shape)} must be (N, {self.dims}).")
        if not bool(embeddings.isfinite().all()):
            raise ValueError("Embeddings hold NaN or infinite values; leave out items that could not be embedded.")
        parts = [self._encode_some(part.float()) for part in embeddings.split(ROWS_AT_ONCE)]
        return torch.cat(parts) if parts else torch.zeros(0, len(self.sizes), dtype=torch.long)

    def _encode_some(self, rest: Tensor) -> Tensor:
        codes = []
        for book in self.residual:
            book = book.to(rest.device)
            codes.append(nearest(rest, book))
            rest = rest - book[codes[-1]]
        if self.product is not None and self.rotation is not None:
            turned = rest @ self.rotation.to(rest.device).T
            parts = turned.split(self.product.shape[2], dim=1)
            codes += [nearest(part, book.to(rest.device)) for part, book in zip(parts, self.product, strict=True)]
        return torch.stack(codes, dim=1)

    def decode(self, codes: Tensor, levels: int | None = None) -> Tensor:
        """(N, L) codes to (N, D) embeddings as near as the codes say; with ``levels``, by the first few alone.

        Product codes count as levels too; parts that are not taken stay zero.

        Raises:
            ValueError: another number of codes, or a code that is out of range.
        """
        sizes = self.sizes
        if codes.dim() != 2 or codes.shape[1] != len(sizes):
            raise ValueError(f"Codes of shape {tuple(codes.shape)} must be (N, {len(sizes)}).")
        if bool(((codes < 0) | (codes >= torch.tensor(sizes, device=codes.device))).any()):
            raise ValueError(f"A code is out of range; there are {sizes} values.")
        taken = len(sizes) if levels is None else levels
        found = torch.zeros(len(codes), self.dims, device=codes.device)
        for level, book in enumerate(self.residual[:taken]):
            found = found + book.to(codes.device)[codes[:, level]]
        if self.product is not None and self.rotation is not None and taken > len(self.residual):
            parts = [
                book.to(codes.device)[codes[:, place]] * float(place < taken)
                for place, book in enumerate(self.product, start=len(self.residual))
            ]
            found = found + torch.cat(parts, dim=1) @ self.rotation.to(codes.device)
        return found

    def tokens(self, codes: Tensor) -> list[str]:
        """Codes as words for a recommender's vocabulary: ``<a_12><b_7>``, a letter for each level."""
        return ["".join(f"<{_letter(level)}_{code}>" for level, code in enumerate(row)) for row in codes.tolist()]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``semantic_ids.safetensors`` into a folder, beside a model's own files; whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"residual.{level}": book.float().contiguous() for level, book in enumerate(self.residual)}
        if self.product is not None and self.rotation is not None:
            tensors |= {"product": self.product.float().contiguous(), "rotation": self.rotation.float().contiguous()}
        partial = folder / f"{FILE_NAME}.partial"
        save_file(tensors, partial, metadata={"scheme": self.scheme, "notes": json.dumps(self.notes)})
        os.replace(partial, folder / FILE_NAME)

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> SemanticIDs:
        """Read them from a local folder or a Hub repository.

        Args:
            name: the folder, or the Hub id.
            options: of ``transformers.utils.cached_file``: ``revision``, ``token``, ``cache_dir``, ...

        Raises:
            OSError: there are none. ValueError: the file is of another kind.
        """
        path = cached_file(str(name), FILE_NAME, **options)
        with safe_open(path, framework="pt") as file:
            known, keys = file.metadata() or {}, list(file.keys())
            if "scheme" not in known or "residual.0" not in keys:
                raise ValueError(f"{path} holds no semantic IDs; `sail sid fit` writes them.")
            levels = sum(key.startswith("residual.") for key in keys)
            residual = [file.get_tensor(f"residual.{level}") for level in range(levels)]
            product, rotation = (file.get_tensor(key) if key in keys else None for key in ("product", "rotation"))
        return cls(residual, product, rotation, known["scheme"], json.loads(known.get("notes", "{}")))


def nearest(vectors: Tensor, centroids: Tensor) -> Tensor:
    """(N,) the centroid at the smallest Euclidean distance of each (N, D) vector; the first of equal ones."""
    return ((centroids * centroids).sum(dim=1) / 2 - vectors @ centroids.T).argmin(dim=1)


def _letter(level: int) -> str:
    """a, b, ... z, aa, ab, ..."""
    return chr(97 + level) if level < 26 else _letter(level // 26 - 1) + _letter(level % 26)
