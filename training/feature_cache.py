"""Features of frozen towers, computed once and kept on disk: a training of the connectors then never runs a tower.

Unusual: blocks are written whole and renamed into place, so a killed run loses at most one block and resumes by itself;
and they are read in place, so a cache may be larger than memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..fingerprints import hash_tensors
from ..items_sail import ItemStatus
from ..modeling_sail import SailEmbeddingModel
from ..processing_sail import SailEmbeddingProcessor
from .rows import RowError

BLOCK = 64  # entries of a file: small enough to lose, large enough not to make thousands of files


class FeatureCache:
    """Float16 tower features by key, in a folder of safetensors blocks.

    Args:
        folder: where the blocks lie; made if it is not there. What lies there already is read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.places: dict[str, tuple[Any, str]] = {}  # the open block that holds an entry, and its name there
        self.failed: dict[str, str] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            self._read(path)

    def __contains__(self, key: str) -> bool:
        return key in self.places

    def __getitem__(self, key: str) -> Tensor:
        """(F, T, C) float16: F pictures or windows of T tokens."""
        block, name = self.places[key]
        return block.get_tensor(name)

    def why_missing(self, key: str) -> str:
        """What to say of a key that is not there."""
        return f"cannot be read ({self.failed[key]})" if key in self.failed else "is not in the feature cache"

    def add(
        self, keys: Sequence[str], compute: Callable[[list[str]], tuple[list[Tensor], list[ItemStatus]]], name: str
    ) -> None:
        """Compute what is missing. A key that fails is left out, its reason in ``failed``; the next run tries again.

        Args:
            keys: what is wanted.
            compute: keys to the features of the good ones and a status for each.
            name: shown on the progress bar.
        """
        missing = [key for key in dict.fromkeys(keys) if key not in self.places and key not in self.failed]
        for start in tqdm(range(0, len(missing), BLOCK), desc=name, disable=not missing):
            block = missing[start : start + BLOCK]
            features, statuses = compute(block)
            good = [key for key, status in zip(block, statuses, strict=True) if status.status == "ok"]
            self.failed |= {block[s.index]: f"{s.field}: {s.reason}" for s in statuses if s.status != "ok"}
            if good:
                self._write(dict(zip(good, features, strict=True)))

    def _write(self, features: dict[str, Tensor]) -> None:
        name = hashlib.sha256("\n".join(features).encode()).hexdigest()[:16]
        tensors = {str(index): tensor.half().contiguous() for index, tensor in enumerate(features.values())}
        path = self.folder / f"{name}.safetensors"
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, metadata={"keys": json.dumps(list(features))})
        os.replace(partial, path)
        self._read(path)

    def _read(self, path: Path) -> None:
        """Only names are read; an entry is when it is asked for, and the system keeps what memory has room for."""
        block = safe_open(path, framework="pt")
        for index, key in enumerate(json.loads(block.metadata()["keys"])):
            self.places[key] = block, str(index)


def tower_features(
    model: SailEmbeddingModel, processor: SailEmbeddingProcessor, field: str
) -> Callable[[list[str]], tuple[list[Tensor], list[ItemStatus]]]:
    """A ``compute`` for `FeatureCache.add`: paths of pictures (``"image"``) or sounds (``"audio"``) to features."""

    @torch.inference_mode()
    def compute(paths: list[str]) -> tuple[list[Tensor], list[ItemStatus]]:
        loaded, statuses = processor.load([{field: path} for path in paths], errors="skip")
        if not loaded:
            return [], statuses
        batch = processor.collate(loaded)
        if field == "image":
            features, owner = model.vision_features(batch["pixel_values"].to(model.device)), batch["image_owner"]
        else:
            features, owner = model.audio_features(batch["input_features"].to(model.device)), batch["audio_owner"]
        return list(features.cpu().split(torch.bincount(owner).tolist())), statuses

    return compute


def cache_media(
    model: SailEmbeddingModel, processor: SailEmbeddingProcessor, datasets: Iterable[Any], folder: Path
) -> tuple[FeatureCache, FeatureCache]:
    """Tower features of every picture and sound of training datasets; resumes where it was stopped.

    Args:
        model, processor: with the towers that are frozen.
        datasets: `rows.TrainingDataset`; a source may name its files itself, as ``images`` and ``sounds``. Otherwise
            its items' ``image`` and ``audio`` must be paths.
        folder: of the caches.

    Raises:
        ValueError: a dataset is streamed.
    """
    images = FeatureCache(folder / f"images-{_fingerprint(model.vision_tower, processor.image_processor)}")
    sounds = FeatureCache(folder / f"sounds-{_fingerprint(model.audio_tower, processor.feature_extractor)}")
    wanted: dict[str, list[str]] = {"image": [], "audio": []}
    for dataset in datasets:
        source = dataset.source
        if hasattr(source, "images"):
            wanted["image"] += source.images
            wanted["audio"] += source.sounds
            continue
        if dataset.streamed:
            raise ValueError(f"Dataset {dataset.name!r} is streamed; a feature cache needs all its rows at hand.")
        for item in _items_of(dataset):
            for name, paths in wanted.items():
                if isinstance(item, dict) and isinstance(item.get(name), str):
                    paths.append(item[name])
    if wanted["image"] and model.vision_tower is not None:
        model.vision_tower.to(memory_format=torch.channels_last)
        images.add(wanted["image"], tower_features(model, processor, "image"), "pictures")
    if model.audio_tower is not None:
        sounds.add(wanted["audio"], tower_features(model, processor, "audio"), "sounds")
    return images, sounds


def _fingerprint(tower: Any, preprocessor: Any) -> str:
    """Of all that features depend on but the file: another tower, or this one trained on, has a cache of its own."""
    settings = {
        name: value for name, value in preprocessor.to_dict().items() if name not in ("auto_map", "processor_class")
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    hash_tensors(digest, [] if tower is None else sorted(tower.state_dict().items()))
    return digest.hexdigest()[:12]


def _items_of(dataset: Any) -> Iterator[Any]:
    """Every item of a dataset that can be read."""
    for place in range(len(dataset.source)):
        try:
            row = dataset.read(place, random.Random(0))
        except RowError:
            continue  # it is reported when its batch is drawn
        yield from (*row.queries, row.target, *row.negatives)
