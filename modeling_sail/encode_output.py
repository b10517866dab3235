"""Where `sail encode` writes: one Parquet file, or a folder of shards with a manifest; what is there, and whose it is.

Unusual: a result that is there is never written over by another job; the message says what differs. All that is needed
to go on after a kill lies in ``.work`` of the folder (for one file, ``<out>.parts``), which the end of the job removes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from .encode_files import put_in_place, read_json, read_tables, said_of, write_file, write_json
from .encode_source import Shard, Source
from .encode_window import Window
from .whole_folder import locked

FORMAT = 1  # of manifests and files
MANIFEST, PLAN = "manifest.json", ".work/plan.json"
NOT_FOLDERS = (".json", ".jsonl", ".csv", ".tsv", ".npy", ".npz", ".arrow", ".feather", ".safetensors", ".pt")

JOB = ("format", "model", "settings")  # what decides the bytes of a result, given the items; the model by its hash
Job = dict[str, Any]
Manifest = dict[str, Any]


class Output:
    """A file or folder on a local disk (or one that is mounted).

    Args:
        out: ``X.parquet`` for one file; anything else is a folder.

    Raises:
        ValueError: a file of another kind is there, or asked for.
    """

    def __init__(self, out: str | Path) -> None:
        if "://" in str(out):
            raise ValueError(f"--out {out}: only --engine ray writes to a URL; name a path.")
        self.out = out = Path(out)
        self.single = out.suffix in (".parquet", ".pq") and not out.is_dir()
        self.folder = out.with_name(out.name + ".parts") if self.single else out
        self.work = self.folder / ".work"
        if not self.single and out.suffix in NOT_FOLDERS:
            raise ValueError(f"--out {out}: embeddings are written as X.parquet, or as a folder of Parquet files.")
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--out {out}: {self.folder} is a file; name another place, or X.parquet.")
        if not self.single and out.is_dir():
            self._refuse_foreign(str(out), {path.name for path in out.iterdir()})

    def _refuse_foreign(self, out: str, names: set[str]) -> None:
        if names and self.work.name not in names and not self.manifest():
            raise ValueError(f"--out {out}: the folder holds other things and no {MANIFEST}; name a new or empty one.")

    @property
    def name(self) -> str:
        """What is there, for messages: a single file once it is whole."""
        return str(self.out if self.out.exists() else self.folder)

    # -- the job -----------------------------------------------------------------------------------------------------

    def manifest(self) -> Manifest | None:
        """What the folder says of its job; None where there is none."""
        return self._read(MANIFEST)

    def finished(self, job: Job) -> Manifest | None:
        """The manifest of a job that is done, or None.

        Raises:
            ValueError: what is there is of another job, or of another program.
        """
        found = self.manifest()
        if self.single and self.out.exists():
            found = (said_of(self.out) or {}).get("manifest")
            if found is None:
                raise ValueError(
                    f"--out {self.out}: this is no whole file of `sail encode`; name another, or delete it."
                )
        if found is not None:
            self._refuse_another(found, job)
        return found if found and found["finished"] else None

    def whole(self, manifest: Manifest) -> bool:
        """Whether all shards of a finished job are there still."""
        job = {name: manifest[name] for name in JOB}
        shards = [Shard(each["index"], each["first"], each["items"], (0, None)) for each in manifest["shards"]]
        return self.single or all(self.shard_done(shard, len(shards), job) for shard in shards)

    def claim(self, job: Job, source: Mapping[str, Any]) -> None:
        """Begin or take up a job.

        Raises:
            ValueError: another job's work is there, or one of other items.
        """
        found = self.manifest()
        if found is None:
            self._write(MANIFEST, {**job, "source": dict(source), "finished": False})
        else:
            self._refuse_another(found, job)
            self.refuse_other_items(found, source)

    def refuse_other_items(self, found: Manifest, source: Mapping[str, Any]) -> None:
        """Raises ValueError where a manifest's source is not this one, by its names and sizes."""
        known = {name: value for name, value in found["source"].items() if name != "name"}  # it may have been moved
        self._refuse(_differences(known, {name: source.get(name) for name in known}, "items: "))

    def _refuse_another(self, found: Manifest, job: Job) -> None:
        self._refuse(_differences({name: found.get(name) for name in job}, job))

    def _refuse(self, differences: list[str]) -> None:
        if differences:
            raise ValueError(
                f"{self.name} is of another job ({'; '.join(differences)}); "
                "go on with what it was begun with, delete it, or name another --out."
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out. The lock ends with the process, however that ends.

        Raises:
            ValueError: another process is at it.
        """
        with locked(self.work / "lock", self.out):
            yield

    # -- the plan ----------------------------------------------------------------------------------------------------

    def plan(self, source: Source, size: int) -> tuple[list[Shard], dict[str, Any], bool]:
        """Shards of ``size`` items, what identifies the items, and whether their files are known to be unchanged."""
        identity, times = source.identity()
        kept = self._read(PLAN)
        if kept and kept.get("key") == [size, identity, times]:
            shards, known = [Shard(*fields) for fields in kept["shards"]], True
        else:
            shards, known = source.shards(size), False
        items = shards[-1].first + shards[-1].items
        return shards, {"name": source.path.name, "items": items, **identity}, known

    def keep_plan(self, source: Source, size: int, shards: Sequence[Shard]) -> None:
        """Let the next start do without counting, as long as the files' names, sizes and times stay."""
        content = [list(asdict(shard).values()) for shard in shards]
        self._write(PLAN, {"key": [size, *source.identity()], "shards": content})

    # -- shards and windows ------------------------------------------------------------------------------------------

    def shard_done(self, shard: Shard, count: int, job: Job) -> dict[str, Any] | None:
        """What a shard's file says, if it is whole and of this job."""
        return same_shard(self._said(shard_name(shard.index, count)), shard, job)

    def finish(self, manifest: Manifest) -> None:
        """Make the result of its shards, and remove the work."""
        if not self.single:
            self._write(MANIFEST, manifest)
            self.clear()
            return
        shards = [self.folder / shard["file"] for shard in manifest["shards"]]
        job = {name: manifest[name] for name in JOB}
        said = {"job": job, "manifest": manifest}
        write_file(self.work / "whole.parquet", chain.from_iterable(map(read_tables, shards)), said)
        put_in_place(self.work / "whole.parquet", self.out)
        self.clear()

    def clear(self) -> None:
        """Remove what a job that is finished may have left when it was killed at the very end."""
        shutil.rmtree(self.folder if self.single else self.work, ignore_errors=True)

    # -- files by their names in the folder --------------------------------------------------------------------------

    def _read(self, name: str) -> dict[str, Any] | None:
        return read_json(self.folder / name)

    def _write(self, name: str, content: Any) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)

    def _said(self, name: str) -> dict[str, Any] | None:
        return said_of(self.folder / name)


