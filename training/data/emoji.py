"""Emoji: a rendered picture with its name in some 30 languages and English tags.

Source: npm's @lobehub/fluent-emoji-3d (webp pictures) and emojibase-data (names and tags, from Unicode CLDR).
Licence: MIT both. Unusual: skin-tone variants are left out, the names differ in nothing else.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from ..packages import extract_package
from .pictures import is_picture, log_counts, require_folder

logger = logging.getLogger(__name__)


def load_emoji(pictures: str | Path | None = None, names: str | Path | None = None) -> list[dict[str, Any]]:
    """Emoji with a picture and an English name, sorted by id.

    Args:
        pictures: folder of ``<code>-<code>.webp``; None fetches it.
        names: folder of ``<language>/compact.json`` of emojibase; None fetches it.

    Returns:
        Rows ``{"id", "names": {language: text}, "tags": [English text], "image": path}``.

    Raises:
        FileNotFoundError: a folder, or the English names, are missing. RuntimeError: a package cannot be fetched.
    """
    images = Path(pictures) if pictures else extract_package("fluent-emoji-3d") / "package" / "assets"
    texts = Path(names) if names else extract_package("emojibase-data") / "package"
    require_folder(images, "the emoji pictures (*.webp)")
    skipped: Counter[str] = Counter()
    labels, tags = _read_names(require_folder(texts, "emojibase's folders of languages"), skipped)
    rows: dict[str, dict[str, Any]] = {}
    for image in sorted(images.glob("*.webp")):
        code = plain_code(image.stem)
        if code in rows:
            skipped["a second time, with another variation selector"] += 1
        elif "en" not in labels.get(code, {}):
            skipped["skin tones or without an English name"] += 1
        elif not is_picture(image):
            skipped["with a broken or huge picture"] += 1
        else:
            row = {"id": f"emoji/{code}", "names": labels[code], "tags": tags.get(code, []), "image": str(image)}
            rows[code] = row
    log_counts(logger, "emoji", len(rows), skipped)
    return sorted(rows.values(), key=lambda row: row["id"])


def _read_names(folder: Path, skipped: Counter[str]) -> tuple[dict[str, dict[str, str]], dict[str, list[str]]]:
    """Names by code and language, English tags by code. Skin tones are nested in ``skins`` and so are not seen."""
    labels: dict[str, dict[str, str]] = {}
    tags: dict[str, list[str]] = {}
    if not (folder / "en" / "compact.json").is_file():
        raise FileNotFoundError(
            f"{folder / 'en' / 'compact.json'} is missing: without English names there are no rows."
        )
    for path in sorted(folder.glob("*/compact.json")):
        language = path.parent.name
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            skipped["languages with broken names"] += 1
            continue
        for entry in entries:
            code = plain_code(entry["hexcode"])
            if entry.get("label"):
                labels.setdefault(code, {})[language] = entry["label"]
            if language == "en":
                tags[code] = list(entry.get("tags", []))
    return labels, tags


def plain_code(code: str) -> str:
    """Lower case and without the variation selector FE0F, which the two packages put in different places."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")
