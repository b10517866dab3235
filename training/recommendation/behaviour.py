"""Behaviour data: who did what with which item and when, and the items; read from Parquet, split by time.

Room: recommendation, the first. Unusual: columns are arrays, and users and items are places in lists of names. Nothing
is judged here beyond the types of the columns: that is validation.py.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...items_sail import KNOWN_FIELDS, MEDIA_FIELDS
from ..rows import located

logger = logging.getLogger(__name__)

EVENT_COLUMNS = ("user", "item", "time", "behaviours")
ITEM_COLUMNS = (*KNOWN_FIELDS, "labels", "released")


class History(NamedTuple):
    """One user's events, oldest first.

    Attributes:
        user: place in ``Interactions.user_ids``.
        items: (n,) places in ``Interactions.item_ids``.
        times: (n,) unix seconds, never falling.
        counts: (n,) how many positive behaviours the user had shown for that item by then (`behaviours_so_far`).
    """

    user: int
    items: np.ndarray
    times: np.ndarray
    counts: np.ndarray

    def newest(self, num_events: int) -> History:
        """The last events of the history."""
        start = max(0, len(self.items) - num_events)
        return History(self.user, self.items[start:], self.times[start:], self.counts[start:])


@dataclass(frozen=True, eq=False)
class Interactions:
    """N events, sorted by user, then time, then as they came.

    Attributes:
        user_ids, item_ids: names; after `validation.validate` the latter are ``Items.ids``.
        behaviour_names: of the B positive behaviours.
        user, item: (N,) places among the names; -1 where it is missing.
        time: (N,) float64 unix seconds; NaN where it is missing.
        behaviours: (N, B) bool, which positive behaviours the event shows; none at all is an event, too.
    """

    user_ids: tuple[str, ...]
    item_ids: tuple[str, ...]
    behaviour_names: tuple[str, ...]
    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    behaviours: np.ndarray

    @classmethod
    def from_table(cls, table: pa.Table, source: str = "the table of interactions") -> Interactions:
        """Read a table.

        Args:
            table: ``user`` and ``item`` (string or integer), ``time`` (unix seconds as a number, or a timestamp),
                ``behaviours`` (list of strings: the names of the positive ones). Nulls may be anywhere:
                `validation.validate` counts them. Other columns are passed over.
            source: its name, for errors.

        Raises:
            ValueError: a column is missing or of another type, or there are no rows.
        """
        _check_columns(table.column_names, EVENT_COLUMNS, source)
        if not len(table):
            raise ValueError(f"{source} has no rows; at least one event is needed.")
        user_ids, user = _places(table["user"], "user", source)
        item_ids, item = _places(table["item"], "item", source)
        names, behaviours = _multi_hot(table["behaviours"], "behaviours", source)
        time = _seconds(table["time"], "time", source)
        order = np.lexsort((time, user))  # stable; NaN comes last
        return cls(user_ids, item_ids, names, user[order], item[order], time[order], behaviours[order])

    def __len__(self) -> int:
        return len(self.user)

    @property
    def counts(self) -> np.ndarray:
        """(N,) how many positive behaviours each event shows."""
        return self.behaviours.sum(1)

    @property
    def num_users(self) -> int:
        """Users that have an event; after a split that may be fewer than there are names."""
        return len(np.unique(self.user))

    def take(self, which: np.ndarray) -> Interactions:
        """Some of the events, (N,) bool or rising places; names and their places stay."""
        parts = {name: getattr(self, name)[which] for name in ("user", "item", "time", "behaviours")}
        return replace(self, **parts)

    def behaviours_so_far(self) -> np.ndarray:
        """(N,) how many different positive behaviours the event's user has shown for its item, up to this event.

        Logs often have one event for each behaviour (watched, then liked, then shared): the paper's "items with at
        least 3 positive behaviours" can only be counted over the events of a pair. Later events never count.
        """
        order = np.lexsort((self.item, self.user))  # stable: the events of a pair keep their order in time
        user, item = self.user[order], self.item[order]
        fresh = np.ones(len(self), dtype=bool)
        fresh[1:] = (user[1:] != user[:-1]) | (item[1:] != item[:-1])
        # The pair's number, plus 1 once a behaviour is seen: no more than the next pair's number, so there the running
        # maximum has forgotten it.
        pair = np.cumsum(fresh)[:, None]  # (N, 1)
        seen = np.maximum.accumulate(pair + self.behaviours[order], axis=0) - pair  # (N, B)
        counts = np.empty(len(self), dtype=np.int64)
        counts[order] = seen.sum(1)
        return counts

    def histories(self) -> Iterator[History]:
        """One history for each user that has an event, in the order of their names.

        Raises:
            ValueError: an event lacks its user, its item or its time.
        """
        check_whole(self)
        counts = self.behaviours_so_far()
        starts = np.flatnonzero(np.diff(self.user, prepend=-1))
        for start, end in zip(starts, [*starts[1:], len(self)], strict=True):
            part = slice(start, end)
            yield History(int(self.user[start]), self.item[part], self.time[part], counts[part])


@dataclass(frozen=True, eq=False)
class Items:
    """The items that events speak of.

    Attributes:
        ids: (I,) names, each once.
        records: (I,) dicts with ``id`` and the item's fields, as the processor takes them.
        labels: (I,) labels of each, perhaps none (genres, topics).
        released: (I,) float64 unix seconds from which on there can be events; NaN where it is unknown.
    """

    ids: tuple[str, ...]
    records: tuple[dict[str, Any], ...]
    labels: tuple[frozenset[str], ...]
    released: np.ndarray

    @classmethod
    def from_table(cls, table: pa.Table, source: str = "the table of items", folder: Path | None = None) -> Items:
        """Read a table.

        Args:
            table: ``id`` (string or integer), any of the item's fields (items_sail.py), at will ``labels`` (list of
                strings) and ``released`` (unix seconds or a timestamp). Other columns are passed over.
            source: its name, for errors.
            folder: what relative media paths are relative to.

        Raises:
            ValueError: a column is missing or of another type, there are no rows, an id is missing or there twice.
        """
        _check_columns(table.column_names, ("id",), source)
        fields = [name for name in KNOWN_FIELDS[1:] if name in table.column_names]
        if not fields or not len(table):
            what = f"columns {table.column_names}" if not fields else "no rows"
            raise ValueError(f"{source} has {what}; items are needed, with any of {', '.join(KNOWN_FIELDS[1:])}.")
        names, places = _places(table["id"], "id", source)
        _check_ids(names, places, source)
        ids = tuple(names[place] for place in places)
        records = [_record(*pair, folder) for pair in zip(ids, table.select(fields).to_pylist(), strict=True)]
        return cls(ids, tuple(records), _labels(table, source), _released(table, source))

    def __len__(self) -> int:
        return len(self.ids)


def load_interactions(path: str | Path) -> Interactions:
    """Read a Parquet file, or a folder of them; the columns are those of `Interactions.from_table`.

    Raises:
        FileNotFoundError: nothing is there. ValueError: it is no Parquet, or as `Interactions.from_table`.
    """
    return Interactions.from_table(_read(Path(path), EVENT_COLUMNS, EVENT_COLUMNS), str(path))


def load_items(path: str | Path) -> Items:
    """Read a Parquet file, or a folder of them; the columns are those of `Items.from_table`.

    Raises:
        FileNotFoundError: nothing is there. ValueError: it is no Parquet, or as `Items.from_table`.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    return Items.from_table(_read(path, ("id",), ITEM_COLUMNS), str(path), folder)


