"""GCompris: pictures of animals, instruments, colours, numbers and other first words, by name; some with their sound.

Source: Debian's gcompris-qt-data; each activity is a Qt resource archive (``<activity>.rcc``), which we read ourselves.
Licence: GPL-3 or later, the words CC-BY-SA-3.0; download it, never commit it. Unusual: kept to evaluate on, no training
stage reads it (yet five instruments are drawings of openclipart: flute, harp, maracas, trombone, violin); a name has
one row, and its sound may come from another activity.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import struct
import zlib
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

from ..packages import cache_root, extract_package
from .pictures import is_picture, is_sound, log_counts, rendered, require_folder
from .tuxpaint import name_key

logger = logging.getLogger(__name__)

ARCHIVES = "usr/share/gcompris-qt/rcc"
# Activity: where its pictures lie in it. The first activity that has a name keeps it.
ACTIVITIES = {
    "lang": "resource/words_sample",
    "explore_world_animals": "resource/animals",
    "explore_farm_animals": "resource/animals",
    "instruments": "resource",
}
PICTURES = (".webp", ".png", ".jpg", ".svg")
SOUNDS = (".ogg", ".wav")
SCENERY = {"question", "background", "farm-animals"}  # boards and buttons that lie among the pictures: no named things


def load_gcompris(root: str | Path | None = None) -> list[dict[str, Any]]:
    """Named pictures, one a name, sorted by id. Pictures and sounds are unpacked once, into the cache.

    Args:
        root: the folder of the ``.rcc`` files, or the folder in which the package was unpacked; None fetches it.

    Returns:
        Rows ``{"id", "names": {"en": text}, "image": path, "folder": activity, "sound": path or None}``; paths are
        strings.

    Raises:
        FileNotFoundError: no such folder, or an activity is missing. ValueError: an archive is truncated or is none.
        RuntimeError: the package cannot be fetched.
    """
    folder = Path(root) if root is not None else extract_package("gcompris")
    if (folder / ARCHIVES).is_dir():
        folder = folder / ARCHIVES
    require_folder(folder, "the resource archives of GCompris (*.rcc)")
    skipped: Counter[str] = Counter()
    files = [path for activity in ACTIVITIES for path in _unpacked(folder / f"{activity}.rcc", skipped)]
    rows = _rows(files, skipped)
    log_counts(logger, "gcompris", len(rows), skipped)
    return sorted(rows, key=lambda row: row["id"])


def _rows(files: list[Path], skipped: Counter[str]) -> list[dict[str, Any]]:
    """One row a name: its first photograph or painting, else its first drawing."""
    sounds = _sounds(files)
    rows: dict[str, dict[str, Any]] = {}
    pictures = [path for path in files if path.suffix in PICTURES]
    for path in sorted(pictures, key=lambda path: path.suffix == ".svg"):  # stable: activities keep their order
        name = spelled_out(path.stem)
        key = name_key(name)
        if path.stem in SCENERY:
            skipped["scenery"] += 1
        elif key in rows:
            skipped["with a name that has a picture"] += 1
        elif not is_picture(image := _image(path)):
            skipped["with a broken or huge picture"] += 1
        else:
            activity = path.parent.name
            row = {"id": f"gcompris/{activity}/{path.stem}", "names": {"en": name}, "image": str(image)}
            # A flock is recorded as chickens.ogg, its picture is chicken.webp.
            rows[key] = {**row, "folder": activity, "sound": sounds.get(key) or sounds.get(f"{key}s")}
    return list(rows.values())


def _sounds(files: list[Path]) -> dict[str, str]:
    """Sounds by the key of their name; the first activity that has one wins."""
    sounds: dict[str, str] = {}
    for path in files:
        if path.suffix in SOUNDS and is_sound(path):
            sounds.setdefault(name_key(spelled_out(path.stem)), str(path))
    return sounds


def _image(path: Path) -> Path:
    return rendered(path, path.parent / "rendered" / f"{path.stem}.png") if path.suffix == ".svg" else path


def spelled_out(stem: str) -> str:
    """The name that a file's stem stands for: ``orange-color``, ``polar_bear`` and ``polarBear`` are two words."""
    return " ".join(re.sub(r"(?<=[^\W_A-Z])(?=[A-Z])|[-_]+", " ", stem).split()).lower()


def _unpacked(archive: Path, skipped: Counter[str]) -> list[Path]:
    """The pictures and sounds of an activity, sorted, in a folder of the cache that is named after the bytes it holds.

    Raises:
        FileNotFoundError: no such archive. ValueError: as `ResourceArchive`.
    """
    if not archive.is_file():
        raise FileNotFoundError(f"{archive} is missing; all of {', '.join(ACTIVITIES)} are needed: unpack them again.")
    resources = ResourceArchive(archive)
    folder = cache_root() / "extracted" / "gcompris-pictures" / resources.sha256[:12] / archive.stem
    inside = PurePosixPath("gcompris/src/activities", archive.stem, ACTIVITIES[archive.stem])
    paths = []
    for name, (flags, body) in sorted(resources.files().items()):
        if PurePosixPath(name).parent != inside or not name.endswith(PICTURES + SOUNDS):
            continue
        content, reason = decoded(flags, body)
        if content is None:
            skipped[reason] += 1
        else:
            paths.append(_write_once(folder / PurePosixPath(name).name, content))
    return paths


