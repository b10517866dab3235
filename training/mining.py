"""Dynamic hard negatives (SAIL-Embedding, section 3.1.2): the threshold of best F1, and what lies just below it.

Unusual: F1 over every threshold is exact without an (N, N) matrix. Only positives' scores can be the best threshold,
and one at or below the K-th highest negative has an F1 of at most 2 N / (2 N + K): once the best one found reaches
that, the K highest negatives were enough; else negatives are counted in a second pass.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

MEMORY_BYTES = 1 << 30
BLOCK_BYTES = 64 << 20  # of a block of scores; larger ones are no faster
BYTES_A_NEGATIVE = 40  # of one that is kept for the threshold: the number itself, and the copies that sort it
KEPT_A_PAIR = 16  # negatives kept for the threshold at first; enough where F1 is at least 0.11
SPARE = 24  # of each query's highest scores more than asked for: some are false negatives, or said twice
MASKED_AT_ONCE = 1 << 20  # pairs that are no negatives, spelt out at a time
SECONDS_BETWEEN_SAVES = 60.0

Ids = Sequence[Hashable] | np.ndarray


@dataclass(frozen=True)
class Threshold:
    """Where "score >= value means positive" has its best F1.

    Attributes:
        value: lambda*, the highest of equally good ones; always a positive's score.
        f1, precision, recall: there.
        curve: (T, 4) threshold, F1, precision, recall at every distinct positive score that is certain, falling.
    """

    value: float
    f1: float
    precision: float
    recall: float
    curve: np.ndarray


@dataclass(frozen=True)
class Mined:
    """What `mine` finds for N pairs.

    Attributes:
        negatives: (N, k) rows of ``targets``, the highest below the threshold first; -1 where there are fewer.
        scores: (N, k) their scores; NaN where there is none.
        positives: (N,) scores of the pairs.
        threshold: lambda*.
        false_negatives: (N,) how many targets of a row score at or above it, and were dropped.
        highest_false: (N,) the row of ``targets`` of the highest of those; -1 where there is none.
        excluded: how many cross pairs are positives of the same query, or share its target's id.
    """

    negatives: Tensor
    scores: Tensor
    positives: Tensor
    threshold: Threshold
    false_negatives: Tensor
    highest_false: Tensor
    excluded: int

    @property
    def degenerate(self) -> str:
        """Why the pairs say nothing, in words; empty where they do."""
        if bool((self.negatives >= 0).any()):
            return ""
        if float(self.positives.min()) == float(self.positives.max()):
            return (
                f"All positives score {self.threshold.value:.4f}, and no other pair scores below: the model does not "
                "tell these items apart. Nothing can be mined; train it first, or look at what the items hold."
            )
        return (
            f"No target scores below lambda* = {self.threshold.value:.4f} for any query: all would be false negatives. "
            "Mine over more pairs, or with a model that tells them apart."
        )


def summary(found: Mined) -> dict[str, Any]:
    """What a report says of a mining, as plain numbers."""
    kept = found.negatives >= 0
    return {
        "pairs": len(found.positives),
        "lambda": found.threshold.value,
        "f1": found.threshold.f1,
        "precision": found.threshold.precision,
        "recall": found.threshold.recall,
        "negatives": int(kept.sum()),
        "queries_with_fewer_negatives": int((~kept.all(dim=1)).sum()),
        "false_negatives_dropped": int(found.false_negatives.sum()),
        "queries_with_false_negatives": int((found.false_negatives > 0).sum()),
        "cross_pairs_excluded": found.excluded,
    }


# --- the threshold --------------------------------------------------------------------------------------------------


def best_threshold(positives: np.ndarray, negatives: np.ndarray, complete: bool) -> Threshold | None:
    """The threshold of best F1 (section 3.1.2), or None where the negatives given cannot tell it.

    Args:
        positives: (N,) scores of the positive pairs.
        negatives: the highest scores of the other pairs.
        complete: whether those are all of them.

    Raises:
        ValueError: there is no positive.
    """
    if not len(positives):
        raise ValueError("There is no positive pair; F1 has no threshold.")
    count, others = len(positives), np.sort(negatives)
    candidates = np.unique(positives)[::-1]
    if not complete:  # at or below the lowest one kept, there may be others that were not kept
        candidates = candidates[candidates > others[0]]
    if not len(candidates):
        return None
    found = threshold_of(positives, candidates, len(others) - np.searchsorted(others, candidates, side="left"))
    certain = complete or found.f1 >= 2 * count / (2 * count + len(others))
    return found if certain else None


def threshold_of(positives: np.ndarray, candidates: np.ndarray, false: np.ndarray) -> Threshold:
    """The best of some thresholds.

    Args:
        positives: (N,) scores of the positive pairs.
        candidates: (T,) thresholds, falling.
        false: (T,) how many other pairs score at or above each.
    """
    count, rising = len(positives), np.sort(positives)
    true = count - np.searchsorted(rising, candidates, side="left")
    f1, precision, recall = 2 * true / (true + false + count), true / (true + false), true / count
    best = int(f1.argmax())  # the first is the highest threshold
    curve = np.stack([candidates, f1, precision, recall], axis=1)
    return Threshold(float(candidates[best]), float(f1[best]), float(precision[best]), float(recall[best]), curve)


# --- mining ---------------------------------------------------------------------------------------------------------


def mine(
    queries: Tensor,
    targets: Tensor,
    *,
    query_ids: Ids,
    target_ids: Ids,
    num_negatives: int = 8,
    memory_bytes: int = MEMORY_BYTES,
    progress: bool = False,
    state: Path | None = None,
) -> Mined:
    """lambda* and the hard negatives of N positive pairs, both exact, in memory linear in N.

    All cross pairs (query i, target j) are negatives but those that are positives of the same query id or that have a
    target id of such a positive.

    Args:
        queries, targets: (N, D) embeddings of the pairs, normalised, on any device; may be memory-mapped.
        query_ids, target_ids: N names or numbers each.
        num_negatives: k; at most so many a query, no target id twice.
        memory_bytes: for blocks of scores and the negatives kept for the threshold, besides the embeddings and what
            is returned.
        progress: show bars.
        state: a file that keeps how far the first pass is; a killed run goes on from it. It is removed at the end.

    Raises:
        ValueError: sizes differ; fewer than two pairs; no negative at all; embeddings that are not finite; a state of
            another run.
    """
    _check(queries, targets, query_ids, target_ids, num_negatives, memory_bytes)
    excluded = _Excluded(_numbered(query_ids), _numbered(target_ids))
    blocks = _Blocks(queries, targets, excluded, min(BLOCK_BYTES, memory_bytes // 4), progress)
    if blocks.num_negatives == 0:
        raise ValueError("There is no negative: every target is a positive of every query. Mine over more pairs.")
    count = min(len(queries), num_negatives + SPARE)
    most = (memory_bytes - min(BLOCK_BYTES, memory_bytes // 4)) // BYTES_A_NEGATIVE
    keep = max(1, min(KEPT_A_PAIR * len(queries), blocks.num_negatives, most))
    first = _first_pass(blocks, count, keep, state)
    complete = len(first.highest) >= blocks.num_negatives
    threshold = best_threshold(first.positives.cpu().numpy(), first.highest.cpu().numpy(), complete)
    if threshold is None:
        threshold = _counted(blocks, first.positives)
    found = _below(first.places, first.scores, threshold.value, blocks.excluded.targets, num_negatives)
    short = (found.scores.isnan().any(dim=1) & (first.scores[:, -1] > -torch.inf)).nonzero()[:, 0]
    if len(short):
        _redo(blocks, short, threshold.value, num_negatives, found)
    if state is not None:
        state.unlink(missing_ok=True)
    return Mined(
        found.places, found.scores, first.positives, threshold, found.false, found.highest_false, excluded.count
    )


@dataclass(frozen=True)
class _First:
    positives: Tensor  # (N,)
    highest: Tensor  # (K,) of all negatives
    places: Tensor  # (N, count) of each query's highest negatives
    scores: Tensor


@dataclass(frozen=True)
class _Found:
    places: Tensor  # (n, k)
    scores: Tensor
    false: Tensor  # (n,)
    highest_false: Tensor  # (n,)


class _Excluded:
    """Which cross pairs are no negatives, row by row: positives of the same query id, and what shares their ids.

    Columns of one target id lie side by side in ``order``, so a row needs its target ids alone, not their columns.
    """

    def __init__(self, queries: np.ndarray, targets: np.ndarray) -> None:
        self.targets, self.queries = torch.from_numpy(targets), queries
        self.order = np.argsort(targets, kind="stable")
        self.sizes = np.bincount(targets)
        self.begins = np.cumsum(self.sizes) - self.sizes
        pairs = np.unique(np.stack([queries, targets], axis=1), axis=0)  # by query, each of its target ids once
        self.wanted = pairs[:, 1]
        self.num_wanted = np.bincount(pairs[:, 0])
        self.wanted_begins = np.cumsum(self.num_wanted) - self.num_wanted
        a_query = np.bincount(pairs[:, 0], weights=self.sizes[self.wanted]).astype(np.int64)
        self.a_row = a_query[queries]  # (N,) columns that are no negatives of a row, its own among them
        self.count = int(self.a_row.sum()) - len(queries)

    def mask(self, scores: Tensor, begin: int) -> None:
        """Set what does not count to minus infinity, in place; some rows at a time, as ids may be shared by many."""
        total = self.a_row[begin : begin + len(scores)].cumsum()
        cuts = np.searchsorted(total, np.arange(MASKED_AT_ONCE, total[-1], MASKED_AT_ONCE)) + 1
        for rows in np.split(np.arange(len(scores)), np.unique(cuts)):
            if len(rows):
                where, columns = (torch.from_numpy(part).to(scores.device) for part in self._pairs(rows, begin))
                scores[where, columns] = -torch.inf

    def _pairs(self, rows: np.ndarray, begin: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a block and columns, pair by pair."""
        queries = self.queries[begin + rows]
        ids = self.wanted[_ranges(self.wanted_begins[queries], self.num_wanted[queries])]
        columns = self.order[_ranges(self.begins[ids], self.sizes[ids])]
        return rows.repeat(self.a_row[begin + rows]), columns


