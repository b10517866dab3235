"""The processes of `sail encode` that decode: they die, hang, fail or never begin; only bad items are harmed."""

from __future__ import annotations

import errno
import json
import os
import signal
from multiprocessing import forkserver, process
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from modeling_sail import encode_job, encode_source, encode_window, encode_workers
from modeling_sail.encode_workers import POISON, STUCK, PreparerSettings, Workers

from . import encode_jobs
from .encode_jobs import content

items, run, small_windows = encode_jobs.items, encode_jobs.run, encode_jobs.small_windows


class Made:
    """In another process what an expression gives there: test modules are not imported in workers."""

    def __init__(self, expression: str) -> None:
        self.expression = expression

    def __reduce__(self) -> tuple:
        return eval, (self.expression,)

    def make(self) -> object:
        return eval(self.expression).make()


class Bomb:
    """Ends the process that receives it, as a decoder's segmentation fault would."""

    def __reduce__(self) -> tuple:
        return os._exit, (1,)


def test_workers_change_nothing_and_their_death_costs_a_retry(run, tmp_path, monkeypatch):
    run(tmp_path / "alone")
    run(tmp_path / "two", workers=2)
    assert content(tmp_path / "two") == content(tmp_path / "alone")
    real, asked = encode_workers._Worker.ask, []

    def killed_from_outside(worker, given):
        asked.append(len(given))
        if len(asked) in (2, 4):
            os.kill(worker._process.pid, signal.SIGKILL)
        return real(worker, given)

    monkeypatch.setattr(encode_workers._Worker, "ask", killed_from_outside)
    run(tmp_path / "killed", workers=1)
    assert len(asked) == 5 + 2, "two windows must have been tried again"
    assert content(tmp_path / "killed") == content(tmp_path / "alone")


def test_an_item_that_kills_its_process_is_a_row_and_harms_no_other(run, tmp_path, monkeypatch):
    run(tmp_path / "whole.parquet")
    real = encode_source.JsonLines._item
    monkeypatch.setattr(
        encode_source.JsonLines, "_item", lambda self, number, line: Bomb() if number == 8 else real(self, number, line)
    )
    run(tmp_path / "x.parquet", workers=2)
    rows, whole = (pq.read_table(tmp_path / name).to_pylist() for name in ("x.parquet", "whole.parquet"))
    assert (rows[7]["id"], rows[7]["status"], rows[7]["reason"]) == ("8", "error", POISON)
    assert [row["id"] for row in rows[8:]] == [row["id"] for row in whole[8:]]
    for row, other in zip(rows[:7] + rows[8:], whole[:7] + whole[8:], strict=True):
        assert row["status"] == other["status"]
        np.testing.assert_allclose(row["embedding"] or [], other["embedding"] or [], atol=1e-5)


def slow(seconds: float) -> Made:
    """An item that takes so long to read; its title is "slow"."""
    return Made(
        f"type('Slow', (dict,), {{'get': lambda self, name: [__import__('time').sleep({seconds} * (name == 'id')), "
        "dict(self).get(name)][1]})(title='slow')"
    )


def test_an_item_that_never_ends_is_a_row_and_those_after_it_have_time_of_their_own(run, tmp_path, monkeypatch):
    source = tmp_path / "items.jsonl"
    source.write_text('{"title": "endless"}\n{"title": "slow"}\n{"title": "slow"}\n{"title": "good"}\n')
    monkeypatch.setattr(encode_job, "WINDOW", 4)
    real, seconds = encode_source.JsonLines._item, {1: 9999.0, 2: 2.6, 3: 2.6}
    monkeypatch.setattr(
        encode_source.JsonLines,
        "_item",
        lambda self, number, line: slow(seconds[number]) if number in seconds else real(self, number, line),
    )
    run(tmp_path / "x.parquet", source, workers=1, item_seconds=5.0)
    rows = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["error", "ok", "ok", "ok"]
    assert rows[0]["reason"] == STUCK.format(5) and "5 seconds, twice" in rows[0]["reason"]


def test_a_process_that_never_begins_is_given_up(monkeypatch):
    monkeypatch.setattr(encode_workers, "ITEM_SECONDS", 0.2)
    monkeypatch.setattr(encode_workers, "STARTS", 2)
    settings = Made("type('Late', (), {'make': lambda self: __import__('time').sleep(9999)})()")
    with Workers(settings, 1, 0.1) as workers, pytest.raises(RuntimeError, match="killed 2 times before it began"):
        list(workers.prepared([(TWO, True)]))


