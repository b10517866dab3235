"""MovieLens-100K, its films joined with directors and cast: behaviour data for recommendation, as two tables.

Sources: ratings, titles, years and genres from recbole's wheel; directors and cast from bokeh-sampledata's movies.db.
Licences: GroupLens (research, no redistribution: download it, never commit it) and CC0. Unusual: ratings become
behaviours; 18 films are there under two ids, as in GroupLens's own files.
"""

from __future__ import annotations

import logging
import re
import sqlite3
import unicodedata
from collections import Counter, defaultdict
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from ..packages import extract_package
from .pictures import require_folder
from .tuxpaint import name_key

logger = logging.getLogger(__name__)

RATINGS, FILMS, CREDITS = "ml-100k.inter", "ml-100k.item", "movies.db"
IN_RECBOLE, IN_BOKEH = "recbole/dataset_example/ml-100k", "bokeh_sampledata/_data"

# The paper asks for "at least 1" and "at least 3 positive behaviours" (section 3.3.5), of behaviours such as watched,
# liked, shared. A rating is one behaviour of graded strength: each of its upper steps counts as one, so that 1 is
# "not against it" and 3 is "among the best".
BEHAVIOURS = {"fine": 3, "liked": 4, "loved": 5}  # the lowest rating that shows it

NAMELESS = ("unknown", "unkonwn")  # GroupLens has one film of which nothing is known, which recbole misspells

# Articles that the catalogue moves behind the title.
ARTICLES = "The|A|An|Il|La|Le|Les|El|O|Das|Der|Die|L'"

INTERACTION_SCHEMA = pa.schema(
    [("user", pa.string()), ("item", pa.string()), ("time", pa.float64()), ("behaviours", pa.list_(pa.string()))]
)
ITEM_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "title", "ocr", "nickname")),
        ("tags", pa.list_(pa.string())),
        ("labels", pa.list_(pa.string())),
        ("released", pa.float64()),
    ]
)


# The cast of a film has up to a hundred names, by the alphabet. Who was in many films is who one knows.
MOST_CAST = 6


class Credits(NamedTuple):
    """Who made a film: names with commas between; of the cast, those with the most films."""

    director: str
    cast: str


