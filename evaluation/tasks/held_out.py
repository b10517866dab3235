"""What the tasks ask about: rows of Tux Paint, openclipart, emoji and GCompris that no recipe trains on.

Room: Evaluation. Unusual: training leaves out 500 English names in all its sources (`split_by_name`, `load_sources`),
yet artists gave one drawing to two collections under two names; those, found by eye, are left out here (`SEEN`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...training.data.emoji import load_emoji
from ...training.data.gcompris import load_gcompris
from ...training.data.openclipart import load_openclipart
from ...training.data.tuxpaint import load_tuxpaint, name_key, split_by_name
from .task import Item

Row = dict[str, Any]
ENGLISH = {"default": ["eng-Latn"]}  # the languages of a task that has no others

# What a `Task` says of its data, by source.
OF_TUX_PAINT: dict[str, Any] = {
    "source": "Tux Paint's stamps (Debian tuxpaint-stamps-default)",
    "licence": "GPL-2.0-or-later",
    "date": ("2002-01-01", "2022-06-04"),
}
OF_ILLUSTRATIONS: dict[str, Any] = {
    "source": "Open Clip Art (Debian openclipart), emoji of @lobehub/fluent-emoji-3d with emojibase's keywords",
    "licence": "public domain and MIT",
    "date": ("2004-01-01", "2025-12-31"),
}
OF_GCOMPRIS: dict[str, Any] = {
    "source": "GCompris (Debian gcompris-qt-data)",
    "licence": "GPL-3.0-or-later, the words CC-BY-SA-3.0",
    "date": ("2000-01-01", "2023-02-18"),
}
UNSEEN_STAMPS = (
    "Only stamps whose English name is held out of all training, without drawings that are trained on under another "
    "name."
)
UNSEEN_ILLUSTRATIONS = (
    "Only drawings whose title, and emoji whose name, is held out of all training; of the tags, others that are no "
    "held-out names are seen with other drawings."
)
SPOKEN = "fr"  # the language with the most recorded speech

# Drawings that are trained on under another name: of Tux Paint those of openclipart ("LeafRake", "couronne"), of
# openclipart those of Tux Paint or a copy with another title, of GCompris those of openclipart. A test looks for more.
SEEN = frozenset(
    f"{source}/{path}"
    for source, folder in {
        "tuxpaint": {
            "animals/insects/cartoon": "spider2",
            "clothes/hats": "brownhat cowboy_hat crown1 feathered_hat",
            "food": "bread",
            "food/fruit/cartoon": "pear",
            "household": "padlock_open vacuum_cleaner",
            "household/electronics": "compact_disc inkjet_printer",
            "military": "longsword",
            "people/cartoon": "woman_chemist woman_nurse",
            "seasonal": "balloon leafrake",
            "seasonal/christmas": "candy_cane",
            "seasonal/halloween": "jackolantern_mean",
            "town/houses/cartoon": "tent",
            "vehicles": "blue_truck",
            "vehicles/cycle": "bluebike",
            "vehicles/race": "f1_car",
            "vehicles/ship": "sail_boat1 sail_boat2",
        },
        "openclipart": {"food/fruit": "lemon pear_jean-victor_balin_01r prune"},
        "gcompris": {"instruments": "flute_traversiere harp maracas trombone violin"},
    }.items()
    for path in (f"{where}/{name}" for where, names in folder.items() for name in names.split())
)


# --- rows -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def tuxpaint() -> list[Row]:
    """Stamps whose English name is of the test part; rows as `load_tuxpaint` gives them, not to be changed.

    Raises:
        RuntimeError: the package cannot be fetched.
    """
    return unseen(_test_rows())


@lru_cache(maxsize=1)
def illustrations() -> list[Row]:
    """Openclipart's drawings and emoji whose title or name is a test name.

    A title that is not in the drawing's file name is left out: one artist called all fruits "pear".

    Returns:
        Rows ``{"id", "title", "tags", "image"}``, not to be changed.

    Raises:
        RuntimeError: a package cannot be fetched.
    """
    test_names = {key_of(row) for row in _test_rows()}
    drawings = [row for row in load_openclipart() if key_of(row) in test_names and says_its_title(row)]
    emoji = [{**row, "title": row["names"]["en"]} for row in load_emoji() if key_of(row) in test_names]
    kept = unseen([*drawings, *emoji])
    return [{name: row[name] for name in ("id", "title", "tags", "image")} for row in kept]


@lru_cache(maxsize=1)
def gcompris() -> list[Row]:
    """All of GCompris, on which nothing is trained; rows as `load_gcompris` gives them, not to be changed.

    Raises:
        RuntimeError: the package cannot be fetched.
    """
    return unseen(load_gcompris())


@lru_cache(maxsize=1)
def _test_rows() -> list[Row]:
    return split_by_name(load_tuxpaint())["test"]


def unseen(rows: Iterable[Row]) -> list[Row]:
    """Rows without those of `SEEN`, a picture once: the first of equal files, with the tags of them all."""
    kept: dict[str, Row] = {}
    for row in rows:
        if row["id"] in SEEN:
            continue
        content = hashlib.sha256(Path(row["image"]).read_bytes()).hexdigest()
        first = kept.setdefault(content, row)
        if first is not row and "tags" in row:
            kept[content] = {**first, "tags": list(dict.fromkeys([*first["tags"], *row["tags"]]))}
    return list(kept.values())


def says_its_title(row: Row) -> bool:
    """Whether all words of a drawing's title are in its file name."""
    stem = row["id"].rpartition("/")[2].casefold()
    return all(word in stem for word in key_of(row).split())


# --- parts of rows --------------------------------------------------------------------------------------------------


def key_of(row: Row) -> str:
    """Key of a row's English name or title; rows with the same one are of the same thing."""
    return name_key(row["title"] if "title" in row else row["names"]["en"])


def spoken(rows: Iterable[Row]) -> list[Row]:
    """Rows with a name in `SPOKEN` and a recording of it."""
    return [row for row in rows if SPOKEN in row["speech"] and SPOKEN in row["names"]]


def item_of(row: Row, *fields: str) -> Item:
    """An item with some of title (English), image and audio (the name spoken in `SPOKEN`), as the row has them."""
    title = row["title"] if "title" in row else row["names"]["en"]
    known = {"title": title, "image": row["image"], "audio": row.get("speech", {}).get(SPOKEN)}
    return {field: known[field] for field in fields if known[field]}


def words(tags: Iterable[str]) -> frozenset[str]:
    """Tags one can search with: without numbers, and without "hash", which an upload script left behind."""
    keys = {name_key(tag) for tag in tags}
    return frozenset(key for key in keys if sum(letter.isalpha() for letter in key) > 1 and key != "hash")
