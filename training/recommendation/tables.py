"""ID-embedding tables: one vector for each item that a recommender knows, the user's own or a teacher's.

Room: recommendation, after behaviour. Unusual: vectors stay as long as they came; a row of zeros says nothing about its
item and is left out, so that "has a row" means "has something to say".
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..files import whole

logger = logging.getLogger(__name__)

TABLE_COLUMNS = ("name", "id", "vector")
ROWS_AT_ONCE = 65_536  # rows of a file that are held as Arrow at one time

TABLE_SCHEMA = pa.schema(  # large lists: 32-bit offsets end at 2^31 numbers
    [("name", pa.string()), ("id", pa.string()), ("vector", pa.large_list(pa.float32()))]
)


@dataclass(frozen=True, eq=False)
class IDTable:
    """N items' vectors of E dims, as given: not normalised.

    Attributes:
        name: of the table.
        ids: (N,) items, each once.
        vectors: (N, E) float32, finite, no row all zero.

    Raises:
        ValueError: it is not so. `IDTable.of` converts, and leaves rows of zeros out.
    """

    name: str
    ids: tuple[str, ...]
    vectors: np.ndarray

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"A table is named {self.name!r}; a string that is not empty is needed.")
        self._check_vectors()
        self._check_ids()

    @classmethod
    def of(cls, name: str, ids: Iterable[str], vectors: np.ndarray) -> IDTable:
        """A table of what there is: vectors become float32, and rows of zeros are left out and counted in the log.

        Args:
            name: of the table.
            ids: (N,).
            vectors: (N, E) numbers.

        Raises:
            ValueError: as `IDTable`, or nothing is left.
        """
        ids, vectors = tuple(ids), np.ascontiguousarray(vectors, dtype=np.float32)
        if vectors.ndim == 2 and len(ids) == len(vectors):
            something = vectors.any(1)
            if not something.all():
                count = int((~something).sum())
                logger.warning("Table %r: %d of %d vectors are zero and are left out.", name, count, len(ids))
                ids = tuple(ids[row] for row in np.flatnonzero(something))
                vectors = vectors[something]
        return cls(name, ids, vectors)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dim(self) -> int:
        """E."""
        return self.vectors.shape[1]

    @cached_property
    def place_of(self) -> dict[str, int]:
        """The row of each id."""
        return dict(zip(self.ids, range(len(self.ids)), strict=True))

    def rows_for(self, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The vectors of items.

        Args:
            ids: Q items, some perhaps more than once.

        Returns:
            (Q, E) float32, zeros where there is no row; (Q,) bool, which have one.
        """
        places = np.array([self.place_of.get(name, -1) for name in ids], dtype=np.int64)
        known = places >= 0
        rows = np.zeros((len(places), self.dim), dtype=np.float32)
        rows[known] = self.vectors[places[known]]
        return rows, known

    def _check_vectors(self) -> None:
        vectors = self.vectors
        kind = f"{vectors.dtype} {vectors.shape}" if isinstance(vectors, np.ndarray) else type(vectors).__name__
        if not kind.startswith("float32 ") or vectors.ndim != 2 or not vectors.size:
            raise ValueError(
                f"Table {self.name!r} has vectors of {kind}; float32 of shape (N, E) are needed, neither of them 0: "
                "convert them with IDTable.of."
            )
        _refuse_row(f"Table {self.name!r}", ~np.isfinite(vectors).all(1), "has a number that is not finite")
        _refuse_row(f"Table {self.name!r}", ~vectors.any(1), "is all zero; leave it out, as IDTable.of does")

    def _check_ids(self) -> None:
        if not isinstance(self.ids, tuple) or len(self.ids) != len(self.vectors):
            what = f"{len(self.ids)} ids in a {type(self.ids).__name__}"
            raise ValueError(
                f"Table {self.name!r} has {what}; a tuple of {len(self.vectors)}, one a vector, is needed."
            )
        wrong = np.array([not isinstance(name, str) or not name for name in self.ids])
        _refuse_row(f"Table {self.name!r}", wrong, "has an id that is no string, or an empty one")
        if len(self.place_of) != len(self.ids):
            name = next(name for row, name in enumerate(self.ids) if self.place_of[name] != row)
            raise ValueError(f"Table {self.name!r} has id {name!r} more than once: which vector is meant? Keep one.")


