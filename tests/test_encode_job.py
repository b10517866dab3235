"""`sail encode` keeps its promises: killed at any moment, workers that die, files that break, items that change."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from sentence_transformers import SentenceTransformer

from modeling_sail import encode_files, encode_job, encode_output, encode_source, encode_window, encode_workers
from modeling_sail.cli import main
from modeling_sail.encode_job import Options, encode, encode_here
from modeling_sail.encode_output import Output
from modeling_sail.encode_source import read_items
from modeling_sail.encode_workers import POISON, PreparerSettings, Workers
from modeling_sail.fingerprints import model_hash

from .conftest import picture, sound

ITEMS = 15


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    """A JSONL file of ragged items, two of them bad and two of one id."""
    folder = tmp_path_factory.mktemp("items")
    for seed in range(3):
        picture(seed).save(folder / f"{seed}.png")
        soundfile.write(folder / f"{seed}.wav", sound(seed, 0.4 + seed)[0], 8000)
    rows: list[dict] = [{"id": f"i{number}", "title": "many words " * (number * 7 % 5)} for number in range(ITEMS)]
    for number in range(0, ITEMS, 2):
        rows[number] |= {"image": f"{number % 3}.png"}
    for number in range(0, ITEMS, 3):
        rows[number] |= {"audio": f"{number % 3}.wav"}
    rows[5] = {"id": "i5", "image": "gone.png"}
    rows[9]["id"] = "i8"
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]) + "{broken\n", encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(encode_job, "WINDOW", 3)


@pytest.fixture
def run(tiny_folder, items):
    """Encode; in windows of 3 and shards of 6 items, without worker processes unless asked for."""

    def run(out: Path, source: Path = items, model: Path = tiny_folder, **options) -> dict:
        chosen = Options(**{"shard_size": 6, "workers": 0, "device": "cpu", **options})
        return encode(model, source, Output(out), chosen, encode_here)

    return run


def content(out: Path) -> dict[str, bytes]:
    """Every file of a result, hidden ones too, by its name."""
    if out.is_file():
        assert not out.with_name(out.name + ".parts").exists()
        return {"": out.read_bytes()}
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_rows_are_the_items_in_order_with_the_vectors_of_sentence_transformers(run, items, tiny_folder, tmp_path):
    done = run(tmp_path / "x.parquet", task="i2i", side="query", dim=40, workers=0)
    assert (done["ok"], done["error"], done["new"]) == (13, 2, 15)
    rows = pq.read_table(tmp_path / "x.parquet").to_pylist()
    given = list(read_items(items))
    assert (
        [row["id"] for row in rows]
        == [name for name, _ in given]
        == [*(f"i{n}" for n in range(9)), "i8", *(f"i{n}" for n in range(10, 14)), "15"]
    )
    assert [row["status"] for row in rows] == ["error" if place in (5, 14) else "ok" for place in range(15)]
    assert "gone.png" in rows[5]["reason"] and rows[5]["reason"].startswith("image: ")
    good = [place for place in range(15) if place not in (5, 14)]
    other = SentenceTransformer(str(tiny_folder), trust_remote_code=True, device="cpu", truncate_dim=40)
    expected = other.encode([given[place][1] for place in good], prompt_name="i2i_query", normalize_embeddings=True)
    np.testing.assert_allclose([rows[place]["embedding"] for place in good], expected, atol=1e-5)


def test_a_folder_holds_the_rows_of_the_file_and_says_whose_they_are(run, tiny_folder, tmp_path):
    run(tmp_path / "x.parquet")
    run(tmp_path / "x")
    names = ["manifest.json", *(f"part-0000{number}.parquet" for number in range(3))]
    assert sorted(content(tmp_path / "x")) == names
    whole = pq.read_table(tmp_path / "x.parquet")
    assert pq.read_table([tmp_path / "x" / name for name in names[1:]]).to_pylist() == whole.to_pylist()
    manifest = json.loads((tmp_path / "x" / "manifest.json").read_text())
    assert manifest["finished"] and [shard["items"] for shard in manifest["shards"]] == [6, 6, 3]
    assert manifest["model"] == model_hash(tiny_folder) == whole.schema.metadata[b"model"].decode()
    assert manifest["settings"]["instruction"] and manifest["settings"]["dim"] == 64


def run_killed(run, out: Path, writes: int, after: bool) -> bool:
    """Run in a child that is killed at its n-th write, before or after the rename; whether it came that far."""
    child = os.fork()
    if child == 0:
        real, left = encode_files.put_in_place, [writes]

        def dies(partial: Path, path: Path) -> None:
            left[0] -= 1
            if left[0] == 0 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            real(partial, path)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        encode_files.put_in_place = dies
        try:
            run(out)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("name", ["x.parquet", "x"])
def test_killed_again_and_again_the_files_are_those_of_a_run_in_one_go(name, run, tmp_path):
    (tmp_path / "whole").mkdir()
    run(tmp_path / "whole" / name)
    chooser, kills = random.Random(name), 0
    while run_killed(run, tmp_path / name, chooser.choice((1, 2)), chooser.random() < 0.6):
        kills += 1
        assert kills < 40, "a run must go on from the last one's work"
    assert kills > 4
    assert run(tmp_path / name)["new"] == 0
    assert content(tmp_path / name) == content(tmp_path / "whole" / name)


def test_what_was_done_is_not_done_again(run, tmp_path):
    assert run_killed(run, tmp_path / "x", 4, True)  # manifest, plan and two windows of three items
    assert run(tmp_path / "x")["new"] == ITEMS - 6


@pytest.mark.parametrize("broken", ["part-00000.parquet", ".work/windows-1/0.parquet", ".work/plan.json"])
def test_a_file_that_was_cut_is_made_again(broken, run, tmp_path):
    run(tmp_path / "whole")
    assert run_killed(run, tmp_path / "x", 7, True)
    path = tmp_path / "x" / broken
    assert path.exists()
    path.write_bytes(path.read_bytes()[:-20])
    run(tmp_path / "x")
    assert content(tmp_path / "x") == content(tmp_path / "whole")


def test_a_shard_of_a_finished_job_that_is_lost_is_made_again(run, tmp_path):
    run(tmp_path / "x")
    before = content(tmp_path / "x")
    (tmp_path / "x" / "part-00001.parquet").unlink()
    assert run(tmp_path / "x")["new"] == 6
    assert content(tmp_path / "x") == before


@pytest.mark.parametrize("name", ["x.parquet", "x"])
@pytest.mark.parametrize("finished", [True, False])
def test_another_job_is_refused_with_what_differs(name, finished, run, items, tiny_folder, tmp_path):
    out, source, model = tmp_path / name, tmp_path / "items.jsonl", tmp_path / "model"
    for path in items.parent.iterdir():
        shutil.copy2(path, tmp_path)
    shutil.copytree(tiny_folder, model)

    def here(**options) -> dict:
        return run(out, **{"source": source, "model": model, **options})

    here() if finished else run_killed(lambda out: here(), out, 6, True)
    before, text = content(out) if finished else None, source.read_text()
    for options, said in [
        ({"dim": 32}, "dim: 64 there, 32 now"),
        ({"task": None}, "instruction: "),
        ({"dtype": "bfloat16"}, "dtype: "),
        ({"shard_size": 5}, "shard_size: 6 there, 5 now"),
        ({"token_budget": 7}, "token_budget: "),
    ]:
        with pytest.raises(ValueError, match=f"is of another job .*{said}"):
            here(**options)
    source.write_text(text + '{"title": "one more"}\n')
    with pytest.raises(ValueError, match="items: 15 there, 16 now"):
        here()
    source.write_text(text.replace("many", "MANY", 1))
    with pytest.raises(ValueError, match="have changed since"):
        here()
    source.write_text(text)  # as it was, but for the time
    (model / "README.md").write_text("a new card is no new model")
    assert here()["error"] == 2
    settings = json.loads((model / "processor_config.json").read_text())
    (model / "processor_config.json").write_text(json.dumps({**settings, "max_tokens": 99}))
    with pytest.raises(ValueError, match="other model"):
        here()
    assert before is None or content(out) == before


@pytest.mark.parametrize("writes", [3, 6])  # a window is done; a shard and one more window are
def test_an_item_that_changed_after_a_kill_is_noticed(writes, run, items, tmp_path):
    source, text = tmp_path / "items.jsonl", items.read_text()
    source.write_text(text)
    assert run_killed(lambda out: run(out, source), tmp_path / "x", writes, True)
    last = "i0" if writes == 3 else "i6"
    source.write_text(text.replace(f'"{last}"', '"XX"'))
    with pytest.raises(ValueError, match="'XX' on have changed since"):
        run(tmp_path / "x", source)


def test_a_source_that_shrinks_while_it_is_read_is_noticed(run, items, tmp_path, monkeypatch):
    source, real = tmp_path / "items.jsonl", Output.keep_plan
    source.write_text(items.read_text())

    def shrink(*args) -> None:
        real(*args)
        source.write_text("".join(items.read_text().splitlines(keepends=True)[:8]))

    monkeypatch.setattr(Output, "keep_plan", shrink)
    with pytest.raises(ValueError, match="fewer items than at the start"):
        run(tmp_path / "x", source)
    assert not (tmp_path / "x" / "part-00001.parquet").exists()


def test_a_second_process_is_refused(run, tmp_path):
    with Output(tmp_path / "x").locked(), pytest.raises(ValueError, match="another process writes"):
        run(tmp_path / "x")
    assert run(tmp_path / "x")["ok"] == 13


def test_a_full_disk_is_said_and_what_is_done_stays(run, tmp_path, monkeypatch):
    run(tmp_path / "whole")
    real, left = pq.ParquetWriter.write_table, [4]

    def full(self, *args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path / "x")
    assert not list((tmp_path / "x").rglob("*.partial"))
    assert run(tmp_path / "x")["new"] == ITEMS - 6
    assert content(tmp_path / "x") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("theirs.parquet", "no whole file of `sail encode`"),
        ("theirs", "holds other things and no manifest.json"),
        ("file", "is a file"),
        ("new.csv", "X.parquet, or as a folder"),
        ("s3://bucket/x", "only --engine ray"),
    ],
)
def test_what_is_not_ours_is_not_written_over(name, message, run, tmp_path):
    (tmp_path / "theirs").mkdir()
    for path in (tmp_path / "theirs.parquet", tmp_path / "theirs" / "photo.png", tmp_path / "file"):
        path.write_bytes(b"precious")
    with pytest.raises(ValueError, match=message):
        run(name if "://" in name else tmp_path / name)
    assert {path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == {b"precious"}


@pytest.mark.parametrize("options", [{"dim": 0}, {"dim": 65}, {"dtype": "int8"}, {"shard_size": 0}, {"workers": -1}])
def test_an_option_that_cannot_be_is_named(options, run, tmp_path):
    with pytest.raises(ValueError, match=next(iter(options))):
        run(tmp_path / "x", **options)


def test_bfloat16_is_of_the_model_and_the_file_stays_float32(run, tmp_path):
    run(tmp_path / "wide.parquet")
    run(tmp_path / "half.parquet", dtype="bfloat16")
    wide, half = (
        np.array([v for v in pq.read_table(tmp_path / name).column("embedding").to_pylist() if v])
        for name in ("wide.parquet", "half.parquet")
    )
    assert 1e-5 < np.abs(wide - half).max() < 0.1
    np.testing.assert_allclose(np.linalg.norm(half, axis=1), 1, atol=1e-5)


# --- workers --------------------------------------------------------------------------------------------------------


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


def test_an_item_of_more_pictures_than_the_model_takes_is_a_row_and_harms_no_other(run, items, tmp_path):
    source = tmp_path / "many.jsonl"
    rows = [{"title": "one"}, {"images": [str(items.parent / "0.png")] * 17}, {"title": "three"}]
    source.write_text("\n".join(map(json.dumps, rows)))
    run(tmp_path / "x.parquet", source)
    found = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert [row["status"] for row in found] == ["ok", "error", "ok"]
    assert found[1]["reason"] == "images: 17 pictures and frames, more than the model's 16"


def test_a_process_that_cannot_be_started_is_no_items_fault(tiny_folder, monkeypatch):
    def no_handles() -> None:
        raise OSError(errno.EMFILE, "too many open files")

    with Workers(PreparerSettings(tiny_folder, "", 9), 1) as workers:
        monkeypatch.setattr(encode_workers, "_context", lambda: SimpleNamespace(Pipe=no_handles))
        with pytest.raises(RuntimeError, match="cannot be started .*too many open files"):
            list(workers.prepared([(encode_window.Window(0, 0, ["a"], ["a"], ""), True)]))


def test_a_user_who_stops_the_command_sees_one_line(items, tiny_folder, tmp_path, monkeypatch, capsys):
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(encode_job, "open_source", stopped)
    assert main(["encode", str(items), "--model", str(tiny_folder), "--out", str(tmp_path / "x")]) == 130
    assert capsys.readouterr().err == "sail encode: stopped\n"


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


def test_the_hash_of_a_model_is_of_what_decides_its_vectors(tiny_folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    known = model_hash(model)
    (model / "semantic_ids.safetensors").write_bytes(b"codes")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "transformers_version": "0"}))
    assert model_hash(model) == known == model_hash(tiny_folder)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    assert model_hash(model) != known
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        model_hash(model)


def test_the_lock_of_a_job_that_was_just_removed_is_not_taken_for_a_lock(tmp_path, monkeypatch):
    output, real, removed = Output(tmp_path / "x"), encode_output.fcntl.flock, []

    def late(handle, how):
        real(handle, how)
        if not removed:
            removed.append(shutil.rmtree(output.work))  # the other one finished between our opening and locking

    monkeypatch.setattr(encode_output.fcntl, "flock", late)
    with output.locked():
        assert (output.work / "lock").exists()
