"""Benchmarks run, compare what is equal on both sides, and print the agreed keys."""

from __future__ import annotations

import pytest
from modeling_sail.evaluation.benchmarks import cache, loss, mine
from modeling_sail.evaluation.benchmarks.child import run_child
from modeling_sail.evaluation.benchmarks.encode import encode_benchmark
from modeling_sail.evaluation.benchmarks.exact import exact_benchmark


def test_the_encode_benchmark_reports_both_sides_and_equal_vectors(tiny_folder) -> None:
    figures = list(encode_benchmark(tiny_folder, items=10, rounds=1))
    keys = {"benchmark", "case", "figure", "unit", "ours", "peer", "peer_name", "ratio"}
    assert all(set(figure) == keys for figure in figures)
    differences = [figure["ours"] for figure in figures if figure["figure"].startswith("largest difference")]
    assert len(differences) == 4
    assert max(differences) < 1e-5
    assert all(figure["ratio"] > 0 for figure in figures if figure["peer"] is not None)


def test_both_sides_of_the_loss_benchmark_compute_the_same() -> None:
    ours, dense = (loss._one(side, 96) for side in ("ours", "dense"))
    assert ours["sums"] == pytest.approx(dense["sums"], rel=1e-4)
    assert len(ours["seconds"]) == 1


def test_all_sides_of_the_cache_benchmark_compute_the_same_gradient() -> None:
    norms = [cache._one(side, 8, mini)["norm"] for side, mini in (("ours", 0), ("direct", 0), ("peer", 4))]
    assert norms == pytest.approx([norms[1]] * 3, rel=1e-4)


def test_a_child_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="benchmarks.loss .*'side': 'nobody'.* failed"):
        run_child("modeling_sail.evaluation.benchmarks.loss", {"side": "nobody", "size": 4})


def test_an_item_is_the_same_alone_and_in_a_batch_and_bfloat16_is_not_float32(tiny_folder) -> None:
    found = {(line["case"], line["figure"]): line["ours"] for line in exact_benchmark(tiny_folder)}
    assert found["float32, alone and in a batch", "largest difference"] < 1e-5
    assert 1e-5 < found["bfloat16 and float32", "largest difference"] < 0.1
    assert found["bfloat16 and float32", "lowest cosine"] > 0.99


def test_the_miners_side_finds_what_is_planted_and_the_peer_runs() -> None:
    given = mine.planted(300)
    found = mine.ours(*given)
    assert 0.6 < found["f1"] < 1.0 and found["false_negatives"] > 0
    assert mine.peer(*given)["rows"] == 300
    assert mine.ours(*mine.planted(300, "a weak model"))["f1"] < 0.5
    lines = list(mine.mine_benchmark(400, 1, {"default": {}}, ["200 names"]))
    assert {line["peer_name"] for line in lines} >= set(mine.NAMES.values())
