"""All scores of queries with targets, tile by tile, without what is no negative; rows that say one item once only.

Unusual: what is no negative is found by ranges of sorted ids, so no pair has an entry of its own, and what is scored
once for many rows comes with how many pairs it stands for (`Block.weights`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

TILE = 1024, 16_384  # queries and targets of a block of scores: 64 MiB; larger ones are no faster
MASKED_AT_ONCE = 1 << 20  # pairs that are no negatives, spelt out at a time
ALIKE = 1e-5  # scores that differ by less are one score with float32's noise
FEW = 0.8  # of the rows, distinct ones at most: where there are more, scoring each once does not pay
ROWS_WEIGHED = 16  # of a block at a time: weights take more room than scores
COMPARED = 4096  # rows that are compared with the first of their id at a time

Ids = Sequence[Hashable] | np.ndarray


@dataclass(frozen=True)
class Distinct:
    """Which rows of a side are the same item.

    Attributes:
        first: (M,) the first row of each distinct one, rising.
        number: (N,) which of those a row is.
        times: (M,) rows that are it; None where each row stands for itself.
    """

    first: np.ndarray
    number: np.ndarray
    times: np.ndarray | None

    @classmethod
    def of(cls, vectors: Tensor, ids: np.ndarray) -> Distinct:
        """Of (N, D) vectors, with ids that are numbers from 0; rows of one id that differ clearly are distinct."""
        every = np.arange(len(ids))
        begins = np.unique(ids, return_index=True)[1]
        if len(begins) <= FEW * len(ids):
            leader = begins[ids]
            for some in np.array_split(np.flatnonzero(leader != every), -(-len(ids) // COMPARED)):
                gap = (vectors[some].float() - vectors[leader[some]].float()).norm(dim=1)
                leader[some] = np.where((gap <= ALIKE).cpu().numpy(), leader[some], some)
            first, number, times = np.unique(leader, return_inverse=True, return_counts=True)
            if len(first) <= FEW * len(ids):
                return cls(first, number, times)
        return cls(every, every, None)

    def spread(self, values: Tensor) -> Tensor:
        """(M, ...) of the distinct ones -> (N, ...) of the rows."""
        return values if self.times is None else values[torch.from_numpy(self.number)]

    def rows(self, places: Tensor) -> Tensor:
        """Numbers of distinct ones as rows; -1 stays."""
        if self.times is None:
            return places
        return torch.where(places < 0, -1, torch.from_numpy(self.first)[places.long()])


class Excluded:
    """Which cross pairs are no negatives, row by row: positives of the same query id, and what shares their ids.

    Pairs are found by ranges of the columns sorted by target id, so no row has a list of its own.
    """

    def __init__(self, queries: np.ndarray, targets: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> None:
        """Ids of both sides, as numbers from 0, and the rows of each that are scored."""
        self.targets, self.queries, self.size = torch.from_numpy(targets[columns]), queries[rows], len(columns)
        self.order = np.argsort(targets[columns], kind="stable")
        self.keys = targets[columns][self.order] * self.size + self.order  # rising: by id, then by column
        pairs = np.unique(np.stack([queries, targets], axis=1), axis=0)  # by query, each of its target ids once
        self.wanted = pairs[:, 1]
        self.num_wanted = np.bincount(pairs[:, 0])
        self.wanted_begins = np.cumsum(self.num_wanted) - self.num_wanted

        def of_queries(ids: np.ndarray) -> np.ndarray:  # how many of these are no negatives of a query
            sizes = np.bincount(ids, minlength=int(targets.max()) + 1)
            return np.bincount(pairs[:, 0], weights=sizes[self.wanted]).astype(np.int64)

        self.a_row = of_queries(targets[columns])[self.queries]  # columns that are no negatives of a row
        positives = int(of_queries(targets)[queries].sum())  # cross pairs that are no negatives, each as often as it is
        self.count, self.num_negatives = positives - len(queries), len(queries) ** 2 - positives

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


def numbered(ids: Ids) -> np.ndarray:
    """(N,) numbers from 0, equal where the ids are."""
    if isinstance(ids, np.ndarray):
        return np.unique(ids, return_inverse=True)[1].astype(np.int64)
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(name, len(known)) for name in ids], dtype=np.int64)


@dataclass(frozen=True)
class Block:
    """Scores of some distinct queries with some distinct targets.

    Attributes:
        rows, columns: which.
        scores: (b, c), minus infinity where a pair is no negative; good until the next block.
        positives: (p,) scores of the positive pairs that are here.
        pairs: (p,) which of the N pairs, on the CPU.
        row_times, column_times: (b,) and (c,), a score is of so many cross pairs as their product; None: of one.
    """

    rows: range
    columns: range
    scores: Tensor
    positives: Tensor
    pairs: Tensor
    row_times: Tensor | None
    column_times: Tensor | None

    def weights(self, where: Tensor, which: Tensor) -> Tensor | None:
        """Of the scores in these rows and columns of the block, any shape that broadcasts."""
        if self.row_times is None or self.column_times is None:
            return None
        return self.row_times[where] * self.column_times[which]

    def above(self, floor: float) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(p,) scores at or above, and their weights; in parts."""
        if self.row_times is None:
            yield self.scores[self.scores >= floor], None
            return
        for begin in range(0, len(self.scores), ROWS_WEIGHED):
            some = self.scores[begin : begin + ROWS_WEIGHED]
            where, which = (some >= floor).nonzero(as_tuple=True)
            yield some[where, which], self.weights(where + begin, which)


