"""Rows to one batch of tensors: queries, targets and hard negatives as one flat list of items, encoded in one pass.

Unusual: with feature caches, pictures and sounds are looked up instead of decoded, and the towers do not run. Where
rows share items, as sequences do, an item is in the list once. A row with an item that cannot be read is left out and
reported; the batch is then smaller, on this rank alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..items_sail import ItemError, LoadedItem, clean_texts
from ..processing_sail import Layout, SailEmbeddingProcessor, layout_of
from .feature_cache import FeatureCache
from .patterns import LETTERS, parts_of
from .rows import Item, Row, dropped_fields, item_key, number_of
from .sampler import Draw

QUERY, TARGET, NEGATIVE = 0, 1, 2  # NEGATIVE + k is the k-th hard negative


class Entry(NamedTuple):
    """One item of a batch: whose, in which role, and the item. A sequence has several in the role of the query."""

    row: int
    slot: int
    item: Item
    instruction: str
    key: str = ""  # where rows share items: who it is


@dataclass
class Prepared:
    """An item before it is padded, or the reason why there is none."""

    layout: Layout | None = None
    loaded: LoadedItem | None = None
    pictures: Tensor | None = None  # cached features (F, T, V)
    sounds: Tensor | None = None  # cached features (W, T, A)
    reason: str = ""

    def parts(self) -> Tensor:
        """(5,) booleans, as patterns.py has them."""
        assert self.layout is not None
        frames = bool(self.loaded and self.loaded.frames)
        return parts_of(self.layout.num_images > 0, frames, self.layout.has_audio, bool(self.layout.texts))


@dataclass
class Collator:
    """Draws to what `ContrastiveTrainer` takes.

    Attributes:
        processor: the model's.
        images, sounds: caches of tower features by path; with them, every picture and sound is looked up.
        field_dropout: share of text fields that are dropped at random (section 3.2.2).
    """

    processor: SailEmbeddingProcessor
    images: FeatureCache | None = None
    sounds: FeatureCache | None = None
    field_dropout: float = 0.0

    def __call__(self, draw: Draw) -> dict[str, Any]:
        """One rank's batch of B rows with H hard negatives in all, at most C - 1 a row: 2 B + H places for U items.

        Returns:
            ``items``: keyword arguments of the model for the items, in the order of [queries, targets, negatives];
            ``members`` and ``owners`` (S,), only where rows share items or have sequences: the item of each member and
            the place that it belongs to, and ``sequences`` (B,), which queries are sequences; ``parts`` (2 B + H, 5),
            what each place has (patterns.py), nothing for sequences; ``target_ids`` (B,), equal where targets are;
            ``negative_slots`` (H, 2), row and number of each negative; ``negative_mask`` (H,), False where it is the
            row's target after all; ``scores`` (B,) and ``teacher_scores`` (B, C), NaN where there is none; ``item_ids``
            (U,), ``said_ids`` (U,), with the instruction, and by table ``tables`` (U, E) and ``table_rows`` (U,), the
            ID embeddings and which items have one; ``dataset``, its name; ``patterns`` and ``losses``, its own;
            ``skipped``, names and reasons; ``asked``, how many rows were drawn.
        """
        shared = _shares_items(draw)
        entries = self._entries(draw, shared)
        firsts, item_of = _once(entries) if shared else (entries, list(range(len(entries))))
        prepared = self.prepare([entry.item for entry in firsts], [entry.instruction for entry in firsts])
        good, skipped = _good_entries(draw, entries, [prepared[place].reason for place in item_of])
        rows = sorted({entries[number].row for number in good if entries[number].slot == TARGET})
        used = sorted({item_of[number] for number in good})
        slots = _slots([entries[number] for number in good], rows)
        new = {item: place for place, item in enumerate(used)}
        members = torch.tensor([new[item_of[number]] for number in good], dtype=torch.long)
        parts = [prepared[item].parts() for item in used]
        return {
            "items": self.pad([prepared[item] for item in used], [firsts[item].instruction for item in used]),
            **({"members": members, "owners": slots.owners, "sequences": _sequences(draw, rows)} if shared else {}),
            "parts": _parts_of_places(parts, members, slots.owners, [draw.rows[row] for row in rows]),
            **_labels([draw.rows[row] for row in rows], slots.negatives),
            **_id_embeddings(draw, [firsts[item] for item in used]),
            "dataset": draw.dataset.name,
            "patterns": list(draw.dataset.patterns),
            "losses": dict(draw.dataset.losses),
            "skipped": skipped,
            "asked": draw.size,
        }

    def _entries(self, draw: Draw, shared: bool) -> list[Entry]:
        """[queries, targets, negatives], each in the order of the rows, text fields dropped.

        A shared item loses the same fields wherever it is in the step, on whatever rank.
        """
        query, target = (self.processor.instruction_for(draw.task, side) for side in draw.dataset.sides)
        entries = []
        for row, generator in enumerate(draw.generators):
            given = draw.rows[row]
            roles = [(QUERY, item) for item in given.queries]
            roles += [(TARGET + place, item) for place, item in enumerate((given.target, *given.negatives))]
            for slot, item in roles:
                said = query if slot == QUERY else target
                key = item_key(item) if shared else ""
                drops = random.Random(f"{draw.step}/{key}") if shared else generator
                entries.append(Entry(row, slot, dropped_fields(item, self.field_dropout, drops), said, key))
        return sorted(entries, key=lambda entry: (min(entry.slot, NEGATIVE), entry.row, entry.slot))

    def encode_items(self, items: Sequence[Item], instruction: str = "") -> dict[str, Tensor]:
        """Items that are all good to the model's keyword arguments.

        Raises:
            ValueError: one of them cannot be read.
        """
        prepared = self.prepare(items, [instruction] * len(items))
        for place, one in enumerate(prepared):
            if one.reason:
                raise ValueError(f"item {place}: {one.reason}")
        return self.pad(prepared, [instruction] * len(prepared))

    # -- items before padding ----------------------------------------------------------------------------------------

    def prepare(self, items: Sequence[Item], instructions: Sequence[str] = ()) -> list[Prepared]:
        """Decode or look up each item; N in, N out. With instructions, good is what has room beside its own."""
        prepared = self._read(items)
        if not instructions:
            return prepared
        return [self._with_room(one, said) for one, said in zip(prepared, instructions, strict=True)]

    def _with_room(self, one: Prepared, instruction: str) -> Prepared:
        """The item, or why not even the first token of its text would fit."""
        if one.layout is None:
            return one
        least = replace(one.layout, texts=dict.fromkeys([*one.layout.texts][:1], "a"))  # longer text is cut
        try:
            self.processor.sequence(least, instruction)
        except ValueError as error:
            return Prepared(reason=f"item: {error}")
        return one

    def _read(self, items: Sequence[Item]) -> list[Prepared]:
        if self.images is not None or self.sounds is not None:
            return [self._looked_up(item) for item in items]
        loaded, statuses = self.processor.load(items, errors="skip")
        prepared = [Prepared(reason=f"{status.field}: {status.reason}") for status in statuses]
        for one in loaded:
            prepared[one.index] = Prepared(layout_of(one), one)
        return prepared

    def _looked_up(self, item: Item) -> Prepared:
        fields = {"text": item} if isinstance(item, str) else item
        found: dict[str, Tensor | None] = {}
        for name in ("images", "video"):
            if fields.get(name):
                return Prepared(reason=f"{name}: a feature cache holds one picture (image) and one sound (audio) alone")
        for name, cache in (("image", self.images), ("audio", self.sounds)):
            if name in fields and not isinstance(fields[name], str):
                return Prepared(
                    reason=f"{name}: with a feature cache it must be a path, got {type(fields[name]).__name__}"
                )
            if name in fields and (cache is None or fields[name] not in cache):
                why = "is not in the feature cache" if cache is None else cache.why_missing(fields[name])
                return Prepared(reason=f"{name}: {fields[name]!r} {why}")
            found[name] = cache[fields[name]] if name in fields and cache is not None else None
        try:
            texts = clean_texts(fields)
        except ItemError as error:
            return Prepared(reason=f"{error.field}: {error.reason}")
        pictures, sounds = found["image"], found["audio"]
        if not texts and pictures is None and sounds is None:
            return Prepared(reason="item: nothing is left; give text that can be seen, image or audio")
        layout = Layout(texts, 0 if pictures is None else len(pictures), sounds is not None)
        return Prepared(layout, None, pictures, sounds)

    # -- to tensors --------------------------------------------------------------------------------------------------

    def pad(self, prepared: Sequence[Prepared], instructions: Sequence[str]) -> dict[str, Tensor]:
        """Prepared items to the model's keyword arguments, each with its instruction."""
        sequences = []
        for one, instruction in zip(prepared, instructions, strict=True):
            assert one.layout is not None
            sequences.append(self.processor.sequence(one.layout, instruction))
        if self.images is None and self.sounds is None:
            return dict(self.processor.assemble([one.loaded for one in prepared if one.loaded], sequences))
        batch = self.processor.pad(sequences)
        batch |= _flat([one.pictures for one in prepared], "image_features", "image_owner")
        return batch | _flat([one.sounds for one in prepared], "audio_features", "audio_owner")


