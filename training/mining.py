"""Dynamic hard negatives (SAIL-Embedding, section 3.1.2): the threshold of best F1, and what lies just below it.

Unusual: F1 over every threshold is exact without an (N, N) matrix. Only positives' scores can be the best threshold,
and one at or below the K-th highest negative has an F1 of at most 2 N / (2 N + K): once the best one found reaches
that, the K highest negatives were enough; else negatives are counted in a second pass, as far down as that needs.
Where rows say the same items again and again, as interactions with a catalogue do, each is scored once and counts as
often as it is there.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import whole
from .mining_blocks import ALIKE, ROWS_WEIGHED, Blocks, Distinct, Excluded, Ids, numbered

MEMORY_BYTES = 1 << 30
CHUNK = 65_536  # rows that are looked at together where nothing else bounds them
BYTES_A_NEGATIVE = 40  # of one that is kept for the threshold, and of its weight: itself, and the copies that sort it
KEPT_A_PAIR = 16  # negatives kept for the threshold at first; enough where F1 is at least 0.11
SPARE = 24  # of each query's highest scores more than asked for: some are false negatives, or said twice
SECONDS_BETWEEN_SAVES = 60.0
SAMPLED = 8  # places at which rows tell how far down to count


class NothingToMine(ValueError):
    """Pairs that have no negatives, whatever the model."""


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
        value, known = self.threshold.value, self.scores[self.negatives >= 0]
        if float(self.positives.max() - self.positives.min()) < ALIKE and not bool((known < value - ALIKE).any()):
            return (
                f"All pairs score {value:.4f}, and no other pair scores clearly below: the model does not tell these "
                "items apart. Nothing can be mined; train it first, or look at what the items hold."
            )
        if len(known):
            return ""
        return (
            f"No target scores below lambda* = {value:.4f} for any query: all would be false negatives. Mine over more "
            "pairs, or with a model that tells them apart."
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


def best_threshold(
    positives: np.ndarray, negatives: np.ndarray, complete: bool, weights: np.ndarray | None = None
) -> Threshold | None:
    """The threshold of best F1 (section 3.1.2), or None where the negatives given cannot tell it.

    Args:
        positives: (N,) scores of the positive pairs.
        negatives: the highest scores of the other pairs.
        complete: whether those are all of them.
        weights: how many pairs have each of those scores; one by default.

    Raises:
        ValueError: there is no positive.
    """
    if not len(positives):
        raise ValueError("There is no positive pair; F1 has no threshold.")
    count, rising = len(positives), np.argsort(negatives)
    others, below = negatives[rising], np.arange(len(negatives) + 1)  # below[n]: pairs that the lowest n scores are of
    if weights is not None:
        below[1:] = weights[rising].cumsum()
    candidates = np.unique(positives)[::-1]
    if not complete:  # at or below the lowest one kept, there may be others that were not kept
        candidates = candidates[candidates > others[0]]
    if not len(candidates):
        return None
    found = threshold_of(positives, candidates, below[-1] - below[np.searchsorted(others, candidates, side="left")])
    certain = complete or found.f1 >= 2 * count / (2 * count + below[-1])
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


@torch.no_grad()
def mine(
    queries: Tensor,
    targets: Tensor,
    *,
    query_ids: Ids,
    target_ids: Ids,
    num_negatives: int = 8,
    memory_bytes: int = MEMORY_BYTES,
    device: torch.device | str | None = None,
    progress: bool = False,
    state: Path | None = None,
) -> Mined:
    """lambda* and the hard negatives of N positive pairs, both exact, in memory linear in N.

    All cross pairs (query i, target j) are negatives but those that are positives of the same query id or that have a
    target id of such a positive. Rows of one id whose embeddings differ by float32's noise alone are scored as the
    first of them: the work is that of the distinct queries times the distinct targets, where these are few.

    Args:
        queries, targets: (N, D) embeddings of the pairs, normalised; may be memory-mapped.
        query_ids, target_ids: N names or numbers each.
        num_negatives: k; at most so many a query, no target id twice.
        memory_bytes: for blocks of scores and the negatives kept for the threshold, besides the embeddings, and about
            12 (k + 24) bytes a pair for each query's highest scores.
        device: where scores are computed; the targets are moved there whole. By default where the queries are.
        progress: show bars.
        state: a file that keeps how far the first pass is; a killed run goes on from it, or from its end. It stays
            until whoever named it removes it.

    Returns:
        Tensors on the CPU.

    Raises:
        NothingToMine: fewer than two pairs; no negative at all. ValueError: sizes differ; embeddings that are not
            finite; a state of another run, or one that cannot be read.
    """
    _check(queries, targets, query_ids, target_ids, num_negatives, memory_bytes)
    numbers = numbered(query_ids), numbered(target_ids)
    rows, columns = (Distinct.of(side, ids) for side, ids in zip((queries, targets), numbers, strict=True))
    excluded = Excluded(*numbers, rows.first, columns.first)
    blocks = Blocks(queries, targets, rows, columns, excluded, memory_bytes // 4, device or queries.device, progress)
    if excluded.num_negatives == 0:
        raise NothingToMine("There is no negative: every target is a positive of every query. Mine over more pairs.")
    size, count = len(queries), min(len(columns.first), num_negatives + SPARE)
    most = (memory_bytes - memory_bytes // 4) // (BYTES_A_NEGATIVE * (1 if blocks.row_times is None else 2))
    keep = max(1, min(KEPT_A_PAIR * size, excluded.num_negatives, most))
    first = _first_pass(blocks, count, keep, state)
    weights = None if first.weights is None else first.weights.numpy()
    complete = (len(first.highest) if weights is None else weights.sum()) >= excluded.num_negatives
    threshold = best_threshold(first.positives.numpy(), first.highest.numpy(), complete, weights)
    if threshold is None:
        threshold = _counted(blocks, first)
    found = _below(first.places, first.scores, threshold.value, blocks, num_negatives)
    short = (found.scores.isnan().any(dim=1) & (first.scores[:, -1] > -torch.inf)).nonzero()[:, 0]
    if len(short):
        _redo(blocks, short, threshold.value, found)
    places, scores, false, highest = (  # a row has what its query has
        rows.spread(part)
        for part in (columns.rows(found.places), found.scores, found.false, columns.rows(found.highest_false))
    )
    return Mined(places, scores, first.positives, threshold, false, highest, excluded.count)


@dataclass(frozen=True)
class _First:
    positives: Tensor  # (N,)
    highest: Tensor  # (K,) of all negatives
    places: Tensor  # (R, count) of each distinct query's highest negatives, distinct targets
    scores: Tensor
    weights: Tensor | None = None  # (K,) cross pairs that have each of the highest scores; None: one


@dataclass(frozen=True)
class _Found:
    places: Tensor  # (n, k) of distinct targets
    scores: Tensor
    false: Tensor  # (n,)
    highest_false: Tensor  # (n,)


def _first_pass(blocks: Blocks, count: int, keep: int, state: Path | None) -> _First:
    """Positives, each query's highest negatives, and the ``keep`` highest of all."""
    size = blocks.num_rows
    places, scores = torch.zeros(size, count, dtype=torch.int32), torch.zeros(size, count)
    known = _First(torch.zeros(len(blocks.queries)), torch.zeros(0), places, scores)
    highest, start = _Highest(keep, blocks.device, blocks.row_times is not None), 0
    job = None if state is None else _job(blocks, count, keep)
    if state is not None and state.is_file():
        start = _load_state(state, job, blocks, known, highest)
    saved = time.monotonic()
    for rows in blocks.bands("mine", start):
        _search_band(blocks, rows, known, highest)
        if state is not None and (rows.stop == size or time.monotonic() - saved > SECONDS_BETWEEN_SAVES):
            _save_state(state, job, blocks, known, highest, rows.stop)
            saved = time.monotonic()
    together, weights = highest.all()
    return _First(known.positives, together.cpu(), places, scores, None if weights is None else weights.cpu())


