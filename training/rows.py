"""Rows to train on: one form for every dataset, and where they come from (Parquet, JSONL, a `datasets.Dataset`).

Unusual: reading a row never stops a run by itself. A record that is no row raises `RowError`, which the batch counts
and reports by id; only too many of them stop the run (trainer.py). A record may be a function of a random generator:
the row is then drawn anew each time.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..items_sail import FORMAT_ORDER, MEDIA_FIELDS
from ..processing_sail import SIDES
from .patterns import check_pattern
from .recommendation.tables import IDTable

Item = str | dict[str, Any]
Record = Mapping[str, Any]

COLUMNS = ("id", "query", "sequence", "item", "target", "target_id", "negatives", "score", "teacher_scores", "mined")


class RowError(ValueError):
    """A record that is no row: ``row_id`` and ``reason``."""

    def __init__(self, row_id: str, reason: str) -> None:
        super().__init__(row_id, reason)
        self.row_id, self.reason = row_id, reason

    def __str__(self) -> str:
        return f"row {self.row_id!r}: {self.reason}"


@dataclass(frozen=True)
class Row:
    """One training example.

    Attributes:
        id: stable name of the row, for reports.
        query, target: items, as the processor takes them. The query may be a sequence of items, oldest first, and both
            may be one item, which has no pair.
        target_id: rows with the same one have the same target, which then is no negative of either.
        negatives: mined hard negatives of this query.
        negative_ids: their ids, in the same order.
        score: graded similarity of query and target, for CoSENT; None where there is none.
        teacher_scores: a teacher's scores of [target, *negatives], for preference distillation, NaN for a negative that
            has none; None where there are none at all.
    """

    id: str
    query: Item | tuple[Item, ...]
    target: Item
    target_id: str
    negatives: tuple[Item, ...] = ()
    negative_ids: tuple[str, ...] = ()
    score: float | None = None
    teacher_scores: tuple[float, ...] | None = None

    @property
    def queries(self) -> tuple[Item, ...]:
        """The items of the query's side: one, or those of the sequence."""
        return self.query if isinstance(self.query, tuple) else (self.query,)


def as_row(record: Record, default_id: str, folder: Path | None = None, items: Mapping[str, Item] | None = None) -> Row:
    """Check a record and make a row of it.

    Args:
        record: columns ``query`` and ``target``, each an item (a dict, a string, or a dict as a JSON string); or
            ``sequence``, a list of items, oldest first, in place of the query; or ``item`` in place of both. At will
            ``id``, ``target_id`` (by default the target's ``id``, else its content), ``negatives`` (a list of items),
            ``score``, ``teacher_scores`` (one for the target and one for each negative). Absent is None. ``mined`` is
            what `sail mine` notes of a row; nothing is read from it.
        default_id: where the record has no id.
        folder: what relative media paths are relative to.
        items: by id; strings and integers in the columns of items are ids of these.

    Raises:
        RowError: a column is unknown, missing or of the wrong kind; there is no item of an id.
    """
    name = str(record.get("id") if record.get("id") is not None else default_id)
    unknown = sorted(set(record) - set(COLUMNS))
    if unknown:
        raise RowError(name, f"unknown column {unknown[0]!r}; known are {', '.join(COLUMNS)}")

    def read(value: Any, column: str) -> Item:
        return _item(value, column, name, folder) if items is None else _item_of(value, column, name, items)

    def read_list(column: str) -> tuple[Item, ...]:
        given = [] if record.get(column) is None else record[column]
        given = given.tolist() if isinstance(given, np.ndarray) else given
        if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
            raise RowError(name, f"{column} must be a list of items, got {type(given).__name__}")
        return tuple(read(value, column) for value in given)

    given = [column for column in ("query", "sequence", "item") if record.get(column) is not None]
    if len(given) > 1 or (given == ["item"] and record.get("target") is not None):
        raise RowError(
            name, f"{' and '.join(given)} are given; a row has query and target, sequence and target, or item"
        )
    for column in ("sequence", "item"):
        _refuse_bare_ids(record.get(column), column, name, items)
    query: Item | tuple[Item, ...]
    if given == ["item"]:
        query = target = read(record["item"], "item")
    else:
        query = read_list("sequence") if given == ["sequence"] else read(record.get("query"), "query")
        target = read(record.get("target"), "target")
        if query == ():
            raise RowError(name, "sequence is empty; it must hold at least one item")
    negatives = read_list("negatives")
    target_id, content = record.get("target_id"), item_key(target)
    ids = [item_key(value) for value in negatives]
    return Row(
        id=name,
        query=query,
        target=target,
        target_id=content if target_id is None else str(target_id),
        negatives=negatives,
        # A negative that is the target itself has its id, whatever the record calls the target.
        negative_ids=tuple(str(target_id) if target_id is not None and one == content else one for one in ids),
        score=_number(record.get("score"), "score", name),
        teacher_scores=_scores(record.get("teacher_scores"), 1 + len(negatives), name),
    )


