"""`sail encode` keeps its promises: killed at any moment, files that break, items that change, another job's result."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from contextlib import nullcontext

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from modeling_sail import encode_job, whole_folder
from modeling_sail.cli import main
from modeling_sail.encode_output import Output
from modeling_sail.encode_source import read_items
from modeling_sail.fingerprints import model_hash
from modeling_sail.kernels_sail import plain_kernels

from . import encode_jobs
from .encode_jobs import ITEMS, content, run_killed

items, run, small_windows = encode_jobs.items, encode_jobs.run, encode_jobs.small_windows


def test_a_job_keeps_little_of_what_onednn_makes_and_closes_what_a_failed_start_opened(run, tmp_path, monkeypatch):
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY"):
        monkeypatch.delenv(name, raising=False)
    seen, closed = [], []

    def fails(*args, **kwargs):
        seen.append(os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY"))
        raise OSError("no weights")

    close = encode_job.Workers.__exit__
    monkeypatch.setattr(encode_job.Workers, "__exit__", lambda *args: (closed.append(True), close(*args))[1])
    monkeypatch.setattr(encode_job, "load_module", fails)
    with pytest.raises(OSError, match="no weights"):
        run(tmp_path / "x.parquet", workers=1)
    assert seen == ["64"] and closed == [True]
    assert "ONEDNN_PRIMITIVE_CACHE_CAPACITY" not in os.environ


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


def test_rows_end_to_end_have_the_same_vectors_and_are_another_job(run, tmp_path):
    found = []
    for packed in (False, True):
        with plain_kernels():  # which pack only where that is asked for
            assert run(tmp_path / f"{packed}.parquet", packed=packed, workers=0)["ok"] == 13
        rows = pq.read_table(tmp_path / f"{packed}.parquet").to_pylist()
        found.append([row["embedding"] for row in rows if row["status"] == "ok"])
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)
    assert found[1] != found[0]  # another order of the same sums
    with pytest.raises(ValueError, match="packed"):
        run(tmp_path / "True.parquet")


def test_an_adapter_beside_the_weights_is_another_model(tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    save_file({"lora": torch.zeros(2)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    hashes = [model_hash(tiny_folder), model_hash(folder)]
    save_file({"lora": torch.ones(2)}, folder / "adapter_model.safetensors")
    assert len({*hashes, model_hash(folder)}) == 3


def test_a_folder_of_an_adapter_alone_is_said_to_be_one(run, tmp_path):
    (tmp_path / "adapter").mkdir()
    with pytest.raises(ValueError, match="holds no model; build one: sail build"):
        run(tmp_path / "x", model=tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="adapter holds only an adapter; merge it into its base model") as caught:
        run(tmp_path / "x", model=tmp_path / "adapter")
    assert "sail build" not in str(caught.value) and not (tmp_path / "x").exists()


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


@pytest.mark.parametrize("library", ["torch", "transformers"])
@pytest.mark.parametrize("finished", [True, False])
def test_other_versions_of_what_computes_the_vectors_are_refused(library, finished, run, tmp_path, monkeypatch):
    run(tmp_path / "x") if finished else run_killed(run, tmp_path / "x", 4, True)
    known = getattr(encode_job, library).__version__
    assert json.loads((tmp_path / "x" / "manifest.json").read_text())["settings"][library] == known
    with monkeypatch.context() as patch:
        patch.setattr(getattr(encode_job, library), "__version__", "99.9.0")
        with pytest.raises(
            ValueError, match=rf"{library}: '.*' there, '99.9.0' now\); go on with what it was begun with"
        ):
            run(tmp_path / "x")
    assert run(tmp_path / "x")["ok"] == 13


def test_a_node_of_a_cluster_with_another_version_is_refused(run, tmp_path, monkeypatch):
    real = Output.claim

    def elsewhere(*args) -> None:
        real(*args)
        monkeypatch.setattr(encode_job.torch, "__version__", "99.9.0")

    monkeypatch.setattr(Output, "claim", elsewhere)
    with pytest.raises(ValueError, match=r"has torch 99.9.0, not .*install the same"):
        run(tmp_path / "x")


def test_another_number_of_threads_is_another_job(run, tmp_path):
    assert run_killed(lambda out: run(out, threads=1), tmp_path / "x", 4, True)
    with pytest.raises(ValueError, match=r"threads: 1 there, 2 now\); go on with what it was begun with"):
        run(tmp_path / "x", threads=2)
    assert run(tmp_path / "x")["ok"] == 13, "by default as many as torch has, which here is one"


def test_the_model_computes_with_the_jobs_threads_and_the_callers_come_back(run, tmp_path, monkeypatch):
    found, before = [], torch.get_num_threads()

    def seen(*_: object) -> None:
        found.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr(encode_job, "embed", seen)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "x", threads=before + 1)
    assert (found, torch.get_num_threads()) == ([before + 1], before)
    assert json.loads((tmp_path / "x" / "manifest.json").read_text())["settings"]["threads"] == before + 1


def test_actors_of_ray_have_one_thread_where_no_number_is_given(items, tiny_folder, tmp_path, monkeypatch):
    encode_ray = pytest.importorskip("modeling_sail.encode_ray", reason="Ray is not installed", exc_type=ImportError)
    monkeypatch.setattr(encode_ray, "_cluster", lambda _: nullcontext())
    monkeypatch.setattr(encode_ray, "encode", lambda model, source, out, options, engine: {"given": options.threads})
    for threads, given in ((None, 1), (3, 3)):
        options = encode_job.Options(threads=threads)
        assert encode_ray.encode_on_ray(tiny_folder, items, str(tmp_path / "x"), options) == {"given": given}


OPTIONS = [
    *({"dim": 0}, {"dim": 65}, {"dim": 1.5}, {"dtype": "int8"}, {"shard_size": 0}, {"shard_size": None}),
    *({"workers": -1}, {"workers": "two"}, {"workers": 1.0}, {"workers": True}, {"token_budget": "9"}),
    *({"item_seconds": 0}, {"item_seconds": float("nan")}, {"item_seconds": float("inf")}, {"item_seconds": "1"}),
    *({"threads": 0}, {"threads": -1}, {"threads": 1.0}, {"threads": 1025}),
]


@pytest.mark.parametrize("options", OPTIONS)
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


def test_an_address_without_ray_is_refused(items, tiny_folder, tmp_path, capsys):
    out = tmp_path / "x"
    arguments = ["encode", str(items), "--model", str(tiny_folder), "--out", str(out), "--address", "10.0.0.1:6379"]
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--address 10.0.0.1:6379" in line and "add --engine ray" in line
    assert not out.exists()


def test_a_user_who_stops_the_command_sees_one_line(items, tiny_folder, tmp_path, monkeypatch, capsys):
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(encode_job, "open_source", stopped)
    assert main(["encode", str(items), "--model", str(tiny_folder), "--out", str(tmp_path / "x")]) == 130
    assert capsys.readouterr().err == "sail encode: stopped\n"


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


def test_the_hash_of_a_model_is_of_the_weights_that_are_loaded(tiny_folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    known, weights = model_hash(model), load_file(model / "model.safetensors")
    names, index = list(weights), model / "model.safetensors.index.json"
    save_file({names[0]: weights[names[0]] + 1, "more": weights[names[1]]}, model / "model-00001-of-00002.safetensors")
    index.write_text(json.dumps({"weight_map": {names[0]: "model-00001-of-00002.safetensors"}}))
    assert model_hash(model) == known, "shards beside a whole file are not loaded"
    for number, half in enumerate((names[::2], names[1::2])):
        save_file({name: weights[name] for name in half}, model / f"half-{number}.safetensors")
    (model / "model.safetensors").unlink()
    index.write_text(
        json.dumps({"weight_map": {name: f"half-{place % 2}.safetensors" for place, name in enumerate(names)}})
    )
    assert model_hash(model) == known, "shards that the index does not name are not loaded"
    (model / "half-1.safetensors").unlink()
    with pytest.raises(ValueError, match="names half-1.safetensors, not in the folder"):
        model_hash(model)
    for broken in ("{", "[]", '{"weight_map": 3}'):
        index.write_text(broken)
        with pytest.raises(ValueError, match="is no index of shards"):
            model_hash(model)
    index.unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        model_hash(model)


def test_the_lock_of_a_job_that_was_just_removed_is_not_taken_for_a_lock(tmp_path, monkeypatch):
    output, real, removed = Output(tmp_path / "x"), whole_folder.fcntl.flock, []

    def late(handle, how):
        real(handle, how)
        if not removed:
            removed.append(shutil.rmtree(output.work))  # the other one finished between our opening and locking

    monkeypatch.setattr(whole_folder.fcntl, "flock", late)
    with output.locked():
        assert (output.work / "lock").exists()
