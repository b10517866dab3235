"""Search in an index: exact where it says so, measured where not, whatever the kind and the first pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_sail import index_build
from modeling_sail.cli import main
from modeling_sail.index import index_of, load_index, require_model, unit
from modeling_sail.index_build import build_index

from .vectors import clustered, exact, write

pytestmark = pytest.mark.usefixtures("quick_index")

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


@settings(max_examples=30)
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
