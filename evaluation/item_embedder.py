"""Items to vectors with any SentenceTransformer: ours, a text encoder, or another that sees or hears. N in, N out.

Room: Model -> Embeddings -> **Evaluation**. Unusual: a model is asked only for what it has. What it lacks is left out
of the item, and an item of which nothing is left, or that cannot be read, is a row of zeros with its reason. mteb is
not known here.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from ..items_sail import FORMAT_ORDER, ItemError, LoadedItem, item_length, load_item, render_texts
from ..media_sail import LoadOptions
from .tasks.task import unit

MODALITIES = ("text", "image", "audio", "video")
FIELDS = {"text": FORMAT_ORDER, "image": ("image", "images"), "audio": ("audio",), "video": ("video",)}
_CONTENT = {name for names in FIELDS.values() for name in names}
MEANS_OF_VIDEO = ("video", "image", "audio")  # its frames are pictures, and it may have a sound track
_TEXT_ONLY = LoadOptions(load_vision=False, load_audio=False)


class ItemEmbedder:
    """Items to vectors, each distinct item once.

    A model of ours takes items as they are. For any other, an item's text fields become one text in our processor's
    format (`render_texts`), frames stand for a video where the model knows only pictures, and sounds
    are resampled to the model's rate. If the model cannot take two modalities in one input, or the item has several
    pictures and the model only sees, each part is embedded alone and the item is the mean of its modalities' unit
    vectors, a modality the mean of its parts'.

    Args:
        model: any SentenceTransformer.
        cache_bytes: of vectors kept for items made of paths and text; the oldest go first.

    Attributes:
        modalities: those of "text", "image", "audio", "video" that the model has.
        num_frames: frames taken of a video.
    """

    def __init__(self, model: SentenceTransformer, cache_bytes: int = 512 << 20) -> None:
        self.model = model
        self.modalities = tuple(name for name in MODALITIES if model.supports(name))
        self.takes_items = {"errors", "use_video_audio"} <= set(model.get_model_kwargs())
        self.num_frames: int = getattr(getattr(model[0], "processor", None), "frames_per_video", 8)
        self._routed = any(type(part).__name__ == "Router" for part in model)
        self._known: OrderedDict[bytes, np.ndarray | str] = OrderedDict()
        self._cache_bytes, self._cached = cache_bytes, 0

    def embed(
        self,
        items: Sequence[Any],
        *,
        prompt_name: str | None = None,
        side: str | None = None,
        batch_size: int = 32,
        progress: str = "",
    ) -> tuple[np.ndarray, list[str]]:
        """Vectors of N items.

        Args:
            items: as `modeling_sail.items_sail` takes them. A field may hold an exception: it is why that field could
                not be read.
            prompt_name: which of ``model.prompts`` goes before each; None for none.
            side: "query" or "document", for models with a path for each; others do not look at it.
            batch_size: items of one call of the model.
            progress: label of a progress bar; "" for none.

        Returns:
            (N, D) float32, finite; and for each item "", or the reason why its row is zeros.
        """
        prompt = self.model.prompts[prompt_name] if prompt_name is not None else None
        settings = json.dumps([prompt or "", side if self._routed else None])
        kept = [self._kept(item) for item in items]
        keys = [_key(item, settings) or index.to_bytes(8, "big") for index, item in enumerate(kept)]
        found = {key: self._known[key] for key in keys if key in self._known}
        fresh = {key: item for key, item in zip(keys, kept, strict=True) if key not in found}
        order = sorted(fresh, key=lambda key: -item_length(fresh[key]))  # long ones together: little padding
        with tqdm(total=len(order), desc=progress, unit="item", disable=not progress) as bar:
            for start in range(0, len(order), batch_size):
                chunk = order[start : start + batch_size]
                vectors = self._embed_batch([fresh[key] for key in chunk], prompt_name, side)
                found |= zip(chunk, vectors, strict=True)
                bar.update(len(chunk))
        for key in order:
            self._remember(key, found[key])
        rows = [found[key] for key in keys]
        width = next((len(row) for row in rows if not isinstance(row, str)), self.model.get_embedding_dimension())
        matrix = np.zeros((len(rows), width or 1), dtype=np.float32)
        for index, row in enumerate(rows):
            if not isinstance(row, str):
                matrix[index] = row
        return matrix, [row if isinstance(row, str) else "" for row in rows]

    def _kept(self, item: Any) -> Any:
        """The item without what the model has no use for."""
        if not isinstance(item, Mapping):
            item = {"text": item} if isinstance(item, str) else {"image": item}
        unused = {name for kind in MODALITIES if kind not in self.modalities for name in FIELDS[kind]}
        if any(name in self.modalities for name in MEANS_OF_VIDEO):
            unused.discard("video")
        kept = {name: value for name, value in item.items() if name not in unused}
        if len(kept) == len(item) or any(name in kept for name in _CONTENT):
            return kept
        return {"item": ValueError(f"nothing is left: the model has {', '.join(self.modalities)} alone")}

    def _embed_batch(self, items: list[Any], prompt_name: str | None, side: str | None) -> list[np.ndarray | str]:
        result: list[Any] = [_reason_in(item) for item in items]
        good = [place for place, reason in enumerate(result) if not reason]
        whole = self._embed_items if self.takes_items else self._embed_parts
        for place, row in zip(good, whole([items[place] for place in good], prompt_name, side), strict=True):
            finite = isinstance(row, str) or (np.isfinite(row).all() and row.any())
            result[place] = row if finite else "the model gave no vector: not finite, or all zeros"
        return result

    def _embed_items(self, items: list[Any], prompt_name: str | None, side: str | None) -> list[np.ndarray | str]:
        """With a model that reads items and marks bad ones itself."""
        if not items:
            return []
        vectors = self._encode(items, prompt_name, side, errors="skip")
        bad = [place for place, vector in enumerate(vectors) if not np.isfinite(vector).all()]
        instruction = self.model.prompts.get(prompt_name, "") if prompt_name else ""
        failed = [items[place] for place in bad]
        _, statuses = self.model[0].processor.load(failed, errors="skip", instruction=instruction)
        rows = list(vectors)
        for place, status in zip(bad, statuses, strict=True):
            rows[place] = f"{status.field}: {status.reason}" if status.status == "error" else rows[place]
        return rows

    def _embed_parts(self, items: list[Any], prompt_name: str | None, side: str | None) -> list[np.ndarray | str]:
        """With a model that takes a text, a picture, a sound, a video, or a dict of these."""
        options = LoadOptions(
            sampling_rate=_sampling_rate(self.model),
            num_frames=self.num_frames,
            load_vision="image" in self.modalities or "video" in self.modalities,
            load_audio="audio" in self.modalities,
        )
        rows: list[Any] = [None] * len(items)
        parts: dict[tuple[str, ...], list[tuple[int, Any]]] = {}  # what goes into one call: the same modalities
        for place, item in enumerate(items):
            try:
                inputs = self._inputs(load_item(item, options))
            except ItemError as error:
                rows[place] = f"{error.field}: {error.reason}"
                continue
            for kinds, value in inputs:
                parts.setdefault(kinds, []).append((place, value))
        sums: dict[int, dict[tuple[str, ...], list[np.ndarray]]] = {}
        for kinds, given in parts.items():
            vectors = self._encode([value for _, value in given], prompt_name, side)
            for (place, _), vector in zip(given, vectors, strict=True):
                sums.setdefault(place, {}).setdefault(kinds, []).append(vector)
        for place, by_kind in sums.items():
            rows[place] = _mean([_mean(vectors) for vectors in by_kind.values()])
        return rows

    def _inputs(self, item: LoadedItem) -> list[tuple[tuple[str, ...], Any]]:
        """What the model is asked for: one input with all modalities if it takes that, else one for each part."""
        pictures: list[Any] = list(item.images)
        whole: dict[str, Any] = {}
        if item.texts and "text" in self.modalities:
            whole["text"] = "".join(text for _, text in render_texts(item.texts))
        if item.frames and "video" in self.modalities:
            whole["video"] = np.stack([np.asarray(frame) for frame in item.frames])  # (T, H, W, 3)
        elif "image" in self.modalities:
            pictures += item.frames
        if item.audio is not None:
            whole["audio"] = {"array": item.audio, "sampling_rate": _sampling_rate(self.model)}
        if not (whole or pictures):
            raise ItemError(
                item.index, item.id, "item", f"nothing is left: the model has {', '.join(self.modalities)} alone"
            )
        kinds = tuple(sorted([*whole, *(["image"] if pictures else [])]))
        if len(kinds) > 1 and self.model.supports(kinds):
            return [(kinds, whole | ({"image": pictures if len(pictures) > 1 else pictures[0]} if pictures else {}))]
        return [((kind,), value) for kind, value in whole.items()] + [(("image",), picture) for picture in pictures]

    def _encode(self, inputs: list[Any], prompt_name: str | None, side: str | None, **settings: Any) -> np.ndarray:
        """(N, D) float32: one call of the model."""
        if self._routed and side:
            settings["task"] = side
        vectors = self.model.encode(
            inputs, prompt_name=prompt_name, batch_size=len(inputs), show_progress_bar=False, **settings
        )
        return np.asarray(vectors, dtype=np.float32)

    def _remember(self, key: bytes, row: np.ndarray | str) -> None:
        if len(key) == 8:  # an item in memory: only its place in this call is known
            return
        self._known[key] = row
        self._cached += _size(row)
        while self._cached > self._cache_bytes:
            self._cached -= _size(self._known.popitem(last=False)[1])


def rendered_text(item: Any) -> str:
    """An item's text fields as one text in the processor's format; "" without any, or where they cannot be read."""
    try:
        return "".join(text for _, text in render_texts(load_item(item, _TEXT_ONLY).texts))
    except ItemError:
        return ""


def model_digest(model: SentenceTransformer) -> str:
    """40 hexadecimal digits that change with what decides a vector: weights, configuration, prompts, lengths."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    settings: dict[str, Any] = {"prompts": model.prompts, "length": model.max_seq_length, "dim": model.truncate_dim}
    # What comes after the first module, such as pooling, may have no weights and decide a vector all the same.
    settings["modules"] = [
        [type(part).__name__, part.get_config_dict() if hasattr(part, "get_config_dict") else {}]
        for part in list(model)[1:]
    ]
    for part in (model[0], getattr(model[0], "model", None), getattr(model[0], "processor", None)):
        config = getattr(part, "config", part)
        if hasattr(config, "to_dict") and not isinstance(config, torch.nn.Module):
            settings[type(config).__name__] = _decisive(config)
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:40]


