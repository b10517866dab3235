"""Metrics against closed forms and brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modeling_sail.evaluation.metrics import recall_at


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
