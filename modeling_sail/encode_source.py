"""Where the items of `sail encode` come from, one by one: JSONL, Parquet, folders of these, folders of media.

Unusual: nothing is ever listed whole. A counting pass finds the place of every shard's first item, from which a shard
is read without what comes before it; a line or row that cannot be read is an item that fails with that reason.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from .encode_media import FIELD_OF, BadLine, FolderItems, is_media, not_text, walk
from .items_sail import KNOWN_FIELDS

Item = tuple[str, Any, bytes]  # id, the item or a BadLine, and the bytes by which a change of it is noticed
MAX_LINE = 1 << 26  # bytes of a line: a file without line ends must not fill the memory
ROWS = 32  # of Parquet that are in memory at once; a row may hold pictures
BOM = b"\xef\xbb\xbf"


class Items(Protocol):
    """One file, or one folder of media."""

    def positions(self) -> Iterator[Any]:
        """Where each item begins, as JSON can hold it; cheap: nothing is decoded."""

    def items(self, position: Any = None) -> Iterator[Item]:
        """The items from a position on."""

    def files(self) -> Iterator[tuple[str, int, int]]:
        """Name, bytes and time of change (ns) of every file."""


@dataclass(frozen=True)
class Shard:
    """A stretch of the source: ``items`` items from item number ``first`` on, which begins at ``cursor``."""

    index: int
    first: int
    items: int
    cursor: tuple[int, Any]  # number of the file, place in it


class Source:
    """All items, in a stable order."""

    def __init__(self, path: Path, parts: Sequence[Items]) -> None:
        self.path = path
        self.parts = parts

    def items(self, cursor: Sequence[Any] = (0, None)) -> Iterator[Item]:
        """Items from a shard's ``cursor`` on, or all."""
        first, position = cursor
        for number, part in enumerate(self.parts[first:]):
            yield from part.items(position if number == 0 else None)

    def shards(self, size: int) -> list[Shard]:
        """The counting pass: where every ``size``-th item begins."""
        cursors, count = [], 0
        everywhere = ((number, place) for number, part in enumerate(self.parts) for place in part.positions())
        for cursor in tqdm(everywhere, desc="count", unit=" items", delay=2, leave=False):
            if count % size == 0:
                cursors.append(cursor)
            count += 1
        starts = range(0, count, size)
        return [
            Shard(index, start, min(size, count - start), cursor)
            for index, (start, cursor) in enumerate(zip(starts, cursors, strict=True))
        ]

    def identity(self) -> tuple[dict[str, Any], str]:
        """What must be equal for a job to go on (names and sizes), and a digest of the files' times.

        Equal times say that the items are the same; where only they differ, the items are read to know.
        """
        names, times, size = hashlib.sha256(), hashlib.sha256(), 0
        for name, length, changed in (entry for part in self.parts for entry in part.files()):
            names.update(f"{name}\0{length}\n".encode(errors="surrogateescape"))
            times.update(f"{name}\0{changed}\n".encode(errors="surrogateescape"))
            size += length
        return {"bytes": size, "files": names.hexdigest()}, times.hexdigest()


def stretches(source: Source, shards: Iterable[Shard]) -> Iterator[tuple[Shard, Iterator[Item]]]:
    """Shards with their items. Neighbours are read in one go: a .gz is not unpacked from its start for each."""
    stream, at = source.items(), 0
    for shard in shards:
        if shard.first != at:
            stream = source.items(shard.cursor)
        at = shard.first + shard.items
        yield shard, islice(stream, shard.items)


def read_items(path: Path) -> Iterator[tuple[str, Any]]:
    """(id, item) of every item of a source, in order.

    Raises:
        ValueError: as `open_source`.
    """
    return ((name, item) for name, item, _ in open_source(path).items())