def test_a_killed_process_that_does_not_end_is_waited_for_only_so_long(monkeypatch):
    monkeypatch.setattr(encode_workers, "END_SECONDS", 0.1)
    asleep = "lambda self: lambda items: __import__('time').sleep(15)"  # ends, lest a wait without limit hang the test
    worker = encode_workers._Worker(Made(f"type('Asleep', (), {{'make': {asleep}}})()"), 0.1)
    worker._start()
    process = worker._process
    monkeypatch.setattr(process, "kill", lambda: None)  # as one that waits for a dead disk
    with pytest.raises(encode_workers._Stuck):
        worker.ask(["a"])
    assert process.is_alive(), "it was waited for to its end"
    assert worker._process is None, "the next item is not for this process"
    type(process).kill(process)


TWO = encode_window.Window(0, 0, ["a", "b"], ["a", "b"], "")
GOOD = "__import__('modeling_sail.encode_window', fromlist=['']).Prepared([], [''])"
FAULT = r"2 items from 'a' on cannot be prepared together \(ZeroDivisionError: division by zero\)"


@pytest.mark.parametrize(
    ("fault", "count", "message"),
    [
        ("1 / 0", 0, FAULT),
        ("1 / 0", 1, FAULT),
        ("bytearray(1 << 62)", 0, "memory is short for 2 items from 'a' on"),
        ("bytearray(1 << 62)", 1, "is killed, .* memory is short"),
        ("__import__('os').kill(__import__('os').getpid(), 9)", 1, "is killed, .* memory is short"),
    ],
)
def test_what_fails_when_a_window_is_joined_is_said_as_what_it_is(fault, count, message):
    prepare = f"lambda self: lambda items: {fault} if len([*items]) > 1 else {GOOD}"
    with (
        Workers(Made(f"type('Faulty', (), {{'make': {prepare}}})()"), count) as workers,
        pytest.raises(RuntimeError, match=message),
    ):
        list(workers.prepared([(TWO, True)]))


def test_a_long_path_of_temporary_files_is_named_with_the_way_out(tiny_folder, tmp_path, monkeypatch):
    place = tmp_path / ("long" * 40)
    place.mkdir()
    monkeypatch.setattr(encode_workers.forkserver, "ensure_running", forkserver.ForkServer().ensure_running)
    monkeypatch.setitem(process.current_process()._config, "tempdir", str(place))  # where sockets are put
    with pytest.raises(RuntimeError, match="path too long.* set TMPDIR to a shorter path .* or --workers 0"):
        Workers(PreparerSettings(tiny_folder, "", 9), 1).__enter__()


def test_an_item_of_more_pictures_than_the_model_takes_is_a_row_and_harms_no_other(run, items, tmp_path):
    source = tmp_path / "many.jsonl"
    rows = [{"title": "one"}, {"images": [str(items.parent / "0.png")] * 17}, {"title": "three"}]
    source.write_text("\n".join(map(json.dumps, rows)))
    run(tmp_path / "x.parquet", source)
    found = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert [row["status"] for row in found] == ["ok", "error", "ok"]
    assert found[1]["reason"].startswith("images: 17 pictures")


def test_a_process_that_cannot_be_started_is_no_items_fault(tiny_folder, monkeypatch):
    def no_handles() -> None:
        raise OSError(errno.EMFILE, "too many open files")

    with Workers(PreparerSettings(tiny_folder, "", 9), 1) as workers:
        monkeypatch.setattr(encode_workers, "_context", lambda: SimpleNamespace(Pipe=no_handles))
        with pytest.raises(RuntimeError, match="cannot be started .*too many open files"):
            list(workers.prepared([(encode_window.Window(0, 0, ["a"], ["a"], ""), True)]))


def test_workers_that_cannot_begin_say_why(tmp_path):
    with (
        Workers(PreparerSettings(tmp_path / "nowhere", "", 9), 1) as workers,
        pytest.raises(RuntimeError, match="cannot begin"),
    ):
        list(workers.prepared([(encode_window.Window(0, 0, ["a"], ["a"], ""), True)]))


# --- memory ---------------------------------------------------------------------------------------------------------


def peak_of(run, source: Path, out: Path) -> int:
    """Bytes that a child's memory reached while it encoded."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        Path("/proc/self/clear_refs").write_text("5")
        run(out, source, shard_size=100_000)
        lines = Path("/proc/self/status").read_text().splitlines()
        os.write(writer, next(line.split()[1] for line in lines if line.startswith("VmHWM")).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as said:
        return int(said.read()) << 10


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured through Linux's /proc")
def test_memory_does_not_grow_with_the_source(run, tmp_path, monkeypatch):
    monkeypatch.setattr(encode_job, "WINDOW", 64)
    line = json.dumps({"junk": "x" * 30_000}) + "\n"  # a field that is none: a long item that costs no time
    peaks = []
    for count in (200, 3000):
        source = tmp_path / f"{count}.jsonl"
        source.write_text('{"title": "good"}\n' + line * count)
        peaks.append(peak_of(run, source, tmp_path / f"{count}.parquet"))
    assert source.stat().st_size > 85e6
    assert peaks[1] - peaks[0] < 30e6