# --- who is what ----------------------------------------------------------------------------------------------------


def _shares_items(draw: Draw) -> bool:
    """Whether an item may be in several rows or places, known by its id."""
    some = any(isinstance(row.query, tuple) or row.query is row.target for row in draw.rows)
    return some or draw.dataset.items is not None


def _once(entries: Sequence[Entry]) -> tuple[list[Entry], list[int]]:
    """The first entry of each item and instruction, and which of those each entry is."""
    places: dict[tuple[str, str], int] = {}
    firsts, found = [], []
    for entry in entries:
        key = entry.key, entry.instruction
        if key not in places:
            places[key] = len(firsts)
            firsts.append(entry)
        found.append(places[key])
    return firsts, found


def _good_entries(
    draw: Draw, entries: Sequence[Entry], reasons: Sequence[str]
) -> tuple[list[int], list[tuple[str, str]]]:
    """Numbers of the entries that stay, and what is skipped and why.

    A negative, or an item of a sequence, goes alone; a row goes with its target or with all of its query.
    """
    skipped, left = list(draw.skipped), set()
    queries = {entry.row for entry, reason in zip(entries, reasons, strict=True) if entry.slot == QUERY and not reason}
    for entry, reason in zip(entries, reasons, strict=True):
        if not reason:
            continue
        role = ("query", "target", f"negative {entry.slot - NEGATIVE + 1}")[min(entry.slot, NEGATIVE)]
        partly = entry.slot == QUERY and entry.row in queries  # a sequence that has others: its item is what is lost
        skipped.append((f"item {entry.key}" if partly else draw.rows[entry.row].id, f"{role}: {reason}"))
        if entry.slot < NEGATIVE and not partly:
            left.add(entry.row)
    good = [number for number, reason in enumerate(reasons) if not reason and entries[number].row not in left]
    return good, skipped


