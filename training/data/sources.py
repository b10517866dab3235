"""Built-in training sources by name, as a recipe writes them: ``mini:openclipart``.

To add one: a file in this folder with a function from a part's name to records, and its name here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..recipe import DatasetSpec
from ..recommendation.behaviour import load_items
from ..recommendation.tables import IDTable, load_tables
from ..rows import TrainingDataset, open_source
from .mini_pairs import SOURCES as MINI
from .mini_pairs import mini_source

logger = logging.getLogger(__name__)

BUILT_IN: dict[str, tuple[Callable[[str], Any], list[str]]] = {"mini": (mini_source, sorted(MINI))}


def built_in_source(path: str) -> Any:
    """The records of ``name:part``, or None where the path is no such name.

    Raises:
        ValueError: there is no such part.
    """
    name, colon, part = path.partition(":")
    if not colon or name not in BUILT_IN:
        return None
    open_part, parts = BUILT_IN[name]
    if part not in parts:
        raise ValueError(f"There is no built-in source {path!r}; of {name!r} there are {', '.join(parts)}.")
    return open_part(part)


def open_dataset(name: str, spec: DatasetSpec, folder: Path = Path()) -> TrainingDataset:  # noqa: B008  immutable
    """A recipe's dataset: of a built-in source, or of a path relative to the recipe's folder.

    Raises:
        FileNotFoundError: nothing is there. ValueError: no such built-in source; another kind of file; no rows; broken
            tables of items or ID embeddings.
    """
    built_in = built_in_source(spec.path)
    path = folder / spec.path
    items = None if spec.items is None else items_by_id(folder / spec.items)
    tables = load_tables([folder / one for one in spec.tables]) if spec.tables else {}
    if items is not None:
        _check_coverage(name, items, tables)
    return TrainingDataset(
        name=name,
        source=open_source(path, spec.streamed) if built_in is None else built_in,
        tasks=spec.tasks,
        sides=(spec.sides[0], spec.sides[1]),
        patterns=spec.patterns,
        temperature=spec.temperature,
        losses=spec.losses,
        folder=path.parent if built_in is None and path.suffix else None,
        items=items,
        tables=tables,
    )


def items_by_id(path: Path) -> dict[str, dict[str, Any]]:
    """A table of items (`load_items`), read once for all datasets that name it, and again when it was written again."""
    return _items_as_of(path, path.stat().st_mtime_ns if path.exists() else 0)


@lru_cache(maxsize=4)
def _items_as_of(path: Path, written: int) -> dict[str, dict[str, Any]]:
    items = load_items(path)
    return dict(zip(items.ids, items.records, strict=True))


def _check_coverage(name: str, items: Mapping[str, Any], tables: Mapping[str, IDTable]) -> None:
    """Say how many items have a row in each table.

    Raises:
        ValueError: none has.
    """
    for table in tables.values():
        known = sum(one in items for one in table.ids)
        if not known:
            raise ValueError(
                f"datasets.{name}.tables: not one of the {len(table)} ids of table {table.name!r}, such as "
                f"{table.ids[0]!r}, is among the {len(items)} items, such as {next(iter(items))!r}; name items alike."
            )
        logger.info("dataset %r: %d of %d items have a row in table %r.", name, known, len(items), table.name)
