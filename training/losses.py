"""Losses beside the contrastive ones: graded pairs, a teacher's preferences and geometry. Pure functions of tensors.

Unusual: `cosent` is a sum over pairs of pairs, but never holds them; sorted by score, a running logsumexp does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  the field's own abbreviation


def cosent(cosine: Tensor, scores: Tensor, *, temperature: float = 0.05) -> Tensor:
    """CoSENT (SAIL-Embedding, section 3.3.2): pairs with a higher score shall have a higher cosine.

    ``log(1 + sum over i, j with scores[i] > scores[j] of exp((cosine[j] - cosine[i]) / temperature))``, in O(B log B)
    time and O(B) memory.

    Args:
        cosine: (B,) cosine of each pair of items.
        scores: (B,) graded similarity of each pair, in any unit; only their order counts, and ties are no order.
        temperature: > 0.

    Returns:
        Scalar float32 (float64 for float64), 0 where all scores are equal.

    Raises:
        ValueError: sizes differ, or a score is not finite.
    """
    if cosine.dim() != 1 or cosine.shape != scores.shape:
        raise ValueError(f"cosine {tuple(cosine.shape)} and scores {tuple(scores.shape)} must both be (B,).")
    if not bool(scores.isfinite().all()):
        raise ValueError("A score is NaN or infinite; leave rows without a score out.")
    scores, order = scores.sort()
    scaled = _wide(cosine)[order] / temperature
    lower = torch.searchsorted(scores, scores)  # (B,) how many scores are strictly lower
    some = lower > 0
    below = scaled.logcumsumexp(dim=0)[(lower - 1).clamp_min(0)]
    return torch.cat([scaled.new_zeros(1), (below - scaled)[some]]).logsumexp(dim=0)


def listwise_divergence(
    cosine: Tensor,
    scores: Tensor,
    mask: Tensor,
    *,
    temperature: float = 0.05,
    teacher_temperature: float = 1.0,
    count: float | None = None,
) -> Tensor:
    """KL divergence from a teacher's distribution over a query's candidates ("Embedding the Teacher", 2510.12014).

    Args:
        cosine: (B, C) of each query and its candidates.
        scores: (B, C) the teacher's, in any unit; ``teacher_temperature`` makes them logits.
        mask: (B, C) booleans, False where there is no candidate. Rows with fewer than two say nothing and give 0.
        temperature, teacher_temperature: of the student's and of the teacher's softmax.
        count: what the sum over rows is divided by; the number of rows with two candidates by default.

    Returns:
        Scalar, mean over rows, in nats.
    """
    _check_candidates(cosine, scores, mask)
    rows = mask.sum(dim=1) > 1
    student = _masked_log_softmax(_wide(cosine) / temperature, mask)
    teacher = _masked_log_softmax(_wide(scores) / teacher_temperature, mask)
    divergence = torch.where(mask & rows[:, None], teacher.exp() * (teacher - student), 0.0).sum()
    return divergence / (count or max(1, int(rows.sum())))


def ranknet(
    cosine: Tensor, scores: Tensor, mask: Tensor, *, temperature: float = 0.05, count: float | None = None
) -> Tensor:
    """RankNet: the logistic loss of each two candidates that the teacher ranks ("Embedding the Teacher", 2510.12014).

    Args:
        cosine, scores, mask, temperature: as in `listwise_divergence`.
        count: what the sum over rows is divided by; the number of rows with a ranked pair by default.

    Returns:
        Scalar: mean over a row's ranked pairs, then over rows, in nats; log 2 where all cosines are equal.
    """
    _check_candidates(cosine, scores, mask)
    both = mask[:, :, None] & mask[:, None, :]
    better = both & (scores[:, :, None] > scores[:, None, :])  # (B, C, C): the first is better
    scaled = _wide(cosine) / temperature
    losses = F.softplus(scaled[:, None, :] - scaled[:, :, None])  # of the second over the first
    pairs = better.sum(dim=(1, 2))
    rows = torch.where(better, losses, 0.0).sum(dim=(1, 2)) / pairs.clamp_min(1)
    return rows.sum() / (count or max(1, int((pairs > 0).sum())))


def relational_divergence(
    student: Tensor,
    students: Tensor,
    teacher: Tensor,
    teachers: Tensor,
    mask: Tensor,
    *,
    temperature: float = 0.1,
    count: float | None = None,
) -> Tensor:
    """KL divergence between two spaces' distributions over an item's neighbours: cosines shall be alike in both.

    The two spaces may have different dimensions: each is only compared with itself, and no projection is needed.

    Args:
        student, students: (B, D) items and (N, D) what they are compared with.
        teacher, teachers: (B, E) and (N, E), the same items in the teacher's space.
        mask: (B, N) booleans, False where an item is compared with itself.
        temperature: of both softmaxes over cosines.
        count: as in `listwise_divergence`.

    Returns:
        Scalar, mean over items, in nats.
    """
    own, wanted = (
        F.normalize(_wide(some), dim=-1) @ F.normalize(_wide(all_), dim=-1).T
        for some, all_ in ((student, students), (teacher, teachers))
    )  # (B, N)
    options = {"temperature": temperature, "teacher_temperature": temperature, "count": count}
    return listwise_divergence(own, wanted, mask, **options)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _masked_log_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Log softmax over what the mask keeps; 0 elsewhere. A finite filling keeps gradients finite."""
    kept = torch.where(mask, logits, torch.finfo(logits.dtype).min)
    return torch.where(mask, kept.log_softmax(dim=1), 0.0)


def _check_candidates(cosine: Tensor, scores: Tensor, mask: Tensor) -> None:
    if cosine.dim() != 2 or not cosine.shape == scores.shape == mask.shape:
        shapes = f"cosine {tuple(cosine.shape)}, scores {tuple(scores.shape)} and mask {tuple(mask.shape)}"
        raise ValueError(f"{shapes} must all be (B, C).")