def _search_band(blocks: Blocks, rows: range, known: _First, highest: _Highest) -> None:
    """Write what a band has into ``known`` and ``highest``."""
    count = known.places.shape[1]
    best: tuple[Tensor, Tensor] | None = None
    for block in blocks.tiles(rows):
        known.positives[block.pairs] = block.positives.cpu()
        top = block.scores.topk(min(count, len(block.columns)), dim=1)
        # Rows whose highest few all lie above the cut may have more above it; for the others the few are enough.
        deep = top.values[:, -1] > highest.cut
        few, every = (~deep).nonzero(), torch.arange(len(block.columns), device=deep.device)
        highest.add(top.values[~deep], block.weights(few, top.indices[~deep]))
        for some in deep.nonzero().split(8):
            highest.add(block.scores[some[:, 0]], block.weights(some, every))
        one = top.values, top.indices + block.columns.start
        if best is not None:
            values, places = (torch.cat(pair, dim=1) for pair in zip(best, one, strict=True))
            merged = values.topk(min(count, values.shape[1]), dim=1)
            one = merged.values, places.gather(1, merged.indices)
        best = one
    assert best is not None
    known.scores[rows.start : rows.stop], known.places[rows.start : rows.stop] = best[0].cpu(), best[1].int().cpu()


class _Highest:
    """The highest of all scores that are added; those at or below ``cut`` are not among them.

    Args:
        keep: how many; with weights, so many in all that one fewer would weigh less.
        device: where.
        weighted: whether each score comes with how often it counts.
    """

    def __init__(self, keep: int, device: torch.device | str, weighted: bool) -> None:
        self.keep, self.cut, self.count = keep, -torch.inf, 0
        self.parts = [torch.zeros(0, device=device)]
        self.weights = [torch.zeros(0, dtype=torch.long, device=device)] if weighted else None

    def add(self, scores: Tensor, weights: Tensor | None = None) -> None:
        """Any number of scores, of any shape, and weights of the same."""
        where = scores > self.cut
        above = scores[where]
        if len(above):
            self.parts.append(above)
            self.count += len(above)
            if self.weights is not None:
                assert weights is not None
                self.weights.append(weights.expand_as(scores)[where])
                self.count += int(self.weights[-1].sum()) - len(above)
        if self.count > 2 * self.keep:
            self.all()

    def all(self) -> tuple[Tensor, Tensor | None]:
        """(at most ``keep``,) scores, falling, and their weights."""
        together = torch.cat(self.parts)
        if self.weights is None:
            together, weights = together.topk(min(self.keep, len(together))).values, None
            self.count = len(together)
        else:
            together, order = together.sort(descending=True)
            weights = torch.cat(self.weights)[order]
            heavy = weights.cumsum(0)
            enough = int(torch.searchsorted(heavy, self.keep)) + 1
            together, weights = together[:enough], weights[:enough]
            self.weights, self.count = [weights], int(weights.sum())
        self.parts = [together]
        self.cut = float(together[-1]) if self.count >= self.keep else -torch.inf
        return together, weights


