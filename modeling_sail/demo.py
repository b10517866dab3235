"""`sail demo`: search held-out Tux Paint items by word, picture and speech, and show it on one HTML page.

Unusual: the page carries its pictures and sounds inside, so that it can be sent as one file. What a query asks for is
marked where it is found: the page shows misses as plainly as hits.
"""

from __future__ import annotations

import base64
import html
import io
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from tqdm.auto import tqdm

from .encode_job import encode_items, load_module
from .index import index_of, search
from .training.data.tuxpaint import load_tuxpaint, name_key, split_by_name

SPOKEN = "fr"  # the items' own sound; queries are spoken in another language
ASKED = ("es", "ro", "ca", "ru", "bg")
QUERIES_EACH = 6
TOP = 6

Row = dict[str, Any]


@dataclass(frozen=True)
class Query:
    """What is asked, how it is shown, and the name key that it asks for."""

    kind: str
    item: dict[str, Any]
    shown: str
    wanted: str


def make_demo(model: Path, out: Path, subset: int | None = None, seed: int = 0) -> Path:
    """Fetch Tux Paint, embed its held-out items (picture and French speech), search them, write the page.

    Args:
        model: folder of a built model.
        out: the page, or a folder to write ``index.html`` into.
        subset: only so many items.
        seed: which queries are shown.

    Returns:
        The path of the page.

    Raises:
        ValueError: no model there, or a subset below 1.
    """
    if subset is not None and subset < 1:
        raise ValueError(f"subset={subset} must be at least 1")
    module = load_module(model)
    rows = [row for row in split_by_name(load_tuxpaint())["test"] if SPOKEN in row["speech"]]
    chooser = random.Random(seed)
    rows = chooser.sample(rows, min(subset or len(rows), len(rows)))
    items = [(row["id"], {"image": row["image"], "audio": row["speech"][SPOKEN]}) for row in rows]
    processor = module.processor
    vectors, statuses = encode_items(module, items, processor.instruction_for("q2i", "target"), progress="items")
    bad = {items[status.index][0]: status.reason for status in statuses if status.status != "ok"}
    index = index_of([name for name, _ in items if name not in bad], vectors)
    queries = make_queries([row for row in rows if row["id"] not in bad], chooser)
    instruction = processor.instruction_for("q2i", "query")
    found = search(module, index, [query.item for query in queries], instruction, TOP)
    page = out if out.suffix == ".html" else out / "index.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    _write(page, render_page(queries, found, {row["id"]: row for row in rows}, bad))
    return page


def make_queries(rows: list[Row], chooser: random.Random) -> list[Query]:
    """Names, pictures and spoken names of some of the items; a picture asks for what looks like it, itself included."""
    some = chooser.sample(rows, min(3 * QUERIES_EACH, len(rows)))
    spoken = [row for row in rows if any(language in row["speech"] for language in ASKED)]
    queries = [
        Query("word", {"text": row["names"]["en"]}, html.escape(row["names"]["en"]), name_key(row["names"]["en"]))
        for row in some[:QUERIES_EACH]
    ]
    for row in some[QUERIES_EACH : 2 * QUERIES_EACH]:
        flipped = ImageOps.mirror(_open(row["image"]))  # not the very file that was indexed
        queries.append(Query("picture", {"image": flipped}, _picture(flipped), name_key(row["names"]["en"])))
    for row in chooser.sample(spoken, min(QUERIES_EACH, len(spoken))):
        language = next(language for language in ASKED if language in row["speech"])
        path = row["speech"][language]
        shown = f"{_player(path)}<small>{language}: {html.escape(row['names'].get(language, ''))}</small>"
        queries.append(Query("speech", {"audio": path}, shown, name_key(row["names"]["en"])))
    return queries


# --- the page -------------------------------------------------------------------------------------------------------

STYLE = """
body{font:15px/1.4 system-ui,sans-serif;margin:2rem auto;max-width:76rem;padding:0 1rem;color:#222;background:#fafafa}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}
.row{display:flex;gap:.7rem;align-items:stretch;margin:.7rem 0;overflow-x:auto}
.card{background:#fff;border:1px solid #ddd;border-radius:8px;padding:.6rem;width:9rem;flex:none;text-align:center}
.query{background:#eef4ff;border-color:#9bb8ee;display:flex;flex-direction:column;justify-content:center;width:12rem}
.hit{border:2px solid #2a9d4a}.card img{width:96px;height:96px;object-fit:contain}
audio{width:100%;height:2rem}small{color:#666;display:block}
"""


def render_page(
    queries: list[Query], found: list[list[tuple[str, float]]], rows: dict[str, Row], bad: dict[str, str]
) -> str:
    """The whole page as HTML. A green frame marks an item that has the name which was asked for."""
    parts = ["<!doctype html><html lang='en'><head><meta charset='utf-8'><title>SAIL-Embedding demo</title>"]
    parts.append(
        f"<style>{STYLE}</style></head><body><h1>Search {len(rows) - len(bad)} items by word, picture, speech</h1>"
    )
    parts.append(
        "<p>Each item is a Tux Paint picture with its spoken French name; none of the names was seen in training. "
        "Green: the item has the name that was asked for.</p>"
    )
    for kind in ("word", "picture", "speech"):
        parts.append(f"<h2>By {kind}</h2>")
        for query, nearest in tqdm(list(zip(queries, found, strict=True)), desc=f"page: {kind}", leave=False):
            if query.kind == kind:
                cards = "".join(_card(rows[name], score, query.wanted) for name, score in nearest)
                parts.append(f"<div class='row'><div class='card query'>{query.shown}</div>{cards}</div>")
    if bad:
        reasons = "".join(f"<li>{html.escape(name)}: {html.escape(reason)}</li>" for name, reason in bad.items())
        parts.append(f"<h2>Items that could not be read</h2><ul>{reasons}</ul>")
    return "\n".join([*parts, "</body></html>"])


def _card(row: Row, score: float, wanted: str) -> str:
    name = row["names"]["en"]
    hit = " hit" if name_key(name) == wanted else ""
    picture, player = _picture(_open(row["image"])), _player(row["speech"][SPOKEN])
    return f"<div class='card{hit}'>{picture}<small>{html.escape(name)}</small>{player}<small>{score:.3f}</small></div>"


def _open(path: str) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGBA")


def _picture(picture: Image.Image) -> str:
    small = picture.copy()
    small.thumbnail((128, 128))
    data = io.BytesIO()
    small.save(data, "PNG", optimize=True)
    return f"<img alt='' src='data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}'>"


def _player(path: str) -> str:
    kind = Path(path).suffix.lstrip(".")
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return f"<audio controls preload='none' src='data:audio/{kind};base64,{data}'></audio>"


def _write(page: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile(
        "w", dir=page.parent, suffix=".partial", delete=False, encoding="utf-8"
    ) as partial:
        partial.write(text)
    Path(partial.name).replace(page)