def _refuse_row(source: str, bad: np.ndarray, what: str, first_row: int = 0) -> None:
    """Raise an error that names the first row that is bad, and how many are."""
    if bad.any():
        row, count = first_row + int(np.argmax(bad)), int(bad.sum())
        raise ValueError(f"{source}: row {row} {what}" + (f" ({count} rows are so)." if count > 1 else "."))


# --- writing --------------------------------------------------------------------------------------------------------


def save_tables(tables: Iterable[IDTable], path: str | Path) -> None:
    """Write tables into one Parquet file, whole or not at all; `load_tables` reads it.

    Args:
        tables: at least one, each name once.
        path: of the file; what was there is replaced.

    Raises:
        ValueError: no table, or two of one name.
    """
    tables = list(tables)
    names = [table.name for table in tables]
    if not tables or len(set(names)) != len(names):
        raise ValueError(f"Tables named {names} came; at least one is needed, and each name once.")
    with whole(Path(path)) as partial, pq.ParquetWriter(partial, TABLE_SCHEMA) as writer:
        for table in tables:
            for start in range(0, len(table), ROWS_AT_ONCE):
                writer.write_table(_as_arrow(table, slice(start, start + ROWS_AT_ONCE)))


def _as_arrow(table: IDTable, part: slice) -> pa.Table:
    ids, vectors = table.ids[part], table.vectors[part]
    offsets = np.arange(len(ids) + 1, dtype=np.int64) * table.dim
    lists = pa.LargeListArray.from_arrays(offsets, np.ascontiguousarray(vectors).reshape(-1))
    return pa.table([pa.array([table.name] * len(ids)), pa.array(ids), lists], schema=TABLE_SCHEMA)


# --- reading --------------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """Rows of one table in one file: the n rows' numbers there, their ids, (n, E) vectors."""

    source: str
    rows: np.ndarray
    ids: list[str]
    vectors: np.ndarray


def load_tables(paths: Sequence[str | Path]) -> dict[str, IDTable]:
    """Read tables from Parquet files; a table may be spread over several of them.

    Columns: ``name`` (string: which table), ``id`` (string or integer), ``vector`` (list of floats, of fixed size or
    not; one length in a table). Others are passed over. Rows of zeros are left out with a warning.

    Args:
        paths: files.

    Returns:
        The tables by name, sorted; rows in the order of the files.

    Raises:
        FileNotFoundError: a file is not there. ValueError: no path, no Parquet, a column is missing or of another
            type, no rows, a null, a number that is not finite, lengths that differ within a table, an item twice in it.
    """
    if isinstance(paths, str | Path) or not len(paths):
        raise ValueError(f"paths={paths!r} came; a list of Parquet files, at least one, is needed.")
    parts: dict[str, list[_Part]] = defaultdict(list)
    for path in map(Path, paths):
        for name, part in _read(path):
            parts[name].append(part)
    return {name: _joined(name, parts[name]) for name in sorted(parts)}


def _read(path: Path) -> Iterator[tuple[str, _Part]]:
    """The parts of the tables in a file."""
    if not path.is_file():
        what = "is a folder; give its files" if path.is_dir() else "is not there"
        raise FileNotFoundError(f"{path} {what}: a Parquet file with columns {', '.join(TABLE_COLUMNS)} is needed.")
    try:
        with pq.ParquetFile(path) as file:
            _check_schema(file.schema_arrow, str(path))
            if not file.metadata.num_rows:
                raise ValueError(f"{path} has no rows; at least one vector is needed.")
            start = 0
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=list(TABLE_COLUMNS)):
                yield from _parts(batch, str(path), start)
                start += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a whole Parquet file ({error}); write it again.") from error


