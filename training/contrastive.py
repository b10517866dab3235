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

BLOCK_SCORES = 1 << 24  # scores of a block: few enough to stay small beside the embeddings, enough to fill a device
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
        wanted = any(ctx.needs_input_grad)
        sums = _Sums(query, target, hard, temperature, terms)
        rows = max(1, BLOCK_SCORES // max(1, len(target) * len(terms.dims)))
        for start in range(0, len(query), rows):
            sums.add(slice(start, min(start + rows, len(query))), wanted)
        if wanted:
            ctx.save_for_backward(*sums.gradients())
        return sums.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output: Tensor) -> tuple[Tensor | None, ...]:
        query, target, hard, temperature = ctx.saved_tensors
        return output * query, output * target, None if hard is None else output * hard, output * temperature, None


class _Sums:
    """Loss and gradients as they grow block by block. ``cosine = dot / (|q| |t|)``, ``score = cosine / temperature``.

    With G the derivative by the cosine: the derivative by q is G's product with t, less q times the row sums of
    G * cosine; both divided by the lengths. The second part is kept as one number a row, and applied at the end.
    """

    def __init__(self, query: Tensor, target: Tensor, hard: Tensor | None, temperature: Tensor, terms: _Terms) -> None:
        self.query, self.target, self.hard, self.temperature, self.terms = query, target, hard, temperature, terms
        self.loss = query.new_zeros(())
        self.by_query, self.by_target = torch.zeros_like(query), torch.zeros_like(target)
        self.by_hard = None if hard is None else torch.zeros_like(hard)
        self.by_temperature = query.new_zeros(())
        self.inverse = [_inverse_lengths(part, terms.dims) for part in (query, target)]
        self.inverse_hard = None if hard is None else _inverse_lengths(hard, terms.dims)
        self.along = [torch.zeros_like(part) for part in self.inverse]
        self.along_hard = None if self.inverse_hard is None else torch.zeros_like(self.inverse_hard)

    def add(self, rows: slice, wanted: bool) -> None:
        """One block of queries: its part of the loss and, if wanted, of every gradient."""
        dot: Tensor | None = None
        dot_hard: Tensor | None = None
        partial: list[tuple[Tensor, Tensor | None]] = []
        for place, (begin, end) in enumerate(pairwise((0, *self.terms.dims))):
            part = self.query[rows, begin:end]
            product = part @ self.target[:, begin:end].T
            dot = product if dot is None else dot + product
            if self.hard is not None:
                product = torch.einsum("bd,bkd->bk", part, self.hard[rows, :, begin:end])
                dot_hard = product if dot_hard is None else dot_hard + product
            partial.append(self._add_length(place, rows, dot, dot_hard, wanted))
        if wanted:
            self._back(rows, partial)

    def _add_length(
        self, place: int, rows: slice, dot: Tensor, dot_hard: Tensor | None, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The loss at one length; returns its derivatives by the dot products."""
        size = len(dot)
        by_row, by_column = self.inverse[0][place, rows, None], self.inverse[1][place]
        cosine = dot * by_row * by_column  # (b, N)
        hard_scale = None
        if dot_hard is not None and self.inverse_hard is not None:
            hard_scale = by_row * self.inverse_hard[place, rows]
            cosine = torch.cat([cosine, dot_hard * hard_scale], dim=1)  # (b, N + K)
        here = torch.arange(size, device=dot.device)
        positive = here + rows.start + self.terms.offset
        scores = (cosine / self.temperature).masked_fill_(self._excluded(rows, cosine, positive), float("-inf"))
        total = scores.logsumexp(dim=1)
        self.loss = self.loss + (total - scores[here, positive]).sum() / self.terms.count
        if not wanted:
            return dot, dot_hard
        slope = scores.sub_(total[:, None]).exp_()
        slope[here, positive] -= 1
        slope /= self.temperature * self.terms.count
        pull = slope * cosine
        self.by_temperature = self.by_temperature - pull.sum() / self.temperature
        columns = dot.shape[1]
        self.along[0][place, rows] = pull.sum(dim=1)
        self.along[1][place] += pull[:, :columns].sum(dim=0)
        if hard_scale is None or self.along_hard is None:
            return slope * by_row * by_column, None
        self.along_hard[place, rows] = pull[:, columns:]
        return slope[:, :columns] * by_row * by_column, slope[:, columns:] * hard_scale

    def _excluded(self, rows: slice, cosine: Tensor, positive: Tensor) -> Tensor:
        """(b, N + K) True where a score does not count."""
        here = torch.arange(len(positive), device=cosine.device)
        out = torch.zeros_like(cosine, dtype=torch.bool)
        ids, mask, columns = self.terms.target_ids, self.terms.hard_mask, len(self.target)
        if ids is not None:
            out[:, :columns] = ids[positive][:, None] == ids[None]
        if mask is not None:
            out[:, columns:] = ~mask[rows]
        if self.terms.margin is not None:
            out |= cosine > cosine[here, positive][:, None] + self.terms.margin
        out[here, positive] = False
        return out

    def _back(self, rows: slice, partial: list[tuple[Tensor, Tensor | None]]) -> None:
        """Derivatives by the dot products to gradients: a slice is part of every length that is not shorter."""
        slope: Tensor | None = None
        slope_hard: Tensor | None = None
        spans = list(pairwise((0, *self.terms.dims)))
        for (begin, end), (more, more_hard) in zip(reversed(spans), reversed(partial), strict=True):
            slope = more if slope is None else slope + more
            self.by_query[rows, begin:end] = slope @ self.target[:, begin:end]
            self.by_target[:, begin:end] += slope.T @ self.query[rows, begin:end]
            if self.hard is None or self.by_hard is None or more_hard is None:
                continue
            slope_hard = more_hard if slope_hard is None else slope_hard + more_hard
            self.by_query[rows, begin:end] += torch.einsum("bk,bkd->bd", slope_hard, self.hard[rows, :, begin:end])
            self.by_hard[rows, :, begin:end] = slope_hard[..., None] * self.query[rows, None, begin:end]

    def gradients(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """By query, target, hard negatives and temperature."""
        parts = [(self.by_query, self.query, *pair) for pair in [(self.along[0], self.inverse[0])]]
        parts += [(self.by_target, self.target, self.along[1], self.inverse[1])]
        if self.hard is not None and self.by_hard is not None:
            parts += [(self.by_hard, self.hard, self.along_hard, self.inverse_hard)]
        for gradient, values, along, inverse in parts:
            less = (along * inverse.square()).flip(0).cumsum(0).flip(0)  # of every length that is not shorter
            for place, (begin, end) in enumerate(pairwise((0, *self.terms.dims))):
                gradient[..., begin:end] -= less[place][..., None] * values[..., begin:end]
        return self.by_query, self.by_target, self.by_hard, self.by_temperature


def _inverse_lengths(values: Tensor, dims: Sequence[int]) -> Tensor:
    """(..., D) -> (len(dims), ...): one over the length of each prefix."""
    lengths = torch.stack([values[..., :dim].norm(dim=-1) for dim in dims])
    return lengths.clamp_min_(_EPSILON).reciprocal_()
