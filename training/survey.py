"""What a model makes of a dataset: embeddings of its pairs, on disk, and of a sample of its items, by modality.

Mining, selecting and balancing start from here. Unusual: the pairs lie in memory-mapped arrays that are filled part by
part, so millions of rows need no memory, a killed run goes on with the part that it died in, and ranks share the parts
out among themselves; parts of another model or dataset are refused. What rows of a part repeat is embedded once.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  the field's own abbreviation
from tqdm.auto import tqdm

from ..fingerprints import hash_tensors
from ..modeling_sail import SailEmbeddingModel
from .collate import Collator
from .distributed import rank, wait, world_size
from .files import write_json
from .grad_cache import PASS_TOKENS, micro_batches, select
from .objective import ALONE
from .rows import Item, RowError, TrainingDataset, content_key, item_key, number_of

PART = 256  # rows of a part: what a kill can cost
CHUNK = 65_536  # rows that are looked at together
DECODED = 32  # items whose media are held at once
LOOKED_AT = 64  # rows whose content tells one dataset from another


@dataclass(frozen=True)
class Survey:
    """Embeddings of a dataset's pairs.

    Attributes:
        places: (N,) rows of the dataset that could be read and embedded, rising.
        queries, targets: (N, D) normalised, float32, memory-mapped.
        query_ids, target_ids: (N,) numbers of 63 bits, equal where the ids are.
        skipped: ids of the other rows, and why.
    """

    places: np.ndarray
    queries: Tensor
    targets: Tensor
    query_ids: np.ndarray
    target_ids: np.ndarray
    skipped: list[tuple[str, str]]


def survey(
    model: SailEmbeddingModel,
    collate: Collator,
    dataset: TrainingDataset,
    folder: Path,
    *,
    disposable: bool = False,
    progress: bool = True,
) -> Survey | None:
    """Embed every pair of a dataset; every rank must call it, and the first one gets the result, the others None.

    Args:
        model, collate: from the media themselves or from cached features.
        dataset: not streamed; its first task says whose instructions are put before both sides.
        folder: of the arrays and parts; all ranks must see it.
        disposable: what another model or dataset left in the folder is thrown away, not refused.
        progress: show a bar, on the first rank.

    Raises:
        ValueError: the dataset is streamed, or no row can be read; the folder is another model's or dataset's, or its
            arrays are broken.
    """
    if dataset.streamed:
        raise ValueError(f"Dataset {dataset.name!r} is streamed; all its rows must be at hand.")
    size = len(dataset.source)
    if rank() == 0:
        job = {"model": model_hash(model), "dataset": content_hash(dataset), "task": dataset.tasks[0], "rows": size}
        _claim(folder, job, (size, model.config.hidden_size), disposable)
    wait()
    arrays = _opened(folder, "r+")
    training, _ = model.training, model.eval()
    starts = list(range(0, size, PART))[rank() :: world_size()]
    for start in tqdm(starts, f"embed {dataset.name}", unit="part", disable=not progress or rank() > 0):
        done = folder / f"{start:012d}.json"
        if not done.exists():
            skipped = _fill(model, collate, dataset, range(start, min(start + PART, size)), arrays)
            for array in arrays.values():
                array.flush()
            write_json(done, skipped)
    model.train(training)
    wait()
    return _gathered(dataset, folder) if rank() == 0 else None


def _gathered(dataset: TrainingDataset, folder: Path) -> Survey:
    skipped: list[tuple[str, str]] = []
    good = np.ones(len(dataset.source), dtype=bool)
    for path in sorted(folder.glob("0*.json")):
        for place, name, reason in json.loads(path.read_text(encoding="utf-8")):
            skipped.append((name, reason))
            good[place] = False
    if not good.any():
        listed = "; ".join(f"{name}: {reason}" for name, reason in skipped[:3])
        raise ValueError(f"Not one of {len(good)} rows of {dataset.name!r} could be embedded. The first: {listed}")
    ids = np.load(folder / "ids.npy", allow_pickle=False)
    queries, targets = (_good_rows(folder, name, good) for name in ("queries", "targets"))
    return Survey(np.flatnonzero(good), queries, targets, ids[0][good], ids[1][good], skipped)


def _good_rows(folder: Path, name: str, good: np.ndarray) -> Tensor:
    """(N, D) rows that are good, memory-mapped: the array itself, or where some are bad a copy beside it.

    Raises:
        ValueError: a row that should be good is not of length 1.
    """
    array = _opened(folder, "c")[name]  # copied where written to, which nobody does; torch wants arrays that may be
    kept = None
    if not good.all():
        shape = (int(good.sum()), array.shape[1])
        kept = np.lib.format.open_memmap(folder / f"good-{name}.npy", "w+", dtype=np.float32, shape=shape)
    begin = 0
    for start in range(0, len(array), CHUNK):
        part = array[start : start + CHUNK][good[start : start + CHUNK]]
        lengths = np.linalg.norm(part, axis=1)
        if not (np.abs(lengths - 1) < 1e-2).all():
            raise ValueError(
                f"{folder} is broken: embeddings that are done have no length of 1. Remove it, begin again."
            )
        if kept is not None:
            kept[begin : begin + len(part)] = part
        begin += len(part)
    return torch.from_numpy(array if kept is None else kept)


def _fill(
    model: SailEmbeddingModel,
    collate: Collator,
    dataset: TrainingDataset,
    places: Sequence[int],
    arrays: Mapping[str, np.memmap],
) -> list[tuple[int, str, str]]:
    """Write a part's embeddings and ids; returns (place, id, reason) of rows that have none."""
    read, skipped = [], []
    for place in places:
        try:
            row = dataset.read_as_surveyed(place)
            if isinstance(row.query, tuple):
                raise RowError(
                    row.id,
                    "its query is a sequence, not an item: leave the dataset out of mine.datasets; select takes none",
                )
            read.append((place, row))
        except RowError as error:
            skipped.append((place, error.row_id, error.reason))
    sides = []
    for name, side in zip(("query", "target"), dataset.sides, strict=True):
        instruction = collate.processor.instruction_for(dataset.tasks[0], side)
        sides.append(_embed_once(model, collate, [getattr(row, name) for _, row in read], instruction))
    for number, (place, row) in enumerate(read):
        reasons = [f"{name}: {side[1][number]}" for name, side in zip(("query", "target"), sides, strict=True)]
        bad = [reason for reason, side in zip(reasons, sides, strict=True) if side[1][number]]
        if bad:
            skipped.append((place, row.id, bad[0]))
            continue
        arrays["queries"][place], arrays["targets"][place] = (side[0][number].numpy() for side in sides)
        arrays["ids"][:, place] = number_of(item_key(row.query)), number_of(row.target_id)
    return skipped


