"""`sail encode`: a file or folder of items to one Parquet file of embeddings; never uploaded.

Unusual: work is written in parts that are renamed into place, so a killed job resumes where it stopped; a bad item is a
row with its reason, never the end of the job.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm

from .items_sail import KNOWN_FIELDS, ItemStatus
from .sentence_transformer_sail import SailSentenceTransformer

PART = 256  # items of a part: what a kill can cost, and the window in which items are sorted by length

SUFFIXES = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    "audio": (".wav", ".ogg", ".flac", ".mp3", ".m4a", ".opus"),
    "video": (".mp4", ".mkv", ".webm", ".mov", ".avi"),
    "text": (".txt",),
}
FIELD_OF = {suffix: field for field, suffixes in SUFFIXES.items() for suffix in suffixes}


# --- where items come from ------------------------------------------------------------------------------------------


def read_items(source: Path) -> list[tuple[str, Any]]:
    """(id, item) of every item of a JSONL or Parquet file or a folder, in a stable order.

    A JSONL line is an item; media paths are relative to the file; without an ``id`` its line number is one. A line that
    is no JSON object becomes an item that fails with that reason. In a folder, files of the same name but for the
    ending are one item: ``cat.png`` and ``cat.ogg`` and ``cat.txt`` (its text).

    A Parquet file has the fields of items as columns, as `sail behaviour` writes them; what is no field is passed over.

    Raises:
        ValueError: the source is none of these, or holds nothing.
    """
    if source.is_dir():
        items = list(_folder_items(source))
    elif source.suffix == ".parquet" and source.is_file():
        items = list(_parquet_items(source))
    elif source.is_file():
        items = list(_jsonl_items(source))
    else:
        raise ValueError(f"{source} is neither a JSONL or Parquet file nor a folder.")
    if not items:
        raise ValueError(f"{source} holds no items: a JSONL file has one JSON object a line, a folder media files.")
    return items


def _jsonl_items(source: Path) -> Iterator[tuple[str, Any]]:
    with source.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
            except ValueError as error:
                yield str(number), BadLine(f"line {number} is not JSON: {error}")
                continue
            if isinstance(item, dict):
                item = {name: _resolved(name, value, source.parent) for name, value in item.items()}
            yield _item_id(item, number), item


def _parquet_items(source: Path) -> Iterator[tuple[str, Any]]:
    try:
        table = pq.read_table(source)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{source} is not a whole Parquet file ({error}); write it again.") from error
    fields = [name for name in table.column_names if name in KNOWN_FIELDS]
    if set(fields) <= {"id"}:
        raise ValueError(f"{source} has the columns {table.column_names}; items have any of {', '.join(KNOWN_FIELDS)}.")
    for number, row in enumerate(table.select(fields).to_pylist()):
        item = {name: _resolved(name, value, source.parent) for name, value in row.items() if value is not None}
        yield _item_id(item, number), item


def _item_id(item: Any, number: int) -> str:
    found = item.get("id") if isinstance(item, dict) else None
    return str(number if found is None else found)


def _resolved(name: str, value: Any, folder: Path) -> Any:
    if name == "images" and isinstance(value, list):
        return [_resolved("image", entry, folder) for entry in value]
    if name in ("image", "audio", "video") and isinstance(value, str) and "://" not in value:
        return str(folder / value)
    return value


def _folder_items(source: Path) -> Iterator[tuple[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for path in sorted(source.rglob("*")):
        field = FIELD_OF.get(path.suffix.lower())
        if field is None or not path.is_file():
            continue
        item = groups.setdefault(path.relative_to(source).with_suffix("").as_posix(), {})
        value = path.read_text(encoding="utf-8", errors="replace") if field == "text" else str(path)
        if field == "image" and field in item:
            item.setdefault("images", []).append(value)
        else:
            item.setdefault(field, value)
    for name, item in groups.items():
        yield name, {"id": name, **item}


class BadLine:
    """What stands for a line that cannot be an item; the item loader refuses it, with this text in the reason."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


# --- the job --------------------------------------------------------------------------------------------------------