def _decisive(config: Any) -> dict[str, Any]:
    """A configuration without defaults, which later versions may add, and without where it came from."""
    passing = ("_name_or_path", "name_or_path", "transformers_version", "auto_map", "architectures", "_commit_hash")
    usual = inspect.signature(type(config).__init__).parameters

    def strip(values: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in values.items() if name not in passing}
        return {name: strip(value) if isinstance(value, Mapping) else value for name, value in kept.items()}

    found = strip(config.to_dict())
    return {
        name: value for name, value in found.items() if name not in usual or repr(usual[name].default) != repr(value)
    }


def _key(item: Mapping[str, Any], settings: str) -> bytes | None:
    """16 bytes that tell an item and the settings from others; None if it holds more than JSON does."""
    try:
        text = json.dumps({name: value for name, value in item.items() if name != "id"}, sort_keys=True)
    except TypeError:
        return None
    return hashlib.blake2b(f"{settings}\0{text}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _size(row: np.ndarray | str) -> int:
    return 100 + (len(row) if isinstance(row, str) else row.nbytes)


def _reason_in(item: Mapping[str, Any]) -> str:
    """Why a field could not be read, where it holds the exception instead."""
    return next((f"{name}: {value}" for name, value in item.items() if isinstance(value, Exception)), "")


def _mean(vectors: Sequence[np.ndarray]) -> np.ndarray:
    return vectors[0] if len(vectors) == 1 else unit(np.stack(vectors)).mean(axis=0)


def _sampling_rate(model: SentenceTransformer) -> int:
    processor = getattr(model[0], "processor", None)
    return getattr(getattr(processor, "feature_extractor", processor), "sampling_rate", 16_000)
