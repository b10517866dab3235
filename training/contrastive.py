"""Contrastive losses: pure functions of tensors (SAIL-Embedding, section 3.3.2). Nothing here knows a model.

Unusual: NCE never holds a (B, N) matrix. It goes through blocks of queries, takes value and gradients of a block at
once, and lets the Matryoshka lengths share one product: dot products of prefixes add up slice by slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_SCORES = 1 << 22  # scores of a block: few enough to stay small beside the embeddings, enough to fill a device
_EPSILON = 1e-12  # of torch.nn.functional.normalize


def info_nce(query: Tensor, target: Tensor, *, temperature: Tensor | float, **options: Any) -> Tensor:
    """InfoNCE with in-batch and mined negatives (SAIL-Embedding, section 3.3.2, eq. 2).

    `matryoshka_nce` at the whole length; it takes the same options.
    """
    return matryoshka_nce(query, target, dims=[query.shape[-1]], temperature=temperature, **options)


def matryoshka_nce(
    query: Tensor,
    target: Tensor,
    *,
    dims: Sequence[int],
    temperature: Tensor | float,
    target_ids: Tensor | None = None,
    offset: int = 0,
    hard_negatives: Tensor | None = None,
    hard_mask: Tensor | None = None,
    margin: float | None = None,
    count: float | None = None,
) -> Tensor:
    """NCE-MRL: the sum of InfoNCE over Matryoshka prefixes (SAIL-Embedding, section 3.3.2), in memory linear in B, N.

    B local queries, N >= B gathered targets, D dims, K mined negatives.

    Args:
        query: (B, D), of any length; each prefix is normalised here. Computed in float32, or float64 for float64.
        target: (N, D); row ``offset + i`` is the positive of query i.
        dims: prefix lengths, each at most D.
        temperature: scalar > 0, learnable.
        target_ids: (N,) integers; a target with the same id as the positive is not a negative.
        offset: index of this rank's first row in ``target``.
        hard_negatives: (B, K, D), negatives of their own query alone.
        hard_mask: (B, K) booleans, False where a mined negative is missing or is no negative.
        margin: a target whose cosine is above the positive's by more than this is not a negative, at the length where
            it is so; None keeps all.
        count: what the sum over queries is divided by; B by default. With R ranks that hold different numbers of
            queries, all queries / R: the mean of the ranks' losses is then the mean over all queries. B may be 0 then.

    Returns:
        Scalar, mean over queries, in nats. Divided by ``len(dims)`` it is the mean, which keeps its scale when a length
        is added; the paper writes the sum, and so do we.

    Raises:
        ValueError: sizes differ, a length does not fit, or a positive lies outside ``target``.
    """
    if query.dim() != 2 or target.dim() != 2 or query.shape[1] != target.shape[1]:
        raise ValueError(f"query {tuple(query.shape)} and target {tuple(target.shape)} must be (B, D) and (N, D).")
    if count is None and not len(query):
        raise ValueError("There is no query (B = 0) to take a mean over; leave the term out, or give count.")
    if offset < 0 or offset + len(query) > len(target):
        raise ValueError(f"{len(query)} positives from row {offset} on do not lie within {len(target)} targets.")
    if not dims or min(dims) < 1 or max(dims) > query.shape[1]:
        raise ValueError(f"Matryoshka dims {list(dims)} do not fit embeddings of {query.shape[1]} dims.")
    if target_ids is not None and target_ids.shape != target.shape[:1]:
        raise ValueError(f"target_ids {tuple(target_ids.shape)} must be ({len(target)},), one for each target.")
    if hard_negatives is not None and (hard_negatives.dim() != 3 or hard_negatives[:, 0].shape != query.shape):
        shape = f"({len(query)}, K, {query.shape[1]})"
        raise ValueError(f"hard_negatives {tuple(hard_negatives.shape)} must be {shape}, K > 0.")
    if hard_mask is not None and (hard_negatives is None or hard_mask.shape != hard_negatives.shape[:2]):
        raise ValueError(f"hard_mask {tuple(hard_mask.shape)} must be (B, K), as hard_negatives.")
    kind = torch.float64 if query.dtype == torch.float64 else torch.float32
    temperature = torch.as_tensor(temperature, dtype=kind, device=query.device).reshape(())
    lengths = sorted(dims)
    terms = _Terms(lengths, target_ids, offset, hard_mask, margin, count or len(query))
    hard = None if hard_negatives is None else hard_negatives.to(kind)[..., : lengths[-1]]
    with torch.autocast(query.device.type, enabled=False):
        loss: Tensor = _BlockedNCE.apply(
            query.to(kind)[:, : lengths[-1]], target.to(kind)[:, : lengths[-1]], hard, temperature, terms
        )
    return loss


@dataclass(frozen=True)
class _Terms:
    """What `_BlockedNCE` is given besides tensors that have gradients; as in `matryoshka_nce`."""

    dims: Sequence[int]
    target_ids: Tensor | None
    offset: int
    hard_mask: Tensor | None
    margin: float | None
    count: float


class _BlockedNCE(torch.autograd.Function):
    """Value and gradients of a block of queries against all targets at once: a row's softmax lies within its block."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, target: Tensor, hard: Tensor | None, temperature: Tensor, terms: _Terms
    ) -> Tensor:
        sums = _summed(query, target, hard, temperature, terms, any(ctx.needs_input_grad))
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(query, target, temperature, *(() if hard is None else (hard,)))
            ctx.terms = terms
            ctx.gradients = sums.gradients()
        return sums.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:  # a second backward through a graph that was kept: they were handed over
            query, target, temperature, *hard = ctx.saved_tensors
            ctx.gradients = _summed(query, target, hard[0] if hard else None, temperature, ctx.terms, True).gradients()
        gradients, ctx.gradients = ctx.gradients, None
        return (*(None if gradient is None else gradient.mul_(output) for gradient in gradients), None)


