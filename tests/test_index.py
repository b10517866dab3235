"""Indexes: exact where they say so, measured where not; the same from one file or many; what is broken is refused."""

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
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_sail import index_build, index_recall
from modeling_sail.cli import main
from modeling_sail.embedding_files import BATCH, open_embeddings
from modeling_sail.index import index_of, load_embeddings, load_index, require_model, unit
from modeling_sail.index_build import build_index

APPROXIMATE = [
    ("flat", "int8"),
    ("flat", "binary"),
    ("ivf", "float32"),
    ("ivf", "int8"),
    ("ivf", "binary"),
    ("ivf-pq", "float32"),
    ("opq", "float32"),
    ("hnsw", "float32"),
    ("hnsw", "int8"),
    ("hnsw", "binary"),
]


def clustered(items: int, dim: int = 48, seed: int = 0) -> np.ndarray:
    """(N, D) unit vectors around a centre for each 20, leading dimensions largest."""
    rng = np.random.default_rng(seed)
    scale = 1 / np.sqrt(1 + np.arange(dim) / 8)
    centres = rng.normal(size=(max(1, items // 20), dim)) * scale
    near = centres[rng.integers(0, len(centres), items)] + 0.7 * rng.normal(size=(items, dim)) * scale
    return unit(near.astype(np.float32))


def table_of(names, vectors, bad: set[int] = frozenset(), kind=None) -> pa.Table:
    rows = [None if place in bad else row for place, row in enumerate(vectors.tolist())]
    return pa.table(
        {
            "id": pa.array(names, pa.string()),
            "embedding": pa.array(rows, kind or pa.list_(pa.float32())),
            "status": ["error" if place in bad else "ok" for place in range(len(names))],
            "reason": ["broken" if place in bad else "" for place in range(len(names))],
        }
    )


def write(
    path: Path, vectors, bad: set[int] = frozenset(), kind=None, model: str | None = None, first: int = 0
) -> Path:
    table = table_of([f"item {first + place}" for place in range(len(vectors))], vectors, bad, kind)
    pq.write_table(table.replace_schema_metadata({"model": model} if model else None), path)
    return path


def exact(vectors, queries, top):
    """(Q, top) places and cosines by NumPy, in float64."""
    one, other = (part / np.linalg.norm(part.astype(np.float64), axis=1, keepdims=True) for part in (queries, vectors))
    scores = one @ other.T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    return order, np.take_along_axis(scores, order, axis=1)


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    """Fewer held queries, and fewer rows for product codes: 256 centroids need no more to be some."""
    monkeypatch.setattr(index_recall, "QUERIES", 100)
    monkeypatch.setattr(index_build, "CODE_ROWS", 512)


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory) -> tuple[Path, np.ndarray]:
    vectors = clustered(3000)
    return write(tmp_path_factory.mktemp("embeddings") / "x.parquet", vectors), vectors


# --- what search promises ---------------------------------------------------------------------------------------------


def test_exact_search_is_that_of_numpy_from_memory_and_from_disk(catalogue, tmp_path) -> None:
    path, vectors = catalogue
    manifest = build_index(path, tmp_path / "index")
    assert (manifest["kind"], manifest["first"], manifest["recall"]["at_10"]) == ("flat", None, 1.0)
    queries = 3 * clustered(40, seed=1)  # of any length
    places, cosines = exact(vectors, queries, 10)
    for index in (load_index(path), load_index(tmp_path / "index")):
        ids, found = index.search(queries, 10)
        assert ids.tolist() == [[f"item {place}" for place in row] for row in places]
        np.testing.assert_allclose(found, cosines, atol=1e-6)
    assert isinstance(load_index(tmp_path / "index").vectors, np.memmap)


@pytest.mark.parametrize(("kind", "precision"), APPROXIMATE)
def test_every_kind_reaches_the_recall_that_it_measured_with_exact_cosines(
    catalogue, tmp_path, kind, precision
) -> None:
    path, vectors = catalogue
    manifest = build_index(path, tmp_path / "index", kind=kind, precision=precision, recall=0.9)
    assert manifest["recall_reached"] and manifest["recall"]["at_10"] >= 0.9
    index = load_index(tmp_path / "index")
    queries = clustered(3000)[1::15] + 0.02 * clustered(200, seed=2)
    ids, cosines = index.search(queries, 10)
    places = np.vectorize(lambda name: int(name.split()[1]))(ids)
    right, _ = exact(vectors, queries, 10)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(places, right, strict=True)]) > 0.85
    own = np.einsum("qd,qkd->qk", unit(queries), vectors[places])
    np.testing.assert_allclose(cosines, own, atol=1e-6)
    assert (np.diff(cosines, axis=1) <= 0).all()
    assert all(len(set(row)) == 10 for row in places.tolist())
    assert (ids[:, 0] == [f"item {place}" for place in range(1, 3000, 15)]).mean() > 0.95


