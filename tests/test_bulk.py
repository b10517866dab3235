"""The proof of `sail encode` runs: the command is killed as a user's would be, and its workers go with it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from modeling_sail.evaluation.benchmarks import bulk
from modeling_sail.evaluation.benchmarks.bulk import bulk_benchmark, write_corpus

from modeling_sail.encode_source import read_items


@pytest.mark.slow
def test_a_command_that_is_killed_leaves_no_process_and_ends_with_the_same_file(
    tiny_folder, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(bulk, "GRACE_SECONDS", 60.0)  # where other tests fill the machine, to end takes its turn, too
    real = tmp_path / "real.jsonl"
    real.write_text('{"title": "a real item"}\n{broken\n')
    figures = bulk_benchmark(tiny_folder, 600, 1, [64], [real], tmp_path, ["--shard-size", "256", "--workers", "1"])
    found = {(line["case"], line["figure"]): line["ours"] for line in figures}
    (killed,) = {case for case, _ in found if "killed" in case}
    assert found[killed, "kills"] == 1
    assert found[killed, "files that differ"] == 0
    assert found[killed, "processes that outlived a kill"] == 0
    assert found["602 items", "peak memory of all its processes"] > 100
    assert ("600 items", "cost of an item beyond the first 64") in found


def test_a_run_that_is_faster_than_the_one_before_is_killed_within_less_time(tmp_path, monkeypatch) -> None:
    waited, fates = [], iter([(0, 1), (1, 0), (2, 0)])

    def kill_often(command, kills, seconds):
        waited.append(seconds)
        Path(command[-1]).write_bytes(b"the same")
        return next(fates)

    def finished(command, *_):
        Path(command[-1]).write_bytes(b"the same")
        return 8.0, 0

    monkeypatch.setattr(bulk, "_command", lambda model, source, out, options: [str(out)])
    monkeypatch.setattr(bulk, "_kill_often", kill_often)
    monkeypatch.setattr(bulk, "_finished", finished)
    found = {line["figure"]: line["ours"] for line in bulk_benchmark(tmp_path, 20, 2, work=tmp_path)}
    assert waited == [8.0, 4.0, 2.0]
    assert (found["kills"], found["processes that outlived a kill"], found["files that differ"]) == (2, 1, 0)


def test_a_command_that_fails_is_not_taken_for_one_that_is_done() -> None:
    with pytest.raises(RuntimeError, match="ended with status 2"):
        bulk._kill_often([sys.executable, "-c", "raise SystemExit(2)"], 1, 60.0)
    assert bulk._kill_often([sys.executable, "-c", ""], 1, 60.0) == (0, 0)


def test_a_corpus_is_the_same_each_time_and_holds_the_real_items(tmp_path) -> None:
    real = tmp_path / "real.jsonl"
    real.write_text('{"id": 3, "title": "a real item"}\n{broken\n')
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        assert write_corpus(tmp_path / name / "x.jsonl", 40, [real]) == 42
    one, other = ((tmp_path / name / "x.jsonl").read_text() for name in ("a", "b"))
    assert one.replace(str(tmp_path / "a"), str(tmp_path / "b")) == other
    items = [item for _, item in read_items(tmp_path / "a" / "x.jsonl")]
    assert json.loads(one.splitlines()[40]) == {"id": "real.jsonl-3", "title": "a real item"}
    assert sum("image" in item for item in items[:40]) == 3
    assert sum("audio" in item for item in items[:40]) == 2


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores are told on Linux alone")
def test_a_command_can_be_kept_on_some_cores() -> None:
    core = min(os.sched_getaffinity(0))
    asked = "import os, sys; sys.exit(os.sched_getaffinity(0) != {int(sys.argv[1])})"
    bulk._finished([sys.executable, "-c", asked, str(core)], cores=[core])
    with pytest.raises(RuntimeError, match="failed"):
        bulk._finished([sys.executable, "-c", asked, "-1"], cores=[core])
