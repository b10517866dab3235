"""Open Clip Art: pictures with the title and tags that their artists gave them.

Source: Debian's openclipart-png (pictures) and openclipart-svg (the same tree; its metadata holds titles and tags).
Licence: public domain. Unusual: geometric shapes, patterns and icon themes are left out, their titles say nothing;
many rows share a title, and all are kept.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ..packages import extract_package
from .pictures import is_picture, log_counts, require_folder

logger = logging.getLogger(__name__)

BASE = "usr/share/openclipart"
# Folders, by path or by the end of a part's name, whose pictures are variations on nothing in particular.
DROPPED = ("shapes", "special/gradients", "special/patterns", "computer/icons", "computer/buttons", "buttons")
DROPPED_ENDINGS = ("-theme",)
DC = "{http://purl.org/dc/elements/1.1/}"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
# Placeholders of drawing programs and of the library's own upload script.
EMPTY_TITLES = {"", "title", "untitled", "unsaved drawing", "clipart", "open clip art", "openclipart", "svg", "drawing"}


def load_openclipart(root: str | Path | None = None) -> list[dict[str, Any]]:
    """Pictures with a title, sorted by id.

    Args:
        root: a folder with ``png/`` and ``svg/`` side by side (``usr/share/openclipart``, both packages unpacked into
            one place); None fetches both packages.

    Returns:
        Rows ``{"id", "title", "tags": [text], "image": path, "folder"}``.

    Raises:
        FileNotFoundError: no such folder. RuntimeError: it cannot be fetched.
    """
    pictures, drawings = _folders(root)
    rows, skipped = [], Counter()
    for image in sorted(pictures.rglob("*.png")):
        relative = image.relative_to(pictures)
        reason, row = _row(image, relative, drawings / relative.with_suffix(".svg"))
        if row is None:
            skipped[reason] += 1
        else:
            rows.append(row)
    log_counts(logger, "openclipart", len(rows), skipped)
    return sorted(rows, key=lambda row: row["id"])


def _folders(root: str | Path | None) -> tuple[Path, Path]:
    if root is None:
        pictures = extract_package("openclipart-png") / BASE / "png"
        drawings = extract_package("openclipart-svg") / BASE / "svg"
    else:
        base = Path(root) / BASE if (Path(root) / BASE).is_dir() else Path(root)
        pictures, drawings = base / "png", base / "svg"
    return require_folder(pictures, "openclipart's pictures"), require_folder(drawings, "openclipart's drawings")


def _row(image: Path, relative: Path, drawing: Path) -> tuple[str, dict[str, Any] | None]:
    """The row of a picture, or why there is none."""
    folder = relative.parent.as_posix()
    if is_dropped(folder):
        return "shapes, patterns or themes", None
    if not is_picture(image):
        return "with a broken or huge picture", None
    try:
        title, tags = read_metadata(drawing)
    except (OSError, ElementTree.ParseError, UnicodeError, ValueError):
        return "with a missing or broken SVG", None
    if title.casefold() in EMPTY_TITLES or not re.search(r"[^\W\d_]{2}", title):
        return "without a title", None
    row = {"id": f"openclipart/{relative.with_suffix('').as_posix()}", "title": title, "tags": tags}
    return "", {**row, "image": str(image), "folder": folder}


def is_dropped(folder: str) -> bool:
    """Whether a folder is one of `DROPPED`, lies in one, or is an icon theme."""
    inside = any(folder == dropped or folder.startswith(f"{dropped}/") for dropped in DROPPED)
    return inside or any(part.endswith(DROPPED_ENDINGS) for part in folder.split("/"))


def read_metadata(drawing: Path) -> tuple[str, list[str]]:
    """Title and tags of a drawing's Dublin Core metadata; reads no further than these.

    Raises:
        OSError, xml.etree.ElementTree.ParseError: the file is missing or broken.
    """
    for _, element in ElementTree.iterparse(drawing):
        if not element.tag.endswith("}Work"):
            continue
        title = _clean(element.findtext(f"{DC}title") or "")  # a direct child: agents have titles too
        tags = [_clean(item.text or "") for item in element.findall(f"{DC}subject//{RDF}li")]
        tags = [tag for tag in tags if tag and not tag.startswith("hash(")]
        return title, list(dict.fromkeys(tags))
    return "", []


def _clean(text: str) -> str:
    """One line with single blanks, without the artist; underscores stand for blanks in many titles."""
    return re.sub(r"^clipart by [^-]+ - ", "", " ".join(text.replace("_", " ").split()), flags=re.IGNORECASE)
