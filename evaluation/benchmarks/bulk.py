"""`sail encode` of a corpus as a user runs it: whole, and killed with SIGKILL at random moments; is it the same file?

Unusual: nothing is measured from within. The command runs as a process; its memory is that of the whole tree, each
shared page counted once; after a kill, what is left of the tree after ten seconds is counted too (nothing should be).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from ...encode_source import BadLine, read_items
from .figures import figure
from .items import WORDS, made_items, write_media

MEDIA = 32  # pictures and sounds that the made items share
GRACE_SECONDS = 10.0  # for what outlives a killed process
LOOK_SECONDS = 0.25


def bulk_benchmark(
    model: Path,
    items: int,
    kills: int,
    smaller: Sequence[int] = (),
    real: Sequence[Path] = (),
    work: Path | None = None,
    options: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:
    """Figures of runs in one go, and of one that is killed.

    Args:
        model: the model's folder.
        items: how many are made up; one in 16 has a picture, one in 32 a sound, the others are text.
        kills: how often the last run is killed.
        smaller: numbers of made items of further runs in one go: neither an item's cost nor the memory should depend
            on the number.
        real: JSONL files or folders whose items are added to those of the run that is killed.
        work: where to write; a temporary folder by default.
        options: more of the command line, such as ``--workers 2``.

    Raises:
        ValueError: a run that is no smaller one, no items, fewer kills than none. RuntimeError: the command failed;
            with what it said last.
    """
    if items < 1 or kills < 0:
        raise ValueError(f"--items {items}, --kills {kills}: at least one item, and no fewer kills than 0.")
    if not all(0 < count < items for count in smaller):
        raise ValueError(f"--smaller {list(smaller)}: above 0 and fewer than --items {items} each.")
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder, before = Path(name), (0, 0.0)
        for count in sorted({*smaller, items}):
            corpus = folder / f"{count}.jsonl"
            write_corpus(corpus, count)
            seconds, peak = _in_one_go(model, corpus, options)
            yield from _run_figures(count, seconds, peak, before)
            before = count, seconds
        total = items
        if real:
            corpus = folder / "real.jsonl"
            total = write_corpus(corpus, items, real)
            seconds, peak = _in_one_go(model, corpus, options)
            yield from _run_figures(total, seconds, peak)
        came, left, within = -1, 0, seconds
        while came < kills:  # done before its last kill, if other work left the machine since: within less time, then
            killed = folder / f"killed-{within}.parquet"
            command = _command(model, corpus, killed, options)
            came, outlived = _kill_often(command, kills, within)
            left, within = left + outlived, within / 2
        again, _ = _finished(command)
        case = f"{total} items, killed {came} times"
        differ = _sha256(killed) != _sha256(corpus.with_suffix(".parquet"))
        yield figure("bulk", case, "kills", "", came, None, "")
        yield figure("bulk", case, "files that differ", "", float(differ), None, "")
        yield figure("bulk", case, "processes that outlived a kill", "", left, None, "")
        yield figure("bulk", case, "the last run", "s", again, seconds, "a run in one go")


def ray_benchmark(
    model: Path, items: int, workers: Sequence[int], work: Path | None = None, cores_each: int | None = None
) -> Iterator[dict[str, Any]]:
    """Items a second of ``--engine ray`` by number of workers, each of which computes with one thread.

    A worker's model takes one core and its decoding another's part, so one worker has more than its share of a small
    machine. With ``cores_each`` N workers, and Ray itself, have N times so many cores and no more.

    The start of the cluster and of the models, timed with a handful of items, is not counted.

    Args:
        model, work: as for `bulk_benchmark`.
        items: as there; a worker has eight shards of them or more.
        workers: numbers of them; the first is what the others stand beside.
        cores_each: CPUs of the machine, as the system counts them, for each worker; by default all for any number.

    Raises:
        ValueError: fewer items than 16 a worker, no worker, or not so many cores here. RuntimeError: the command
            failed.
    """
    if not workers or min(workers) < 1 or items < 16 * max(workers):
        raise ValueError(f"--workers {list(workers)}, --items {items}: at least 1 worker, and 16 items for each.")
    workers = list(dict.fromkeys(workers))
    here = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if cores_each is not None and not 0 < cores_each * max(workers) <= len(here):
        found = f"{len(here)} CPUs are here" if here else "only Linux can keep a process on some CPUs"
        raise ValueError(f"--cores-each {cores_each} for {max(workers)} workers: {found}.")
    few = 2 * max(workers)
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder, speeds, vectors = Path(name), {}, {}
        for count in (few, items):
            write_corpus(folder / f"{count}.jsonl", count)
        for number in workers:
            seconds = {}
            for count in (few, items):
                out = folder / f"{number}-{count}"
                options = ["--engine", "ray", "--workers", str(number)]
                options += ["--shard-size", str(-(-count // (8 * max(workers))))]
                command = _command(model, folder / f"{count}.jsonl", out, options)
                cores = here[: number * cores_each] if cores_each is not None else None
                seconds[count], _ = _finished(command, {"OMP_NUM_THREADS": "1"}, cores)
            speeds[number] = (items - few) / (seconds[items] - seconds[few])
            vectors[number] = {path.name: _sha256(path) for path in sorted(out.glob("*.parquet"))}
            each = f", {cores_each} core{'s' * (cores_each > 1)} each" if cores_each is not None else ""
            case, unit = f"{items} items, {_said(number)} of one thread{each}", "items/s"
            name = "items per second after the start"
            if number == workers[0]:
                yield figure("ray", case, name, unit, speeds[number], None, "")
                continue
            first, peer = workers[0], _said(workers[0])
            yield figure("ray", case, name, unit, speeds[number], speeds[first], peer)
            changed = sum(vectors[number].get(file) != told for file, told in vectors[first].items())
            yield figure("ray", case, "files that differ", "", changed, None, peer)


def _said(workers: int) -> str:
    return f"{workers} worker{'s' * (workers > 1)}"


def _run_figures(
    count: int, seconds: float, peak: int, before: tuple[int, float] = (0, 0.0)
) -> Iterator[dict[str, Any]]:
    """Of a run in one go; what an item costs without the start is told from the run ``before``, of fewer items."""
    case, (fewer, shorter) = f"{count} items", before
    yield figure("bulk", case, "items per second, start included", "items/s", count / seconds, None, "")
    yield figure("bulk", case, "peak memory of all its processes", "MB", peak / 1e6, None, "")
    if fewer:
        each = (seconds - shorter) / (count - fewer) * 1e3
        yield figure("bulk", case, f"cost of an item beyond the first {fewer}", "ms", each, None, "")


def _in_one_go(model: Path, corpus: Path, options: Sequence[str]) -> tuple[float, int]:
    """Seconds and bytes at the peak of a run that writes beside its corpus."""
    return _finished(_command(model, corpus, corpus.with_suffix(".parquet"), options))


def write_corpus(path: Path, count: int, real: Sequence[Path] = ()) -> int:
    """Write ``count`` made items, the same for the same count, and real ones to a JSONL file; how many in all."""
    chooser = random.Random(0)
    folder = path.with_suffix("")
    folder.mkdir()
    media = write_media(made_items(MEDIA, "omni-full"), folder)
    with path.open("w", encoding="utf-8") as lines:
        for number in range(count):
            item = {"id": f"made-{number}", "title": " ".join(chooser.choices(WORDS, k=chooser.randint(3, 40)))}
            for field, every in (("image", 16), ("audio", 32)):
                if number % every == 0:
                    item[field] = str(Path(media[chooser.randrange(MEDIA)][field]).absolute())
            lines.write(json.dumps(item) + "\n")
        for source in real:
            for name, item in read_items(source.absolute()):
                if isinstance(item, dict):
                    item = {**item, "id": f"{source.name}-{name}"}
                lines.write(("{" if isinstance(item, BadLine) else json.dumps(item)) + "\n")
                count += 1
    return count


def _command(model: Path, source: Path, out: Path, options: Sequence[str]) -> list[str]:
    program = [sys.executable, "-m", "modeling_sail", "encode"]
    return [*program, str(source), "--model", str(model), "--out", str(out), *options]


def _finished(
    command: list[str], environment: Mapping[str, str] | None = None, cores: Sequence[int] | None = None
) -> tuple[float, int]:
    """Run to the end, on these cores alone: seconds, and bytes at the peak."""
    whole = {**os.environ, **(environment or {})}
    if cores is not None:
        pinned = f"import os, sys; os.sched_setaffinity(0, {list(cores)}); os.execv(sys.executable, sys.argv[1:])"
        command = [sys.executable, "-c", pinned, *command]
    begun, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as said, subprocess.Popen(command, stdout=said, stderr=said, env=whole) as process:
        while process.poll() is None:
            peak = max(peak, sum(map(_memory, _tree(process.pid))))
            time.sleep(LOOK_SECONDS)
        seconds = time.perf_counter() - begun
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{said.read()[-2000:].decode(errors='replace')}")
    return seconds, peak


def _kill_often(command: list[str], kills: int, seconds: float) -> tuple[int, int]:
    """Start and kill so often, each time after a random share of a whole run; how often it came to a kill, and how
    many processes outlived one.
    """
    chooser, came, left = random.Random(0), 0, 0
    for _ in range(kills):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                process.wait(timeout=chooser.uniform(0, seconds / (kills + 1)))
                if process.returncode:
                    raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")
                return came, left  # it was done before
            except subprocess.TimeoutExpired:
                tree = _tree(process.pid)
                process.kill()
                came += 1
        _, alive = psutil.wait_procs(tree, timeout=GRACE_SECONDS)
        left += len(alive)
    return came, left


def _tree(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _memory(process: psutil.Process) -> int:
    """Bytes that a process holds, pages that it shares divided among those who do."""
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
