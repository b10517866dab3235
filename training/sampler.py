"""Stochastic specialization (SAIL-Embedding, section 3.3.3): each batch is drawn whole from one dataset.

Unusual: a batch is a function of (seed, step) alone, so every rank draws the same dataset, a resumed run goes on with
the exact next batch, and a worker process can make any batch. A rank reads only its own rows of the global batch.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from .rows import Row, RowError, TrainingDataset, with_negatives

# A dataset that is this many batches behind its share is taken next, whatever the dice say: none starves.
MOST_BEHIND = 2.0

# Shares of a batch that are tried where not one row can be read.
MOST_ATTEMPTS = 3


@dataclass(frozen=True)
class Draw:
    """What a rank gets for one step: ``rows`` that could be read, and why others could not; ``step`` names it, alike on
    every rank.
    """

    dataset: TrainingDataset
    task: str | None
    rows: list[Row]
    generators: list[random.Random]
    skipped: list[tuple[str, str]]
    size: int
    step: str = ""


class Negatives(Protocol):
    """Mined negatives by batch (choosing.py)."""

    def of(self, name: str, batch: int) -> np.ndarray | None:
        """(N, k) rows of dataset ``name`` whose targets are negatives, -1 where there are fewer; None without any."""


class SpecializedBatches(IterableDataset):
    """An endless, seeded stream of one rank's batches.

    Args:
        datasets: what to draw from.
        probabilities: by dataset name, each >= 0, of any sum; a dataset that is not named has 1. 0 is never drawn.
        collate: `Draw` to what the Trainer takes.
        batch_size: rows of the global batch, over all ranks.
        seed: of the whole stream.
        rank, world_size: of this process; every rank has batch_size / world_size rows.
        start: first step, for a resumed run; the Trainer sets it.
        negatives: mined hard negatives, added to those that the rows bring.

    Raises:
        ValueError: names or probabilities that do not fit; a batch size that the ranks cannot share.
    """

    def __init__(
        self,
        datasets: Sequence[TrainingDataset],
        collate: Callable[[Draw], dict[str, Any]],
        batch_size: int,
        probabilities: Mapping[str, float] | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        negatives: Negatives | None = None,
    ) -> None:
        given = dict(probabilities or {})
        names = [dataset.name for dataset in datasets]
        if len(set(names)) < len(names):
            raise ValueError(f"Two datasets have the same name: {names}.")
        if set(given) - set(names):
            raise ValueError(
                f"Probabilities for unknown datasets {sorted(set(given) - set(names))}; there are {names}."
            )
        weights = np.array([given.get(name, 1.0) for name in names], dtype=np.float64)
        if not len(weights) or not np.isfinite(weights).all() or weights.min() < 0 or weights.sum() <= 0:
            raise ValueError(f"Probabilities {given} must be >= 0, and one of them above 0: nothing to train on.")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size={batch_size} must be a positive multiple of the {world_size} ranks.")
        self.datasets, self.collate = list(datasets), collate
        self.probabilities = weights / weights.sum()
        self.batch_size, self.seed, self.rank, self.world_size, self.start = batch_size, seed, rank, world_size, start
        self.negatives = negatives
        self._plan = array("i")  # dataset of each step, as far as anyone asked
        self._counts = np.zeros(len(weights))
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        self._streams: dict[int, _Stream] = {}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        if worker is not None:
            self._refuse_shards()
        first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        step = self.start + first
        while True:
            yield self.batch(step)
            step += stride

    def _refuse_shards(self) -> None:
        """Streams of the `datasets` library share themselves out over workers, which would change the batches."""
        for dataset in self.datasets:
            if dataset.streamed and hasattr(dataset.source, "num_shards"):
                raise ValueError(
                    f"Dataset {dataset.name!r} is a stream that shares itself out over worker processes; use workers=0 "
                    "or do not stream it."
                )

    def batch(self, step: int) -> dict[str, Any]:
        """This rank's batch of a step, whatever came before it.

        Where no row of its share can be read, other rows of the dataset are taken in their place.

        Raises:
            RuntimeError: none of those can be read either.
        """
        skipped: list[tuple[str, str]] = []
        for attempt in range(MOST_ATTEMPTS):
            batch = self.collate(self.draw(step, attempt))
            batch["skipped"] = skipped + batch["skipped"]
            if len(batch["target_ids"]):
                return batch
            skipped = batch["skipped"]
        listed = "; ".join(f"{name}: {reason}" for name, reason in skipped[-3:])
        raise RuntimeError(f"Step {step}: not one of {len(skipped)} rows could be read. The last: {listed}")

    def dataset_of(self, step: int) -> int:
        """Index of the dataset that a step is drawn from; the same on every rank."""
        while len(self._plan) <= step:
            behind = self.probabilities * (len(self._plan) + 1) - self._counts
            index = int(behind.argmax())
            if behind[index] < MOST_BEHIND:
                point = random.Random(f"{self.seed}/{len(self._plan)}").random()
                index = int(np.searchsorted(self.probabilities.cumsum(), point, side="right"))
                index = min(index, len(self.probabilities) - 1)
            self._plan.append(index)
            self._counts[index] += 1
        return self._plan[step]

    def draw(self, step: int, attempt: int = 0) -> Draw:
        """The rows of this rank's share, read; another share for another attempt."""
        index = self.dataset_of(step)
        dataset = self.datasets[index]
        size = self.batch_size // self.world_size
        begin = self._turn(step, index) * self.batch_size + self.rank * size
        if attempt:  # of a stream, rows that come later anyway
            ahead = random.Random(f"{self.seed}/{step}/{self.rank}/{attempt}")
            begin = begin + attempt * self.batch_size if dataset.streamed else ahead.randrange(len(dataset.source))
        table = None if self.negatives is None else self.negatives.of(dataset.name, step)
        rows, generators, skipped = [], [], []
        for offset, (place, record) in enumerate(self._records(index, begin, size)):
            generator = random.Random(f"{self.seed}/{step}/{self.rank * size + offset}")
            try:
                row = dataset.read(place, generator, record)
                rows.append(row if table is None else with_negatives(row, dataset, table[place]))
                generators.append(generator)
            except RowError as error:
                skipped.append((error.row_id, error.reason))
        task = random.Random(f"{self.seed}/{step}/task").choice(list(dataset.tasks))
        return Draw(dataset, task, rows, generators, skipped, size, f"{self.seed}/{step}")

    def _turn(self, step: int, index: int) -> int:
        """How many batches of the dataset came before this step."""
        return int((np.frombuffer(self._plan, dtype=np.int32)[:step] == index).sum())

    def _records(self, index: int, begin: int, size: int) -> Iterator[tuple[int, Any]]:
        """(place, record) of positions in the endless, shuffled sequence of a dataset; record None: read by place."""
        dataset = self.datasets[index]
        if dataset.streamed:
            stream = self._streams.setdefault(index, _Stream(dataset))
            yield from stream.read(begin, size)
            return
        for position in range(begin, begin + size):
            epoch, place = divmod(position, len(dataset.source))
            yield int(self._order(index, epoch)[place]), None

    def _order(self, index: int, epoch: int) -> np.ndarray:
        """The shuffled places of one epoch; the last one asked for is kept."""
        known = self._orders.get(index)
        if known is None or known[0] != epoch:
            generator = np.random.default_rng([self.seed, index, epoch])
            known = epoch, generator.permutation(len(self.datasets[index].source))
            self._orders[index] = known
        return known[1]


class _Stream:
    """Records of a streamed source by position; going back starts over, the end goes on from the beginning."""

    def __init__(self, dataset: TrainingDataset) -> None:
        self.dataset = dataset
        self.position = 0
        self.records = iter(dataset.source)

    def read(self, begin: int, size: int) -> Iterator[tuple[int, Any]]:
        if begin < self.position:
            self.position, self.records = 0, iter(self.dataset.source)
        while self.position < begin + size:
            record = self._next()
            self.position += 1
            if self.position > begin:
                yield self.position - 1, record

    def _next(self) -> Any:
        for _ in range(2):
            for record in self.records:
                return record
            self.records = iter(self.dataset.source)
        raise ValueError(f"Dataset {self.dataset.name!r} is a stream without rows.")