class Blocks:
    """Scores of all distinct queries with all distinct targets, tile by tile; a tile is the same numbers whenever it is
    asked for.
    """

    def __init__(
        self,
        queries: Tensor,
        targets: Tensor,
        rows: Distinct,
        columns: Distinct,
        excluded: Excluded,
        block_bytes: int,
        device: torch.device | str,
        progress: bool,
    ) -> None:
        self.queries, self.rows, self.columns = queries, rows, columns
        self.excluded, self.progress, self.device = excluded, progress, device
        self.num_rows, self.num_columns = len(rows.first), len(columns.first)
        self.copied = columns.times is not None and 4 * self.num_columns * targets.shape[1] <= block_bytes
        self.targets = (targets[columns.first] if self.copied else targets).to(device, torch.float32)
        self.row_times, self.column_times = None, None
        if rows.times is not None or columns.times is not None:
            self.row_times, self.column_times = (
                torch.from_numpy(np.ones_like(side.first) if side.times is None else side.times).to(device)
                for side in (rows, columns)
            )
        self.height = min(self.num_rows, TILE[0], max(1, block_bytes // (4 * min(self.num_columns, TILE[1]))))
        self.width = min(self.num_columns, TILE[1], max(1, block_bytes // (4 * self.height)))
        self.buffer = torch.empty(self.height * self.width, device=device)  # fresh pages cost more than sums
        self.by_row = np.argsort(rows.number, kind="stable")  # (N,) pairs, by their distinct query
        self.pairs_before = np.searchsorted(rows.number[self.by_row], np.arange(self.num_rows + 1))

    def bands(self, name: str, start: int = 0) -> Iterator[range]:
        """Rows of a tile's height, from row ``start`` on."""
        size = self.num_rows
        begins, done = range(start, size, self.height), start // self.height
        total = -(-size // self.height)
        for begin in tqdm(begins, name, total=total, initial=done, unit="band", disable=not self.progress):
            yield range(begin, min(begin + self.height, size))

    def pairs(self, start: int, stop: int) -> np.ndarray:
        """Which of the N pairs have a query of these rows."""
        return self.by_row[self.pairs_before[start] : self.pairs_before[stop]]

    def _targets(self, columns: range) -> Tensor:
        if self.copied or self.columns.times is None:
            return self.targets[columns.start : columns.stop]
        return self.targets[torch.from_numpy(self.columns.first[columns.start : columns.stop])]

    def tiles(self, rows: range) -> Iterator[Block]:
        """All tiles of a band."""
        first = self.rows.first[rows.start : rows.stop]
        some = self.queries[rows.start : rows.stop] if self.rows.times is None else self.queries[first]
        some = some.to(self.device, torch.float32)
        pairs = self.pairs(rows.start, rows.stop)
        where, which = self.rows.number[pairs] - rows.start, self.columns.number[pairs]
        for begin in range(0, self.num_columns, self.width):
            columns = range(begin, min(begin + self.width, self.num_columns))
            out = self.buffer[: len(rows) * len(columns)].view(len(rows), len(columns))
            scores = torch.mm(some, self._targets(columns).T, out=out)
            here = np.flatnonzero((which >= columns.start) & (which < columns.stop))
            positives = scores[torch.from_numpy(where[here]), torch.from_numpy(which[here] - columns.start)]
            self.excluded.mask(scores, rows, columns)
            times = (None, None)
            if self.row_times is not None and self.column_times is not None:
                times = self.row_times[rows.start : rows.stop], self.column_times[columns.start : columns.stop]
            yield Block(rows, columns, scores, positives, torch.from_numpy(pairs[here]), *times)
