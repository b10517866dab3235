"""Pairs of items to train on: what a training dataset is here, and batches that each come from one of them.

A row is (query item, target item, id of the target); an item is the dict that the processor takes. Unusual: the text of
a row may be drawn anew each time it is used, so a row is a function of a random generator.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from ..items_sail import clean_text
from ..processing_sail import Layout, SailEmbeddingProcessor
from .feature_cache import FeatureCache

Item = dict[str, Any]
Row = Callable[[random.Random], tuple[Item, Item, str]]


@dataclass
class PairDataset:
    """Rows of one kind.

    Attributes:
        name: for logs; its temperature is the model's "default" unless the configuration has one of this name.
        rows: each gives (query, target, target id) for a random generator.
        weight: how often a batch is drawn from it, relative to the others.
        tasks: task families whose instructions are put before both sides, one drawn for each batch; None is no
            instruction.
    """

    name: str
    rows: Sequence[Row]
    weight: float = 1.0
    tasks: Sequence[str | None] = field(default=(None,))


class PairBatches(IterableDataset):
    """An endless, seeded stream of batches, each from one dataset: step ``s`` is the same batch in every run.

    Args:
        datasets: what to draw from, by their weights.
        collate: (rows, task) to what the Trainer's ``compute_loss`` takes.
        batch_size: rows of a batch.
        seed: of the whole stream.
        start: first step, for a resumed run.
    """

    def __init__(
        self,
        datasets: Sequence[PairDataset],
        collate: Callable[[list[tuple[Item, Item, str]], str | None], dict[str, Any]],
        batch_size: int,
        seed: int = 0,
        start: int = 0,
    ) -> None:
        self.datasets = [dataset for dataset in datasets if dataset.rows and dataset.weight > 0]
        if not self.datasets:
            raise ValueError("No dataset has rows and a weight above 0: nothing to train on.")
        self.collate, self.batch_size, self.seed, self.start = collate, batch_size, seed, start

    def __iter__(self) -> Iterator[dict[str, Any]]:
        step = self.start
        while True:
            yield self.batch(step)
            step += 1

    def batch(self, step: int) -> dict[str, Any]:
        """The batch of a step, whatever came before it."""
        generator = random.Random(f"{self.seed}/{step}")
        dataset = generator.choices(self.datasets, [d.weight for d in self.datasets])[0]
        rows = generator.sample(dataset.rows, min(self.batch_size, len(dataset.rows)))
        return self.collate([row(generator) for row in rows], generator.choice(list(dataset.tasks)))


class CachedCollator:
    """Rows to tensors with the towers' cached features in place of pictures and sounds.

    Args:
        processor: lays out the sequences.
        images, sounds: features by path.
    """

    def __init__(self, processor: SailEmbeddingProcessor, images: FeatureCache, sounds: FeatureCache) -> None:
        self.processor, self.images, self.sounds = processor, images, sounds

    def __call__(self, rows: list[tuple[Item, Item, str]], task: str | None) -> dict[str, Any]:
        ids = {target_id: index for index, target_id in enumerate(dict.fromkeys(row[2] for row in rows))}
        return {
            "query": self.side([row[0] for row in rows], self.processor.instruction_for(task, "query")),
            "target": self.side([row[1] for row in rows], self.processor.instruction_for(task, "target")),
            "target_ids": torch.tensor([ids[row[2]] for row in rows]),
            "dataset": "default",
        }

    def side(self, items: list[Item], instruction: str = "") -> dict[str, Tensor]:
        """Items with ``image`` and ``audio`` as cached paths, and text fields, to the model's keyword arguments."""
        pictures = [self.images[item["image"]] if "image" in item else None for item in items]
        sounds = [self.sounds[item["audio"]] if "audio" in item else None for item in items]
        layouts = [
            Layout(_texts(item), 0 if picture is None else len(picture), sound is not None)
            for item, picture, sound in zip(items, pictures, sounds, strict=True)
        ]
        batch = self.processor.pad([self.processor.sequence(layout, instruction) for layout in layouts])
        batch |= _flat(pictures, "image_features", "image_owner")
        return batch | _flat(sounds, "audio_features", "audio_owner")


def _texts(item: Item) -> dict[str, str]:
    return {name: clean_text(value) for name, value in item.items() if name not in ("image", "audio")}


def _flat(features: Sequence[Tensor | None], values_name: str, owner_name: str) -> dict[str, Tensor]:
    """[(F, T, C) or None] to one (sum F, T, C) tensor in float32 and the row that each entry belongs to."""
    present = [tensor for tensor in features if tensor is not None]
    if not present:
        return {}
    counts = torch.tensor([0 if tensor is None else len(tensor) for tensor in features])
    owner = torch.arange(len(features)).repeat_interleave(counts)
    return {values_name: torch.cat(present).float(), owner_name: owner}
