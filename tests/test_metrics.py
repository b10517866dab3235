"""Metrics against closed forms and brute force."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modeling_sail.evaluation.metrics import (
    average_precision,
    bijective_accuracy,
    grouped_auc,
    kendall_tau,
    normalized_mutual_information,
    recall_at,
    roc_auc,
    separability,
    top_k_overlap,
)
from sklearn.metrics import average_precision_score, roc_auc_score


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
    for chunk in (1, 2, 5):
        assert bijective_accuracy(queries, targets, excluded, chunk=chunk) == pytest.approx(hits / pairs)
    places = [np.flatnonzero(row) for row in excluded]
    assert bijective_accuracy(queries, targets, places, chunk=2) == pytest.approx(hits / pairs)
    assert bijective_accuracy(queries, targets, [row.tolist() for row in places]) == pytest.approx(hits / pairs)
    assert bijective_accuracy(queries, targets, excluded.tolist()) == pytest.approx(hits / pairs)


def test_of_targets_that_are_equally_near_but_for_rounding_the_first_is_taken() -> None:
    # Query 0 has target 1 nearer by 7e-13; but for the first, of which query 1 is kept, it would be sent away.
    queries, targets = [[1.0, 1.0], [1.0, 0.2]], [[1.0, 0.0], [1.0, 1e-12]]
    assert bijective_accuracy(queries, targets, [[], [0]]) == 1
    assert bijective_accuracy(queries, targets[::-1], [[], [0]]) == 1


@given(st.integers(2, 9), st.integers(1, 9), st.integers(0, 10_000))
def test_bijective_accuracy_does_not_depend_on_the_chunk_with_ties_either(pairs: int, chunk: int, seed: int) -> None:
    queries, targets = np.random.default_rng(seed).integers(-1, 2, (2, pairs, 2)) * 1.0
    queries[~queries.any(axis=1)] = targets[~targets.any(axis=1)] = 1
    assert bijective_accuracy(queries, targets, chunk=chunk) == bijective_accuracy(7 * queries, targets)


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
def test_gauc_does_not_depend_on_the_order_of_events(order: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores, groups = generator.integers(0, 4, 12), generator.integers(0, 3, 12)
    labels = np.arange(12) % 2
    groups[:2] = 0  # one group has both
    first, second = grouped_auc(scores, labels, groups), grouped_auc(scores[order], labels[order], groups[order])
    assert second == (pytest.approx(first.value), first.share)


# --- AUC, average precision and separability ------------------------------------------------------------------------


@st.composite
def events(draw: st.DrawFn, fewest: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Scores of few values and labels, of both at least one."""
    labels = draw(st.lists(st.booleans(), min_size=fewest, max_size=30).filter(lambda some: len(set(some)) == 2))
    scores = draw(st.lists(st.integers(-3, 3), min_size=len(labels), max_size=len(labels)))
    return np.array(scores) / 4, np.array(labels)


@given(events())
def test_auc_is_the_share_of_pairs_in_order_and_that_of_sklearn(some: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = some
    pairs = scores[labels][:, None] - scores[~labels]
    assert roc_auc(scores, labels) == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean(), abs=1e-12)
    assert roc_auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))
    assert roc_auc(-scores, ~labels) == pytest.approx(roc_auc(scores, labels))


def test_auc_in_closed_form_is_exact_on_ties() -> None:
    assert roc_auc(np.ones(999), np.arange(999) % 3 == 0) == 0.5
    assert roc_auc([-math.inf, 0, math.inf], [0, 0, 1]) == 1
    assert roc_auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75
    assert roc_auc(np.arange(300_000) % 3, np.arange(300_000) % 3 == 1) == 0.5


