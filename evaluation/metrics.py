"""Retrieval metrics: pure functions of score matrices (SAIL-Embedding, section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor


def recall_at(scores: Tensor, relevant: Tensor, k: int) -> float:
    """Recall@k: relevant retrieved in the top k / all relevant, averaged over queries (section 4.2).

    Args:
        scores: (Q, N) similarities of Q queries and N candidates.
        relevant: (Q, N) booleans; every query has at least one.
        k: how many candidates are looked at.

    Returns:
        A number in [0, 1]. A tie counts against the relevant candidate, so a constant score earns nothing.

    Raises:
        ValueError: shapes differ, or a query has nothing relevant.
    """
    if scores.shape != relevant.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and relevant {tuple(relevant.shape)} must have one shape.")
    total = relevant.sum(dim=1)
    if not bool((total > 0).all()):
        raise ValueError(f"{int((total == 0).sum())} queries have no relevant candidate; leave them out.")
    # Rank of each relevant candidate among the irrelevant ones; relevant ones do not push each other out of the top.
    worse = torch.where(relevant, float("-inf"), scores).sort(dim=1).values  # (Q, N) ascending
    above = scores.shape[1] - torch.searchsorted(worse, scores.contiguous(), side="left")  # >= counts ties against
    order = torch.where(relevant, above, scores.shape[1]).sort(dim=1).values
    place = order + torch.arange(scores.shape[1], device=scores.device)
    found = ((place < k) & (order < scores.shape[1])).sum(dim=1)
    return float((found / total).double().mean())