def _refuse_bare_ids(value: Any, column: str, name: str, items: Mapping[str, Item] | None) -> None:
    """Ids without a table of items would be read as texts."""
    values = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
    bare = [one for one in values if isinstance(one, str) and not one.lstrip().startswith("{")]
    if items is None and bare:
        raise RowError(
            name,
            f"{column} holds {bare[0]!r:.60}: for ids, the dataset needs its table of items (items: in the recipe); "
            'for a text, write {"text": ...}',
        )


def item_key(item: Item | tuple[Item, ...]) -> str:
    """An item's id, else a hash of its content: equal items, and sequences of them, have equal keys."""
    if isinstance(item, dict) and item.get("id") is not None:
        return str(item["id"])
    return content_key(item)


def content_key(item: Item | tuple[Item, ...]) -> str:
    """A hash of an item's content, its id among it: only equal items have equal keys."""
    content = {"text": item} if isinstance(item, str) else item
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=_digest).encode()).hexdigest()[:32]


def number_of(name: str) -> int:
    """A 63-bit number of an id: the same in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 1


def _digest(value: Any) -> str:
    """What JSON cannot hold, by its content: arrays, pictures, bytes; anything else by its repr."""
    if hasattr(value, "mode") and hasattr(value, "tobytes"):  # a PIL picture
        return f"{value.mode} {value.size} {hashlib.sha256(value.tobytes()).hexdigest()}"
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        return f"{array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else repr(value)


def _item(value: Any, column: str, name: str, folder: Path | None) -> Item:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RowError(name, f"{column} looks like JSON, but is none ({error})") from error
    if isinstance(value, str) and value.strip():
        return value
    if not isinstance(value, Mapping) or not value:
        what = "missing" if value is None else f"{value!r}"[:60]
        raise RowError(name, f"{column} must be an item (a dict or a string that is not empty), it is {what}")
    item = {key: part for key, part in value.items() if part is not None}
    if folder is not None:
        item |= {key: located(item[key], folder) for key in MEDIA_FIELDS if key in item}
    return item


def _item_of(value: Any, column: str, name: str, items: Mapping[str, Item]) -> Item:
    if isinstance(value, bool) or not isinstance(value, (str, int, np.integer)):
        raise RowError(name, f"{column} must be the id of an item, as there is a table of items; it is {value!r:.60}")
    if str(value) not in items:
        raise RowError(name, f"{column}: there is no item {value!r} among the {len(items)} in the table of items")
    return items[str(value)]


def located(value: Any, folder: Path) -> Any:
    """Relative paths, and lists of them, below the folder; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return [located(part, folder) for part in value]
    relative = isinstance(value, str) and not Path(value).is_absolute() and "://" not in value
    return str(folder / value) if relative else value