def _summed(
    query: Tensor, target: Tensor, hard: Tensor | None, temperature: Tensor, terms: _Terms, wanted: bool
) -> _Sums:
    """Loss and, if wanted, gradients of all blocks."""
    sums = _Sums(query, target, hard, temperature, terms, wanted)
    rows = max(1, BLOCK_SCORES // max(1, len(target) * len(terms.dims)))
    for start in range(0, len(query), rows):
        sums.add(slice(start, min(start + rows, len(query))))
    return sums


class _Sums:
    """Loss and gradients as they grow block by block. ``score = dot / (|q| |t| temperature)``.

    With S the softmax less the positive's 1, over the count: the derivative by q is S / (|q| |t| temperature) times t,
    less q times the row sum of S * score over |q| squared. The second part is kept as one number a row, and applied at
    the end. In the same way for targets, with column sums.
    """

    def __init__(
        self,
        query: Tensor,
        target: Tensor,
        hard: Tensor | None,
        temperature: Tensor,
        terms: _Terms,
        wanted: bool,
    ) -> None:
        self.query, self.target, self.hard, self.temperature, self.terms = query, target, hard, temperature, terms
        self.wanted = wanted  # gradients
        self.loss = query.new_zeros(())
        self.by_temperature = query.new_zeros(())
        self.inverse = [_inverse_lengths(part, terms.dims) for part in (query, target)]
        self.inverse_hard = None if hard is None else _inverse_lengths(hard, terms.dims)
        if wanted:
            self.by_query, self.by_target = torch.zeros_like(query), torch.zeros_like(target)
            self.by_hard = None if hard is None else torch.zeros_like(hard)
            self.along = [torch.zeros_like(part) for part in self.inverse]
            self.along_hard = None if self.inverse_hard is None else torch.zeros_like(self.inverse_hard)

    def add(self, rows: slice) -> None:
        """One block of queries: its part of the loss and, if wanted, of every gradient."""
        positive = torch.arange(rows.start, rows.stop, device=self.query.device) + self.terms.offset
        excluded = self._excluded(rows, positive)
        dot = self.query.new_zeros(len(positive), len(self.target))
        dot_hard: Tensor | None = None
        partial: list[tuple[Tensor, Tensor | None]] = []
        for place, (begin, end) in enumerate(pairwise((0, *self.terms.dims))):
            part = self.query[rows, begin:end]
            dot.addmm_(part, self.target[:, begin:end].T)
            if self.hard is not None:
                product = torch.einsum("bd,bkd->bk", part, self.hard[rows, :, begin:end])
                dot_hard = product if dot_hard is None else dot_hard + product
            partial.append(self._add_length(place, rows, positive, dot, dot_hard, excluded))
        if self.wanted:
            self._back(rows, partial)

    def _add_length(
        self,
        place: int,
        rows: slice,
        positive: Tensor,
        dot: Tensor,
        dot_hard: Tensor | None,
        excluded: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The loss at one length; returns its derivatives by the dot products."""
        here = torch.arange(len(dot), device=dot.device)
        by_row, by_column = self.inverse[0][place, rows, None] / self.temperature, self.inverse[1][place]
        scores = (dot * by_row).mul_(by_column)  # (b, N)
        hard_scale = None
        if dot_hard is not None and self.inverse_hard is not None:
            hard_scale = by_row * self.inverse_hard[place, rows]
            scores = torch.cat([scores, dot_hard * hard_scale], dim=1)  # (b, N + K)
        if self.terms.margin is not None:
            above = scores > scores[here, positive][:, None] + self.terms.margin / self.temperature
            excluded = above if excluded is None else above | excluded
            excluded[here, positive] = False
        logarithm = (scores if excluded is None else scores.masked_fill(excluded, float("-inf"))).log_softmax(dim=1)
        self.loss -= logarithm[here, positive].sum() / self.terms.count
        if not self.wanted:
            return dot, dot_hard
        slope = logarithm.exp_()
        slope[here, positive] -= 1
        slope /= self.terms.count
        pull = scores.mul_(slope)
        along = pull.sum(dim=1)
        self.by_temperature -= along.sum() / self.temperature
        columns = dot.shape[1]
        self.along[0][place, rows] = along
        self.along[1][place] += pull[:, :columns].sum(dim=0)
        if hard_scale is None or self.along_hard is None:
            return slope.mul_(by_row).mul_(by_column), None
        self.along_hard[place, rows] = pull[:, columns:]
        return slope[:, :columns] * by_row * by_column, slope[:, columns:] * hard_scale

    def _excluded(self, rows: slice, positive: Tensor) -> Tensor | None:
        """(b, N + K) True where a score does not count at any length; None where all count."""
        ids, mask = self.terms.target_ids, self.terms.hard_mask
        if ids is None and mask is None:
            return None
        size, columns = len(positive), len(self.target)
        out = torch.zeros(size, columns, dtype=torch.bool, device=positive.device)
        if ids is not None:
            out = ids[positive][:, None] == ids[None]
            out[torch.arange(size, device=out.device), positive] = False
        if self.hard is None:
            return out
        hard = out.new_zeros(size, self.hard.shape[1]) if mask is None else ~mask[rows]
        return torch.cat([out, hard], dim=1)

    def _back(self, rows: slice, partial: list[tuple[Tensor, Tensor | None]]) -> None:
        """Derivatives by the dot products to gradients: a slice is part of every length that is not shorter."""
        slope: Tensor | None = None
        slope_hard: Tensor | None = None
        spans = list(pairwise((0, *self.terms.dims)))
        for (begin, end), (more, more_hard) in zip(reversed(spans), reversed(partial), strict=True):
            slope = more if slope is None else more.add_(slope)
            self.by_query[rows, begin:end] = slope @ self.target[:, begin:end]
            self.by_target[:, begin:end].addmm_(slope.T, self.query[rows, begin:end])
            if self.hard is None or self.by_hard is None or more_hard is None:
                continue
            slope_hard = more_hard if slope_hard is None else slope_hard + more_hard
            self.by_query[rows, begin:end] += torch.einsum("bk,bkd->bd", slope_hard, self.hard[rows, :, begin:end])
            self.by_hard[rows, :, begin:end] = slope_hard[..., None] * self.query[rows, None, begin:end]

    def gradients(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """By query, target, hard negatives and temperature."""
        parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = [
            (self.by_query, self.query, self.along[0], self.inverse[0]),
            (self.by_target, self.target, self.along[1], self.inverse[1]),
        ]
        if self.hard is not None and self.by_hard is not None:
            assert self.along_hard is not None and self.inverse_hard is not None
            parts.append((self.by_hard, self.hard, self.along_hard, self.inverse_hard))
        for gradient, values, along, inverse in parts:
            less = (along * inverse.square()).flip(0).cumsum(0).flip(0)  # of every length that is not shorter
            for place, (begin, end) in enumerate(pairwise((0, *self.terms.dims))):
                gradient[..., begin:end].addcmul_(less[place][..., None], values[..., begin:end], value=-1)
        return self.by_query, self.by_target, self.by_hard, self.by_temperature


def _inverse_lengths(values: Tensor, dims: Sequence[int]) -> Tensor:
    """(..., D) -> (len(dims), ...): one over the length of each prefix."""
    lengths = torch.stack([values[..., :dim].norm(dim=-1) for dim in dims])
    return lengths.clamp_min_(_EPSILON).reciprocal_()
