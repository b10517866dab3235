"""Retrieval, neighbours and agreement of embeddings, by blocks, against dense forms, sklearn and brute force."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling_sail.evaluation.metrics import bijective_accuracy, kendall_tau, recall_at, top_k_overlap
from modeling_sail.evaluation.similarity import embedding_agreement, retrieval_scores, top_k_neighbours
from sklearn.metrics import ndcg_score

SEEDS = st.integers(0, 10_000)


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(Q, N) to nine decimals, so that what is equal is equal; zero rows are -inf."""
    lengths = np.linalg.norm(one, axis=1)[:, None] * np.linalg.norm(other, axis=1)
    return np.where(lengths > 0, (one @ other.T) / np.where(lengths > 0, lengths, 1), -np.inf).round(9)


def drawn(seed: int, queries: int, targets: int, dims: int = 3) -> tuple[Any, ...]:
    """Vectors of few values, so with many ties and some zeros; a relevant candidate at least, some excluded."""
    generator = np.random.default_rng(seed)
    one, other = (generator.integers(-1, 2, (rows, dims)).astype(float) for rows in (queries, targets))
    relevant = generator.random((queries, targets)) < 0.3
    relevant[np.arange(queries), generator.integers(targets, size=queries)] = True
    return one, other, relevant, (generator.random((queries, targets)) < 0.2) & ~relevant


def places(marks: np.ndarray) -> list[np.ndarray]:
    return [np.flatnonzero(row) for row in marks]


def brute(scores: np.ndarray, relevant: np.ndarray, k: int) -> tuple[float, float, float]:
    """Recall, nDCG and MRR at k: a list of each query, irrelevant ones first among equals, what is -inf not in it."""
    found = []
    for row, marks in zip(scores, relevant, strict=True):
        order = sorted((place for place in range(len(row)) if row[place] > -np.inf), key=lambda p: (-row[p], marks[p]))
        hits = [place for place, candidate in enumerate(order[:k], start=1) if marks[candidate]]
        ideal = sum(1 / np.log2(place + 1) for place in range(1, min(k, marks.sum()) + 1))
        gain = sum(1 / np.log2(place + 1) for place in hits)
        found.append((len(hits) / marks.sum(), gain / ideal, 1 / hits[0] if hits else 0))
    return tuple(np.mean(found, axis=0))


# --- retrieval ------------------------------------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 5), st.integers(1, 12), st.integers(1, 15), st.integers(1, 13))
@settings(max_examples=60)
def test_scores_equal_brute_force_and_dense_recall_with_ties_zeros_and_exclusions(
    seed: int, queries: int, targets: int, k: int, chunk: int
) -> None:
    one, other, relevant, excluded = drawn(seed, queries, targets)
    found = retrieval_scores(one, other, places(relevant), places(excluded), ks=[k, 2], chunk=chunk)
    scores = np.where(excluded, -np.inf, cosines(one, other))
    assert set(found) == {f"{name}_at_{at}" for at in (k, 2) for name in ("recall", "ndcg", "mrr")}
    assert [found[f"{name}_at_{k}"] for name in ("recall", "ndcg", "mrr")] == pytest.approx(brute(scores, relevant, k))
    dense = recall_at(torch.from_numpy(scores), torch.from_numpy(relevant), k)
    assert found[f"recall_at_{k}"] == pytest.approx(dense)
    assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_without_ties_scores_equal_those_of_sklearn(kind: str) -> None:
    generator = np.random.default_rng(0)
    one, other = generator.normal(size=(40, 16)).astype(kind), generator.normal(size=(300, 16)).astype(kind)
    relevant = generator.random((40, 300)) < 0.03
    relevant[:, 0] = True
    found = retrieval_scores(one, other, places(relevant), chunk=64)
    dense = cosines(one.astype(float), other.astype(float))
    for k in (1, 10, 25, 50, 100):
        assert found[f"ndcg_at_{k}"] == pytest.approx(ndcg_score(relevant, dense, k=k), abs=1e-12)
        recall = recall_at(torch.from_numpy(dense), torch.from_numpy(relevant), k)
        assert found[f"recall_at_{k}"] == pytest.approx(recall, rel=1e-6)  # which divides in float32