@pytest.mark.parametrize(("kind", "precision"), [("flat", "float32"), *APPROXIMATE])
@pytest.mark.parametrize("items", [1, 2, 30])
def test_few_items_are_all_found_by_any_kind(tmp_path, items, kind, precision) -> None:
    vectors = clustered(items, dim=13)  # no multiple of anything
    build_index(write(tmp_path / "x.parquet", vectors), tmp_path / "index", kind=kind, precision=precision)
    index = load_index(tmp_path / "index")
    for top in (1, items, items + 5, 1000):
        ids, cosines = index.search(vectors, top)
        assert ids.shape == cosines.shape == (items, min(top, items))
    assert [set(row) for row in ids] == [{f"item {place}" for place in range(items)}] * items
    np.testing.assert_allclose(cosines, exact(vectors, vectors, items)[1], atol=1e-6)


def test_a_list_that_holds_too_few_is_made_up_for(catalogue, tmp_path) -> None:
    path, vectors = catalogue
    build_index(path, tmp_path / "index", kind="ivf", recall=0.01)
    ids, cosines = load_index(tmp_path / "index").search(vectors[:3], 2900)
    assert ids.shape == (3, 2900)
    np.testing.assert_allclose(cosines, exact(vectors, vectors[:3], 2900)[1], atol=1e-6)


def test_no_queries_are_no_results_and_bad_ones_are_said(catalogue) -> None:
    index = load_index(catalogue[0])
    ids, cosines = index.search(np.empty((0, 48)), 10)
    assert ids.shape == cosines.shape == (0, 10)
    broken = np.ones((3, 48))
    broken[1, 7] = np.nan
    for queries, top, message in [
        (np.ones((2, 47)), 10, r"shape \(2, 47\)"),
        (np.ones(48), 10, r"shape \(48,\)"),
        (broken, 10, "query 1"),
        (np.ones((2, 48)), 0, "top=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            index.search(queries, top)


def test_equal_cosines_come_in_the_order_of_the_items(tmp_path) -> None:
    vectors = np.tile(clustered(1), (40, 1))
    vectors[25] = -vectors[25]
    path = write(tmp_path / "x.parquet", vectors)
    order = [place for place in range(40) if place != 25] + [25]
    manifest = build_index(path, tmp_path / "index", precision="int8")
    assert manifest["recall"]["at_10"] == 1.0, "equal items cannot be missed"
    for index in (load_index(path), load_index(tmp_path / "index")):
        ids, cosines = index.search(vectors[:1], 40)
        assert ids[0].tolist() == [f"item {place}" for place in order]
        assert len(set(cosines[0].tolist())) == 2


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 80), st.integers(0, 5))
def test_a_result_does_not_depend_on_the_other_queries(items, dim, top, queries) -> None:
    vectors = clustered(items, dim, seed=3)
    index = index_of([str(place) for place in range(items)], vectors)
    asked = clustered(queries, dim, seed=4)[:queries] if queries else np.empty((0, dim), np.float32)
    ids, cosines = index.search(asked, top)
    for row, query in enumerate(asked):
        alone = index.search(query[None], top)
        assert alone[0].tolist() == [ids[row].tolist()] and (alone[1][0] == cosines[row]).all()


# --- first passes -----------------------------------------------------------------------------------------------------


