"""Encoding ragged items: token-budget batches beside fixed batches of 32 of the same model, in turn, in one run.

Items are decoded before the clock starts, the same for both sides; what is timed is tokenizing, pixel values and
log-mels, towers and fusion. The vectors of both sides are compared: a faster wrong answer is no answer.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...encode_job import load_module
from ...items_sail import LoadedItem
from ...sentence_transformer_sail import SailSentenceTransformer
from .figures import figure

WORDS = "red kangaroo jumps over quiet river while seven musicians tune brass instruments under paper lanterns".split()
FIXED = 32


def ragged_items(count: int, kind: str, seed: int = 0) -> list[dict[str, Any]]:
    """Texts of 4 to 180 words, mostly short; "omni": every second with a picture, every third with 5 s of sound."""
    chooser, numbers = random.Random(seed), np.random.default_rng(seed)
    items: list[dict[str, Any]] = []
    for index in range(count):
        length = min(180, 4 + int(chooser.expovariate(1 / 35)))
        item: dict[str, Any] = {"title": " ".join(chooser.choices(WORDS, k=length))}
        if kind == "omni" and index % 2 == 0:
            item["image"] = Image.fromarray(numbers.integers(0, 255, (224, 224, 3), dtype=np.uint8))
        if kind == "omni" and index % 3 == 0:
            item["audio"] = (numbers.normal(0, 0.1, 80_000).astype(np.float32), 16_000)
        items.append(item)
    return items


@torch.inference_mode()
def embed(
    module: SailSentenceTransformer, loaded: list[LoadedItem], batches: Iterator[tuple[Sequence[int], Any]]
) -> Tensor:
    """(N, D) normalised embeddings of decoded items, batch by batch."""
    result = torch.empty(len(loaded), module.get_embedding_dimension())
    for places, batch in batches:
        result[list(places)] = torch.nn.functional.normalize(module.model(**batch).embeddings, dim=-1)
    return result


def fixed_batches(
    module: SailSentenceTransformer, loaded: list[LoadedItem], by_length: bool
) -> Iterator[tuple[Any, Any]]:
    """Batches of 32, as they come or longest first (as sentence-transformers sorts, by characters)."""
    order = list(range(len(loaded)))
    if by_length:
        order.sort(key=lambda place: -sum(map(len, loaded[place].texts.values())))
    for start in range(0, len(order), FIXED):
        places = order[start : start + FIXED]
        yield places, module.processor.collate([loaded[place] for place in places])


def encode_benchmark(model: Path, items: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Figures of first-encode latency and of items/s, ours and the peer's, medians of ``rounds`` runs in turn."""
    begun = time.perf_counter()
    module = load_module(model)
    loading = time.perf_counter() - begun
    begun = time.perf_counter()
    with torch.inference_mode():
        module(module.preprocess(["one short query"]))
    yield figure("encode", "first encode", "seconds after loading", "s", time.perf_counter() - begun, None, "")
    yield figure("encode", "loading", "seconds", "s", loading, None, "")
    for kind in ("text", "omni"):
        loaded, _ = module.processor.load(ragged_items(items, kind))
        for name, by_length in (("fixed batches of 32, as they come", False), ("fixed batches of 32, sorted", True)):

            def ours(loaded: list[LoadedItem] = loaded) -> Tensor:
                return embed(module, loaded, module.processor.batches(loaded))

            def peer(loaded: list[LoadedItem] = loaded, by_length: bool = by_length) -> Tensor:
                return embed(module, loaded, fixed_batches(module, loaded, by_length))

            seconds, difference = in_turn(ours, peer, rounds)
            yield figure("encode", kind, "items per second", "items/s", items / seconds[0], items / seconds[1], name)
            yield figure("encode", kind, "largest difference of vectors", "", difference, None, name)


def in_turn(ours: Callable[[], Tensor], peer: Callable[[], Tensor], rounds: int) -> tuple[tuple[float, float], float]:
    """Median seconds of both, run in turn after one round that is not counted; how far their results differ."""
    difference = float((ours() - peer()).abs().max())
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for run, times in zip((ours, peer), seconds, strict=True):
            begun = time.perf_counter()
            run()
            times.append(time.perf_counter() - begun)
    return (statistics.median(seconds[0]), statistics.median(seconds[1])), difference