def test_scores_in_closed_form() -> None:
    # From the query: targets 0, 1, 2, 3 in this order; 1 and 3 are relevant, in places 2 and 4.
    query, targets = [[1.0, 0.0]], [[9.0, 0.0], [3.0, 1.0], [0.2, 0.1], [1.0, 1.0]]
    found = retrieval_scores(query, targets, [[1, 3]], ks=(1, 2, 4))
    assert [found[f"recall_at_{k}"] for k in (1, 2, 4)] == [0, 0.5, 1]
    assert [found[f"mrr_at_{k}"] for k in (1, 2, 4)] == [0, 0.5, 0.5]
    ideal = 1 + 1 / np.log2(3)
    gains = [0, 1 / np.log2(3), 1 / np.log2(3) + 1 / np.log2(5)]
    assert [found[f"ndcg_at_{k}"] for k in (1, 2, 4)] == pytest.approx([gains[0], gains[1] / ideal, gains[2] / ideal])
    without = retrieval_scores(query, targets, [[1, 3]], [[0]], ks=(1, 2))  # the first makes way
    assert (without["recall_at_1"], without["mrr_at_1"], without["ndcg_at_1"]) == (0.5, 1, 1)
    assert retrieval_scores(query, targets, [[1, 1, 3, 3]], ks=[4]) == {
        name: found[name] for name in ("recall_at_4", "ndcg_at_4", "mrr_at_4")
    }


@given(SEEDS, st.integers(1, 4), st.integers(2, 9), st.sampled_from(["float32", "float64"]))
@settings(max_examples=30)
def test_a_constant_embedding_earns_nothing_before_the_end(seed: int, queries: int, targets: int, kind: str) -> None:
    generator = np.random.default_rng(seed)
    vector, lengths = generator.normal(size=7), generator.uniform(0.1, 9, (queries + targets, 1))
    vectors = (lengths * vector).astype(kind)  # of one direction but for rounding
    right = generator.integers(targets, size=(queries, 1))
    found = retrieval_scores(vectors[:queries], vectors[queries:], right, ks=[targets - 1, targets], chunk=3)
    assert found[f"recall_at_{targets - 1}"] == found[f"ndcg_at_{targets - 1}"] == found[f"mrr_at_{targets - 1}"] == 0
    assert found[f"recall_at_{targets}"] == 1


@given(SEEDS, st.integers(1, 5), st.integers(1, 12), st.integers(1, 13), st.integers(1, 13))
@settings(max_examples=60)
def test_scores_do_not_depend_on_the_order_of_candidates_or_queries_nor_on_the_chunk(
    seed: int, queries: int, targets: int, chunk: int, other_chunk: int
) -> None:
    one, other, relevant, excluded = drawn(seed, queries, targets)
    found = retrieval_scores(one, other, places(relevant), places(excluded), ks=(1, 3), chunk=chunk)
    generator = np.random.default_rng(seed + 1)
    rows, columns = generator.permutation(queries), generator.permutation(targets)
    shuffled = [places(marks[rows][:, columns]) for marks in (relevant, excluded)]
    again = retrieval_scores(one[rows], 3 * other[columns], *shuffled, ks=(1, 3), chunk=other_chunk)
    assert again == pytest.approx(found)