class Slots(NamedTuple):
    """Where members belong: ``owners`` (S,) among [B queries, B targets, H negatives], and (row, number) of the H."""

    owners: Tensor
    negatives: list[tuple[int, int]]


def _slots(entries: Sequence[Entry], rows: Sequence[int]) -> Slots:
    new = {row: place for place, row in enumerate(rows)}
    owners, negatives = [], []
    for entry in entries:
        row = new[entry.row]
        if entry.slot < NEGATIVE:
            owners.append(entry.slot * len(rows) + row)
        else:
            owners.append(2 * len(rows) + len(negatives))
            negatives.append((row, entry.slot - NEGATIVE))
    return Slots(torch.tensor(owners, dtype=torch.long), negatives)


def _sequences(draw: Draw, rows: Sequence[int]) -> Tensor:
    """(B,) which queries are sequences, be it of one item."""
    return torch.tensor([isinstance(draw.rows[row].query, tuple) for row in rows], dtype=torch.bool)


def _parts_of_places(parts: Sequence[Tensor], members: Tensor, owners: Tensor, rows: Sequence[Row]) -> Tensor:
    """(2 B + H, 5) what each place has; nothing for a sequence, which has no single modality to contrast."""
    found = torch.zeros(int(owners.max()) + 1 if len(owners) else 0, len(LETTERS), dtype=torch.bool)
    if len(owners):
        found[owners] = torch.stack(list(parts))[members]
        found[[place for place, row in enumerate(rows) if isinstance(row.query, tuple)]] = False
    return found


def _id_embeddings(draw: Draw, entries: Sequence[Entry]) -> dict[str, Any]:
    """Numbers of the items, and by table their ID embeddings and which items have one."""
    entries = entries if draw.dataset.tables else []
    ids = [entry.key or item_key(entry.item) for entry in entries]
    said = [f"{entry.instruction}\n{name}" for entry, name in zip(entries, ids, strict=True)]
    rows = {name: table.rows_for(ids) for name, table in draw.dataset.tables.items()}
    return {
        "item_ids": torch.tensor([number_of(name) for name in ids], dtype=torch.long),
        "said_ids": torch.tensor([number_of(name) for name in said], dtype=torch.long),
        "tables": {name: torch.from_numpy(vectors) for name, (vectors, _) in rows.items()},
        "table_rows": {name: torch.from_numpy(there) for name, (_, there) in rows.items()},
    }


def _labels(rows: Sequence[Row], slots: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """What the losses need besides embeddings; as `Collator.__call__` says."""
    width = 1 + max((slot for _, slot in slots), default=-1) + 1
    teacher = torch.full((len(rows), width), float("nan"))
    for place, row in enumerate(rows):
        if row.teacher_scores is not None:
            known = [0, *(1 + slot for owner, slot in slots if owner == place)]
            teacher[place, known] = torch.tensor(row.teacher_scores)[known]
    same = [rows[row].negative_ids[slot] == rows[row].target_id for row, slot in slots]
    return {
        "target_ids": torch.tensor([number_of(row.target_id) for row in rows], dtype=torch.long),
        "negative_slots": torch.tensor(slots, dtype=torch.long).reshape(-1, 2),
        "negative_mask": ~torch.tensor(same, dtype=torch.bool),
        "scores": torch.tensor([float("nan") if row.score is None else row.score for row in rows]),
        "teacher_scores": teacher,
    }


def _flat(features: Sequence[Tensor | None], values_name: str, owner_name: str) -> dict[str, Tensor]:
    """[(F, T, C) or None] to one (sum F, T, C) tensor in float32 and the row that each entry belongs to."""
    present = [tensor for tensor in features if tensor is not None]
    if not present:
        return {}
    counts = torch.tensor([0 if tensor is None else len(tensor) for tensor in features])
    owner = torch.arange(len(features)).repeat_interleave(counts)
    return {values_name: torch.cat(present).float(), owner_name: owner}