def open_source(path: Path, leave_out: Sequence[Path] = ()) -> Source:
    """A JSONL file (also .gz), a Parquet file, a folder of such files, or a folder of media.

    A JSONL line is an item; media paths are relative to its file; without an ``id`` its line number is one. A Parquet
    file has the fields of items as columns, what is no field is passed over. In a folder of several such files that
    number follows the file's name. In a folder of media, files of the same name but for the ending are one item:
    ``cat.png``, ``cat.ogg`` and ``cat.txt`` (its text). Several pictures of a name are all the item's; of several
    sounds, videos or texts the first by name is, and a warning tells which files are passed over. A folder with JSONL
    or Parquet files of items is read as these; media in it are what their lines name.

    Args:
        path: the file or folder.
        leave_out: files and folders of the job itself, which may lie in the folder.

    Raises:
        ValueError: the source is none of these (such as one picture, or one JSON array) or empty, or a Parquet file is
            broken or has no field of an item.
    """
    if path.is_dir():
        source = Source(path, _parts_of_folder(path, {place.resolve() for place in leave_out}))
    elif path.is_file():
        _refuse_medium(path)
        source = Source(path, [ParquetItems(path) if path.suffix in (".parquet", ".pq") else JsonLines(path)])
    else:
        raise ValueError(f"{path} is neither a JSONL or Parquet file nor a folder.")
    for part in source.parts:
        if isinstance(part, JsonLines):
            part.refuse_one_value()
    if not any(True for part in source.parts for _ in part.positions()):
        raise ValueError(f"{path} holds no items: a JSONL file has one JSON object a line, a folder media files.")
    return source


def _refuse_medium(path: Path) -> None:
    field = FIELD_OF.get(path.suffix.lower(), "text")
    if field != "text":  # which a .txt of lines may be
        raise ValueError(
            f'{path} is one {field} file, no list of items; name its folder, or a JSONL file with a line {{"{field}": '
            f"{json.dumps(path.name)}}}."
        )


def _parts_of_folder(folder: Path, leave_out: set[Path]) -> list[Items]:
    parts: list[Items] = []
    media, refused = False, None
    for directory, names in walk(folder, leave_out):
        for name in names:
            path = directory / name
            place = path.relative_to(folder).as_posix()
            media = media or is_media(path)
            try:
                if name.lower().endswith((".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")):
                    parts.append(JsonLines(path, place))
                elif path.suffix.lower() in (".parquet", ".pq"):
                    parts.append(ParquetItems(path, place))
            except ValueError as error:
                refused = refused or error
    if refused and not (media or parts):
        raise refused
    if parts and (media or refused):
        also = f"({refused})" if refused else "other media than its items name are passed over"
        tqdm.write(f"{folder} is read as {len(parts)} file(s) of items; {also}")
    return parts or [FolderItems(folder, leave_out)]


class JsonLines:
    """A JSONL file, plain or gzipped; a position is (offset of the line in bytes, number of lines before it)."""

    def __init__(self, path: Path, place: str = "") -> None:
        self.path = path
        self.prefix = f"{place}:" if place else ""

    def positions(self) -> Iterator[tuple[int, int]]:
        for offset, number, _ in self._lines(0, 0):
            yield offset, number - 1

    def items(self, position: Any = None) -> Iterator[Item]:
        for offset, number, line in self._lines(*(position or (0, 0))):
            item = self._item(number, line if offset else line.removeprefix(BOM))
            yield _item_id(item, f"{self.prefix}{number}"), item, line

    def files(self) -> Iterator[tuple[str, int, int]]:
        status = self.path.stat()
        yield self.prefix, status.st_size, status.st_mtime_ns

    def refuse_one_value(self) -> None:
        """Raises ValueError where the file is one array, or one object over many lines, by its first two lines.

        Of several lines only such count that nobody writes as items: a bad first line is a row like another.
        """
        lines = [line.removeprefix(BOM).strip() for _, _, line in islice(self._lines(0, 0), 2)]
        first, second = (lines + [b"", b""])[:2]
        array = first in (b"[", b"[{") or (first.startswith(b"[") and (not second or first.endswith(b",")))
        if array or (first == b"{" and not second.startswith(b"{")):
            raise ValueError(
                f"{self.path} holds one JSON {'array' if array else 'object over several lines'}; items are JSONL, one "
                f"object a line: write it so (jq -c '{'.[]' if array else '.'}' does)."
            )

    def _lines(self, offset: int, number: int) -> Iterator[tuple[int, int, bytes]]:
        """Offset, number and bytes of every line that is not blank; of one that is too long, its beginning."""
        try:
            with self._opened() as file:
                file.seek(offset)
                while line := file.readline(MAX_LINE):
                    start, number, rest = offset, number + 1, line
                    offset += len(line)
                    while len(rest) == MAX_LINE and not rest.endswith(b"\n"):
                        rest = file.readline(MAX_LINE)
                        offset += len(rest)
                    if not line.isspace():
                        yield start, number, line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{self.path} is not a whole gzip file ({error}); write it again.") from error

    def _opened(self) -> BinaryIO:
        return cast(BinaryIO, gzip.open(self.path)) if self.path.suffix == ".gz" else self.path.open("rb")

    def _item(self, number: int, line: bytes) -> Any:
        if len(line) >= MAX_LINE:
            return BadLine(f"line {number} is longer than {MAX_LINE >> 20} MiB")
        try:
            item = json.loads(line.decode())
        except UnicodeDecodeError as error:  # the model would embed what stands in its place as if it were the text
            return BadLine(f"line {number} is {not_text(error)}")
        except (ValueError, RecursionError) as error:
            return BadLine(f"line {number} is not JSON: {error}")
        return resolved(item, self.path.parent) if isinstance(item, dict) else item