# --- columns --------------------------------------------------------------------------------------------------------


def _read(path: Path, needed: Sequence[str], known: Sequence[str]) -> pa.Table:
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}; a Parquet file or a folder of them is needed.")
    try:
        dataset = pq.ParquetDataset(path)
        names = dataset.schema.names
        _check_columns(names, needed, str(path))
        others = sorted(set(names) - set(known))
        if others:
            logger.warning("%s: columns %s are passed over; known are %s.", path, others, list(known))
        return dataset.read(columns=[name for name in names if name in known])
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a whole Parquet file ({error}); write it again.") from error


def _check_columns(names: Sequence[str], needed: Sequence[str], source: str) -> None:
    missing = [name for name in needed if name not in names]
    if missing:
        raise ValueError(f"{source} has columns {list(names)}; {missing} are missing: add or rename them.")


def _wrong_type(column: pa.ChunkedArray, name: str, source: str, needed: str) -> ValueError:
    return ValueError(f"{source}: column {name!r} is of type {column.type}; {needed} is needed: cast it.")


def _places(column: pa.ChunkedArray | pa.Array, name: str, source: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Sorted names, and the place of each value among them (-1 for null)."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    allowed = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_null)
    if not any(check(kind) for check in allowed):
        raise _wrong_type(column, name, source, "string or integer")
    encoded = pa.chunked_array(column.cast(pa.large_string())).combine_chunks().dictionary_encode()
    names = np.array(encoded.dictionary.to_pylist(), dtype=object)
    order = np.argsort(names)
    ranks = np.full(len(names) + 1, -1)  # the last one is where null looks
    ranks[order] = np.arange(len(names))
    return tuple(names[order]), ranks[encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)]