def _ranges(begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The whole numbers of [begin, begin + size), one range after the other."""
    ends = sizes.cumsum()
    return np.arange(ends[-1]) + np.repeat(begins - (ends - sizes), sizes)


def _numbered(ids: Ids) -> np.ndarray:
    """(N,) numbers from 0, equal where the ids are."""
    if isinstance(ids, np.ndarray):
        return np.unique(ids, return_inverse=True)[1].astype(np.int64)
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(name, len(known)) for name in ids], dtype=np.int64)


class _Blocks:
    """Scores of all cross pairs, some queries at a time; a block is the same numbers whenever it is asked for."""

    def __init__(self, queries: Tensor, targets: Tensor, excluded: _Excluded, block_bytes: int, progress: bool) -> None:
        self.queries, self.targets, self.excluded, self.progress = queries.float(), targets.float(), excluded, progress
        self.rows = min(len(queries), max(1, block_bytes // (4 * len(targets))))
        self.num_negatives = len(queries) * len(targets) - int(excluded.a_row.sum())
        self.buffer = self.queries.new_empty(self.rows, len(targets))  # one for all: fresh pages cost more than sums

    def each(self, name: str, start: int = 0) -> Iterator[tuple[int, Tensor, Tensor]]:
        """All blocks from row ``start`` on; each is good until the next."""
        done, size = start // self.rows, -(-len(self.queries) // self.rows)
        begins = range(start, len(self.queries), self.rows)
        for begin in tqdm(begins, name, total=size, initial=done, unit="block", disable=not self.progress):
            yield begin, *self.block(begin)

    def block(self, begin: int) -> tuple[Tensor, Tensor]:
        """(b,) scores of the positives, (b, N) scores of the negatives."""
        some = self.queries[begin : begin + self.rows]
        scores = torch.mm(some, self.targets.T, out=self.buffer[: len(some)])
        here = torch.arange(len(scores), device=scores.device)
        positives = scores[here, here + begin].clone()
        self.excluded.mask(scores, begin)
        return positives, scores


def _first_pass(blocks: _Blocks, count: int, keep: int, state: Path | None) -> _First:
    """Positives, each query's highest negatives, and the ``keep`` highest of all."""
    size, device = len(blocks.queries), blocks.queries.device
    positives, scores = torch.zeros(size, device=device), torch.zeros(size, count, device=device)
    places = torch.zeros(size, count, dtype=torch.int32, device=device)
    job = {"size": size, "count": count, "keep": keep, "rows": blocks.rows}
    highest, start = blocks.queries.new_zeros(0), 0
    if state is not None and state.is_file():
        start, highest = _load_state(state, job, positives, places, scores)
    cut, saved = _cut(highest, keep), time.monotonic()
    for begin, positive, block in blocks.each("mine", start):
        end = begin + len(block)
        top = block.topk(count, dim=1)
        positives[begin:end], places[begin:end], scores[begin:end] = positive, top.indices.int(), top.values
        # Rows whose highest few all lie above the cut may have more above it; for the others the few are enough.
        deep = top.values[:, -1] > cut
        above = [top.values[~deep].flatten(), *(row[row > cut] for row in block[deep].split(8))]
        highest = torch.cat([highest, *(part[part > cut] for part in above)])
        if len(highest) > 2 * keep:
            highest = highest.topk(keep).values
            cut = _cut(highest, keep)
        if state is not None and time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
            _save_state(state, {**job, "next": end}, (highest, positives[:end], places[:end], scores[:end]))
            saved = time.monotonic()
    return _First(positives, highest.topk(min(keep, len(highest))).values, places, scores)


def _cut(highest: Tensor, keep: int) -> float:
    """Scores at or below it are not among the ``keep`` highest."""
    return float(highest.topk(keep).values[-1]) if len(highest) >= keep else -torch.inf


_STATE = ("highest", "positives", "places", "scores")


def _save_state(path: Path, job: dict[str, int], tensors: Sequence[Tensor]) -> None:
    partial = path.with_name(path.name + ".partial")
    given = {name: tensor.cpu().contiguous() for name, tensor in zip(_STATE, tensors, strict=True)}
    save_file(given, partial, metadata={"job": json.dumps(job)})
    os.replace(partial, path)


def _load_state(
    path: Path, job: dict[str, int], positives: Tensor, places: Tensor, scores: Tensor
) -> tuple[int, Tensor]:
    """The next row and the highest negatives so far; what is done is written into the tensors."""
    with safe_open(path, framework="pt", device=str(positives.device)) as file:
        known = json.loads((file.metadata() or {}).get("job", "{}"))
        start = known.pop("next", 0)
        if known != job:
            raise ValueError(f"{path} is the state of another run ({known}, now {job}); remove it.")
        for name, part in (("positives", positives), ("places", places), ("scores", scores)):
            part[:start] = file.get_tensor(name)
        return start, file.get_tensor("highest")


def _counted(blocks: _Blocks, positives: Tensor) -> Threshold:
    """The threshold by a second pass that counts the negatives at or above each positive score; nothing is kept."""
    rising = positives.unique()
    counts = torch.zeros(len(rising) + 1, dtype=torch.long, device=rising.device)
    for _, _, block in blocks.each("mine: threshold"):
        for part in block.split(max(1, MASKED_AT_ONCE // block.shape[1])):
            places = torch.bucketize(part[part >= rising[0]], rising, right=True)
            counts += torch.bincount(places, minlength=len(counts))
    at_or_above = counts.flip(0).cumsum(0).flip(0)[1:]  # (T,), of each positive score
    falling = rising.flip(0).cpu().numpy()
    return threshold_of(positives.cpu().numpy(), falling, at_or_above.flip(0).cpu().numpy())


def _below(places: Tensor, scores: Tensor, threshold: float, targets: Tensor, count: int) -> _Found:
    """The highest ``count`` below the threshold, each target id once, and what is not below; from (n, m) falling
    scores.
    """
    places = places.long()
    ids = targets.to(places.device)[places]  # (n, m)
    above = scores >= threshold
    good = (scores < threshold) & (scores > -torch.inf)
    # The first of each id, that is the highest: a stable sort by id puts it before its equals.
    alone = -1 - torch.arange(ids.shape[1], device=ids.device)
    grouped = torch.where(good, ids, alone).sort(dim=1, stable=True)
    again = torch.zeros_like(good)
    again[:, 1:] = grouped.values[:, 1:] == grouped.values[:, :-1]
    good &= ~torch.zeros_like(good).scatter(1, grouped.indices, again)
    order = (~good).long().argsort(dim=1, stable=True)[:, :count]
    kept = good.gather(1, order)
    found = torch.where(kept, places.gather(1, order), -1)
    values = torch.where(kept, scores.gather(1, order), torch.nan)
    missing = max(0, count - found.shape[1])
    return _Found(
        torch.nn.functional.pad(found, (0, missing), value=-1),
        torch.nn.functional.pad(values, (0, missing), value=torch.nan),
        above.sum(dim=1),
        torch.where(above[:, 0], places[:, 0], -1),
    )


def _redo(blocks: _Blocks, rows: Tensor, threshold: float, count: int, found: _Found) -> None:
    """Look at whole rows again where the highest few were mostly above the threshold; in place."""
    for begin in sorted({int(row) // blocks.rows * blocks.rows for row in rows}):
        _, block = blocks.block(begin)
        for here in rows[(rows >= begin) & (rows < begin + blocks.rows)].split(8):
            ordered = block[here - begin].sort(dim=1, descending=True, stable=True)
            again = _below(ordered.indices, ordered.values, threshold, blocks.excluded.targets, count)
            found.places[here], found.scores[here], found.false[here] = again.places, again.scores, again.false


def _check(
    queries: Tensor, targets: Tensor, query_ids: Ids, target_ids: Ids, num_negatives: int, memory_bytes: int
) -> None:
    if queries.dim() != 2 or queries.shape != targets.shape:
        raise ValueError(f"queries {tuple(queries.shape)} and targets {tuple(targets.shape)} must both be (N, D).")
    if len(query_ids) != len(queries) or len(target_ids) != len(queries):
        raise ValueError(f"{len(query_ids)} query ids and {len(target_ids)} target ids for {len(queries)} pairs.")
    if len(queries) < 2:
        raise ValueError(f"{len(queries)} pair(s) have no cross pairs; negatives need at least two.")
    if num_negatives < 1:
        raise ValueError(f"num_negatives={num_negatives} must be at least 1.")
    if memory_bytes < 16 * len(queries):
        raise ValueError(f"memory_bytes={memory_bytes} does not hold one row of scores; give {16 * len(queries)}.")
    for name, part in (("queries", queries), ("targets", targets)):
        if not all(bool(some.isfinite().all()) for some in part.split(65_536)):
            raise ValueError(f"{name} hold NaN or infinite values; leave out items that could not be embedded.")