def encode_to_parquet(
    module: SailSentenceTransformer, source: Path, out: Path, *, instruction: str = "", truncate_dim: int | None = None
) -> dict[str, int]:
    """Embed every item of a source and write ``out`` with the columns id, embedding, status, reason.

    Args:
        module: the loaded model.
        source: JSONL file or folder.
        out: Parquet file; ``<out>.parts`` beside it holds the work until it is whole.
        instruction: put before every item.
        truncate_dim: keep this many leading dimensions, normalised again.

    Returns:
        Counts of "ok" and "error".

    Raises:
        ValueError: nothing to encode; or parts of another job (other items, model or settings) lie in the way.
    """
    items = read_items(source)
    parts = out.with_name(out.name + ".parts")
    _claim(parts, _job(module, items, instruction, truncate_dim))
    starts = range(0, len(items), PART)
    bar = tqdm(total=len(items), unit="item", desc="encode")
    for start in starts:
        path, chunk = parts / f"{start:09d}.parquet", items[start : start + PART]
        if not path.exists():
            _replace(path, embed_rows(module, chunk, instruction, truncate_dim))
        bar.update(len(chunk))
    bar.close()
    table = pa.concat_tables(pq.read_table(parts / f"{start:09d}.parquet") for start in starts)
    _replace(out, table)
    shutil.rmtree(parts)
    statuses = table.column("status").to_pylist()
    return {status: statuses.count(status) for status in ("ok", "error")}


def embed_rows(
    module: SailSentenceTransformer, items: Sequence[tuple[str, Any]], instruction: str, truncate_dim: int | None
) -> pa.Table:
    """One row for each item, good or bad."""
    readable = [item for _, item in items if not isinstance(item, BadLine)]
    with torch.inference_mode():
        features = module.preprocess(readable, prompt=instruction, errors="skip")
        vectors = module(features)["sentence_embedding"][:, :truncate_dim]
    vectors = torch.nn.functional.normalize(vectors, dim=-1).float().cpu().numpy()
    encoded = iter(zip(features["statuses"], vectors, strict=True))
    rows = [_row(name, item, encoded) for name, item in items]
    schema = pa.schema(
        [("id", pa.string()), ("embedding", pa.list_(pa.float32())), ("status", pa.string()), ("reason", pa.string())]
    )
    return pa.Table.from_pylist(rows, schema=schema)


def encode_items(
    module: SailSentenceTransformer, items: Sequence[tuple[str, Any]], instruction: str = "", progress: str = ""
) -> tuple[np.ndarray, list[ItemStatus]]:
    """Embed (id, item) pairs in memory.

    Returns:
        (G, D) float32 vectors of the G good items in order, and a status for each item.
    """
    vectors, statuses = [], []
    for start in tqdm(range(0, len(items), PART // 4), desc=progress, disable=not progress):
        chunk = [item for _, item in items[start : start + PART // 4]]
        with torch.inference_mode():
            features = module.preprocess(chunk, prompt=instruction, errors="skip")
            found = module(features)["sentence_embedding"].float().cpu().numpy()
        good = [status.status == "ok" for status in features["statuses"]]
        vectors.append(found[good])
        statuses += [replace(status, index=start + status.index) for status in features["statuses"]]
    return np.concatenate(vectors) if vectors else np.empty((0, 0), np.float32), statuses


def _row(name: str, item: Any, encoded: Iterator[Any]) -> dict[str, Any]:
    if isinstance(item, BadLine):
        return {"id": name, "embedding": None, "status": "error", "reason": item.reason}
    status, vector = next(encoded)
    if status.status == "ok":
        return {"id": name, "embedding": vector, "status": "ok", "reason": ""}
    reason = f"{status.field}: {status.reason}" if status.field else status.reason
    return {"id": name, "embedding": None, "status": "error", "reason": reason}


def _job(
    module: SailSentenceTransformer, items: Sequence[tuple[str, Any]], instruction: str, truncate_dim: int | None
) -> dict[str, Any]:
    """What must be equal for parts to be of the same job: the items as written, the weights, the settings."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(np.float64(tensor.double().sum().item()).tobytes())
    listed = json.dumps([(name, item.reason if isinstance(item, BadLine) else item) for name, item in items])
    return {
        "items": hashlib.sha256(listed.encode()).hexdigest(),
        "model": digest.hexdigest(),
        "instruction": instruction,
        "truncate_dim": truncate_dim,
    }


def _claim(parts: Path, job: dict[str, Any]) -> None:
    parts.mkdir(parents=True, exist_ok=True)
    manifest = parts / "job.json"
    if manifest.exists() and json.loads(manifest.read_text(encoding="utf-8")) != job:
        raise ValueError(
            f"{parts} holds parts of another job (other items, model or settings); delete it or name another --out."
        )
    partial = manifest.with_suffix(".partial")
    partial.write_text(json.dumps(job), encoding="utf-8")
    os.replace(partial, manifest)


def _replace(path: Path, table: pa.Table) -> None:
    partial = path.with_name(path.name + ".partial")
    pq.write_table(table, partial)
    os.replace(partial, path)


def load_module(folder: Path) -> SailSentenceTransformer:
    """The model of a folder, ready to encode, with the installed code.

    Raises:
        ValueError: the folder is not one that `sail build` or ``save_pretrained`` wrote.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model; build one: sail build --preset mini --out {folder}")
    return SailSentenceTransformer.load(str(folder)).eval()