@pytest.mark.parametrize("chunk", [3, 64, 1024])
def test_a_duplicate_of_the_relevant_candidate_is_always_a_tie(chunk: int) -> None:
    """Whatever its place, though a product of matrices rounds by place, and though float32 rounded it otherwise."""
    generator = np.random.default_rng(0)
    targets = generator.normal(size=(150, 33))
    for place in range(0, 150, 29):
        doubled = np.concatenate([targets, targets[place : place + 1]])
        queries = targets[[place] * 8] + 0.5 * generator.normal(size=(8, 33))  # near, but not the same direction
        rounded = doubled.astype(np.float32)
        rounded[-1] /= np.linalg.norm(rounded[-1])
        for right, candidates in ((place, doubled), (150, doubled), (place, rounded), (150, rounded)):
            found = retrieval_scores(queries, candidates, [[right]] * 8, ks=(1, 2), chunk=chunk)
            assert (found["recall_at_1"], found["recall_at_2"], found["mrr_at_2"]) == (0, 1, 0.5)


def test_an_item_without_a_vector_finds_nothing_and_is_not_found() -> None:
    vectors = np.array([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]])
    found = retrieval_scores(vectors[:2], vectors, [[2], [0]], ks=[2, 9])
    assert found["recall_at_2"] == 0.5  # the row of zeros does not compete; its own query finds nothing
    assert found["recall_at_9"] == 0.5
    assert retrieval_scores(vectors[:1], vectors, [[0, 1]], ks=[9])["recall_at_9"] == 0.5


# --- neighbours -----------------------------------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 5), st.integers(1, 12), st.integers(1, 12), st.integers(1, 13))
@settings(max_examples=60)
def test_neighbours_equal_a_stable_sort(seed: int, queries: int, targets: int, k: int, chunk: int) -> None:
    k = min(k, targets)
    one, other, _, _ = drawn(seed, queries, targets)
    found = top_k_neighbours(one, other, k, chunk=chunk)
    scores = cosines(one, other)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    values = np.take_along_axis(scores, order, axis=1)
    np.testing.assert_allclose(found.cosines, values, atol=1e-9)
    np.testing.assert_array_equal(found.indices, np.where(values > -np.inf, order, -1))


def test_a_vector_is_its_own_neighbour_and_the_opposite_one_the_last() -> None:
    vectors = np.concatenate([np.eye(4), -np.eye(4)]).astype(np.float32)
    found = top_k_neighbours(vectors, 5 * vectors, 8, chunk=3)
    assert found.indices[:, 0].tolist() == list(range(8)) and found.indices[:, -1].tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    assert found.cosines[0].tolist() == [1, 0, 0, 0, 0, 0, 0, -1]


# --- agreement ------------------------------------------------------------------------------------------------------


@given(SEEDS, st.integers(3, 9), st.integers(1, 8), st.integers(1, 10))
@settings(max_examples=40)
def test_agreement_equals_the_dense_metrics(seed: int, items: int, k: int, chunk: int) -> None:
    k = min(k, items - 1)
    one, other, _, _ = drawn(seed, items, items)
    dense = [
        scores[~np.eye(items, dtype=bool)].reshape(items, -1) for scores in (cosines(one, one), cosines(other, other))
    ]
    expected = kendall_tau(*dense), top_k_overlap(*dense, k)
    assert embedding_agreement(one, other, k, chunk=chunk) == pytest.approx(expected)
    wide = cosines(one[:2], other), cosines(other[:2], other)  # queries and their targets rank the same candidates
    found = embedding_agreement(one[:2], other[:2], k, candidates=(other, other), chunk=chunk)
    assert found == pytest.approx((kendall_tau(*wide), top_k_overlap(*wide, k)))


def test_an_embedding_agrees_with_its_rotation_and_not_with_a_constant() -> None:
    generator = np.random.default_rng(0)
    vectors, rotation = generator.normal(size=(30, 6)), np.linalg.qr(generator.normal(size=(6, 6)))[0]
    assert embedding_agreement(vectors, 2 * vectors @ rotation, 5) == pytest.approx((1, 1))
    assert embedding_agreement(vectors, np.ones((30, 2)), 5) == (0, 0)
    assert abs(embedding_agreement(vectors, generator.normal(size=(30, 6)), 5).kendall_tau) < 0.15