def _embed_once(
    model: SailEmbeddingModel, collate: Collator, items: Sequence[Item], instruction: str
) -> tuple[Tensor, list[str]]:
    """As `embed`; an item that is there again has the vector of the first."""
    seen: dict[str, int] = {}
    numbers = [seen.setdefault(content_key(item), len(seen)) for item in items]
    firsts = [numbers.index(number) for number in range(len(seen))]
    vectors, reasons = embed(model, collate, [items[first] for first in firsts], instruction)
    return vectors[numbers], [reasons[number] for number in numbers]


@torch.inference_mode()
def embed(
    model: SailEmbeddingModel, collate: Collator, items: Sequence[Item], instruction: str = ""
) -> tuple[Tensor, list[str]]:
    """(N, D) normalised embeddings on the CPU, and the reason why an item has none ("" where it has; zeros then)."""
    vectors = torch.zeros(len(items), model.config.hidden_size)
    reasons = [""] * len(items)
    for places, output in _passes(model, collate, items, instruction, reasons):
        vectors[places] = F.normalize(output.embeddings.float(), dim=-1).cpu()
    return vectors, reasons


def sample_embeddings(
    model: SailEmbeddingModel,
    collate: Collator,
    dataset: TrainingDataset,
    samples: int,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, np.ndarray]:
    """(n, D) normalised embeddings of items of a dataset, both sides, by modality combination (section 3.1.3).

    Args:
        model, collate: as in `survey`.
        dataset: a stream gives its first rows.
        samples: rows, drawn without replacement.
        seed: of the draw.
        progress: show a bar.

    Returns:
        "fused" of items with several modalities; "vision", "audio", "text" of every item that has it, encoded without
        the others. Combinations that no item has are left out.

    Raises:
        ValueError: no item could be embedded.
    """
    found: dict[str, list[np.ndarray]] = {}
    training, _ = model.training, model.eval()
    total = samples if dataset.streamed else min(samples, len(dataset.source))
    reason = ""
    items = _sampled_items(dataset, samples, seed)
    for some in tqdm(_parts(items), f"embed {dataset.name}", -(-2 * total // PART), unit="part", disable=not progress):
        why = [""] * len(some)
        for _, output in _passes(model, collate, some, "", why, output_modality_embeddings=True):
            for kind, part in _by_kind(output).items():
                found.setdefault(kind, []).append(part)
        reason = reason or next(filter(None, why), "")
    model.train(training)
    if not found:
        raise ValueError(f"Not one item of {dataset.name!r} could be embedded. {reason and 'The first: ' + reason}")
    return {kind: np.concatenate(parts) for kind, parts in found.items()}


def _parts(items: Iterable[Item]) -> Iterator[list[Item]]:
    part: list[Item] = []
    for item in items:
        part.append(item)
        if len(part) == PART:
            yield part
            part = []
    if part:
        yield part


def _by_kind(output: Any) -> dict[str, np.ndarray]:
    """Embeddings of a pass by modality combination; the mask's columns are audio, vision, text."""
    mask = output.modality_mask.cpu()
    kinds = {"fused": (output.embeddings, mask.sum(dim=1) > 1)}
    for kind, column in (("audio", 0), ("vision", 1), ("text", 2)):
        kinds[kind] = (output[ALONE[kind]], mask[:, column])
    return {
        kind: F.normalize(values.float().cpu()[rows], dim=-1).numpy()
        for kind, (values, rows) in kinds.items()
        if values is not None and bool(rows.any())
    }


def _sampled_items(dataset: TrainingDataset, samples: int, seed: int) -> Iterator[Item]:
    generator = random.Random(seed)
    if dataset.streamed:
        records = ((None, record) for _, record in zip(range(samples), dataset.source, strict=False))
    else:
        size = len(dataset.source)
        records = ((place, None) for place in sorted(generator.sample(range(size), min(samples, size))))
    for place, record in records:
        try:
            row = dataset.read(place or 0, generator, record)
        except RowError:
            continue  # it is reported when its batch is drawn
        yield from (*row.queries, row.target)


@torch.inference_mode()
def _passes(
    model: SailEmbeddingModel,
    collate: Collator,
    items: Sequence[Item],
    instruction: str,
    reasons: list[str],
    **wanted: bool,
) -> Iterator[tuple[Tensor, Any]]:
    """(places, output) of each pass over the good ones; why the others are not is written into ``reasons``."""
    for start in range(0, len(items), DECODED):
        part = items[start : start + DECODED]
        prepared = collate.prepare(part, [instruction] * len(part))
        reasons[start : start + DECODED] = [one.reason for one in prepared]
        good = torch.tensor([place for place, one in enumerate(prepared) if not one.reason], dtype=torch.long)
        if not len(good):
            continue
        batch = collate.pad([prepared[place] for place in good.tolist()], [instruction] * len(good))
        for cut in micro_batches(batch, PASS_TOKENS):
            chosen = {name: value.to(model.device) for name, value in select(batch, cut).items()}
            yield start + good[cut], model(**chosen, **wanted)


# --- what is kept ---------------------------------------------------------------------------------------------------


def model_hash(model: torch.nn.Module) -> str:
    """sha256 over all of a model's tensors in the order of their names."""
    digest = hashlib.sha256()
    hash_tensors(digest, sorted(model.state_dict().items()))
    return digest.hexdigest()


def content_hash(dataset: TrainingDataset) -> str:
    """Of some of its rows and of its file's size and time: another dataset in its place is found out, at low cost."""
    source = dataset.source
    size = len(source)
    digest = hashlib.sha256(f"{size} {getattr(source, '_fingerprint', '')}".encode())  # the latter of `datasets`
    if isinstance(getattr(source, "path", None), Path):
        status = source.path.stat()
        digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    for place in range(0, size, max(1, size // LOOKED_AT)):
        try:
            row = dataset.read_as_surveyed(place)
            digest.update(f"{row.id} {item_key(row.query)} {item_key(row.target)} {row.target_id}".encode())
        except RowError as error:
            digest.update(str(error).encode())
    return digest.hexdigest()


_ARRAYS = ("queries", "targets", "ids")


def _claim(folder: Path, job: dict[str, Any], shape: tuple[int, int], disposable: bool) -> None:
    """Make the arrays, or find them made by the same job."""
    manifest = folder / "job.json"
    known = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else None
    if known is not None and known != job and not disposable:
        changed = ", ".join(key for key in job if known.get(key) != job[key])
        raise ValueError(f"{folder} was begun with another {changed}; remove it, or name another place.")
    if known == job:
        _check_sizes(folder)
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name in _ARRAYS:
        wide, kind = ((2, shape[0]), np.int64) if name == "ids" else (shape, np.float32)
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype=kind, shape=wide).flush()
    write_json(manifest, job)


def _check_sizes(folder: Path) -> None:
    """Refuse arrays that were cut short; opened to write to, they would be filled up with zeros.

    Raises:
        ValueError: one is.
    """
    for name in _ARRAYS:
        try:
            np.lib.format.open_memmap(folder / f"{name}.npy", "r")
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder / name}.npy is broken ({error}); remove {folder}, and begin again.") from error


def _opened(folder: Path, mode: Any) -> dict[str, np.memmap]:
    return {name: np.lib.format.open_memmap(folder / f"{name}.npy", mode) for name in _ARRAYS}
