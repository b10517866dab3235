"""A folder of media as items: files of one name but for the ending are one item.

Unusual: the folder is read directory by directory, each in the order of its names and before those in it, so that a
walk can begin in the middle, and no more than one directory's names are in memory. All pictures of a name are the
item's; of its sounds, videos and texts the first by name is, and a warning tells which files are passed over. A link
whose file is not there (as git-annex and DVC leave them) is an item that says so, and only plain files are opened.
"""

from __future__ import annotations

import codecs
import logging
import os
import stat
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

SUFFIXES = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    "audio": (".wav", ".ogg", ".flac", ".mp3", ".m4a", ".opus"),
    "video": (".mp4", ".mkv", ".webm", ".mov", ".avi"),
    "text": (".txt",),
}
FIELD_OF = {suffix: field for field, suffixes in SUFFIXES.items() for suffix in suffixes}
MAX_NAMED = 3  # files that a warning names
MAX_TEXT = 1 << 24  # bytes of a text file; the rest would be cut from the sequence anyway
MARKS = {  # of byte order, at a text's beginning; that of UTF-32 begins as that of UTF-16 does
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

logger = logging.getLogger(__name__)


class BadLine:
    """What stands for a line, row or text file that cannot be an item; it becomes a row with this reason."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def is_media(path: Path) -> bool:
    """Whether a file is a field of an item, by its ending."""
    return path.suffix.lower() in FIELD_OF


def walk(
    folder: Path, leave_out: Collection[Path] = (), start: tuple[str, ...] = ()
) -> Iterator[tuple[Path, list[str]]]:
    """Directories with the sorted names of their files, from the directory ``start`` (parts of its path) on.

    Links to directories are not followed: they may lead back up.
    """
    with os.scandir(folder) as entries:
        kinds = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
    for name in {place.name for place in leave_out} & set(kinds):
        if (folder / name).resolve() in leave_out:
            del kinds[name]
    if not start:
        yield folder, sorted(name for name, is_directory in kinds.items() if not is_directory)
    for name in sorted(name for name, is_directory in kinds.items() if is_directory):
        if not start or name >= start[0]:
            yield from walk(folder / name, leave_out, start[1:] if start and name == start[0] else ())


class FolderItems:
    """A folder of media; a position is (directory, number of the item in it)."""

    def __init__(self, folder: Path, leave_out: Collection[Path] = ()) -> None:
        self.folder = folder
        self.leave_out = leave_out

    def positions(self) -> Iterator[tuple[str, int]]:
        """As `Items.positions`; at the end it warns of files that are in no item."""
        count, first = 0, []
        for directory, groups in self._groups():
            for number, names in enumerate(groups.values()):
                yield directory, number
                for name, taken in _passed_over(names):
                    count += 1
                    if count <= MAX_NAMED:
                        first.append(f"{Path(directory) / name} ({taken} is taken)")
        if count:
            logger.warning(
                "%s: %d file(s) are passed over, since an item has one sound, one video and one text, the first by "
                "name: %s%s. Give them names of their own to have them embedded.",
                *(self.folder, count, ", ".join(first), ", ..." if count > len(first) else ""),
            )

    def items(self, position: Any = None) -> Iterator[tuple[str, Any, bytes]]:
        start, skipped = position or ("", 0)
        for directory, groups in self._groups(start):
            for number, (stem, names) in enumerate(groups.items()):
                if directory != start or number >= skipped:
                    name = f"{directory}/{stem}" if directory else stem
                    yield name, *self._item(name, [self.folder / directory / entry for entry in names])

    def files(self) -> Iterator[tuple[str, int, int]]:
        for directory, groups in self._groups():
            for name in (name for names in groups.values() for name in names):
                status = _status(self.folder / directory / name)
                yield f"{directory}/{name}", *status

    def _groups(self, start: str = "") -> Iterator[tuple[str, dict[str, list[str]]]]:
        """Directories with the names of each item's files by what they have in common."""
        for directory, names in walk(self.folder, self.leave_out, tuple(Path(start).parts)):
            groups: dict[str, list[str]] = {}
            for name in names:
                if is_media(Path(name)) and not os.path.isdir(directory / name):  # such as a link to one
                    groups.setdefault(Path(name).stem, []).append(name)
            place = directory.relative_to(self.folder)
            yield ("" if place == Path() else place.as_posix()), groups

    def _item(self, name: str, paths: list[Path]) -> tuple[Any, bytes]:
        try:
            return self._read(name, paths)
        except OSError as error:
            return BadLine(f"text: {error}"), str(error).encode(errors="surrogateescape")

    def _read(self, name: str, paths: list[Path]) -> tuple[Any, bytes]:
        item: dict[str, Any] = {"id": name}
        seen = [repr([(path.name, _status(path)[0]) for path in paths]).encode(errors="surrogateescape")]
        for path in paths:
            field = FIELD_OF[path.suffix.lower()]
            value = str(path)
            if field == "text":
                if field in item:  # passed over: whatever is the matter with it
                    continue
                content = _content(path)
                seen.append(content)
                try:
                    value = _decoded(content)
                except UnicodeDecodeError as error:
                    return BadLine(f"text: {path.name} is {not_text(error)}"), b"\0".join(seen)
            if field == "image" and field in item:
                item.setdefault("images", []).append(value)
            else:
                item.setdefault(field, value)
        return item, b"\0".join(seen)


def _content(path: Path) -> bytes:
    """The beginning of a text file.

    Raises:
        OSError: it is not there, closed to us, or no plain file: a pipe would keep who opens it waiting for ever.
    """
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(f"{path} is not a regular file")
    with path.open("rb") as file:
        return file.read(MAX_TEXT)


def _decoded(content: bytes) -> str:
    """Text in UTF-8, or as its byte order mark says; a character that was cut at ``MAX_TEXT`` is left out.

    Raises:
        UnicodeDecodeError: it is not.
    """
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8")
    return codecs.getincrementaldecoder(encoding)().decode(content, final=len(content) < MAX_TEXT)


def not_text(error: UnicodeDecodeError) -> str:
    """What is the matter with bytes that are not UTF-8, and what to do."""
    name = "UTF-8" if error.encoding.startswith("utf-8") else f"UTF-8, nor {error.encoding} as it begins"
    return (
        f"not {name} ({error.reason} at byte {error.start}); write it as UTF-8, such as with iconv -f LATIN1 -t UTF-8"
    )


def _passed_over(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Of an item's sorted files those that are not part of it, each with the one that is in its place."""
    taken: dict[str, str] = {}
    for name in names:
        field = FIELD_OF[Path(name).suffix.lower()]
        if taken.setdefault(field, name) != name and field != "image":
            yield name, taken[field]


def _status(path: Path) -> tuple[int, int]:
    """Bytes and time of change; zeros of a file that is gone or closed to us: its item will say so."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns
