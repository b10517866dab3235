"""Dynamic hard negatives (SAIL-Embedding, section 3.1.2): the threshold of best F1, and what lies just below it.

Unusual: F1 over every threshold is exact without an (N, N) matrix. Only positives' scores can be the best threshold,
and one at or below the K-th highest negative has an F1 of at most 2 N / (2 N + K): once the best one found reaches
that, the K highest negatives were enough; else negatives are counted in a second pass, as far down as that needs.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from .files import whole

MEMORY_BYTES = 1 << 30
TILE = 1024, 16_384  # queries and targets of a block of scores: 64 MiB; larger ones are no faster
CHUNK = 65_536  # rows that are looked at together where nothing else bounds them
BYTES_A_NEGATIVE = 40  # of one that is kept for the threshold: the number itself, and the copies that sort it
KEPT_A_PAIR = 16  # negatives kept for the threshold at first; enough where F1 is at least 0.11
SPARE = 24  # of each query's highest scores more than asked for: some are false negatives, or said twice
MASKED_AT_ONCE = 1 << 20  # pairs that are no negatives, spelt out at a time
SECONDS_BETWEEN_SAVES = 60.0
ALIKE = 1e-5  # scores that differ by less are one score with float32's noise


Ids = Sequence[Hashable] | np.ndarray


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
    target id of such a positive.

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
    excluded = _Excluded(_numbered(query_ids), _numbered(target_ids))
    blocks = _Blocks(queries, targets, excluded, memory_bytes // 4, device or queries.device, progress)
    if blocks.num_negatives == 0:
        raise NothingToMine("There is no negative: every target is a positive of every query. Mine over more pairs.")
    size, count = len(queries), min(len(queries), num_negatives + SPARE)
    most = (memory_bytes - memory_bytes // 4) // BYTES_A_NEGATIVE
    keep = max(1, min(KEPT_A_PAIR * size, blocks.num_negatives, most))
    first = _first_pass(blocks, count, keep, state)
    complete = len(first.highest) >= blocks.num_negatives
    threshold = best_threshold(first.positives.numpy(), first.highest.numpy(), complete)
    if threshold is None:
        threshold = _counted(blocks, first)
    found = _below(first.places, first.scores, threshold.value, blocks.excluded.targets, num_negatives)
    short = (found.scores.isnan().any(dim=1) & (first.scores[:, -1] > -torch.inf)).nonzero()[:, 0]
    if len(short):
        _redo(blocks, short, threshold.value, found)
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

    Pairs are found by ranges of the columns sorted by target id, so no row has a list of its own.
    """

    def __init__(self, queries: np.ndarray, targets: np.ndarray) -> None:
        self.targets, self.queries, self.size = torch.from_numpy(targets), queries, len(targets)
        self.order = np.argsort(targets, kind="stable")
        self.keys = targets[self.order] * self.size + self.order  # rising: by id, then by column
        sizes = np.bincount(targets)
        pairs = np.unique(np.stack([queries, targets], axis=1), axis=0)  # by query, each of its target ids once
        self.wanted = pairs[:, 1]
        self.num_wanted = np.bincount(pairs[:, 0])
        self.wanted_begins = np.cumsum(self.num_wanted) - self.num_wanted
        a_query = np.bincount(pairs[:, 0], weights=sizes[self.wanted]).astype(np.int64)
        self.a_row = a_query[queries]  # (N,) columns that are no negatives of a row, its own among them
        self.count = int(self.a_row.sum()) - len(queries)

    def mask(self, scores: Tensor, rows: range, columns: range) -> None:
        """Set what does not count to minus infinity, in place; some rows at a time, as ids may be shared by many."""
        total = self.a_row[rows.start : rows.stop].cumsum()
        cuts = np.searchsorted(total, np.arange(MASKED_AT_ONCE, total[-1], MASKED_AT_ONCE)) + 1
        for some in np.split(np.arange(len(rows)), np.unique(cuts)):
            if len(some):
                where, which = (torch.from_numpy(part).to(scores.device) for part in self._pairs(some, rows, columns))
                scores[where, which] = -torch.inf

    def _pairs(self, some: np.ndarray, rows: range, columns: range) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of a block, pair by pair."""
        queries = self.queries[rows.start + some]
        ids = self.wanted[_ranges(self.wanted_begins[queries], self.num_wanted[queries])]
        owners = some.repeat(self.num_wanted[queries])
        begins, ends = (np.searchsorted(self.keys, ids * self.size + at) for at in (columns.start, columns.stop))
        return owners.repeat(ends - begins), self.order[_ranges(begins, ends - begins)] - columns.start


def _ranges(begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The whole numbers of [begin, begin + size), one range after the other."""
    ends = sizes.cumsum()
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(begins - (ends - sizes), sizes)


def _numbered(ids: Ids) -> np.ndarray:
    """(N,) numbers from 0, equal where the ids are."""
    if isinstance(ids, np.ndarray):
        return np.unique(ids, return_inverse=True)[1].astype(np.int64)
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(name, len(known)) for name in ids], dtype=np.int64)


