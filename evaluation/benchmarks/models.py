"""A model as the benchmarks run it: loaded with the installed code, and encoding by one way or another.

Unusual: ways that are compared share one model; what differs is the kernels, and how items are cut into passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from ...encode_job import load_module
from ...items_sail import LoadedItem
from ...kernels_sail import plain_kernels
from ...sentence_transformer_sail import SailSentenceTransformer

FIXED = 32  # sentence-transformers' own batch size
ONE_PASS = 1 << 40  # a token budget that no batch reaches


def check_device(device: str) -> None:
    """Refuse a device that is not here before a model is loaded for it.

    Raises:
        ValueError: neither a CPU nor a GPU that torch sees.
    """
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device {device}: take cpu or cuda.")
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no GPU here; take --device cpu.")


def as_encoder(folder: Path, device: str = "cpu", dtype: torch.dtype | None = None) -> SentenceTransformer:
    """``SentenceTransformer(folder)``, whatever code lies in the folder: that of the installed package is measured."""
    return SentenceTransformer(modules=[load_module(folder, device, dtype)], device=device)


def module_of(encoder: SentenceTransformer) -> Any:
    """The `SailSentenceTransformer` in it."""
    return encoder[0]


def encoded(encoder: SentenceTransformer, items: list[Any], **options: Any) -> Tensor:
    """(N, D) float32 vectors as a user gets them."""
    found = encoder.encode(items, convert_to_tensor=True, show_progress_bar=False, **options)
    return found.float().cpu()


def plainly(work: Callable[[], Any]) -> Callable[[], Any]:
    """The same work with plain kernels."""

    def run() -> Any:
        with plain_kernels():
            return work()

    return run


@torch.inference_mode()
def embed(
    module: SailSentenceTransformer, loaded: list[LoadedItem], batches: Iterator[tuple[Sequence[int], Any]]
) -> Tensor:
    """(N, D) normalised embeddings of decoded items, batch by batch."""
    result = torch.empty(len(loaded), module.get_embedding_dimension())
    for places, batch in batches:
        found = module.model(**batch.to(module.model.device), unpadded=True).embeddings
        result[list(places)] = torch.nn.functional.normalize(found, dim=-1).float().cpu()
    return result


def fixed_batches(module: SailSentenceTransformer, loaded: list[LoadedItem]) -> Iterator[tuple[Any, Any]]:
    """Batches of 32, as they come."""
    for start in range(0, len(loaded), FIXED):
        places = range(start, min(start + FIXED, len(loaded)))
        yield places, module.processor.collate([loaded[place] for place in places])
