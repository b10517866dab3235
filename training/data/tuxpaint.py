"""Tux Paint's stamps: a picture, its name in up to 80 languages, the name spoken in some, at times its own sound.

Source: Debian's tuxpaint-stamps-default, ``stamps/<category>/<item>.png .txt .ogg _desc_<language>.ogg``.
Licence: GPL-2
or later; download it, never commit it. Unusual: the split is by English name, so no test name is seen in training.
"""

from __future__ import annotations

import hashlib
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..packages import cache_root, extract_package
from .pictures import is_picture, is_sound, log_counts, rendered, require_folder

logger = logging.getLogger(__name__)

STAMPS = "usr/share/tuxpaint/stamps"


def load_tuxpaint(root: str | Path | None = None) -> list[dict[str, Any]]:
    """Stamps that have a picture and an English name, sorted by id. Drawings (SVG) are rendered once, into the cache.

    Args:
        root: the ``stamps`` folder, or the folder in which the package was unpacked; None fetches it.

    Returns:
        Rows ``{"id", "category", "names": {language: text}, "image": path, "speech": {language: path}, "effect": path
        or None}``; paths are strings.

    Raises:
        FileNotFoundError: no such folder. RuntimeError: it cannot be fetched.
    """
    folder = Path(root) if root is not None else extract_package("tuxpaint-stamps")
    if (folder / STAMPS).is_dir():
        folder = folder / STAMPS
    require_folder(folder, "the stamps of Tux Paint")
    rows, skipped = [], Counter()
    for text in sorted(folder.rglob("*.txt")):
        reason, row = _row(text, folder)
        if row is None:
            skipped[reason] += 1
        else:
            rows.append(row)
    log_counts(logger, "tuxpaint", len(rows), skipped)
    return sorted(rows, key=lambda row: row["id"])


def _row(text: Path, folder: Path) -> tuple[str, dict[str, Any] | None]:
    """The row of an item, or why there is none."""
    image = text.with_suffix(".png")
    if not image.is_file():
        drawing = text.with_suffix(".svg")
        if not drawing.is_file():
            return "without a picture", None
        image = rendered(drawing, _cache_of(folder) / text.relative_to(folder).with_suffix(".png"))
    if not is_picture(image):
        return "with a broken or huge picture", None
    names = read_names(text)
    if not names.get("en"):
        return "without an English name", None
    relative = text.relative_to(folder).with_suffix("").as_posix()
    effects = [path for path in (text.with_suffix(".ogg"), text.with_suffix(".wav")) if is_sound(path)]
    return "", {
        "id": f"tuxpaint/{relative}",
        "category": relative.rpartition("/")[0],
        "names": names,
        "image": str(image),
        "speech": _speech(text),
        "effect": str(effects[0]) if effects else None,
    }


def _cache_of(folder: Path) -> Path:
    """Where the drawings of a tree are rendered to; another tree than the fetched one has a place of its own."""
    fetched = cache_root() in folder.parents
    name = "tuxpaint" if fetched else f"tuxpaint-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]}"
    return cache_root() / "rendered" / name


def read_names(text: Path) -> dict[str, str]:
    """``{language: name}`` of a stamp's text file: the first line is English, then lines ``fr.utf8=Un chat.``"""
    names: dict[str, str] = {}
    lines = text.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    if lines and lines[0].strip():
        names["en"] = lines[0].strip()
    for line in lines[1:]:
        match = re.fullmatch(r"([\w@-]+)\.utf8\s*=\s*(\S.*)", line.strip())
        if match:
            names.setdefault(match[1], match[2])
    return names


def _speech(text: Path) -> dict[str, str]:
    """``<item>_desc_<language>.ogg`` by language; without a language it is English."""
    pattern = re.compile(re.escape(text.stem) + r"_desc(?:_([A-Za-z@_]+))?\.ogg")
    matches = [(pattern.fullmatch(path.name), path) for path in sorted(text.parent.glob("*_desc*.ogg"))]
    return {match[1] or "en": str(path) for match, path in matches if match and is_sound(path)}


# --- split ----------------------------------------------------------------------------------------------------------


def name_key(name: str) -> str:
    """A name without case, punctuation, leading English article and surplus blanks: "A cat." and "cat" are one name."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    words = "".join(
        letter if letter.isalnum() or unicodedata.category(letter)[0] == "M" else " " for letter in folded
    ).split()
    if len(words) > 1 and words[0] in ("a", "an", "the"):
        words = words[1:]
    return " ".join(words) or folded.strip()  # a name of nothing but punctuation is itself


def split_by_name(
    rows: Iterable[dict[str, Any]], test_names: int = 500, validation_names: int = 40, seed: int = 0
) -> dict[str, list[dict[str, Any]]]:
    """Rows by "test", "validation" and "train", so that no two parts share an English name.

    Args:
        rows: with ``row["names"]["en"]``; their order is kept.
        test_names: distinct names in the test part.
        validation_names: distinct names in the validation part; the rest is for training.
        seed: names are ranked by the sha256 of ``<seed>:<name_key>``, whatever else is in the data.

    Raises:
        ValueError: there are not more distinct names than the two parts need.
    """
    rows = list(rows)
    keys = {name_key(row["names"]["en"]) for row in rows}
    if len(keys) <= test_names + validation_names:
        raise ValueError(
            f"{len(keys)} distinct names leave none to train on after {test_names} for test and {validation_names} for "
            "validation: ask for fewer."
        )
    ranked = sorted(keys, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).hexdigest())
    part_of = dict.fromkeys(ranked[:test_names], "test")
    part_of |= dict.fromkeys(ranked[test_names : test_names + validation_names], "validation")
    parts: dict[str, list[dict[str, Any]]] = {"test": [], "validation": [], "train": []}
    for row in rows:
        parts[part_of.get(name_key(row["names"]["en"]), "train")].append(row)
    return parts
