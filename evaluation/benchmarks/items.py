"""Items that the benchmarks embed: made up, seeded, of the shapes that the issue of speed names."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from ...sentence_transformer_sail import SailSentenceTransformer

WORDS = "red kangaroo jumps over quiet river while seven musicians tune brass instruments under paper lanterns".split()
KINDS = ("text", "omni", "omni-full")
SECONDS, HZ, PIXELS, TOKENS = 5, 16_000, 224, 32
MIXES = {
    "text": (),
    "picture": ("image",),
    "sound": ("audio",),
    "omni": ("image", "audio"),
}


def made_items(count: int, kind: str, count_tokens: Callable[[str], int] | None = None) -> list[dict[str, Any]]:
    """Items of a kind, the same ones for the same count.

    Args:
        count: how many.
        kind: "text": 4 to 180 words, mostly short; "omni": those, every second with a picture, every third with 5 s of
            sound; "omni-full": every item a picture, 5 s of sound and a title of `TOKENS` tokens.
        count_tokens: of a text, by the model's tokenizer; a word counts as one token without it.

    Raises:
        ValueError: no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"There is no kind of items {kind!r}; take one of {', '.join(KINDS)}.")
    chooser, numbers = random.Random(0), np.random.default_rng(0)
    items: list[dict[str, Any]] = []
    for index in range(count):
        full = kind == "omni-full"
        length = TOKENS if full else min(180, 4 + int(chooser.expovariate(1 / 35)))
        words = chooser.choices(WORDS, k=length)
        item: dict[str, Any] = {"title": cut_to_tokens(words, count_tokens) if full else " ".join(words)}
        if full or (kind == "omni" and index % 2 == 0):
            item["image"] = Image.fromarray(numbers.integers(0, 255, (PIXELS, PIXELS, 3), dtype=np.uint8))
        if full or (kind == "omni" and index % 3 == 0):
            item["audio"] = (numbers.normal(0, 0.1, SECONDS * HZ).astype(np.float32), HZ)
        items.append(item)
    return items


def cut_to_tokens(words: list[str], count_tokens: Callable[[str], int] | None) -> str:
    """As many of the words as have at most `TOKENS` tokens, but one at least."""
    while count_tokens is not None and len(words) > 1 and count_tokens(" ".join(words)) > TOKENS:
        words = words[:-1]
    return " ".join(words)


def items_for(module: SailSentenceTransformer, count: int, kind: str) -> list[dict[str, Any]]:
    """`made_items` with what the model's towers read, and lengths by its tokenizer.

    Raises:
        ValueError: nothing to embed.
    """
    if count < 1:
        raise ValueError(f"{count} items: at least one is needed.")
    tokenizer = module.tokenizer
    items = made_items(count, kind, lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]))
    lacking = {"image": "vision", "audio": "audio"}
    for field, modality in lacking.items():
        if modality not in module.processor.modalities:
            for item in items:
                item.pop(field, None)
    return items


def write_media(items: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The items with files in place of pictures (JPEG) and sounds (16-bit WAV): what a corpus is read from."""
    written = []
    for index, item in enumerate(items):
        found = dict(item)
        if "image" in item:
            found["image"] = str(folder / f"{index}.jpg")
            item["image"].save(found["image"], quality=90)
        if "audio" in item:
            found["audio"] = str(folder / f"{index}.wav")
            soundfile.write(found["audio"], *item["audio"])
        written.append(found)
    return written
