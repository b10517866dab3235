"""The benchmark runs, compares equal vectors, and prints the agreed keys."""

from __future__ import annotations

from modeling_sail.evaluation.benchmarks.encode import encode_benchmark


def test_the_encode_benchmark_reports_both_sides_and_equal_vectors(tiny_folder) -> None:
    figures = list(encode_benchmark(tiny_folder, items=10, rounds=1))
    keys = {"benchmark", "case", "figure", "unit", "ours", "peer", "peer_name", "ratio"}
    assert all(set(figure) == keys for figure in figures)
    differences = [figure["ours"] for figure in figures if figure["figure"].startswith("largest difference")]
    assert len(differences) == 4
    assert max(differences) < 1e-5
    assert all(figure["ratio"] > 0 for figure in figures if figure["peer"] is not None)
