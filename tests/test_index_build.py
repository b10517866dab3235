"""Building an index: by size, as hard as asked, the same bytes from one file or many, in little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modeling_sail import index_build
from modeling_sail.cli import main
from modeling_sail.embedding_files import BATCH, open_embeddings
from modeling_sail.index import load_embeddings, load_index, unit
from modeling_sail.index_build import build_index

from .vectors import clustered, table_of, write

pytestmark = pytest.mark.usefixtures("quick_index")


def test_the_kind_goes_by_size(tmp_path, catalogue, monkeypatch) -> None:
    def kind(precision="float32") -> str:
        return build_index(catalogue[0], tmp_path / "index", precision=precision)["kind"]

    assert kind() == "flat"
    monkeypatch.setattr(index_build, "FLAT_UP_TO", 2999)
    assert kind() == kind("int8") == "ivf"
    monkeypatch.setattr(index_build, "IVF_UP_TO", 2999)
    assert (kind(), kind("binary")) == ("opq", "ivf")


def test_recall_that_is_not_reached_is_said(tmp_path, capsys) -> None:
    rng = np.random.default_rng(0)
    path = write(tmp_path / "x.parquet", unit(rng.normal(size=(3000, 64)).astype(np.float32)))
    arguments = ["index", str(path), "--out", str(tmp_path / "index"), "--kind", "flat", "--precision", "binary"]
    assert main([*arguments, "--first-pass", "8", "--recall", "0.9"]) == 0
    assert "(asked 0.9: NOT reached)" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    assert not manifest["recall_reached"] and manifest["recall"]["at_10"] < 0.9
    assert manifest["parameters"]["factor"] == 64
    assert set(manifest["bytes_per_item"]) == {"searched", "disk"} and manifest["ms_per_query"] > 0


def test_more_recall_is_more_effort(catalogue, tmp_path) -> None:
    efforts = []
    for recall in (0.05, 0.999):
        manifest = build_index(catalogue[0], tmp_path / "index", kind="ivf", recall=recall)
        efforts.append((manifest["recall"]["at_10"], manifest["parameters"]["nprobe"]))
    assert efforts[0] < efforts[1] and efforts[1][0] >= 0.999


def folder_hashes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


@pytest.mark.parametrize("kind", ["flat", "ivf", "opq", "hnsw"])
def test_shards_of_any_size_and_one_file_give_the_same_bytes_twice(tmp_path, kind) -> None:
    vectors, bad = clustered(1200), {0, 5, 700, 1199}
    write(tmp_path / "x.parquet", vectors, bad)
    shards = tmp_path / "shards"
    shards.mkdir()
    cuts = [0, 1, 400, 1200]
    for number, (start, end) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
        here = {place - start for place in bad if start <= place < end}
        form = pa.list_(pa.float32(), 48) if number == 1 else None
        write(shards / f"part-{number:05d}.parquet", vectors[start:end], here, form, first=start)
    (shards / "manifest.json").write_text(json.dumps({"finished": True, "model": "m"}))
    for source, out in ((tmp_path / "x.parquet", "a"), (tmp_path / "x.parquet", "b"), (shards, "c")):
        manifest = build_index(source, tmp_path / out, kind=kind)
        assert (manifest["items"], manifest["left_out"]) == (1196, 4)
    assert folder_hashes(tmp_path / "a") == folder_hashes(tmp_path / "b") == folder_hashes(tmp_path / "c")
    names, loaded = load_embeddings(shards)
    assert names == [f"item {place}" for place in range(1200) if place not in bad]
    assert (loaded == np.delete(vectors, sorted(bad), axis=0)).all()
    assert load_index(tmp_path / "c").manifest["model"] == load_index(shards).manifest["model"] == "m"


def test_batches_are_arrows_own_memory_and_few_rows(tmp_path) -> None:
    path = tmp_path / "x.parquet"
    write(path, clustered(2 * BATCH + 5, 4))
    batches = list(open_embeddings(path).vectors())
    assert max(map(len, batches)) <= BATCH and sum(map(len, batches)) == 2 * BATCH + 5
    assert not any(batch.flags.owndata or batch.flags.writeable for batch in batches)


MEASURED = """
import sys, threading, time
from pathlib import Path
from modeling_sail.index_build import build_index

def own():  # without pages of the memory map, which the system takes back when it likes
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024

def watch():
    while True:
        seen.append(own())
        time.sleep(0.01)

