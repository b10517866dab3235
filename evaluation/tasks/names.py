"""Names and what bears them, in some languages: what the tasks from names to items and from items to names share.

Room: Evaluation. Unusual: what is the same thing is told by the English name; where another language has one name for
two of them, it is one name, and both are right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...training.data.tuxpaint import name_key
from .held_out import Row, item_of, key_of
from .task import Item, Retrieval

BOTH = ("en", "fr")
# Keys of Tux Paint's names by what a subset is called, and how mteb writes the language.
LANGUAGES = {
    "en": ("en", "eng-Latn"),
    "fr": ("fr", "fra-Latn"),
    "es": ("es", "spa-Latn"),
    "de": ("de", "deu-Latn"),
    "ru": ("ru", "rus-Cyrl"),
    "zh": ("zh_CN", "zho-Hans"),
}


class Names(NamedTuple):
    """Distinct names: their texts by id, and the id by key of the English name."""

    items: dict[str, Item]
    id_of: dict[str, str]


def names_of(rows: Sequence[Row], languages: Sequence[str]) -> Names:
    """The names of rows that have one in all the languages, one beside the other; of a thing, its first row's.

    Args:
        rows: with ``names``.
        languages: keys of ``names``.
    """
    texts: dict[str, str] = {}
    for row in rows:
        if all(language in row["names"] for language in languages):
            texts.setdefault(key_of(row), " ".join(row["names"][language] for language in languages))
    items: dict[str, Item] = {}
    for text in texts.values():
        items.setdefault(f"name/{name_key(text)}", {"text": text})
    return Names(items, {key: f"name/{name_key(text)}" for key, text in texts.items()})


def name_to_item(rows: Sequence[Row], languages: Sequence[str], *fields: str) -> Retrieval:
    """Names find items, which have some fields of their rows; rows without such a name are in the corpus, too."""
    names = names_of(rows, languages)
    bearers: dict[str, set[str]] = {}
    for row in rows:
        if key_of(row) in names.id_of:
            bearers.setdefault(names.id_of[key_of(row)], set()).add(row["id"])
    corpus = {row["id"]: item_of(row, *fields) for row in rows}
    return Retrieval(names.items, corpus, {name: frozenset(bearers[name]) for name in names.items})


def item_to_name(rows: Sequence[Row], languages: Sequence[str], *fields: str) -> Retrieval:
    """The other way round: a row's item finds its name."""
    names = names_of(rows, languages)
    rows = [row for row in rows if key_of(row) in names.id_of]
    queries = {row["id"]: item_of(row, *fields) for row in rows}
    return Retrieval(queries, names.items, {row["id"]: frozenset({names.id_of[key_of(row)]}) for row in rows})
