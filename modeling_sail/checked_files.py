"""Whether the files of a folder are still what was written: their sizes and sha256, as the folder's manifest has them.

Unusual: a file of more than 64 MiB, which its reader maps and does not read, is told by 256 places spread over it, a
MiB in all, unless the whole is asked for. That finds what a copy or a power cut leaves: a file that is cut, another of
the same size, a hole of a 255th of it or more. A single flipped bit only the whole finds. Knows no model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SMALL = 1 << 26  # bytes that are hashed whole each time: tenths of a second
SPOTS, SPOT = 256, 4096  # places of a larger file, and bytes of each


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """``bytes`` and ``sha256`` of each file below a folder, by its name there; ``spots`` of those beyond `SMALL`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _described(path) for path in paths}


def _described(path: Path) -> dict[str, Any]:
    about: dict[str, Any] = {"bytes": path.stat().st_size, "sha256": _whole(path)}
    return about | ({"spots": _spots(path)} if about["bytes"] > SMALL else {})


def check_files(folder: Path, files: Mapping[str, Mapping[str, Any]], whole: bool = False) -> None:
    """Compare files with what `describe_files` said of them.

    Args:
        folder: where they are.
        files: as `describe_files` gave them; others in the folder are not looked at.
        whole: hash files of more than `SMALL` bytes whole, too: about a second a GB, or what the disk takes.

    Raises:
        ValueError: a file is missing, or another, or what was said of it is no such thing; the message has its path.
    """
    for name, about in files.items():
        path = folder / name
        try:
            size, digest, spots = about["bytes"], about["sha256"], None if whole else about.get("spots")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is known, but not its bytes and sha256") from error
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            raise ValueError(f"{path} is missing")
        if found != size:
            raise ValueError(f"{path} has {found} bytes, {size} were written")
        if (_whole(path) != digest) if spots is None else (_spots(path) != spots):
            raise ValueError(f"{path} is not the file that was written: its sha256 is another")


def _whole(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _spots(path: Path) -> str:
    """sha256 over the first bytes of a file, the last, and places evenly between them."""
    last, digest = max(0, path.stat().st_size - SPOT), hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        for place in range(SPOTS):
            file.seek(last * place // (SPOTS - 1))
            digest.update(file.read(SPOT))
    return digest.hexdigest()
