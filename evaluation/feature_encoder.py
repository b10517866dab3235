"""Items to vectors from cached tower features: what comparisons of many models on the same items go through.

Room: Model -> **Embeddings** -> Evaluation. Unusual: an item is read with the modalities that the model has, and one of
which nothing is left gets a row of zeros: it finds nothing and is not found.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812  the field's own abbreviation

from ..items_sail import FORMAT_ORDER
from ..modeling_sail import SailEmbeddingModel
from ..processing_sail import SailEmbeddingProcessor
from ..training.build import TOWERS, assemble
from ..training.collate import Collator
from ..training.data.mini_pairs import load_sources
from ..training.feature_cache import cache_media
from ..training.mini import cache_features
from ..training.packages import PACKAGES
from ..training.rows import TrainingDataset
from ..training.towers import PINNED
from ..training.warm_start import text_encoder
from .revisions import digest_of
from .tasks.task import Encode, Item, Pairs, Retrieval, with_sequences
from .tuxpaint_retrieval import LinearBaseline

FIELDS = {"text": FORMAT_ORDER, "vision": ("image",), "audio": ("audio",)}
Data = Mapping[str, Mapping[str, Retrieval | Pairs]]  # of each task, by subset


@dataclass(frozen=True)
class _Media:
    """The pictures and sounds of items, as `feature_cache.cache_media` asks a source for them."""

    images: list[str]
    sounds: list[str]


def items_in(data: Retrieval | Pairs) -> list[Item]:
    """Every item of a task's data, those of sequences too."""
    if isinstance(data, Pairs):
        return [*data.queries, *data.targets]
    queries = [member for item in data.queries.values() for member in item.get("sequence", [item])]
    return [*queries, *data.corpus.values()]


def media_of(data: Data) -> TrainingDataset:
    """All pictures and sounds of tasks' items, each once, for `cache_media`."""
    items = [item for subsets in data.values() for one in subsets.values() for item in items_in(one)]
    found = {name: sorted({item[name] for item in items if item.get(name)}) for name in ("image", "audio")}
    return TrainingDataset("tasks", _Media(found["image"], found["audio"]))


def kept(item: Item, modalities: Collection[str]) -> Item:
    """An item with its fields of some of "text", "vision", "audio"."""
    wanted = {field for name in modalities for field in FIELDS[name]}
    return {field: value for field, value in item.items() if field in wanted and value}


def by_parts(
    encode: Callable[[list[Item]], np.ndarray], modalities: Collection[str], size: int
) -> Callable[[Sequence[Item]], np.ndarray]:
    """`encode` for items of which only some modalities are read; zeros for those that have none of them.

    Args:
        encode: items to (N, D) vectors.
        modalities: of "text", "vision", "audio".
        size: D.
    """

    def encode_kept(items: Sequence[Item]) -> np.ndarray:
        parts = [kept(item, modalities) for item in items]
        full = [place for place, part in enumerate(parts) if part]
        found = np.zeros((len(items), size), dtype=np.float32)
        if full:
            found[full] = encode([parts[place] for place in full])
        return found

    return encode_kept


def cached_collator(model: SailEmbeddingModel, processor: SailEmbeddingProcessor, work: Path, data: Data) -> Collator:
    """What lays items out with cached tower features; what is missing of the data's pictures and sounds is added.

    Args:
        model, processor: with towers that are the cache's.
        work: folder of the feature cache.
        data: the tasks' data.
    """
    return Collator(processor, *cache_media(model, processor, [media_of(data)], work))