@dataclass(frozen=True)
class _Block:
    rows: range
    columns: range
    scores: Tensor  # (b, c), minus infinity where a pair is no negative; good until the next block
    positives: Tensor  # (p,) scores of the positives of the rows whose own column is here
    own: Tensor  # (p,) which rows of the block


class _Blocks:
    """Scores of all cross pairs, tile by tile; a tile is the same numbers whenever it is asked for."""

    def __init__(
        self,
        queries: Tensor,
        targets: Tensor,
        excluded: _Excluded,
        block_bytes: int,
        device: torch.device | str,
        progress: bool,
    ) -> None:
        self.queries, self.targets = queries, targets.to(device, torch.float32)
        self.excluded, self.progress, self.device = excluded, progress, device
        size = len(queries)
        self.height = min(size, TILE[0], max(1, block_bytes // (4 * min(size, TILE[1]))))
        self.width = min(size, TILE[1], max(1, block_bytes // (4 * self.height)))
        self.num_negatives = size * size - int(excluded.a_row.sum())
        self.buffer = torch.empty(self.height * self.width, device=device)  # fresh pages cost more than sums

    def bands(self, name: str, start: int = 0) -> Iterator[range]:
        """Rows of a tile's height, from row ``start`` on."""
        size = len(self.queries)
        begins, done = range(start, size, self.height), start // self.height
        total = -(-size // self.height)
        for begin in tqdm(begins, name, total=total, initial=done, unit="band", disable=not self.progress):
            yield range(begin, min(begin + self.height, size))

    def tiles(self, rows: range) -> Iterator[_Block]:
        """All tiles of a band."""
        some = self.queries[rows.start : rows.stop].to(self.device, torch.float32)
        for begin in range(0, len(self.targets), self.width):
            columns = range(begin, min(begin + self.width, len(self.targets)))
            out = self.buffer[: len(rows) * len(columns)].view(len(rows), len(columns))
            scores = torch.mm(some, self.targets[columns.start : columns.stop].T, out=out)
            first, last = max(rows.start, columns.start), min(rows.stop, columns.stop)
            own = torch.arange(first, max(first, last), device=scores.device)
            positives = scores[own - rows.start, own - columns.start].clone()
            self.excluded.mask(scores, rows, columns)
            yield _Block(rows, columns, scores, positives, own - rows.start)


def _first_pass(blocks: _Blocks, count: int, keep: int, state: Path | None) -> _First:
    """Positives, each query's highest negatives, and the ``keep`` highest of all."""
    size = len(blocks.queries)
    known = _First(
        torch.zeros(size), torch.zeros(0), torch.zeros(size, count, dtype=torch.int32), torch.zeros(size, count)
    )
    highest, start = _Highest(keep, blocks.device), 0
    job = None if state is None else _job(blocks, count, keep)
    if state is not None and state.is_file():
        start = _load_state(state, job, known, highest)
    saved = time.monotonic()
    for rows in blocks.bands("mine", start):
        _search_band(blocks, rows, known, highest)
        if state is not None and (rows.stop == size or time.monotonic() - saved > SECONDS_BETWEEN_SAVES):
            _save_state(state, job, known, highest, rows.stop)
            saved = time.monotonic()
    return _First(known.positives, highest.all().cpu(), known.places, known.scores)


def _search_band(blocks: _Blocks, rows: range, known: _First, highest: _Highest) -> None:
    """Write what a band has into ``known`` and ``highest``."""
    count = known.places.shape[1]
    best: tuple[Tensor, Tensor] | None = None
    for block in blocks.tiles(rows):
        known.positives[rows.start + block.own.cpu()] = block.positives.cpu()
        top = block.scores.topk(min(count, len(block.columns)), dim=1)
        # Rows whose highest few all lie above the cut may have more above it; for the others the few are enough.
        deep = top.values[:, -1] > highest.cut
        highest.add(top.values[~deep])
        for some in block.scores[deep].split(8):
            highest.add(some)
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
        keep: how many.
        device: where.
    """

    def __init__(self, keep: int, device: torch.device | str) -> None:
        self.keep, self.cut, self.count = keep, -torch.inf, 0
        self.parts = [torch.zeros(0, device=device)]

    def add(self, scores: Tensor) -> None:
        """Any number of scores, of any shape."""
        above = scores[scores > self.cut]
        if len(above):
            self.parts.append(above)
            self.count += len(above)
        if self.count > 2 * self.keep:
            self.all()

    def all(self) -> Tensor:
        """(at most ``keep``,) scores, falling."""
        together = torch.cat(self.parts)
        together = together.topk(min(self.keep, len(together))).values
        self.parts, self.count = [together], len(together)
        self.cut = float(together[-1]) if len(together) == self.keep else -torch.inf
        return together


def _job(blocks: _Blocks, count: int, keep: int) -> dict[str, Any]:
    """What a state is of: the embeddings and ids themselves, and how they are gone through."""
    digest = hashlib.sha256()
    for part in (blocks.queries, blocks.targets):
        for some in part.split(CHUNK):
            digest.update(some.float().cpu().contiguous().numpy().tobytes())
    digest.update(blocks.excluded.queries.tobytes() + blocks.excluded.targets.numpy().tobytes())
    tile = [blocks.height, blocks.width]
    return {"size": len(blocks.queries), "count": count, "keep": keep, "tile": tile, "data": digest.hexdigest()}


def _save_state(path: Path, job: dict[str, Any] | None, known: _First, highest: _Highest, end: int) -> None:
    tensors = {name: getattr(known, name)[:end].contiguous() for name in ("positives", "places", "scores")}
    with whole(path) as partial:
        notes = {"job": json.dumps({**(job or {}), "next": end})}
        save_file({**tensors, "highest": highest.all().cpu()}, partial, metadata=notes)


def _load_state(path: Path, job: dict[str, Any] | None, known: _First, highest: _Highest) -> int:
    """The next row; what is done is written into the tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {})["job"])
            start = found.pop("next")
            tensors = {name: file.get_tensor(name) for name in ("positives", "places", "scores", "highest")}
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as the state of a mining ({error}); remove it.") from error
    if found != job:
        changed = ", ".join(name for name in found if found[name] != (job or {}).get(name))
        raise ValueError(f"{path} is the state of another run (its {changed} differ); remove it.")
    highest.add(tensors.pop("highest").to(highest.parts[0].device))
    for name, values in tensors.items():
        getattr(known, name)[:start] = values
    return start


def _counted(blocks: _Blocks, first: _First) -> Threshold:
    """The threshold by a second pass that counts the negatives at or above each positive score; nothing is kept.

    Only thresholds with at most 2 N / f - 2 N negatives at or above them can beat an F1 of f, so counting goes down to
    where a band of scores says that so many are; where it turns out that they are not, down to the lowest positive.
    """
    rising = first.positives.unique()
    for floor in (_floor(blocks, first), float(rising[0])):
        found = rising[rising >= floor].to(blocks.device)
        if not len(found):
            continue
        counts = torch.zeros(len(found) + 1, dtype=torch.long, device=found.device)
        for rows in blocks.bands("mine: threshold"):
            for block in blocks.tiles(rows):
                some = block.scores[block.scores >= found[0]]
                counts += torch.bincount(torch.bucketize(some, found, right=True), minlength=len(counts))
        at_or_above = counts.flip(0).cumsum(0)[:-1]  # (T,), of each positive score, falling
        best = threshold_of(first.positives.numpy(), found.flip(0).cpu().numpy(), at_or_above.cpu().numpy())
        size = len(first.positives)
        if float(found[0]) == float(rising[0]) or best.f1 >= 2 * size / (2 * size + int(at_or_above[-1])):
            return best
    raise AssertionError("the lowest positive is always enough")


def _floor(blocks: _Blocks, first: _First) -> float:
    """A score above which there are about as many negatives as the best threshold may have, by one band of rows."""
    size, bands = len(first.positives), -(-len(first.positives) // blocks.height)
    begin = bands // 2 * blocks.height
    rows = range(begin, min(begin + blocks.height, size))
    tiles = [block.scores.flatten().cpu() for block in blocks.tiles(rows)]
    falling = torch.cat(tiles).sort(descending=True).values
    positives = first.positives.sort(descending=True).values
    true = torch.arange(1, size + 1)
    false = torch.searchsorted(-falling, -positives, right=True) * (size / len(rows))  # about, of each positive score
    f1 = float((2 * true / (true + false + size)).max())
    place = int(2.5 * size * (1 / f1 - 1) * len(rows) / size)
    return float(falling[min(place, len(falling) - 1)])


def _below(places: Tensor, scores: Tensor, threshold: float, targets: Tensor, count: int) -> _Found:
    """The highest ``count`` below the threshold, each target id once, and what is not below; from (n, m) falling
    scores, some rows at a time.
    """
    parts = [
        _below_some(some.long(), values, threshold, targets, count)
        for some, values in zip(places.split(CHUNK), scores.split(CHUNK), strict=True)
    ]
    names = ("places", "scores", "false", "highest_false")
    return _Found(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def _below_some(places: Tensor, scores: Tensor, threshold: float, targets: Tensor, count: int) -> _Found:
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


def _redo(blocks: _Blocks, rows: Tensor, threshold: float, found: _Found) -> None:
    """Look again at rows whose highest few were mostly above the threshold, or of few target ids; in place.

    Bands that have none are passed over. A tile gives each id its highest score below the threshold, then the highest
    ids are taken, so neither how many lie above nor how often an id is there matters.
    """
    short = torch.zeros(len(blocks.queries), dtype=torch.bool)
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
            false += above.sum(dim=1)
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