def named_by_path(item: Item, owner: str) -> dict[str, Any]:
    """An item as a file can hold it: media by their absolute paths, so that it may be read from anywhere.

    Args:
        item: as the processor takes it.
        owner: whose it is, for errors.

    Raises:
        ValueError: a medium that is no path.
    """
    fields = {"text": item} if isinstance(item, str) else dict(item)
    for name in MEDIA_FIELDS:
        value = fields.get(name)
        if value is not None:
            some = isinstance(value, (list, tuple))
            fields[name] = [_path(part, owner, name) for part in value] if some else _path(value, owner, name)
    return fields


def _path(value: Any, owner: str, field: str) -> str:
    if not isinstance(value, (str, Path)):
        raise ValueError(
            f"{owner}: {field} is a {type(value).__name__}, which cannot be written by name; give paths of files."
        )
    return str(value) if "://" in str(value) else str(Path(value).absolute())


def _number(value: Any, column: str, name: str) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise RowError(name, f"{column} must be a number, got {value!r:.60}") from error
    if not math.isfinite(number):
        raise RowError(name, f"{column} must be finite, got {value!r}")
    return number


def _scores(values: Any, count: int, name: str) -> tuple[float, ...] | None:
    if values is None:
        return None
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise RowError(name, f"teacher_scores must be a list of numbers, got {values!r:.60}")
    scores = [_number(value, "teacher_scores", name) for value in values]
    if len(scores) != count or scores[0] is None:
        raise RowError(
            name,
            f"teacher_scores has {len(scores)} entries; {count} are needed: the target and each negative (null where a "
            "negative has none)",
        )
    return tuple(math.nan if score is None else score for score in scores)


# --- sources --------------------------------------------------------------------------------------------------------


class JsonLines(Sequence):
    """Records of a JSONL file by their place; only where each line begins is held in memory.

    Args:
        path: of the file; relative media paths in it are relative to its folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.starts = array("q")
        with path.open("rb") as file:
            place = 0
            for line in file:
                if line.strip():
                    self.starts.append(place)
                place += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        with self.path.open("rb") as file:
            file.seek(self.starts[index])
            return _parsed(file.readline(), f"{self.path.name}:{index + 1}")


def _parsed(line: bytes, name: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise RowError(name, f"the line is no JSON ({error})") from error
    if not isinstance(record, dict):
        raise RowError(name, f"the line is no JSON object, but a {type(record).__name__}")
    return record


def open_source(path: str | Path, streamed: bool = False) -> Any:
    """What a path holds: something with a length and records by place, or with ``streamed`` an iterable of them.

    Args:
        path: ``.jsonl`` or ``.parquet``; a folder saved by ``datasets.Dataset.save_to_disk``.

    Raises:
        FileNotFoundError: nothing is there. ValueError: of another kind, or without rows.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"There is no {path}; a dataset's path is a .jsonl or .parquet file, or a saved folder."
        )
    if path.suffix == ".jsonl":
        source: Any = StreamedLines(path) if streamed else JsonLines(path)
    elif path.suffix == ".parquet":
        from datasets import load_dataset

        loaded = load_dataset("parquet", data_files=str(path), split="train", streaming=streamed)
        source = loaded
    elif path.is_dir():
        from datasets import load_from_disk

        source = load_from_disk(str(path))
        source = source.to_iterable_dataset() if streamed else source
    else:
        raise ValueError(f"{path} is neither .jsonl nor .parquet nor a folder that datasets saved.")
    if not streamed and not len(source):
        raise ValueError(f"{path} has no rows.")
    return source


