"""Losses: pure functions of tensors (SAIL-Embedding, section 3.3.2). Nothing here knows a model or a Trainer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  the field's own abbreviation


def info_nce(
    query: Tensor, target: Tensor, *, temperature: Tensor | float, target_ids: Tensor | None = None, offset: int = 0
) -> Tensor:
    """InfoNCE with in-batch negatives (SAIL-Embedding, section 3.3.2, eq. 2).

    B local queries, N >= B gathered targets, D dims.

    Args:
        query: (B, D), of any length; normalised here, in float32.
        target: (N, D); row ``offset + i`` is the positive of query i.
        temperature: scalar > 0, learnable.
        target_ids: (N,) integers; a target with the same id as the positive is not a negative.
        offset: index of this rank's first row in ``target``.

    Returns:
        Scalar float32, mean over queries, in nats.

    Raises:
        ValueError: sizes differ, or a positive lies outside ``target``.
    """
    if query.dim() != 2 or target.dim() != 2 or query.shape[1] != target.shape[1]:
        raise ValueError(f"query {tuple(query.shape)} and target {tuple(target.shape)} must be (B, D) and (N, D).")
    if offset < 0 or offset + len(query) > len(target):
        raise ValueError(f"{len(query)} positives from row {offset} on do not lie within {len(target)} targets.")
    positives = torch.arange(len(query), device=query.device) + offset
    scores = F.normalize(query.float(), dim=-1) @ F.normalize(target.float(), dim=-1).T / temperature  # (B, N)
    if target_ids is not None:
        same = target_ids[positives][:, None] == target_ids[None]
        same[torch.arange(len(query)), positives] = False
        scores = scores.masked_fill(same, float("-inf"))
    return F.cross_entropy(scores, positives)


def matryoshka_nce(
    query: Tensor,
    target: Tensor,
    *,
    dims: Sequence[int],
    temperature: Tensor | float,
    target_ids: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """NCE-MRL: the sum of `info_nce` over Matryoshka prefixes (SAIL-Embedding, section 3.3.2).

    Args:
        query, target, temperature, target_ids, offset: as in `info_nce`.
        dims: prefix lengths; each prefix is normalised by itself.

    Returns:
        Scalar float32. Divided by ``len(dims)`` it is the mean, which keeps its scale when a length is added; the paper
        writes the sum, and so do we.
    """
    if not dims or max(dims) > query.shape[-1]:
        raise ValueError(f"Matryoshka dims {list(dims)} do not fit embeddings of {query.shape[-1]} dims.")
    terms = [
        info_nce(query[:, :dim], target[:, :dim], temperature=temperature, target_ids=target_ids, offset=offset)
        for dim in dims
    ]
    return torch.stack(terms).sum()