class ParquetItems:
    """A Parquet file; a position is the number of a row.

    Raises:
        ValueError: the file is broken, or none of its columns is a field of an item.
    """

    def __init__(self, path: Path, place: str = "") -> None:
        self.path = path
        self.prefix = f"{place}:" if place else ""
        try:
            with pq.ParquetFile(path) as file:
                names, self.rows = file.schema_arrow.names, file.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is not a whole Parquet file ({error}); write it again.") from error
        self.columns = [name for name in names if name in KNOWN_FIELDS]
        if set(self.columns) <= {"id"}:
            raise ValueError(f"{path} has the columns {names}; items have any of {', '.join(KNOWN_FIELDS)}.")

    def positions(self) -> Iterator[int]:
        return iter(range(self.rows))

    def items(self, position: Any = None) -> Iterator[Item]:
        for number, row in self._rows(position or 0):
            item = row if isinstance(row, BadLine) else resolved(row, self.path.parent)
            yield _item_id(item, f"{self.prefix}{number}"), item, _bytes_of(row)

    def files(self) -> Iterator[tuple[str, int, int]]:
        status = self.path.stat()
        yield self.prefix, status.st_size, status.st_mtime_ns

    def _rows(self, position: int) -> Iterator[tuple[int, Any]]:
        # No pre-buffering: it would hold a row group whole, however large.
        with pq.ParquetFile(self.path, buffer_size=1 << 20, pre_buffer=False) as file:
            end = 0
            for group in range(file.num_row_groups):
                number, end = end, end + file.metadata.row_group(group).num_rows
                if end <= position:
                    continue
                try:
                    for batch in file.iter_batches(ROWS, row_groups=[group], columns=self.columns):
                        for place in range(max(0, position - number), batch.num_rows):
                            yield number + place, _row(batch, place)
                        number += batch.num_rows
                except (pa.ArrowException, OSError) as error:
                    if getattr(error, "errno", None):  # the disk's fault, not the file's
                        raise
                    for lost in range(max(number, position), end):
                        yield lost, BadLine(f"row {lost} cannot be read: {str(error).splitlines()[0]}")


def _row(batch: pa.RecordBatch, place: int) -> Any:
    try:
        row = batch.slice(place, 1).to_pylist()[0]
    except (ValueError, pa.ArrowException) as error:  # such as text that is no UTF-8
        return BadLine(f"the row cannot be read: {error}")
    return {name: value for name, value in row.items() if value is not None}


def _item_id(item: Any, number: str) -> str:
    found = item.get("id") if isinstance(item, dict) else None
    return number if found is None else str(found)


def resolved(item: dict[str, Any], folder: Path) -> dict[str, Any]:
    """An item whose media paths are relative to a folder, as one that can be read from anywhere."""
    return {name: _resolved(name, value, folder) for name, value in item.items()}


def _resolved(name: str, value: Any, folder: Path) -> Any:
    if name == "images" and isinstance(value, list):
        return [_resolved("image", entry, folder) for entry in value]
    if name not in ("image", "audio", "video"):
        return value
    if isinstance(value, Mapping) and isinstance(value.get("path"), str) and value.get("bytes") is None:
        return {**value, "path": _resolved(name, value["path"], folder)}
    # An empty path is an absent field, which a folder's name in its place would hide.
    return str(folder / value) if isinstance(value, str) and value and "://" not in value else value


def _bytes_of(value: Any) -> bytes:
    if isinstance(value, BadLine):
        return value.reason.encode(errors="backslashreplace")
    if isinstance(value, dict):
        return b"".join(
            f"{name}=".encode(errors="backslashreplace") + _bytes_of(entry) for name, entry in value.items()
        )
    if isinstance(value, list):
        return b"[" + b",".join(map(_bytes_of, value)) + b"]"
    return value if isinstance(value, bytes) else repr(value).encode(errors="backslashreplace")