def load_movielens(root: str | Path | None = None) -> tuple[pa.Table, pa.Table]:
    """The interactions and the items, as `Interactions.from_table` and `Items.from_table` take them.

    An item has the film's title ("The Matrix"), as ``tags`` its genres and its year, as ``nickname`` (the author) its
    director, as ``ocr`` its cast (what one reads in the credits); as ``labels`` its genres; it is ``released`` on the
    first of January of its year, as more is not known. What is missing is null.

    Args:
        root: a folder with ``ml-100k.inter``, ``ml-100k.item`` and ``movies.db``; None fetches the two packages.

    Returns:
        Tables of `INTERACTION_SCHEMA` and `ITEM_SCHEMA`: events in the order of the file, items by their number.

    Raises:
        FileNotFoundError: no such folder, or a file is missing. ValueError: a file is of another form.
        RuntimeError: a package cannot be fetched.
    """
    if root is None:
        ratings, credits = extract_package("movielens-100k") / IN_RECBOLE, extract_package("bokeh-movies") / IN_BOKEH
    else:
        ratings = credits = Path(root)
    for folder, name in ((ratings, RATINGS), (ratings, FILMS), (credits, CREDITS)):
        if not (require_folder(folder, "MovieLens-100K") / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing; {RATINGS}, {FILMS} and {CREDITS} are needed.")
    items = _films(ratings / FILMS, read_credits(credits / CREDITS))
    return _ratings(ratings / RATINGS), items


def _ratings(path: Path) -> pa.Table:
    lines = _lines(path, ("user_id", "item_id", "rating", "timestamp"))
    try:
        events = [
            {"user": user, "item": _item_id(film), "time": float(time), "behaviours": behaviours_of(float(rating))}
            for user, film, rating, time in lines
        ]
    except ValueError as error:
        raise ValueError(f"{path} holds a rating or a time that is no number ({error}).") from error
    return pa.Table.from_pylist(events, INTERACTION_SCHEMA)


def behaviours_of(rating: float) -> list[str]:
    """The positive behaviours that a rating shows: none below 3, three at 5."""
    return [name for name, lowest in BEHAVIOURS.items() if rating >= lowest]


def _films(path: Path, credits: dict[tuple[str, int], list[Credits]]) -> pa.Table:
    lines = _lines(path, ("item_id", "movie_title", "release_year", "class"))
    films = []
    for number, written, year, genres in sorted(lines, key=lambda line: int(line[0])):
        made = _year(year, written)
        title = plain_title(written)
        films.append({"id": _item_id(number), **_film(title, made, genres, find_credits(title, made, credits))})
    known = sum(film["nickname"] is not None or film["ocr"] is not None for film in films)
    logger.info("movielens: %d films, %d of them with director or cast.", len(films), known)
    return pa.Table.from_pylist(films, ITEM_SCHEMA)


def _film(title: str, year: int | None, genres: str, found: Credits | None) -> dict[str, Any]:
    labels = [genre for genre in genres.split() if genre not in NAMELESS]
    return {
        "title": None if title in NAMELESS else title,
        "nickname": found.director or None if found else None,
        "ocr": found.cast or None if found else None,
        "tags": [*labels, *([] if year is None else [str(year)])],
        "labels": labels,
        "released": None if year is None else datetime(year, 1, 1, tzinfo=UTC).timestamp(),
    }


def _item_id(number: str) -> str:
    return f"movielens/{number}"


def _year(written: str, title: str) -> int | None:
    """The film's year; in one line of the source it still stands behind the title."""
    behind = re.search(r"\((\d{4})\)$", title)
    if re.fullmatch(r"\d{4}", written):
        return int(written)
    return int(behind[1]) if behind else None


def _lines(path: Path, columns: tuple[str, ...]) -> list[list[str]]:
    """The cells of a file of recbole: tab-separated, under a header ``name:type``.

    Raises:
        ValueError: other columns, or a line of another length.
    """
    head, *lines = (line.split("\t") for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    if tuple(name.partition(":")[0] for name in head) != columns:
        raise ValueError(f"{path} begins with {head}; the columns {columns} of recbole's ml-100k are needed.")
    for number, line in enumerate(lines, start=2):
        if len(line) != len(columns):
            raise ValueError(f"{path}, line {number} has {len(line)} cells; {len(columns)} are needed: cut off?")
    return lines


# --- titles and credits ---------------------------------------------------------------------------------------------


def plain_title(written: str) -> str:
    """A title as one says it: "Matrix, The" is "The Matrix", in a translation in brackets, too; without a year."""
    written = re.sub(r" \(\d{4}\)$", "", written)
    bracket = re.fullmatch(r"(.+?) \((.+)\)", written)
    if bracket:
        return f"{_article_first(bracket[1])} ({_article_first(bracket[2])})"
    return _article_first(written)


def _article_first(title: str) -> str:
    match = re.fullmatch(rf"(.+), ({ARTICLES})", title)
    if not match:
        return title
    return f"{match[2]}{'' if match[2].endswith(chr(39)) else ' '}{match[1]}"


def title_key(title: str) -> str:
    """A title without case, accents, punctuation and leading article, "&" as "and": what two catalogues agree on."""
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", title) if not unicodedata.combining(letter))
    return name_key(re.sub(r"['’]", "", plain.replace("&", " and ")))


def read_credits(path: Path) -> dict[tuple[str, int], list[Credits]]:
    """Credits by key of the title and year; a film that another one shares both with is a second entry.

    Raises:
        ValueError: the file is no such database.
    """
    found: dict[tuple[str, int], list[Credits]] = defaultdict(list)
    query = 'SELECT "Title", "Year", "Director", "Cast" FROM omdb WHERE "Title" IS NOT NULL AND "Year" IS NOT NULL'
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as database:
            rows = [(title, year, director, _names(cast)) for title, year, director, cast in database.execute(query)]
    except sqlite3.Error as error:
        raise ValueError(f"{path} is not bokeh-sampledata's movies.db ({error}); unpack it again.") from error
    films = Counter(name for *_, cast in rows for name in cast)
    for title, year, director, cast in rows:
        known = sorted(sorted(cast, key=lambda name: -films[name])[:MOST_CAST])
        found[title_key(title), int(year)].append(Credits(director or "", ", ".join(known)))
    return dict(found)


def _names(cast: str | None) -> list[str]:
    return [name.strip() for name in (cast or "").split(",") if name.strip()]


def find_credits(title: str, year: int | None, credits: dict[tuple[str, int], list[Credits]]) -> Credits | None:
    """The one film of that title, or of its translation in brackets, of that year, else a year earlier, else later.

    Catalogues date a film by its festival or by its release, hence the year. Two films of a title and year are none:
    which one is meant cannot be known.
    """
    if year is None:
        return None
    bracket = re.fullmatch(r"(.+?) \((.+)\)", title)
    names = [title_key(name) for name in (bracket.groups() if bracket else (title,))]
    for made in (year, year - 1, year + 1):
        for name in names:
            found = credits.get((name, made), [])
            if found:
                return found[0] if len(found) == 1 else None
    return None