def _job(blocks: Blocks, count: int, keep: int) -> dict[str, Any]:
    """What a state is of: the embeddings and ids themselves, and how they are gone through."""
    digest = hashlib.sha256()
    for part in (blocks.queries, blocks.targets):
        for some in part.split(CHUNK):
            digest.update(some.float().cpu().contiguous().numpy().tobytes())
    digest.update(blocks.excluded.queries.tobytes() + blocks.excluded.targets.numpy().tobytes())
    digest.update(blocks.rows.number.tobytes() + blocks.columns.number.tobytes())
    tile = [blocks.height, blocks.width]
    return {"size": len(blocks.queries), "count": count, "keep": keep, "tile": tile, "data": digest.hexdigest()}


def _save_state(
    path: Path, job: dict[str, Any] | None, blocks: Blocks, known: _First, highest: _Highest, end: int
) -> None:
    tensors = {name: getattr(known, name)[:end].contiguous() for name in ("places", "scores")}
    tensors["positives"] = known.positives[blocks.pairs(0, end)]
    together, weights = highest.all()
    tensors |= {"highest": together.cpu()} | ({} if weights is None else {"weights": weights.cpu()})
    with whole(path) as partial:
        notes = {"job": json.dumps({**(job or {}), "next": end})}
        save_file(tensors, partial, metadata=notes)


