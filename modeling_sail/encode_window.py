"""Windows of `sail encode`: the items that are decoded together, sorted by length and cut into passes together.

Unusual: where a window ends depends on the items' order and on nothing that happens (not on workers, kills or which
items turn out bad), so vectors come out the same bit for bit; an item's picture or sound is let go as soon as its
tensors are made. Runs in worker processes: neither the model's weights nor sentence-transformers are imported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .encode_media import BadLine
from .items_sail import LoadedItem
from .processing_sail import layout_of, token_batches

ROWWISE = ("input_ids", "attention_mask", "modality_ids")  # padded to the longest row of a pass

Batch = dict[str, np.ndarray]


@dataclass
class Window:
    """Items that go through together.

    Attributes:
        shard: index of the shard that it is part of.
        number: of the window in its shard.
        names: ids.
        items: as the source gave them.
        digest: of what the source gave.
    """

    shard: int
    number: int
    names: list[str]
    items: list[Any]
    digest: str

    def without(self, bad: Mapping[int, str]) -> Window:
        """The window with some items replaced by the reason why they are not to be touched."""
        items = [BadLine(bad[place]) if place in bad else item for place, item in enumerate(self.items)]
        return Window(self.shard, self.number, self.names, items, self.digest)


@dataclass
class Prepared:
    """A window ready for the model.

    Attributes:
        passes: places of items in the window, and the tensors of these items as one batch.
        reasons: why an item could not be read, "" where it could; one for each item of the window.
    """

    passes: list[tuple[list[int], Batch]]
    reasons: list[str]


@dataclass
class Row:
    """One item's token ids and segment ids, and the tensors of its pictures and sound."""

    sequence: tuple[list[int], list[int]]
    media: Batch


class Cost:
    """Bytes that an item will hold, told from the raw item: an upper bound, nothing is decoded.

    Args:
        processor: says how large a picture's and a window's tensors are, how many frames a video gives, and how many
            windows of sound an item may have.
    """

    def __init__(self, processor: Any) -> None:
        blank = LoadedItem(0, None, {}, images=(Image.new("RGB", (32, 32)),), audio=np.zeros(1, np.float32))
        seen, heard = "vision" in processor.modalities, "audio" in processor.modalities
        made = processor.assemble([blank], [([0], [0])]) if seen or heard else {}
        windows = np.ceil(processor.max_audio_seconds / processor.audio_window_seconds)
        self.picture = made["pixel_values"].nbytes if seen else 0
        self.sound = int(windows) * made["input_features"].nbytes if heard else 0
        self.video = processor.frames_per_video * self.picture + self.sound

    def __call__(self, item: Any) -> int:
        """Bytes of raw item and tensors."""
        total = _bytes_in(item)
        if isinstance(item, dict):
            images = item.get("images")
            pictures = (len(images) if isinstance(images, list) else 1) if images else 0
            total += self.picture * (pictures + bool(item.get("image")))
            total += self.video * bool(item.get("video")) + self.sound * bool(item.get("audio"))
        return total


def cut_windows(
    items: Iterable[tuple[str, Any, bytes]], cost: Callable[[Any], int], limits: Sequence[int], shard: int = 0
) -> Iterator[Window]:
    """Items in order as windows of at most ``limits[0]`` items and ``limits[1]`` bytes; one item may have more."""
    most, room = limits
    number, held, digest = 0, 0, hashlib.sha256()
    names: list[str] = []
    kept: list[Any] = []
    for name, item, seen in items:
        needed = cost(item)
        if kept and (len(kept) == most or held + needed > room):
            yield Window(shard, number, names, kept, digest.hexdigest())
            number, held, names, kept, digest = number + 1, 0, [], [], hashlib.sha256()
        names.append(name)
        kept.append(item)
        held += needed
        digest.update(len(seen).to_bytes(8, "little") + seen)
    if kept:
        yield Window(shard, number, names, kept, digest.hexdigest())


def _bytes_in(value: Any) -> int:
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_bytes_in, value.values()))
    return sum(map(_bytes_in, value)) if isinstance(value, list) else 32


# --- decoding -------------------------------------------------------------------------------------------------------


@dataclass
class Preparer:
    """Windows to tensors, with one processor and one instruction."""

    processor: Any
    instruction: str
    token_budget: int

    def __call__(self, items: Iterable[Any]) -> Prepared:
        """Decode, tokenise and batch; items that cannot be read are left out of the passes."""
        rows, reasons = {}, []
        for place, item in enumerate(items):
            made = self._row(item)
            reasons.append(made if isinstance(made, str) else "")
            if isinstance(made, Row):
                rows[place] = made
        places, passes = list(rows), []
        for cut in token_batches([len(row.sequence[0]) for row in rows.values()], self.token_budget):
            chosen = [places[index] for index in cut]
            passes.append((chosen, self._joined([rows.pop(place) for place in chosen])))
        return Prepared(passes, reasons)

    def _row(self, item: Any) -> Row | str:
        """One item's tensors, or the reason why there are none."""
        if isinstance(item, BadLine):
            return item.reason
        try:
            loaded, (status,) = self.processor.load([item], errors="skip", instruction=self.instruction)
            if not loaded:
                return f"{status.field}: {status.reason}" if status.field else status.reason
            sequence = self.processor.sequence(layout_of(loaded[0]), self.instruction)
            made = self.processor.assemble(loaded, [sequence])
            return Row(sequence, {name: value.numpy() for name, value in made.items() if name not in ROWWISE})
        except MemoryError:
            return "item: reading it takes more memory than there is"
        except Exception as error:  # whatever a processor makes of an odd picture is that item's failure alone
            return f"item: cannot be prepared ({type(error).__name__}: {error})"

    def _joined(self, rows: list[Row]) -> Batch:
        """Rows as one batch, as `SailEmbeddingProcessor.assemble` makes it of all their items at once."""
        batch = {name: value.numpy() for name, value in self.processor.pad([row.sequence for row in rows]).items()}
        for name in {name: None for row in rows for name in row.media}:  # as they come: the same names, the same order
            values = [row.media.get(name) for row in rows]
            if name.endswith("_owner"):
                values = [None if value is None else np.full_like(value, row) for row, value in enumerate(values)]
            batch[name] = np.concatenate([value for value in values if value is not None])
        return batch
