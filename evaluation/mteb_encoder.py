"""The adapter to mteb, first half: any SentenceTransformer, ours above all, as one of mteb's encoders.

Room: Model -> Embeddings -> **Evaluation**. Only this file and mteb_tasks, the other half, import mteb. Unusual: one
encoder for all modalities and models, that never fails for one bad item and never gives NaN.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer
from torch.utils.data import DataLoader

from ..media_sail import LoadOptions, load_video
from .item_embedder import MODALITIES, ItemEmbedder, model_digest
from .tasks.task import Item

_log = logging.getLogger(__name__)

DOCUMENT_PROMPTS = ("document", "passage", "corpus")  # what sentence-transformers looks for, in its order


class SailEncoder(AbsEncoder):
    """Any SentenceTransformer as an encoder of mteb: text, pictures, sounds and videos in any mix.

    Batches of our tasks carry the whole item in a column ``item`` (JSON); of others, the item is made of the columns
    ``text``, ``image``, ``audio`` and ``video``, the last without its sound track, which mteb keeps in ``audio``.

    Instructions (``model.prompts``) by task and side, ``<family>_<side>``:

    ========================================================  ======  ================================================
    task                                                      family  side
    ========================================================  ======  ================================================
    one of ours                                               its own query or target
    retrieval, reranking with queries of text alone           q2i     query or target
    any other retrieval or reranking                          i2i     query or target
    STS, summarization, bitext mining, clustering             i2i     query for all
    classification, regression, zero-shot                     cls     query; target for the names of zero-shot classes
    pairs of which one side alone is text                     q2i     query for the text, target for the other
    any other pairs                                           i2i     query for all
    ========================================================  ======  ================================================

    A model without such prompts gets the one that mteb would take ("query", "document" and their kin), or none.

    Args:
        model: the model.
        name: as results name it, "organisation/name"; a name without "/" goes under "local".
        cache_bytes: of vectors kept in memory, so that tasks that share items embed them once.

    Attributes:
        mteb_model_meta: name, revision (a hash of weights and settings), sizes and modalities.
        left_out: for each task that has been encoded, why rows are zeros, and how many.
    """

    reads_items = True  # of the column `item`: mteb_tasks sends one loader, whatever each item has

    def __init__(self, model: SentenceTransformer, name: str = "model", cache_bytes: int = 512 << 20) -> None:
        self.model = model
        self.embedder = ItemEmbedder(model, cache_bytes)
        self.model_prompts = dict(model.prompts)
        self.mteb_model_meta = meta_of(model, name)
        self.left_out: dict[str, Counter[str]] = {}
        self._told: set[tuple[str, str, str]] = set()

    def encode(
        self,
        inputs: DataLoader,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        batch_size: int = 32,
        show_progress_bar: bool = True,
        **kwargs: Any,
    ) -> np.ndarray:
        """(N, D) float32 of N rows, finite; a row of zeros where an item cannot be embedded (see ``left_out``)."""
        if kwargs.get("precision", "float32") != "float32":
            raise ValueError(f"precision={kwargs['precision']!r} is not made here; leave it out.")
        vectors, reasons = [], []
        columns = _columns(inputs)
        asked = {
            "prompt_name": self.prompt_name(task_metadata, prompt_type, columns),
            "side": None if prompt_type is None else PromptType(prompt_type).value,
            "batch_size": batch_size,
            "progress": f"{task_metadata.name} {hf_subset}" if show_progress_bar else "",
        }
        for items in _windows(inputs, columns, self.embedder.num_frames):
            rows, why = self.embedder.embed(items, **asked)
            vectors.append(rows)
            reasons += filter(None, why)
        found = np.concatenate(vectors)
        self._tell(task_metadata.name, hf_subset, str(asked["side"]), reasons, len(found))
        return found

    def prompt_name(
        self, task_metadata: TaskMetadata, prompt_type: PromptType | None, columns: Sequence[str] = ("text",)
    ) -> str | None:
        """The prompt of a task's side; ``columns`` are those of the rows, which tell the text's side of pairs."""
        family, side = family_and_side(task_metadata, prompt_type, columns)
        if f"{family}_{side}" in self.model_prompts:
            return f"{family}_{side}"
        name = get_prompt_name(self.model_prompts, task_metadata, prompt_type)
        if name is None and prompt_type == PromptType.document:
            name = next((name for name in DOCUMENT_PROMPTS if name in self.model_prompts), None)
        return name

    def _tell(self, task: str, subset: str, side: str, reasons: list[str], count: int) -> None:
        self.left_out.setdefault(task, Counter()).update(reasons)
        if reasons and (task, subset, side) not in self._told:
            self._told.add((task, subset, side))
            first = "; ".join(f"{number} x {reason}" for reason, number in Counter(reasons).most_common(3))
            _log.warning("%s (%s, %s): %d of %d items are zeros: %s", task, subset, side, len(reasons), count, first)


def family_and_side(
    metadata: TaskMetadata, prompt_type: PromptType | None, columns: Sequence[str] = ("text",)
) -> tuple[str, str]:
    """Whose instruction goes before the rows of a task: the table of `SailEncoder`."""
    side = "target" if prompt_type == PromptType.document else "query"
    family = getattr(metadata, "family", None)
    if family:
        return family, side
    texts_only = not set(columns) & {"image", "audio", "video"}
    kind = metadata.simplified_task_type
    if kind == "retrieval":
        return ("q2i" if metadata.get_modalities(PromptType.query) == ["text"] else "i2i"), side
    if kind == "classification":
        zero_shot = "zeroshot" in metadata.type.lower() and metadata.modalities != ["text"]
        names = zero_shot and texts_only and prompt_type is None
        return "cls", "target" if names else side
    sides = (metadata.category or "").split("2")
    if kind == "pair-classification" and sides.count("t") == 1:
        return "q2i", "query" if texts_only else "target"
    return "i2i", side


def meta_of(model: SentenceTransformer, name: str) -> ModelMeta:
    """What is known of a model without asking anybody; the rest stays None."""
    sizes = [(tensor.numel(), tensor.element_size()) for tensor in model.parameters()]
    known = {
        "name": name if "/" in name else f"local/{name}",
        "revision": model_digest(model),
        "modalities": [kind for kind in MODALITIES if model.supports(kind)],
        "embed_dim": model.get_embedding_dimension(),
        "n_parameters": sum(count for count, _ in sizes),
        "memory_usage_mb": round(sum(count * width for count, width in sizes) / 2**20, 1),
        "max_tokens": model.max_seq_length if math.isfinite(model.max_seq_length or math.inf) else None,
        "framework": ["Sentence Transformers", "PyTorch"],
        "similarity_fn_name": "cosine",
        "use_instructions": any(model.prompts.values()),
    }
    return ModelMeta.model_validate(ModelMeta.create_empty().model_dump() | known)


@contextmanager
def _silence(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def plain_encoder(model: SentenceTransformer, name: str) -> SentenceTransformerEncoderWrapper:
    """The model as mteb itself wraps it, its results kept apart from those of `SailEncoder`.

    Of its prompts mteb takes those named as its own tasks and sides ("query", "document") are, and no others.
    """
    with warnings.catch_warnings(action="ignore"), _silence("mteb"):  # a page about each name that is not mteb's
        wrapper = SentenceTransformerEncoderWrapper(model)
    wrapper.mteb_model_meta = meta_of(model, f"{name}-plain")
    return wrapper


# --- batches of mteb to items -----------------------------------------------------------------------------------------


def _columns(inputs: DataLoader) -> list[str]:
    return list(getattr(inputs.dataset, "column_names", None) or next(iter(inputs), {}))


def _windows(inputs: DataLoader, columns: Sequence[str], num_frames: int) -> Iterator[list[Any]]:
    """Items, many at a time where they are text or paths: then batches can be made of items of one length."""
    if "item" in columns and isinstance(inputs.dataset, Dataset):  # so that no picture is decoded for nothing
        yield [json.loads(text) for text in inputs.dataset.with_format(None)["item"]]
        return
    light = "item" in columns or not set(columns) & {"image", "audio", "video"}
    batches = (items_of(batch, num_frames) for batch in inputs)
    if light:
        yield [item for items in batches for item in items]
    else:
        yield from batches


def items_of(batch: Mapping[str, Any], num_frames: int = 8) -> list[Item]:
    """The items of a batch as mteb's loaders make it: a dict of lists.

    Args:
        batch: with ``item``, or any of ``text``, ``image``, ``audio`` and ``video``.
        num_frames: frames to take of a video.

    Returns:
        Items as `modeling_sail.items_sail` takes them. What cannot be decoded is the exception in place of the field.
    """
    if "item" in batch:
        return [json.loads(text) for text in batch["item"]]
    read = {"text": _text, "image": _picture, "audio": _sound, "video": lambda value: _frames(value, num_frames)}
    columns = {name: batch[name] for name in MODALITIES if name in batch}
    size = max(map(len, columns.values()), default=0)
    items: list[Item] = [{} for _ in range(size)]
    for name, values in columns.items():
        for item, value in zip(items, values, strict=True):
            try:
                found = None if value is None else read[name](value)
            except Exception as error:  # a decoder's own: the item's fault, not its neighbours'
                found = error
            item["images" if isinstance(found, list) and name == "image" else name] = found
    return items


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):  # a conversation that no loader joined
        return "\n".join(turn["content"] if isinstance(turn, Mapping) else str(turn) for turn in value)
    return str(value)


def _picture(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _sound(value: Any) -> Any:
    if hasattr(value, "get_all_samples"):  # a decoder of torchcodec
        samples = value.get_all_samples()
        return {"array": samples.data.numpy(), "sampling_rate": samples.sample_rate}
    if isinstance(value, Mapping) and "array" in value:
        array = value["array"]
        array = array.numpy() if isinstance(array, torch.Tensor) else np.asarray(array)
        array = array if array.dtype.kind in "fiu" else array.astype(np.float32)
        return {"array": array, "sampling_rate": int(value["sampling_rate"])}
    return value


def _frames(value: Any, count: int) -> list[Any]:
    """Frames at the middles of equal parts; a video's own sound is left: mteb's tasks give it apart, or ask for it."""
    if hasattr(value, "get_frames_at"):  # a decoder of torchcodec
        total = value.metadata.num_frames
        places = sorted({(2 * part + 1) * total // (2 * count) for part in range(count)})
        return list(value.get_frames_at(indices=places).data.numpy())  # (C, H, W) each
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    return list(load_video(value, LoadOptions(num_frames=count), own_sound=False)[0])