def _load_state(path: Path, job: dict[str, Any] | None, blocks: Blocks, known: _First, highest: _Highest) -> int:
    """The next row; what is done is written into the tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {})["job"])
            start = found.pop("next")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
            positives, together, places, scores = (
                tensors[name] for name in ("positives", "highest", "places", "scores")
            )
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as the state of a mining ({error}); remove it.") from error
    if found != job:
        changed = ", ".join(name for name in found if found[name] != (job or {}).get(name))
        raise ValueError(f"{path} is the state of another run (its {changed} differ); remove it.")
    weights = tensors.get("weights")
    highest.add(together.to(blocks.device), None if weights is None else weights.to(blocks.device))
    known.positives[blocks.pairs(0, start)] = positives
    known.places[:start], known.scores[:start] = places, scores
    return start


def _counted(blocks: Blocks, first: _First) -> Threshold:
    """The threshold by a second pass that counts the negatives at or above each positive score; nothing is kept.

    Only thresholds with at most 2 N / f - 2 N negatives at or above them can beat an F1 of f, so counting goes down to
    where a band of scores says that so many are; where it turns out that they are not, down to the lowest positive.
    """
    rising = first.positives.unique()
    for floor in (_floor(blocks, first), float(rising[0])):
        found = rising[rising >= floor].to(blocks.device)
        if not len(found):
            continue
        counts = torch.zeros(len(found) + 1, dtype=torch.double, device=found.device)  # whole up to 2^53
        for rows in blocks.bands("mine: threshold"):
            for block in blocks.tiles(rows):
                for some, weights in block.above(float(found[0])):
                    places = torch.bucketize(some, found, right=True)
                    weights = None if weights is None else weights.double()
                    counts += torch.bincount(places, weights, minlength=len(counts))
        at_or_above = counts.long().flip(0).cumsum(0)[:-1]  # (T,), of each positive score, falling
        best = threshold_of(first.positives.numpy(), found.flip(0).cpu().numpy(), at_or_above.cpu().numpy())
        size = len(first.positives)
        if float(found[0]) == float(rising[0]) or best.f1 >= 2 * size / (2 * size + int(at_or_above[-1])):
            return best
    raise AssertionError("the lowest positive is always enough")


def _floor(blocks: Blocks, first: _First) -> float:
    """A score above which there are about as many negatives as the best threshold may have, by rows here and there."""
    size = len(first.positives)
    few = min(max(1, len(blocks.buffer) // (4 * SAMPLED * blocks.num_columns)), blocks.height, blocks.num_rows)
    starts = np.unique(np.linspace(0, blocks.num_rows - few, SAMPLED).astype(int) // few * few)
    rows = [range(start, start + few) for start in starts.tolist()]  # none twice
    found = [part for some in rows for block in blocks.tiles(some) for part in block.above(-torch.inf)]
    falling, order = torch.cat([scores.cpu() for scores, _ in found]).sort(descending=True)
    heavy = torch.arange(len(falling) + 1)  # cross pairs that the highest n scores are of
    if blocks.column_times is not None:
        heavy[1:] = torch.cat([times.cpu() for _, times in found if times is not None])[order].cumsum(0)
    share = sum(len(blocks.pairs(some.start, some.stop)) for some in rows) / size  # of all pairs, those of these rows
    positives = first.positives.sort(descending=True).values
    true = torch.arange(1, size + 1)
    false = heavy[torch.searchsorted(-falling, -positives, right=True)] / share  # about, of each positive score
    f1 = float((2 * true / (true + false + size)).max())
    place = int(torch.searchsorted(heavy, int(2.5 * size * (1 / f1 - 1) * share)))
    return float(falling[min(place, len(falling) - 1)])


def _below(places: Tensor, scores: Tensor, threshold: float, blocks: Blocks, count: int) -> _Found:
    """The highest ``count`` below the threshold, each target id once, and what is not below; from (n, m) falling
    scores, some rows at a time.
    """
    parts = [
        _below_some(some.long(), values, threshold, blocks, count)
        for some, values in zip(places.split(CHUNK), scores.split(CHUNK), strict=True)
    ]
    names = ("places", "scores", "false", "highest_false")
    return _Found(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def _below_some(places: Tensor, scores: Tensor, threshold: float, blocks: Blocks, count: int) -> _Found:
    ids = blocks.excluded.targets[places]  # (n, m)
    times = None if blocks.column_times is None else blocks.column_times.cpu()[places]
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
        (above if times is None else above * times).sum(dim=1),
        torch.where(above[:, 0], places[:, 0], -1),
    )


def _redo(blocks: Blocks, rows: Tensor, threshold: float, found: _Found) -> None:
    """Look again at rows whose highest few were mostly above the threshold, or of few target ids; in place.

    Bands that have none are passed over. A tile gives each id its highest score below the threshold, then the highest
    ids are taken, so neither how many lie above nor how often an id is there matters.
    """
    short = torch.zeros(blocks.num_rows, dtype=torch.bool)
    short[rows] = True
    ids = blocks.excluded.targets.to(blocks.device)
    size, count = int(ids.max()) + 1, found.places.shape[1]
    repeated = size < len(ids)
    for band in blocks.bands("mine: again"):
        here = short[band.start : band.stop].nonzero()[:, 0].to(blocks.device)
        if not len(here):
            continue
        false = torch.zeros(len(here), dtype=torch.long, device=blocks.device)
        none_yet = torch.zeros(len(here), 0, device=blocks.device)
        best = none_yet, none_yet.long()
        for block in blocks.tiles(band):
            scores = block.scores[here]
            above = scores >= threshold
            if block.column_times is None:
                false += above.sum(dim=1)
            else:
                for some in torch.arange(len(above), device=above.device).split(ROWS_WEIGHED):
                    false[some] += (above[some] * block.column_times).sum(dim=1)
            scores.masked_fill_(above, -torch.inf)
            one = _highest_of_ids(scores, ids[block.columns.start : block.columns.stop], count, repeated)
            best = _merged(best, (one[0], one[1] + block.columns.start), ids, count)
        where = band.start + here.cpu()
        values, places = (part.cpu() for part in best)
        none = ~values.isfinite()
        found.false[where] = false.cpu()
        found.scores[where, : values.shape[1]] = values.masked_fill(none, torch.nan)
        found.places[where, : places.shape[1]] = places.masked_fill(none, -1)


def _highest_of_ids(scores: Tensor, ids: Tensor, count: int, repeated: bool) -> tuple[Tensor, Tensor]:
    """(n, at most count) highest scores of distinct ids, and their columns."""
    if not repeated:
        top = scores.topk(min(count, scores.shape[1]), dim=1)
        return top.values, top.indices
    names, places = ids.unique(return_inverse=True)
    highest = torch.full((len(scores), len(names)), -torch.inf, device=scores.device)
    highest.scatter_reduce_(1, places.expand(len(scores), -1), scores, "amax")
    top = highest.topk(min(count, len(names)), dim=1)
    columns = torch.stack(
        [  # the column that has this score among those of the id
            torch.where(places == top.indices[:, [rank]], scores, -torch.inf).argmax(dim=1)
            for rank in range(top.indices.shape[1])
        ],
        dim=1,
    )
    return top.values, columns


def _merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest of both, each id once."""
    values, places = (torch.cat(pair, dim=1) for pair in zip(one, other, strict=True))
    order = values.argsort(dim=1, descending=True, stable=True)
    values, places = values.gather(1, order), places.gather(1, order)
    named = ids[places]
    for column in range(1, values.shape[1]):
        again = (named[:, :column] == named[:, [column]]) & values[:, :column].isfinite()
        values[:, column].masked_fill_(again.any(dim=1), -torch.inf)
    order = values.argsort(dim=1, descending=True, stable=True)[:, :count]
    return values.gather(1, order), places.gather(1, order)


def _check(
    queries: Tensor, targets: Tensor, query_ids: Ids, target_ids: Ids, num_negatives: int, memory_bytes: int
) -> None:
    if queries.dim() != 2 or queries.shape != targets.shape:
        raise ValueError(f"queries {tuple(queries.shape)} and targets {tuple(targets.shape)} must both be (N, D).")
    if len(query_ids) != len(queries) or len(target_ids) != len(queries):
        raise ValueError(f"{len(query_ids)} query ids and {len(target_ids)} target ids for {len(queries)} pairs.")
    if len(queries) < 2:
        raise NothingToMine(f"{len(queries)} pair(s) have no cross pairs; negatives need at least two.")
    if num_negatives < 1:
        raise ValueError(f"num_negatives={num_negatives} must be at least 1.")
    if memory_bytes < BYTES_A_NEGATIVE:
        raise ValueError(f"memory_bytes={memory_bytes} holds no score; give {MEMORY_BYTES}, or what the machine has.")
    for name, part in (("queries", queries), ("targets", targets)):
        if not all(bool(some.isfinite().all()) for some in part.split(CHUNK)):
            raise ValueError(f"{name} hold NaN or infinite values; leave out items that could not be embedded.")