seen = [own()]
threading.Thread(target=watch, daemon=True).start()
build_index(Path(sys.argv[1]), Path(sys.argv[2]), kind="flat", precision="binary", recall=0.01)
print(max(seen) - seen[0])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_items(tmp_path) -> None:
    """What a process that builds takes, at one row group of 15 and of 123 MB."""
    peaks = []
    for items in (10_000, 80_000):
        values = np.random.default_rng(0).normal(size=items * 384).astype(np.float32)
        columns = {
            "id": [str(place) for place in range(items)],
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(values), 384),
            "status": ["ok"] * items,
        }
        pq.write_table(pa.table(columns), tmp_path / "x.parquet")  # one row group, as other writers do
        command = [sys.executable, "-c", MEASURED, str(tmp_path / "x.parquet"), str(tmp_path / f"index{items}")]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        peaks.append(float(done.stdout))
    assert peaks[1] - peaks[0] < 50, f"{peaks} MB; the vectors are {70_000 * 384 * 4 >> 20} MB more"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--kind", "annoy"], "kind=annoy"),
        (["--precision", "int4"], "precision=int4"),
        (["--kind", "opq", "--precision", "int8"], "product codes already"),
        (["--recall", "1.5"], "recall=1.5"),
        (["--first-pass", "0"], "first_pass=0"),
        (["--seed", "99999999999"], "seed=99999999999 cannot be; --seed takes 0 to 2147483646"),
        (["--seed", "2147483647"], "seed=2147483647 cannot be"),
        (["--seed", "-1"], "seed=-1 cannot be"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(catalogue, tmp_path, monkeypatch, more, message, capsys) -> None:
    monkeypatch.setattr(index_build, "open_embeddings", lambda place: pytest.fail("embeddings were read first"))
    assert main(["index", str(catalogue[0]), "--out", str(tmp_path / "index"), *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("kind", ["ivf", "opq"])
def test_the_last_seed_builds(catalogue, tmp_path, kind) -> None:
    assert build_index(catalogue[0], tmp_path / "index", kind=kind, seed=index_build.LAST_SEED)["seed"] == 2**31 - 2


def test_broken_embeddings_are_one_clear_error_each(tmp_path) -> None:
    vectors = clustered(20)
    whole = write(tmp_path / "x.parquet", vectors)
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(whole.read_bytes()[:500])
    garbled = tmp_path / "garbled.parquet"
    garbled.write_bytes(whole.read_bytes()[:4] + b"\xff" * 3000 + whole.read_bytes()[3004:])
    infinite = vectors.copy()
    infinite[7, 3] = np.inf
    ragged = table_of(["a", "b"], vectors[:2]).set_column(
        1, "embedding", pa.array([[1.0, 2.0], [1.0]], pa.list_(pa.float32()))
    )
    missing = table_of(["a", "b"], vectors[:2]).set_column(
        1, "embedding", pa.array([[1.0, 2.0], None], pa.list_(pa.float32()))
    )
    unfinished, lost, empty = (tmp_path / name for name in ("unfinished", "lost", "empty"))
    for folder in (unfinished, lost, empty):
        folder.mkdir()
    write(unfinished / "part-00000.parquet", vectors)
    (unfinished / "manifest.json").write_text('{"finished": false}')
    (lost / "manifest.json").write_text('{"finished": true, "shards": [{"file": "part-00000.parquet"}]}')
    models = tmp_path / "models"
    models.mkdir()
    for number in range(2):
        write(models / f"part-{number}.parquet", vectors, model=f"model {number}")
    for name, table in {"ragged": ragged, "missing": missing, "text": pa.table({"id": ["a"]})}.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
    for place, message in [
        (tmp_path / "nowhere", "there is no file"),
        (cut, "cut.parquet is not a whole Parquet file"),
        (garbled, "garbled.parquet is not a whole Parquet file"),
        (write(tmp_path / "inf.parquet", infinite), "item 7 holds numbers that are not finite"),
        (write(tmp_path / "bad.parquet", vectors, set(range(20))), "no item that could be encoded"),
        (tmp_path / "ragged.parquet", "item b has not 2 numbers"),
        (tmp_path / "missing.parquet", "item b has not 2 numbers"),
        (tmp_path / "text.parquet", "lacks the columns"),
        (unfinished, "not finished"),
        (lost, "lacks 1 of its 1 shards"),
        (empty, "holds no Parquet files"),
        (models, "2 models"),
    ]:
        for use in (load_index, lambda place: build_index(place, tmp_path / "index")):
            with pytest.raises(ValueError, match=message) as error:
                use(place)
            assert "\n" not in str(error.value)
    assert not (tmp_path / "index").exists()