def model_encoder(
    model: SailEmbeddingModel,
    collate: Collator,
    *,
    family: str | None,
    modalities: Collection[str] | None = None,
    batch_size: int = 64,
    known: dict[str, np.ndarray] | None = None,
) -> Encode:
    """A model as what `tasks.task.score` asks. An item is embedded once for each instruction.

    Args:
        model: the model.
        collate: of `cached_collator`.
        family: whose instructions go before the items; None: no instructions.
        modalities: what is read of an item; all that the model has by default.
        batch_size: items of one pass, sorted by the length of their text.
        known: vectors by what they are of, which several encoders of one model may share.
    """
    processor, known = collate.processor, {} if known is None else known
    there = {"text", *processor.modalities} if modalities is None else set(modalities)

    @torch.inference_mode()
    def add(items: dict[str, Item], instruction: str) -> None:
        order = sorted(items, key=lambda key: len(said(items[key])))
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            batch = collate.encode_items([items[key] for key in part], instruction)
            known.update(zip(part, F.normalize(model(**batch).embeddings, dim=-1).numpy(), strict=True))

    def embed(items: list[Item], side: str) -> np.ndarray:
        instruction = processor.instruction_for(family, side) if family else ""
        keys = [f"{instruction}\n{json.dumps(item, sort_keys=True)}" for item in items]
        add({key: item for key, item in zip(keys, items, strict=True) if key not in known}, instruction)
        return np.stack([known[key] for key in keys])

    def encode(items: Sequence[Item], side: str) -> np.ndarray:
        return by_parts(lambda some: embed(some, side), there, model.config.hidden_size)(items)

    return with_sequences(encode)


def text_only_encoder() -> Encode:
    """all-MiniLM-L6-v2 as it was published, on the items' text."""
    model, processor = assemble("mini")
    backbone = text_encoder(model, processor)

    def embed(items: list[Item]) -> np.ndarray:
        return backbone([said(item) for item in items]).numpy()

    encode = by_parts(embed, ("text",), model.config.hidden_size)
    return with_sequences(lambda items, side: encode(items))


def said(item: Item) -> str:
    """An item's text fields, one a line."""
    lines = [item[field] for field in FORMAT_ORDER if item.get(field)]
    return "\n".join(line if isinstance(line, str) else ", ".join(line) for line in lines)


def linear_encoder(work: Path, data: Data) -> Encode:
    """The linear baseline of `tuxpaint_retrieval`: ridge maps from tower features into MiniLM's space, summed."""
    model, processor = assemble("mini")
    sources = load_sources()
    images, sounds = cache_features(model, processor, work, sources)
    images, sounds = cache_media(model, processor, [media_of(data)], work)
    for row in (row for part in sources.values() for row in part):
        row["speech"] = {language: path for language, path in row.get("speech", {}).items() if path in sounds}
    baseline = LinearBaseline(text_encoder(model, processor), images, sounds, sources)
    baseline.classify(media_of(data).source.images)

    def embed(items: list[Item]) -> np.ndarray:
        groups: dict[tuple[bool, bool, bool], list[int]] = {}
        for place, item in enumerate(items):
            key = (bool(said(item)), bool(item.get("image")), bool(item.get("audio")))
            groups.setdefault(key, []).append(place)
        vectors = torch.zeros(len(items), model.config.hidden_size)
        for (text, image, audio), places in groups.items():
            parts = [baseline.embed([{"text": said(items[place])} for place in places])] if text else []
            for field, there in (("image", image), ("audio", audio)):
                if there:
                    parts.append(baseline.embed([{field: items[place][field]} for place in places]))
            vectors[places] = F.normalize(torch.stack(parts).sum(dim=0), dim=-1)
        return vectors.numpy()

    encode = by_parts(embed, tuple(FIELDS), model.config.hidden_size)
    return with_sequences(lambda items, side: encode(items))


def published_towers() -> str:
    """Digits of the packages that mini's towers come from."""
    return digest_of([PACKAGES[part].sha256 for tower in TOWERS["mini"].values() for part in PINNED[tower]])


# Columns that nothing trains by steps: how each is made from the feature cache and the tasks' data, and the digits that
# change with it.
BASELINES: dict[str, tuple[Callable[[Path, Data], Encode], Callable[[], str]]] = {
    "MiniLM text only": (lambda work, data: text_only_encoder(), published_towers),
    "linear baseline": (linear_encoder, lambda: digest_of([published_towers(), load_sources()])),
}