class StreamedLines:
    """A JSONL file to go through again and again; nothing of it is held in memory.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[Callable[[random.Random], Record]]:
        """Each line as a function that parses it: a broken line is an error of its row, not of the stream."""
        with self.path.open("rb") as file:
            for number, line in enumerate((line for line in file if line.strip()), start=1):
                yield lambda generator, line=line, number=number: _parsed(line, f"{self.path.name}:{number}")


# --- datasets -------------------------------------------------------------------------------------------------------


@dataclass
class TrainingDataset:
    """Rows of one kind, and how they are trained on.

    Attributes:
        name: for logs, and of its temperature in the model.
        source: records by place (a list, a `datasets.Dataset`, `JsonLines`), or an iterable of them (streamed). A
            record is a `Row`, a mapping for `as_row`, or a function from a random generator to either.
        tasks: task families whose instructions are put before both sides, one drawn for each batch; None is none.
        sides: which side's instruction the queries and the targets get.
        patterns: what else is contrasted (patterns.py).
        temperature: initial; the model learns it.
        losses: weights of the loss terms that differ from the stage's.
        folder: what relative media paths are relative to.
        items: by id; where they are given, rows name items by their ids.
        tables: ID embeddings of items, by the table's name (recommendation/tables.py).
    """

    name: str
    source: Any
    tasks: Sequence[str | None] = (None,)
    sides: tuple[str, str] = SIDES
    patterns: Sequence[str] = ()
    temperature: float = 0.05
    losses: Mapping[str, float] = field(default_factory=dict)
    folder: Path | None = None
    items: Mapping[str, Item] | None = None
    tables: Mapping[str, IDTable] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for pattern in self.patterns:
            check_pattern(pattern)
        for side in self.sides:
            if side not in SIDES:
                raise ValueError(f"Dataset {self.name!r}: side {side!r} is not one of {SIDES}.")
        if not self.temperature > 0:
            raise ValueError(f"Dataset {self.name!r}: temperature={self.temperature} must be above 0.")
        if not self.streamed and not len(self.source):
            raise ValueError(f"Dataset {self.name!r} has no rows.")

    @property
    def streamed(self) -> bool:
        return not hasattr(self.source, "__len__")

    def read(self, place: int, generator: random.Random, record: Any = None) -> Row:
        """The row at a place; ``record`` is given where the source is streamed.

        Raises:
            RowError: the record is no row.
        """
        name = f"{self.name}:{place}"
        try:
            record = self.source[place] if record is None else record
            record = record(generator) if callable(record) else record
        except (RowError, MemoryError):
            raise
        except Exception as error:  # a decoder of the source, or whoever made the record
            raise RowError(name, f"the record cannot be read ({type(error).__name__}: {error})") from error
        if isinstance(record, Row):
            return record
        if not isinstance(record, Mapping):
            raise RowError(name, f"a record is a mapping or a Row, got {type(record).__name__}")
        return as_row(record, name, self.folder, self.items)

    def read_as_surveyed(self, place: int) -> Row:
        """The row at a place as it is embedded, mined and selected: what is drawn is drawn by its place.

        Raises:
            RowError: the record is no row.
        """
        return self.read(place, random.Random(place))


def with_negatives(row: Row, dataset: TrainingDataset, places: Iterable[int]) -> Row:
    """A row with the targets of other rows as its negatives; those that cannot be read are left out.

    Where records are functions of a generator, a negative is drawn as `TrainingDataset.read_as_surveyed` draws it: it
    is what was scored.
    """
    found = []
    for place in places:
        if place < 0:
            break
        try:
            found.append(dataset.read_as_surveyed(int(place)))
        except RowError:
            continue  # it is reported when its own turn comes
    scores = None if row.teacher_scores is None else (*row.teacher_scores, *[math.nan] * len(found))
    return replace(
        row,
        negatives=(*row.negatives, *(one.target for one in found)),
        negative_ids=(*row.negative_ids, *(one.target_id for one in found)),
        teacher_scores=scores,
    )


def dropped_fields(item: Item, share: float, generator: random.Random) -> Item:
    """The item without a random part of its text fields; never without all that it has (section 3.2.2)."""
    if isinstance(item, str) or not share:
        return item
    fields = [name for name in FORMAT_ORDER if item.get(name)]
    gone = [name for name in fields if generator.random() < share]
    if fields and gone == fields and not any(item.get(name) is not None for name in MEDIA_FIELDS):
        gone.remove(generator.choice(fields))
    return {name: value for name, value in item.items() if name not in gone}