@given(events())
def test_average_precision_puts_tied_negatives_first(some: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = some
    order = sorted(range(len(scores)), key=lambda place: (-scores[place], labels[place]))
    hits = [place for place, event in enumerate(order, start=1) if labels[event]]
    expected = np.mean([found / place for found, place in enumerate(hits, start=1)])
    assert average_precision(scores, labels) == pytest.approx(expected)
    untied = scores - 1e-3 * labels + 1e-6 * np.arange(len(scores))
    assert average_precision(scores, labels) == pytest.approx(average_precision_score(labels, untied))
    assert average_precision(scores, labels) <= average_precision_score(labels, scores) + 1e-12


def test_average_precision_of_a_constant_score_is_the_least_there_is() -> None:
    labels = np.arange(6) < 2
    least = (1 / 5 + 2 / 6) / 2
    assert average_precision(np.zeros(6), labels) == pytest.approx(least)
    assert average_precision(np.arange(6), labels) == pytest.approx(least)
    assert average_precision(-np.arange(6), labels) == 1


@given(events(), st.integers(0, 10_000))
def test_what_ranks_events_does_not_depend_on_their_order(some: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    scores, labels = some
    order = np.random.default_rng(seed).permutation(len(labels))
    for metric in (roc_auc, average_precision):
        assert metric(scores[order], labels[order]) == pytest.approx(metric(scores, labels))
    found = separability(scores[labels], scores[~labels])
    again = separability(scores[order][labels[order]], scores[order][~labels[order]])
    assert again[:4] == pytest.approx(found[:4])


def test_separability_in_closed_form() -> None:
    found = separability([0.9, 0.9, 0.1, -0.3], [0.1, -0.3], bins=4)  # edges -1, -0.5, 0, 0.5, 1
    assert found.positive_mean == pytest.approx(0.4) and found.negative_mean == pytest.approx(-0.1)
    assert found.edges.tolist() == [-1, -0.5, 0, 0.5, 1]
    assert found.positive_counts.tolist() == [0, 1, 1, 2]
    assert found.negative_counts.tolist() == [0, 1, 1, 0]
    assert found.overlap == 0.5
    assert found.auc == pytest.approx((4 + 1 + 2 * 0.5) / 8)  # 0.9 beats all, 0.1 and -0.3 tie once, 0.1 beats -0.3
    assert separability([1.0000001, 1], [-1.0000001])[2:4] == (0, 1)


@given(events())
def test_separability_is_symmetric_and_a_constant_cosine_separates_nothing(some: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = some
    found, back = (separability(scores[one], scores[~one]) for one in (labels, ~labels))
    assert found.overlap == pytest.approx(back.overlap) and 0 <= found.overlap <= 1 + 1e-12
    assert found.auc == pytest.approx(1 - back.auc) == pytest.approx(1 - roc_auc_score(~labels, scores))
    counts = found.positive_counts, found.negative_counts
    assert [side.sum() for side in counts] == [labels.sum(), (~labels).sum()] and len(found.negative_counts) == 50
    constant = separability(np.full(3, scores[0]), np.full(5, scores[0]))
    assert constant.overlap == 1 and constant.auc == 0.5


@pytest.mark.parametrize(
    ("metric", "arguments", "message"),
    [
        (bijective_accuracy, (np.eye(2), np.eye(2), [[1]]), r"excluded of shape \(1, 2\)"),
        (bijective_accuracy, (np.eye(2), np.eye(2), [[0], []]), "False on the diagonal"),
        (bijective_accuracy, (np.eye(2), np.eye(2), [[], [2]]), "names targets 2 to 2; there are 2"),
        (roc_auc, ([1, 2], [1, 1]), "2 positive and 0 negative"),
        (roc_auc, ([1, 2, 3], [0, 1]), r"\(N,\) of each"),
        (roc_auc, ([1, math.nan], [0, 1]), "NaN"),
        (average_precision, ([1, 2], [0, 0]), "None of 2 events is positive"),
        (average_precision, ([], []), "None of 0 events"),
        (average_precision, ([1, 2], [0, 2]), "neither 0 nor 1"),
        (separability, ([], [0.5]), r"positive of shape \(0,\)"),
        (separability, ([0.5], [[0.5]]), r"negative of shape \(1, 1\)"),
        (separability, ([0.5], [3.0]), "within -1 .. 1"),
        (separability, ([math.nan], [0.5]), "within -1 .. 1"),
        (separability, ([0.5], [0.5], 0), "bins=0"),
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


def test_bijective_accuracy_refuses_a_chunk_of_nothing() -> None:
    with pytest.raises(ValueError, match="chunk=0"):
        bijective_accuracy(np.eye(2), np.eye(2), chunk=0)