def _write_once(path: Path, content: bytes | memoryview) -> Path:
    """Write a file that is complete or not there, also when two processes load at a time."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_bytes(content)
        os.replace(partial, path)
    return path


# --- Qt resource archives -------------------------------------------------------------------------------------------

MAGIC = b"qres"
VERSIONS = (1, 2, 3)
STORED, ZLIB, FOLDER, ZSTD = 0, 1, 2, 4  # bits of a node's flags


class ResourceArchive:
    """An ``.rcc`` file: a tree of folders and files, their names and their contents, each in a part of its own.

    The format is Qt's (``qresource.cpp``), all numbers are big-endian; no offset in it is trusted.
    """

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            ValueError: it is no such archive, of an unknown version, or truncated.
        """
        self.path, self.data = path, memoryview(path.read_bytes())
        head = bytes(self.data[:8])
        if head[:4] != MAGIC or int.from_bytes(head[4:], "big") not in VERSIONS:
            raise ValueError(
                f"{path} is no Qt resource archive: it begins with {head!r}, where {MAGIC!r} and a version of "
                f"{VERSIONS} are needed. Take the .rcc files of gcompris-qt-data."
            )
        self.tree, self.contents, self.names = self._numbers(8, ">III")
        self.node_bytes = 14 if head[7] == 1 else 22  # from version 2 on a node ends with a date

    @property
    def sha256(self) -> str:
        """Of the whole file."""
        return hashlib.sha256(self.data).hexdigest()

    def files(self) -> dict[str, tuple[int, memoryview]]:
        """Flags and content, as it is stored, of every file by its path (``folder/name``).

        Raises:
            ValueError: the archive is truncated, its tree is none, or a name would lead out of a folder.
        """
        files: dict[str, tuple[int, memoryview]] = {}
        seen = {0}
        folders = [(0, "")]
        while folders:
            node, prefix = folders.pop()
            for child in self._children(node):
                if child in seen:  # two ways lead to it: perhaps a circle
                    raise self._broken(f"node {child} of its tree is in two folders")
                seen.add(child)
                path = prefix + self._name(child)
                if self._flags(child) & FOLDER:
                    folders.append((child, f"{path}/"))
                else:  # of one path in several languages, the first
                    files.setdefault(path, (self._flags(child), self._content(child)))
        return files

    def _children(self, node: int) -> range:
        """The nodes of a folder, all of which lie in the file."""
        if not self._flags(node) & FOLDER:
            raise self._broken("its tree does not begin with a folder")
        count, first = self._numbers(self._place(node) + 6, ">II")
        self._slice(self._place(first), count * self.node_bytes)
        return range(first, first + count)

    def _place(self, node: int) -> int:
        return self.tree + node * self.node_bytes

    def _flags(self, node: int) -> int:
        return self._numbers(self._place(node) + 4, ">H")[0]

    def _name(self, node: int) -> str:
        """A node's name, UTF-16 after its length and a hash."""
        start = self.names + self._numbers(self._place(node), ">I")[0]
        length = self._numbers(start, ">H")[0]
        name = bytes(self._slice(start + 6, 2 * length)).decode("utf-16-be", errors="replace")
        if name in ("", ".", "..") or re.search(r"[/\\:\0]", name):
            raise self._broken(f"{name!r} is no name of a file")
        return name

    def _content(self, node: int) -> memoryview:
        start = self.contents + self._numbers(self._place(node) + 10, ">I")[0]
        return self._slice(start + 4, self._numbers(start, ">I")[0])

    def _numbers(self, start: int, layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, self._slice(start, struct.calcsize(layout)))

    def _slice(self, start: int, length: int) -> memoryview:
        if start + length > len(self.data):
            raise self._broken(f"it has {len(self.data)} bytes and points to {length} at {start}")
        return self.data[start : start + length]

    def _broken(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is truncated or broken: {what}. A whole .rcc is needed: unpack it again.")


def decoded(flags: int, body: memoryview) -> tuple[bytes | memoryview | None, str]:
    """A file's content, or None and why there is none; zstd is passed over, it would take another dependency."""
    if flags == STORED:
        return body, ""
    if flags != ZLIB:
        return None, "compressed with zstd" if flags == ZSTD else "compressed in an unknown way"
    length = int.from_bytes(body[:4], "big")
    try:
        content = zlib.decompressobj().decompress(body[4:], length + 1)  # no bomb: a byte more than announced, at most
    except zlib.error:
        return None, "with broken zlib"
    return (content, "") if len(content) == length else (None, "with broken zlib")
