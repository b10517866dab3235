"""What `sail encode` wrote, read in batches: one Parquet file, or a folder of shards with its manifest.json.

Unusual: a batch's vectors are Arrow's own memory seen as an array, not copied row by row, and no more than one batch is
held. Rows with status "error" are counted and left out; an "ok" without a vector is an error that names the item.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

BATCH = 8192  # rows held at once; a file may hold them in smaller steps
COLUMNS = ("id", "embedding", "status")


@dataclass(frozen=True)
class EmbeddingFiles:
    """Shards of embeddings, in order.

    Attributes:
        place: the file or folder that was asked for.
        paths: its Parquet files.
        ok: items with a vector.
        errors: items without one.
        dim: D.
        model: the hash of the model that made them; None where the files do not say.
    """

    place: Path
    paths: tuple[Path, ...]
    ok: int
    errors: int
    dim: int
    model: str | None

    def ids(self) -> Iterator[pa.Array]:
        """Ids of the good items, as large strings, batch by batch."""
        for path in self.paths:
            for batch in _good_rows(path, ["id"]):
                if batch.column("id").null_count:
                    raise ValueError(f"{path} has a good row without an id; write it again with `sail encode`")
                yield batch.column("id").cast(pa.large_string())

    def vectors(self) -> Iterator[np.ndarray]:
        """(n, D) float32 vectors of the good items as they are in the files, batch by batch; read-only.

        Raises:
            ValueError: a good row has no vector, one of another length, or numbers that are not finite.
        """
        for path in self.paths:
            for batch in _good_rows(path, ["id", "embedding"]):
                yield _as_matrix(batch, self.dim, path)


def open_embeddings(place: Path) -> EmbeddingFiles:
    """Look at a file or folder of embeddings: which files, how many items, how wide. No vector but the first is read.

    Raises:
        ValueError: nothing there, a file that is broken or has other columns, an unfinished folder, no good row.
    """
    paths, manifest = _shards(place)
    ok = errors = dim = 0
    models = {manifest["model"]} if isinstance(manifest.get("model"), str) else set()
    for path in paths:
        models |= _checked(path)
        for batch in _batches(path, ["status"]):
            good = pc.sum(pc.equal(batch.column("status"), "ok")).as_py() or 0
            ok, errors = ok + good, errors + batch.num_rows - good
        dim = dim or next((_width(batch.column("embedding")) for batch in _good_rows(path, ["embedding"])), 0)
    if len(models) > 1:
        raise ValueError(f"{place} holds embeddings of {len(models)} models; encode all items with one")
    if not ok:
        raise ValueError(f"{place} has no item that could be encoded; its column 'reason' says why")
    if not dim:
        raise ValueError(f"{place}: the first good row has no vector; write it again with `sail encode`")
    return EmbeddingFiles(place, paths, ok, errors, dim, next(iter(models), None))


def _shards(place: Path) -> tuple[tuple[Path, ...], dict[str, Any]]:
    """The Parquet files of a place in order, and its manifest."""
    if place.is_file():
        return (place,), {}
    if not place.is_dir():
        raise ValueError(f"there is no file {place}; write one with `sail encode`")
    manifest = read_manifest(place / "manifest.json")
    if manifest.get("finished") is False:
        raise ValueError(f"{place} is not finished; run the same `sail encode` again, it goes on where it was")
    listed = manifest.get("shards")
    if not isinstance(listed, list):
        paths = sorted(place.glob("*.parquet"))
    elif missing := [shard["file"] for shard in listed if not (place / shard["file"]).is_file()]:
        raise ValueError(f"{place} lacks {len(missing)} of its {len(listed)} shards, {missing[0]} among them")
    else:
        paths = [place / shard["file"] for shard in listed]
    if not paths:
        raise ValueError(f"{place} holds no Parquet files; name what `sail encode` or `sail index` wrote")
    return tuple(paths), manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none.

    Raises:
        ValueError: the file is no JSON.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); write the folder again") from error
    return found if isinstance(found, dict) else {}


def _checked(path: Path) -> set[str]:
    """Whether a file has the columns; the hash of its model, if it says."""
    schema = _opened(path).schema_arrow
    if missing := set(COLUMNS) - set(schema.names):
        raise ValueError(f"{path} lacks the columns {sorted(missing)}; write one with `sail encode`")
    kind = schema.field("embedding").type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not lists or not pa.types.is_floating(kind.value_type):
        raise ValueError(f"{path}: the column embedding is {kind}; a list of float32 is needed")
    model = (schema.metadata or {}).get(b"model")
    return {model.decode(errors="replace")} if model else set()


def _opened(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)  # else a row group is read whole
    except (pa.ArrowException, OSError) as error:
        raise _broken(path, error) from error


def _batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    with _opened(path) as file:
        try:
            yield from file.iter_batches(BATCH, columns=columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> ValueError:
    reason = str(error).strip().splitlines()[:1]
    return ValueError(f"{path} is not a whole Parquet file ({''.join(reason)}); write it again with `sail encode`")


def _good_rows(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Batches of the rows with status "ok"; a batch without a bad row is passed on as it is."""
    for batch in _batches(path, [*columns, "status"]):
        good = pc.fill_null(pc.equal(batch.column("status"), "ok"), False)
        if not pc.all(good).as_py():
            batch = batch.filter(good)
        if batch.num_rows:
            yield batch


def _width(column: pa.Array) -> int:
    return column.type.list_size if pa.types.is_fixed_size_list(column.type) else len(column[0].as_py() or ())


def _as_matrix(batch: pa.RecordBatch, dim: int, path: Path) -> np.ndarray:
    column = batch.column("embedding")
    wrong = pc.fill_null(pc.not_equal(pc.list_value_length(column), dim), True)
    if pc.any(wrong).as_py():
        name = batch.column("id")[pc.index(wrong, True).as_py()]
        raise ValueError(f"{path}: the vector of item {name} has not {dim} numbers, as others have; encode it again")
    values = column.flatten()
    if values.null_count:
        raise ValueError(f"{path}: a vector lacks a number; write it again with `sail encode`")
    matrix = values.cast(pa.float32()).to_numpy(zero_copy_only=True).reshape(-1, dim)
    finite = np.isfinite(matrix).all(axis=1)
    if not finite.all():
        name = batch.column("id")[int(finite.argmin())]
        raise ValueError(f"{path}: the vector of item {name} holds numbers that are not finite; encode it again")
    return matrix
