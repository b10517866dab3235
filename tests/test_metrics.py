"""Metrics against closed forms and brute force."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling_sail.evaluation.metrics import (
    bijective_accuracy,
    grouped_auc,
    kendall_tau,
    normalized_mutual_information,
    recall_at,
    top_k_overlap,
)
from sklearn.metrics import roc_auc_score


def brute(scores, relevant, k) -> float:
    """Each relevant candidate is found if fewer than k others rank above it; irrelevant ties rank above."""
    values = []
    for row, marks in zip(scores.tolist(), relevant.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda place: (-row[place], marks[place]))
        values.append(sum(marks[place] for place in order[:k]) / sum(marks))
    return sum(values) / len(values)


@given(
    st.integers(1, 4),
    st.integers(2, 9),
    st.integers(1, 9),
    st.integers(0, 10_000),
)
def test_recall_equals_brute_force_with_ties(queries, candidates, k, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (queries, candidates), generator=generator).float()
    relevant = torch.rand(queries, candidates, generator=generator) < 0.3
    relevant[:, 0] |= ~relevant.any(dim=1)
    assert recall_at(scores, relevant, k) == pytest.approx(brute(scores, relevant, k))


def test_a_constant_score_earns_nothing_before_the_end() -> None:
    relevant = torch.eye(5, dtype=torch.bool)
    assert recall_at(torch.zeros(5, 5), relevant, 4) == 0
    assert recall_at(torch.zeros(5, 5), relevant, 5) == 1


def test_queries_without_a_relevant_candidate_are_refused() -> None:
    with pytest.raises(ValueError, match="1 queries"):
        recall_at(torch.zeros(2, 2), torch.tensor([[True, False], [False, False]]), 1)


# --- NMI ------------------------------------------------------------------------------------------------------------


def entropy(values: list[Any]) -> float:
    counts = Counter(values).values()
    return -sum(count / len(values) * math.log(count / len(values)) for count in counts)


def test_clusters_that_say_the_same_have_all_information_and_independent_ones_none() -> None:
    assert normalized_mutual_information([0, 0, 1, 2], [7, 7, 5, 6]) == pytest.approx(1)
    assert normalized_mutual_information([0, 0, 1, 1], [0, 1, 0, 1]) == pytest.approx(0, abs=1e-12)
    # H = log 2 and log 4 - 3/4 log 3, of both together 3/2 log 2.
    second = math.log(4) - 0.75 * math.log(3)
    expected = 2 * (math.log(2) + second - 1.5 * math.log(2)) / (math.log(2) + second)
    assert normalized_mutual_information([0, 0, 1, 1], [0, 0, 0, 1]) == pytest.approx(expected)


def test_one_cluster_for_all_earns_nothing() -> None:
    assert normalized_mutual_information([3, 3, 3], [0, 0, 0]) == 0
    assert normalized_mutual_information([3, 3, 3], [0, 0, 1]) == pytest.approx(0)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
@settings(deadline=None)
def test_nmi_is_the_formula_of_the_paper(pairs: list[tuple[int, int]]) -> None:
    one, other = [list(side) for side in zip(*pairs, strict=True)]
    total = entropy(one) + entropy(other)
    expected = 2 * (total - entropy(pairs)) / total if total else 0
    assert normalized_mutual_information(one, other) == pytest.approx(expected, abs=1e-9)
    assert normalized_mutual_information(other, one) == pytest.approx(expected, abs=1e-9)


# --- consistency of rankings ----------------------------------------------------------------------------------------


def test_tau_of_the_same_the_reverse_and_one_swap() -> None:
    assert kendall_tau([[1, 2, 3, 4]], [[10, 20, 30, 40]]) == pytest.approx(1)
    assert kendall_tau([[1, 2, 3, 4]], [[4, 3, 2, 1]]) == pytest.approx(-1)
    assert kendall_tau([[1, 2, 3, 4]], [[1, 3, 2, 4]]) == pytest.approx((5 - 1) / 6)
    assert kendall_tau([[1, 2], [1, 2]], [[1, 2], [2, 1]]) == pytest.approx(0)  # the mean of both rows
    assert kendall_tau([[-math.inf, 2, math.inf]], [[1, 2, 3]]) == pytest.approx(1)


def test_ties_make_it_tau_b_and_a_constant_row_has_no_order() -> None:
    # Three pairs: two concordant, one tied in the second only.
    assert kendall_tau([[1, 2, 3]], [[1, 2, 2]]) == pytest.approx(2 / math.sqrt(3 * 2))
    assert kendall_tau([[1, 2, 3]], [[5, 5, 5]]) == 0
    assert kendall_tau([[1, 2, 3], [1, 2, 3]], [[5, 5, 5], [1, 2, 3]]) == pytest.approx(0.5)


@given(st.permutations(range(7)), st.permutations(range(7)))
@settings(deadline=None)
def test_tau_is_the_formula_of_the_paper(one: list[int], other: list[int]) -> None:
    signs = [(one[a] - one[b]) * (other[a] - other[b]) > 0 for a in range(7) for b in range(a)]
    assert kendall_tau([one], [other]) == pytest.approx((2 * sum(signs) - len(signs)) / len(signs))
    assert kendall_tau(torch.tensor([one]), -np.array([other])) == pytest.approx(-kendall_tau([one], [other]))


def test_overlap_is_the_share_of_the_top_k() -> None:
    assert top_k_overlap([[4, 3, 2, 1]], [[3, 4, 1, 2]], 2) == 1
    assert top_k_overlap([[4, 3, 2, 1]], [[1, 2, 3, 4]], 2) == 0
    assert top_k_overlap([[4, 3, 2, 1], [4, 3, 2, 1]], [[4, 2, 3, 1], [4, 3, 2, 1]], 2) == pytest.approx(0.75)


def test_constant_scores_overlap_in_nothing_before_the_end() -> None:
    assert top_k_overlap(np.zeros((2, 5)), np.zeros((2, 5)), 4) == 0
    assert top_k_overlap(np.zeros((2, 5)), np.zeros((2, 5)), 5) == 1


@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7), st.integers(0, 10_000))
@settings(deadline=None)
def test_overlap_equals_brute_force_with_ties(rows: int, candidates: int, k: int, seed: int) -> None:
    k = min(k, candidates)
    one, other = np.random.default_rng(seed).integers(0, 4, (2, rows, candidates))
    found = 0
    for first, second in zip(one.tolist(), other.tolist(), strict=True):
        tops = [
            {place for place, score in enumerate(row) if sum(rival >= score for rival in row) <= k}
            for row in (first, second)
        ]
        found += len(tops[0] & tops[1])
    assert top_k_overlap(one, other, k) == pytest.approx(found / k / rows)


# --- bijective alignment --------------------------------------------------------------------------------------------


def test_pairs_that_find_each_other_are_bijective_and_a_collapsed_embedding_is_not() -> None:
    assert bijective_accuracy(np.eye(4), 3 * np.eye(4)) == 1
    assert bijective_accuracy(np.eye(4), np.eye(4)[::-1]) == 1  # which target it is does not matter
    assert bijective_accuracy(np.ones((4, 3)), np.ones((4, 3))) == 0
    noise = 1 + 1e-13 * np.random.default_rng(0).normal(size=(4, 3))
    assert bijective_accuracy(noise, np.ones((4, 3))) == 0


def test_a_target_that_has_a_nearer_query_sends_its_query_away() -> None:
    # Both queries are nearest to target 0, whose nearest is query 0.
    queries, targets = [[1.0, 0.1], [1.0, 0.5]], [[1.0, 0.0], [-1.0, 0.0]]
    assert bijective_accuracy(queries, targets) == 0.5


def test_an_item_that_is_both_does_not_meet_itself() -> None:
    vectors = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    pairs = np.array([[0, 1], [1, 0], [2, 1]])
    queries, targets = vectors[pairs[:, 0]], vectors[pairs[:, 1]]
    assert bijective_accuracy(queries, targets) == pytest.approx(2 / 3)  # 0 and 1 find themselves
    same = pairs[:, :1] == pairs[:, 1]
    assert bijective_accuracy(queries, targets, same) == pytest.approx(2 / 3)  # 0 and 1 each other; 2 is sent away
    swapped = vectors[[0, 2, 1]]  # now 2 lies between: it is nearest to 0, and 0 and 1 are sent away
    found = bijective_accuracy(swapped[pairs[:, 0]], swapped[pairs[:, 1]], same)
    assert found == pytest.approx(1 / 3)


@given(st.integers(1, 6), st.integers(0, 10_000))
@settings(deadline=None)
def test_bijective_accuracy_equals_brute_force(pairs: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    queries, targets = generator.normal(size=(2, pairs, 3))
    excluded = (generator.random((pairs, pairs)) < 0.3) & ~np.eye(pairs, dtype=bool)

    def cosine(i: int, j: int) -> float:
        if excluded[i, j]:
            return -math.inf
        return queries[i] @ targets[j] / np.linalg.norm(queries[i]) / np.linalg.norm(targets[j])

    hits = 0
    for i in range(pairs):
        nearest = max(range(pairs), key=lambda j: cosine(i, j))
        hits += max(range(pairs), key=lambda q: cosine(q, nearest)) == i
    assert bijective_accuracy(queries, targets, excluded) == pytest.approx(hits / pairs)


# --- GAUC -----------------------------------------------------------------------------------------------------------


def test_gauc_of_one_group_is_auc() -> None:
    scores, labels = [0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]
    assert grouped_auc(scores, labels, ["u"] * 4) == (pytest.approx(roc_auc_score(labels, scores)), 1.0)


def test_gauc_weighs_groups_by_their_events_and_leaves_out_those_of_one_label() -> None:
    # u: 1 of 3 events' pairs right each way -> 0.5 over 3 events; v: right, 2 events; w has one label.
    scores = [1, 2, 3, 0, 1, 9, 9]
    labels = [False, True, False, False, True, True, True]
    found = grouped_auc(scores, labels, ["u", "u", "u", "v", "v", "w", "w"])
    assert found.value == pytest.approx((3 * 0.5 + 2 * 1) / 5)
    assert found.share == pytest.approx(5 / 7)


def test_gauc_does_not_see_how_eager_a_user_is() -> None:
    # Within each user the order is right; the second user's scores all lie above the first's.
    scores, labels, users = np.array([0, 1, 2, 10, 11, 12]), [0, 0, 1, 0, 1, 1], np.array([0, 0, 0, 1, 1, 1])
    assert roc_auc_score(labels, scores) < 1
    assert grouped_auc(scores, labels, users).value == 1
    assert grouped_auc(np.zeros(6), labels, users).value == 0.5


@given(st.permutations(range(12)), st.integers(0, 10_000))
@settings(deadline=None)
def test_gauc_does_not_depend_on_the_order_of_events(order: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores, groups = generator.integers(0, 4, 12), generator.integers(0, 3, 12)
    labels = np.arange(12) % 2
    groups[:2] = 0  # one group has both
    first, second = grouped_auc(scores, labels, groups), grouped_auc(scores[order], labels[order], groups[order])
    assert second == (pytest.approx(first.value), first.share)


@pytest.mark.parametrize(
    ("metric", "arguments", "message"),
    [
        (normalized_mutual_information, ([0, 1], [0]), r"shapes \(2,\) and \(1,\)"),
        (normalized_mutual_information, ([], []), "a pair at least"),
        (kendall_tau, ([[1, 2]], [[1, 2, 3]]), r"\(Q, N\) of both"),
        (kendall_tau, ([[1]], [[1]]), "N from 2 on"),
        (kendall_tau, ([[1, math.nan]], [[1, 2]]), "NaN"),
        (top_k_overlap, ([[1, 2]], [[1, 2]], 3), "k=3 must be at least 1 and at most the 2"),
        (top_k_overlap, ([[1, 2]], [[1, 2]], 0), "k=0"),
        (top_k_overlap, ([1, 2], [1, 2], 1), r"\(Q, N\) of both"),
        (bijective_accuracy, (np.eye(2), np.eye(3)), "must have one shape"),
        (bijective_accuracy, (np.zeros((2, 2)), np.eye(2)), "2 of 2 queries are zero"),
        (bijective_accuracy, (np.eye(2), [[math.inf, 1], [1, 1]]), "all finite"),
        (bijective_accuracy, (np.eye(2), np.eye(2), np.eye(2)), "False on the diagonal"),
        (grouped_auc, ([1, 2], [0, 1], [0, 1]), "None of 2 groups has both labels"),
        (grouped_auc, ([1, 2], [0, 1, 1], [0, 0]), r"\(N,\) of each"),
        (grouped_auc, ([1, 2], [0, 3], [0, 0]), "neither 0 nor 1"),
        (grouped_auc, ([], [], []), "None of 0 groups"),
    ],
)
def test_what_a_metric_cannot_take_is_refused(metric: Any, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric(*arguments)