def first_pass(path: Path, out: Path, **more):
    build_index(path, out, kind="flat", **more)
    return load_index(out).first


def test_int8_is_within_half_a_step_of_each_dimensions_range(catalogue, tmp_path) -> None:
    path, vectors = catalogue
    first = first_pass(path, tmp_path / "index", precision="int8", first_pass=16)
    cut = unit(vectors[:, :16])
    back = first.index.reconstruct_n(0, len(cut))
    step = (cut.max(axis=0) - cut.min(axis=0)) / 255
    assert (np.abs(back - cut) <= step * 0.51 + 1e-6).all()
    assert first.index.sa_code_size() == 16


@pytest.mark.parametrize("dims", [16, 13, 48])
def test_binary_keeps_the_signs_and_finds_by_hamming_distance(catalogue, tmp_path, dims) -> None:
    path, vectors = catalogue
    first = first_pass(path, tmp_path / "index", precision="binary", first_pass=dims)
    codes = np.stack([first.index.reconstruct(place) for place in range(50)])
    signs = np.unpackbits(codes, axis=1)[:, :dims].astype(bool)
    assert (signs == (vectors[:50, :dims] > 0)).all()
    distances, _ = first.index.search(first.view(vectors[:5]), 5)
    hamming = ((vectors[:5, None, :dims] > 0) != (vectors[None, :, :dims] > 0)).sum(axis=2)
    assert (distances == np.sort(hamming, axis=1)[:, :5]).all()


def test_a_first_pass_sees_leading_dimensions_normalised_again(catalogue, tmp_path) -> None:
    path, vectors = catalogue
    first = first_pass(path, tmp_path / "index", first_pass=8)
    assert first.dim == first.index.d == 8
    assert (first.candidates(vectors[:20], 6) == exact(vectors[:, :8], vectors[:20, :8], 6)[0]).all()
    assert first_pass(path, tmp_path / "index", first_pass=4096) is None, "all dimensions: exact"