def _seconds(column: pa.ChunkedArray, name: str, source: str) -> np.ndarray:
    """Unix seconds, NaN for null."""
    kind, scale = column.type, 1.0
    if pa.types.is_timestamp(kind):
        column, scale = column.cast(pa.timestamp("us", kind.tz), safe=False).cast(pa.int64()), 1e-6
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        raise _wrong_type(column, name, source, "a number (unix seconds) or a timestamp")
    return scale * column.cast(pa.float64(), safe=False).fill_null(math.nan).to_numpy()


def _lists(column: pa.ChunkedArray, name: str, source: str) -> pa.ListArray:
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise _wrong_type(column, name, source, "a list of strings")
    return column.combine_chunks()


def _multi_hot(column: pa.ChunkedArray, name: str, source: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Sorted names, and which of them each list holds, (N, B)."""
    lists = _lists(column, name, source)
    names, places = _places(pc.list_flatten(lists), name, source)
    rows = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
    hot = np.zeros((len(lists), len(names)), dtype=bool)
    hot[rows[places >= 0], places[places >= 0]] = True
    return names, hot


def _labels(table: pa.Table, source: str) -> tuple[frozenset[str], ...]:
    if "labels" not in table.column_names:
        return (frozenset(),) * len(table)
    lists = _lists(table["labels"], "labels", source)
    _places(pc.list_flatten(lists), "labels", source)  # for its check of the type
    return tuple(frozenset(str(label) for label in line or () if label is not None) for line in lists.to_pylist())


def _released(table: pa.Table, source: str) -> np.ndarray:
    if "released" not in table.column_names:
        return np.full(len(table), math.nan)
    return _seconds(table["released"], "released", source)


def _check_ids(names: Sequence[str], places: np.ndarray, source: str) -> None:
    if (places < 0).any():
        raise ValueError(f"{source}: row {int(np.argmax(places < 0))} has no id; each item needs one of its own.")
    repeated = [names[place] for place, count in Counter(places.tolist()).items() if count > 1]
    if repeated:
        raise ValueError(
            f"{source}: {len(repeated)} ids are there more than once, such as {repeated[0]!r}: which row is meant by "
            "an event? Keep one."
        )


def _record(name: str, fields: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """An item as the processor takes it, without the fields that are absent."""
    item = {key: value for key, value in fields.items() if value is not None and value != "" and value != []}
    if folder is not None:
        item |= {key: located(item[key], folder) for key in MEDIA_FIELDS if key in item}
    return {"id": name, **item}


# --- split ----------------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """Events before a time, and those from it on; both keep the names of all users and items."""

    before: Interactions
    after: Interactions
    time: float


def split_by_time(interactions: Interactions, *, share: float = 0.8, time: float | None = None) -> Split:
    """Split all events at one time: one for all users, so that nothing of the future is known of anybody.

    Args:
        interactions: validated.
        share: of the events that come before; fewer, where events at the split time are many: all of them go after.
        time: the split itself, in unix seconds, in place of a share.

    Raises:
        ValueError: a share not within (0, 1), an event without its time, or a side that would be empty.
    """
    check_whole(interactions)
    if time is None:
        if not 0 < share < 1:
            raise ValueError(f"share={share} must lie between 0 and 1.")
        time = float(np.sort(interactions.time)[int(share * len(interactions))])
    before = interactions.time < time
    if before.all() or not before.any():
        raise ValueError(
            f"The split at {time} leaves {int(before.sum())} events before and {int((~before).sum())} after; the times "
            f"go from {interactions.time.min()} to {interactions.time.max()}: choose one between."
        )
    return Split(interactions.take(before), interactions.take(~before), time)


def check_whole(interactions: Interactions) -> None:
    """Refuse events of which a part is missing.

    Raises:
        ValueError: an event lacks its user, its item or its time.
    """
    bad = (interactions.user < 0) | (interactions.item < 0) | ~np.isfinite(interactions.time)
    if bad.any():
        raise ValueError(f"{int(bad.sum())} events lack their user, item or time: call `validate` first.")


def check_before(before: Interactions, split_time: float) -> None:
    """Refuse events from after a split.

    Raises:
        ValueError: an event is at the split time or later, or without a time.
    """
    late = int((~(before.time < split_time)).sum())  # NaN is no time before the split either
    if late:
        raise ValueError(
            f"{late} events are at the split time {split_time} or later and would leak into what is learned: give only "
            "those before, split_by_time(...).before."
        )
