"""Parquet files of embeddings as `sail encode` writes them: windows, shards made of them, one file made of shards.

Unusual: a file is there whole or not at all, says in its metadata which job, items and model it is of, and holds
nothing (no time, no host) that would differ if it were written again. Room: of the command line; knows no model.

The vectors are list<float32>, not lists of a fixed size: pyarrow before 18 cannot read the latter where an item has
none, and both are the same bytes in Parquet; `column.flatten()` of the good rows is their memory, uncopied.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = pa.schema(
    [("id", pa.string()), ("embedding", pa.list_(pa.float32())), ("status", pa.string()), ("reason", pa.string())]
)
ROW_GROUP = 4096  # rows; 24 MB of vectors of 1,536 dimensions
_KEY = b"sail_encode"  # of what is said of a file; the model's hash has a key of its own, "model"


def table_of(names: Sequence[str], vectors: np.ndarray, reasons: Sequence[str]) -> pa.Table:
    """Rows of a window.

    Args:
        names: ids of N items.
        vectors: (N, D) float32; the row of an item with a reason is not looked at.
        reasons: why an item has no vector, "" where it has one.
    """
    good = np.array([not reason for reason in reasons])
    flat = pa.array(np.ascontiguousarray(vectors[good], dtype=np.float32).reshape(-1))
    ends = np.concatenate([[0], np.cumsum(good)]) * vectors.shape[1]
    offsets = pa.array(ends.astype(np.int32), mask=np.append(~good, False))
    columns = [
        pa.array([_storable(name) for name in names], pa.string()),
        pa.ListArray.from_arrays(offsets, flat),
        pa.array(["error" if reason else "ok" for reason in reasons], pa.string()),
        pa.array([_storable(reason) for reason in reasons], pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _storable(text: str) -> str:
    """Half of a surrogate pair, which JSON and file names may hold, is no text for Parquet."""
    return text.encode(errors="backslashreplace").decode()


def write_file(path: Path, tables: Iterable[pa.Table], said: dict[str, Any]) -> None:
    """Write tables as row groups of ``ROW_GROUP`` rows, of which only one is in memory; then the file is there at once.

    Args:
        path: where.
        tables: rows, in order.
        said: what `said_of` reads again; with "model" in its "job".

    Raises:
        OSError: no space, or no right to write. What was there before stays.
    """
    model = said["job"]["model"].encode()
    schema = SCHEMA.with_metadata({b"model": model, _KEY: json.dumps(said, sort_keys=True).encode()})
    partial = path.with_name(path.name + ".partial")
    try:
        with pq.ParquetWriter(partial, schema, use_dictionary=["status", "reason"]) as writer:
            for group in _row_groups(tables):
                writer.write_table(group.replace_schema_metadata(schema.metadata), ROW_GROUP)
        put_in_place(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    held: list[pa.Table] = []
    rows = 0
    for table in tables:
        held, rows = [*held, table], rows + table.num_rows
        while rows >= ROW_GROUP:
            whole = pa.concat_tables(held)
            yield whole.slice(0, ROW_GROUP).combine_chunks()
            held, rows = [whole.slice(ROW_GROUP)], rows - ROW_GROUP
    if rows:
        yield pa.concat_tables(held).combine_chunks()


def read_tables(path: Path) -> Iterator[pa.Table]:
    """The row groups of a file, one at a time."""
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group)


def said_of(file: Any) -> dict[str, Any] | None:
    """What was said of a file when it was written, and "rows"; None where it is not there, not whole or not ours.

    Args:
        file: a path, or a file that is open for reading.
    """
    try:
        with pq.ParquetFile(file) as parquet:
            said = json.loads((parquet.schema_arrow.metadata or {})[_KEY])
            return {**said, "rows": parquet.metadata.num_rows}
    except (OSError, KeyError, ValueError, pa.ArrowException):
        return None


def write_json(path: Path, content: Any) -> None:
    """As `write_file`: whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    put_in_place(partial, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none, or a file that is broken."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def put_in_place(partial: Path, path: Path) -> None:
    """Rename a written file once its bytes are on the disk, so that no power cut leaves an empty one by its name."""
    for place in (partial, path.parent):
        handle = os.open(place, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        if place == partial:
            os.replace(partial, path)