# --- memory and errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measure", "rows", "most"),
    [  # MB; in one piece 80, 80, 40 and 72
        (lambda one, other: retrieval_scores(one, other, np.arange(200)[:, None], chunk=256), (200, 50_000), 15),
        (lambda one, other: top_k_neighbours(one, other, 10, chunk=256), (200, 50_000), 15),
        (lambda one, other: embedding_agreement(one, -one, 9, candidates=(other, other), chunk=4), (150, 6000), 12),
        (lambda one, other: bijective_accuracy(one, other, chunk=32), (3000, 3000), 10),
    ],
)
def test_many_vectors_need_the_memory_of_a_block_and_not_of_all_pairs(
    measure: Callable[[Any, Any], Any], rows: tuple[int, int], most: int
) -> None:
    sides = [np.random.default_rng(seed).normal(size=(count, 64)).astype(np.float32) for seed, count in enumerate(rows)]
    tracemalloc.start()
    try:
        measure(*sides)
        peak = tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()
    assert peak < most


NAN = [[1.0, np.nan]]


@pytest.mark.parametrize(
    ("metric", "arguments", "message"),
    [
        (retrieval_scores, (np.eye(2), np.eye(3), [[0], [0]]), r"shapes \(2, 2\) and \(3, 3\)"),
        (retrieval_scores, (np.eye(2), [1, 2], [[0], [0]]), r"\(N, D\) are needed"),
        (retrieval_scores, (np.eye(2), np.eye(2), [[0], []]), "1 queries have no relevant candidate"),
        (retrieval_scores, (np.eye(2), np.eye(2), [[0]]), "relevant is of 1 queries; there are 2"),
        (retrieval_scores, (np.eye(2), np.eye(2), [[0], [2]]), "names candidates 0 to 2; there are 2"),
        (retrieval_scores, (np.eye(2), np.eye(2), [[0], [-1]]), "names candidates -1 to 0"),
        (retrieval_scores, (np.eye(2), np.eye(2), [[0], [1]], [[], [7]]), "excluded names candidates 7"),
        (retrieval_scores, (np.eye(2), np.eye(2), [[0], [1]], [[], [1]]), "1 relevant candidates are excluded"),
        (retrieval_scores, (np.eye(2), np.eye(2), np.eye(2, dtype=bool)), "no booleans"),
        (retrieval_scores, (np.eye(2), np.eye(2), [[0], [1]], None, []), "at least one, all from 1 on"),
        (retrieval_scores, (np.eye(2), np.eye(2), [[0], [1]], None, [0]), "all from 1 on"),
        (retrieval_scores, (NAN, [[1.0, 0.0]], [[0]]), "not finite"),
        (retrieval_scores, (np.eye(2), np.zeros((0, 2)), [[], []]), "0 candidates"),
        (top_k_neighbours, (np.eye(2), np.eye(2), 3), "k=3 must be at least 1 and at most the 2 targets"),
        (top_k_neighbours, (np.eye(2), np.eye(2), 0), "k=0"),
        (top_k_neighbours, (np.zeros((0, 2)), np.eye(2), 1), "are needed"),
        (top_k_neighbours, (np.eye(2), NAN, 1), "not finite"),
        (embedding_agreement, (np.eye(3), np.eye(4), 1), "3 and 4 queries"),
        (embedding_agreement, (np.eye(3), np.eye(3), 3), "k=3"),  # of the two others
    ],
)
def test_what_cannot_be_compared_is_refused(metric: Any, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric(*arguments)


@pytest.mark.parametrize(
    "measure",
    [
        lambda: retrieval_scores(np.eye(2), np.eye(2), [[0], [1]], chunk=0),
        lambda: top_k_neighbours(np.eye(2), np.eye(2), 1, chunk=0),
        lambda: embedding_agreement(np.eye(3), np.eye(3), 1, chunk=0),
    ],
)
def test_a_chunk_of_nothing_is_refused(measure: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="chunk=0"):
        measure()