def _check_schema(schema: pa.Schema, source: str) -> None:
    missing = [name for name in TABLE_COLUMNS if name not in schema.names]
    if missing:
        raise ValueError(f"{source} has columns {schema.names}; {missing} are missing: add or rename them.")
    checks = {
        "name": (_is_string, "string"),
        "id": (_is_id, "string or integer"),
        "vector": (_is_vector, "list of floats"),
    }
    for name, (check, needed) in checks.items():
        kind = schema.field(name).type
        if not check(kind):
            raise ValueError(f"{source}: column {name!r} is of type {kind}; {needed} is needed: cast it.")


def _is_string(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_id(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or _is_string(kind)


def _is_vector(kind: pa.DataType) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(check(kind) for check in lists) and pa.types.is_floating(kind.value_type)


def _parts(batch: pa.RecordBatch, source: str, start: int) -> Iterator[tuple[str, _Part]]:
    """The rows of each table in a batch, whose first row is the file's ``start``-th; no Python for each vector."""
    names, ids = (_texts(batch, column, source, start) for column in ("name", "id"))
    encoded = names.dictionary_encode()
    which = encoded.indices.to_numpy()  # (n,) table of each row
    lengths, numbers = _numbers(batch, source, start)  # (n,), (sum of them,)
    for place, name in enumerate(encoded.dictionary.to_pylist()):
        rows = np.flatnonzero(which == place)
        dim = int(lengths[rows[0]])
        odd = np.zeros(len(batch), dtype=bool)
        odd[rows] = lengths[rows] != dim
        first = f"row {start + rows[0]}'s {dim}"
        _refuse_row(source, odd, f"of table {name!r} has a vector of another length than {first} numbers", start)
        vectors = numbers[np.repeat(which == place, lengths)].reshape(-1, dim)  # (n, E)
        yield name, _Part(source, start + rows, ids.take(pa.array(rows)).to_pylist(), vectors)


def _texts(batch: pa.RecordBatch, column: str, source: str, start: int) -> pa.Array:
    """A column as strings, none of them null or empty."""
    texts = batch.column(column).cast(pa.large_string())
    bad = pc.fill_null(pc.equal(texts, ""), True).to_numpy(zero_copy_only=False)
    _refuse_row(source, bad, f"has no {column}", start)
    return texts


def _numbers(batch: pa.RecordBatch, source: str, start: int) -> tuple[np.ndarray, np.ndarray]:
    """The lengths of the vectors, and their numbers, one vector behind the other, as float32."""
    lists = batch.column("vector")
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    _refuse_row(source, lengths == 0, "has no vector, or an empty one", start)
    # A null becomes NaN, and what float32 cannot hold becomes infinite: both are refused together.
    numbers = lists.flatten().cast(pa.float32()).to_numpy(zero_copy_only=False)
    finite = np.isfinite(numbers)
    if not finite.all():
        bad = np.zeros(len(lists), dtype=bool)
        bad[np.repeat(np.arange(len(lists)), lengths)[~finite]] = True
        _refuse_row(source, bad, "has a vector with a null, or a number that is not finite as float32", start)
    return lengths, numbers


def _joined(name: str, parts: Sequence[_Part]) -> IDTable:
    """One table of its parts."""
    first = parts[0]
    for part in parts[1:]:
        if part.vectors.shape[1] != first.vectors.shape[1]:
            raise ValueError(
                f"Table {name!r} has vectors of {first.vectors.shape[1]} numbers ({first.source}, row {first.rows[0]}) "
                f"and of {part.vectors.shape[1]} ({part.source}, row {part.rows[0]}); a table's are all of one length: "
                "give one of the two another name."
            )
    ids = [id_ for part in parts for id_ in part.ids]
    if len(set(ids)) < len(ids):  # before rows of zeros are left out
        raise _twice(name, parts)
    return IDTable.of(name, ids, np.concatenate([part.vectors for part in parts]))


def _twice(name: str, parts: Sequence[_Part]) -> ValueError:
    """The error for an item that has two rows."""
    seen: dict[str, str] = {}
    for part in parts:
        for row, id_ in zip(part.rows, part.ids, strict=True):
            here = f"{part.source}, row {row}"
            if id_ in seen:
                where = f"({seen[id_]}; {here})"
                return ValueError(f"Table {name!r} has id {id_!r} twice {where}: which vector is meant? Keep one.")
            seen[id_] = here
    raise AssertionError("no item has two rows")
