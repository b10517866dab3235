"""A folder that is there whole or not at all, written by one process at a time: of `sail index` and `sail export`.

Unusual: all that a run needs beside its folder is in ``<out>.partial``: a lock that ends with the process, however that
ends; the new folder; and the old one for the moment in which they change places. A run that was killed leaves it, and
the next one takes it over: it puts an old folder back that had no successor yet, and removes the rest.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from .encode_files import put_in_place

LOCK, NEW, OLD = "lock", "new", "old"


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """An empty folder to write in; at the end of the block it takes the place of ``out``, its bytes on the disk.

    A block that raises leaves ``out`` as it was. What may be replaced is the caller's to say, within the block
    (`refuse_other_things`), where no other process can put anything there.

    Raises:
        ValueError: another process is at it, or ``<out>.partial`` is not of such a run.
    """
    place = out.resolve()  # a link stays one, and two names of a folder have one lock
    work = place.with_name(place.name + ".partial")
    try:
        with locked(work / LOCK, out):
            _take_over(work, place)
            try:
                (work / NEW).mkdir()
                yield work / NEW
                _move(work, place)
            finally:
                _clear(work, place)
    finally:
        with suppress(OSError):  # not empty: another process is in it
            work.rmdir()


def _take_over(work: Path, place: Path) -> None:
    """Clear what a run that was killed has left."""
    if other := sorted({path.name for path in work.iterdir()} - {LOCK, NEW, OLD}):
        raise ValueError(f"{work} is needed to write {place}, but holds {other[0]}: remove it, or name another --out")
    _clear(work, place)


def _clear(work: Path, place: Path) -> None:
    """Remove a run's folders; where its old one has no successor in its place, that goes back there."""
    if (work / OLD).exists() and not place.exists():
        os.replace(work / OLD, place)
    for name in (NEW, OLD):
        shutil.rmtree(work / name, ignore_errors=True)


def _move(work: Path, place: Path) -> None:
    """Bring what is new to the disk, then to its place; what is old goes aside for that."""
    for path in (work / NEW).rglob("*"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    if place.exists():
        os.replace(place, work / OLD)
    put_in_place(work / NEW, place)


# --- one at a time --------------------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path, out: Path) -> Iterator[None]:
    """Keep other processes out, by a file that is removed at the end. The lock ends with the process in any case.

    Args:
        path: of the file; its folder is made where there is none.
        out: what is named in the error.

    Raises:
        ValueError: another process is at it.
    """
    handle = _opened(path, out)
    while handle is None:
        handle = _opened(path, out)
    with handle:
        try:
            yield
        finally:
            if _same(handle, path):
                path.unlink()


def _opened(path: Path, out: Path) -> TextIO | None:
    """The lock's file, locked; None where the one that held it removed it after it was opened here."""
    path.parent.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):  # exist_ok would look again, when its folder may be gone
        path.parent.mkdir()
    try:
        handle = path.open("a")
    except FileNotFoundError:  # its folder was removed at this moment
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.close()
        if isinstance(error, BlockingIOError):
            raise ValueError(f"another process writes {out} at this moment; wait for it") from None
        raise
    if _same(handle, path):
        return handle
    handle.close()
    return None


def _same(handle: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False


# --- what is in the way ---------------------------------------------------------------------------------------------


def refuse_other_things(out: Path, known: Collection[str], what: str) -> None:
    """Only nothing, an empty folder or a folder of known files may be in the way.

    Args:
        out: a folder to be.
        known: names of files that may be replaced; none where what is there is not ours.
        what: what they are, for the error.

    Raises:
        ValueError: something else is there.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    others = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()} - set(known)
    if not known or others or not out.is_dir():
        other = f"{min(others)} is in {out}" if others else f"{out} exists"
        raise ValueError(f"{other}, which is no {what} to replace; name another --out or remove it")