def shard_name(index: int, count: int) -> str:
    """``part-00007.parquet``: as wide as it takes for the names to sort in order."""
    return f"part-{index:0{max(5, len(str(count - 1)))}d}.parquet"


def same_shard(said: dict[str, Any] | None, shard: Shard, job: Job) -> dict[str, Any] | None:
    """What a file says of its shard, if it is this one, of this job."""
    if said is None or said.get("job") != job or said["rows"] != shard.items:
        return None
    found = said.get("shard") or {}
    return found if (found.get("first"), found.get("items")) == (shard.first, shard.items) else None


class WindowFiles:
    """The windows of shards that are not whole yet.

    Args:
        folder: a folder for each shard is made in it.
        job: what is said in each file.
    """

    def __init__(self, folder: Path, job: Job) -> None:
        self.folder = folder
        self.job = job

    def path(self, shard: int, number: int) -> Path:
        """Where a window is."""
        return self.folder / f"windows-{shard}" / f"{number}.parquet"

    def done(self, window: Window) -> dict[str, Any] | None:
        """What a window's file says, if it is whole.

        Raises:
            ValueError: it was made of other items.
        """
        said = said_of(self.path(window.shard, window.number))
        if said is None or said.get("job") != self.job:
            return None
        if said["window"]["digest"] != window.digest:
            raise ValueError(
                f"the items from {window.names[0]!r} on have changed since they were encoded; put them back as they "
                "were, or delete the unfinished result and begin again."
            )
        return said["window"]

    def write(self, window: Window, table: Any, said: dict[str, Any]) -> None:
        """Keep a window's rows."""
        path = self.path(window.shard, window.number)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, [table], {"job": self.job, "window": said})

    def join(self, said: dict[str, Any], windows: int, path: Path) -> None:
        """Make a shard's file of its windows, and remove them."""
        index = said["index"]
        tables = chain.from_iterable(read_tables(self.path(index, number)) for number in range(windows))
        write_file(path, tables, {"job": self.job, "shard": said})
        shutil.rmtree(self.folder / f"windows-{index}", ignore_errors=True)


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str = "") -> list[str]:
    """Lines such as ``dim: 64 there, 32 now``."""
    lines = []
    for name in sorted({*found, *wanted}):
        one, other = found.get(name), wanted.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            lines += _differences(one, other, where)
        elif one != other:
            hashes = name in ("model", "files")
            lines.append(f"{where}other {name}" if hashes else f"{where}{name}: {one!r} there, {other!r} now")
    return lines