def test_as_many_dims_as_are_needed_are_taken_for_the_first_pass(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(index_build, "SHORTEST", 8)
    matryoshka = clustered(2000, 64)
    late = np.concatenate([0.01 * clustered(2000, 32, seed=5), clustered(2000, 32, seed=6)], axis=1)
    found = [
        build_index(write(tmp_path / "x.parquet", unit(vectors)), tmp_path / "index", kind="ivf")["first_pass"]
        for vectors in (matryoshka, late)
    ]
    assert found[0] < 64 == found[1]


# --- building ---------------------------------------------------------------------------------------------------------


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


def test_an_index_is_replaced_whole_and_nothing_else_is(catalogue, tmp_path, monkeypatch) -> None:
    path, _ = catalogue
    out = tmp_path / "index"
    build_index(path, out)

    def dies(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(index_build, "held_items", dies)
        with pytest.raises(KeyboardInterrupt):
            build_index(path, out, kind="ivf")
    assert [entry.name for entry in tmp_path.iterdir()] == ["index"]
    assert load_index(out).manifest["kind"] == "flat"
    (tmp_path / "index.partial").mkdir()
    (tmp_path / "index.partial" / "rest").write_text("of a killed build")
    build_index(path, out, kind="ivf")
    assert load_index(out).manifest["kind"] == "ivf"
    assert [entry.name for entry in tmp_path.iterdir()] == ["index"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x")
    for place in (tmp_path / "notes", path.parent, path):
        with pytest.raises(ValueError, match="name another"):
            build_index(path, place)
    assert (tmp_path / "notes" / "mine.txt").read_text() == "x" and path.is_file()


# --- what is broken ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vectors.npy", "ids.npy", "id_ends.npy", "first.faiss", "manifest.json"])
@pytest.mark.parametrize("how", ["cut", "gone", "other bytes"])
def test_a_broken_folder_is_one_clear_error(tmp_path, name, how) -> None:
    folder = tmp_path / "index"
    build_index(write(tmp_path / "x.parquet", clustered(60)), folder, precision="int8")
    path, content = folder / name, (folder / name).read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-7] if how == "cut" else b"\xff" * 300 + content[300:])
    with pytest.raises(ValueError, match="broken index|no JSON|holds no Parquet files") as error:
        load_index(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_manifest_that_says_less_or_more_is_refused(tmp_path) -> None:
    folder = tmp_path / "index"
    build_index(write(tmp_path / "x.parquet", clustered(60)), folder)
    known = json.loads((folder / "manifest.json").read_text())
    for change in ({"files": None}, {"parameters": {}}, {"items": 61}, {"version": 2}, {"first": 3}):
        (folder / "manifest.json").write_text(json.dumps(known | change))
        with pytest.raises(ValueError, match="build it again"):
            load_index(folder)


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


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--kind", "annoy"], "kind=annoy"),
        (["--precision", "int4"], "precision=int4"),
        (["--kind", "opq", "--precision", "int8"], "product codes already"),
        (["--recall", "1.5"], "recall=1.5"),
        (["--first-pass", "0"], "first_pass=0"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(catalogue, tmp_path, more, message, capsys) -> None:
    assert main(["index", str(catalogue[0]), "--out", str(tmp_path / "index"), *more]) == 2
    assert message in capsys.readouterr().err


# --- the model --------------------------------------------------------------------------------------------------------


def test_another_model_than_the_items_is_refused(tiny_folder, tmp_path, capsys) -> None:
    from modeling_sail.fingerprints import model_hash

    known = model_hash(tiny_folder)
    query = ["--model", str(tiny_folder), "--text", "x", "--top", "3"]
    for model, status in ((known, 0), ("0" * 64, 2), (None, 0)):
        path = write(tmp_path / "x.parquet", clustered(30, 32), model=model)
        assert main(["index", str(path), "--out", str(tmp_path / "index")]) == 0
        for place in (path, tmp_path / "index"):
            capsys.readouterr()
            assert main(["search", "--index", str(place), *query]) == status
            told = capsys.readouterr()
            assert len(told.out.splitlines()) == (0 if status else 3)
            assert ("another model" in told.err) == bool(status)


def test_an_index_without_a_model_is_for_any(catalogue) -> None:
    require_model(load_index(catalogue[0]), "a")
    index = index_of(["a"], np.ones((1, 3), np.float32), {"model": "b"})
    with pytest.raises(ValueError, match="another model"):
        require_model(index, "a")


# --- the benchmark ----------------------------------------------------------------------------------------------------


def test_the_benchmark_has_each_kind_beside_its_peers_on_made_and_on_real_items(tmp_path) -> None:
    from modeling_sail.evaluation.benchmarks.index import index_benchmark

    made = list(index_benchmark(400, 48, 1, ("flat", "ivf-int8", "flat-binary")))
    real = list(index_benchmark(0, 0, 1, ("flat",), write(tmp_path / "x.parquet", clustered(300, 24))))
    recalls = {
        (one["case"].split(",")[0], one["peer_name"].split()[-1]): one for one in made if "recall" in one["figure"]
    }
    assert {key: one["ours"] > 0.9 for key, one in recalls.items()} == {
        ("flat", "faiss.IndexFlatIP"): True,
        ("ivf-int8", "faiss.IndexFlatIP"): True,
        ("ivf-int8", "uint8"): True,
        ("flat-binary", "faiss.IndexFlatIP"): True,
        ("flat-binary", "ubinary"): True,
    }
    assert recalls["flat", "faiss.IndexFlatIP"]["ours"] == recalls["flat", "faiss.IndexFlatIP"]["peer"] == 1
    searched = {one["case"].split(",")[0]: one["ours"] for one in made if one["figure"] == "searched"}
    assert searched["flat-binary"] < 48 / 8 + 1 and searched["flat"] == pytest.approx(48 * 4, rel=0.01)
    assert "N = 270, D = 24, x.parquet" in real[0]["case"] and real[0]["ours"] == 1
    with pytest.raises(ValueError, match="too few"):
        list(index_benchmark(0, 0, 1, ("flat",), write(tmp_path / "few.parquet", clustered(15, 24))))
