"""What the datasets share: is a file a picture, is it a sound, drawings to pictures, a log line for what is skipped."""

from __future__ import annotations

import logging
import os
import warnings
from collections import Counter
from pathlib import Path

import resvg_py
from PIL import Image, UnidentifiedImageError

LARGEST_PIXELS = 25_000_000  # a few clip-arts are posters of 168 megapixels: half a gigabyte each once decoded
RENDERED_PIXELS = 448  # width of a rendered drawing: twice what the vision tower takes
SOUND_MAGIC = (b"OggS", b"RIFF")


def is_picture(path: Path) -> bool:
    """True if Pillow reads the header and the picture has no more than `LARGEST_PIXELS`; the body is not read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return 0 < image.width * image.height <= LARGEST_PIXELS
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def rendered(drawing: Path, picture: Path) -> Path:
    """Render an SVG drawing to a PNG picture once; a drawing that cannot be rendered leaves no picture behind."""
    if not picture.is_file():
        picture.parent.mkdir(parents=True, exist_ok=True)
        partial = picture.with_suffix(".partial")
        try:
            partial.write_bytes(bytes(resvg_py.svg_to_bytes(svg_path=str(drawing), width=RENDERED_PIXELS)))
        except ValueError:  # not an SVG; `is_picture` then finds no file
            return picture
        os.replace(partial, picture)
    return picture


def is_sound(path: Path) -> bool:
    """True if the file begins as an Ogg or WAV file does."""
    try:
        with path.open("rb") as file:
            return file.read(4) in SOUND_MAGIC
    except OSError:
        return False


def log_counts(logger: logging.Logger, dataset: str, num_rows: int, skipped: Counter[str]) -> None:
    """One line: how many rows, and how many were skipped for which reason."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items())) or "none"
    logger.info("%s: %d rows; skipped: %s.", dataset, num_rows, reasons)


def require_folder(folder: Path, what: str) -> Path:
    """The folder, if it is there.

    Raises:
        FileNotFoundError: it is not; says what was looked for.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; {what} was expected there.")
    return folder
