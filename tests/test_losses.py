"""Graded pairs and teachers' preferences: closed forms, and the plain sums over pairs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling_sail.training.losses import cosent, listwise_divergence, ranknet
from torch.nn import functional as F  # noqa: N812  the field's own abbreviation


def plain_cosent(cosine, scores, temperature):
    """The sum over pairs of pairs, as the paper writes it."""
    total = 1 + 0 * cosine.sum()
    for i in range(len(cosine)):
        for j in range(len(cosine)):
            if scores[i] > scores[j]:
                total = total + ((cosine[j] - cosine[i]) / temperature).exp()
    return total.log()


@settings(max_examples=60)
@given(st.lists(st.tuples(st.floats(-1, 1), st.integers(0, 3)), min_size=1, max_size=9))
def test_cosent_equals_the_sum_over_pairs_of_pairs_with_ties(rows) -> None:
    cosine = torch.tensor([row[0] for row in rows], dtype=torch.float64, requires_grad=True)
    scores = torch.tensor([float(row[1]) for row in rows])
    found, wanted = cosent(cosine, scores, temperature=0.2), plain_cosent(cosine, scores, 0.2)
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)
    one, other = (torch.autograd.grad(value, cosine, allow_unused=True)[0] for value in (found, wanted))
    torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, atol=1e-9, rtol=1e-9)


def test_cosent_of_two_pairs_has_a_closed_form_and_pushes_the_right_way() -> None:
    cosine = torch.tensor([0.2, 0.5], requires_grad=True)
    loss = cosent(cosine, torch.tensor([1.0, 0.0]), temperature=0.1)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(3)), rel=1e-6)
    loss.backward()
    assert cosine.grad[0] < 0 < cosine.grad[1]


def test_cosent_does_not_overflow() -> None:
    cosine = torch.tensor([-1.0, 1.0] * 50, requires_grad=True)
    loss = cosent(cosine, torch.tensor([1.0, 0.0] * 50), temperature=0.001)
    loss.backward()
    assert loss.isfinite()
    assert cosine.grad.isfinite().all()


def test_equal_scores_are_no_order() -> None:
    assert cosent(torch.randn(5), torch.ones(5)) == 0


@pytest.mark.parametrize("scores", [torch.ones(3), torch.tensor([1.0, float("nan")])])
def test_scores_that_do_not_fit_are_refused(scores) -> None:
    with pytest.raises(ValueError, match=r"\(B,\)|NaN"):
        cosent(torch.ones(2), scores)


def test_listwise_is_torchs_divergence_where_all_candidates_are_there() -> None:
    generator = torch.Generator().manual_seed(0)
    cosine, scores = torch.randn(4, 5, generator=generator), torch.randn(4, 5, generator=generator)
    found = listwise_divergence(cosine, scores, torch.ones(4, 5).bool(), temperature=0.3, teacher_temperature=0.7)
    student, teacher = (cosine / 0.3).log_softmax(1), (scores / 0.7).softmax(1)
    torch.testing.assert_close(found, F.kl_div(student, teacher, reduction="batchmean"))


def test_a_model_that_agrees_with_its_teacher_has_no_divergence() -> None:
    scores = torch.tensor([[2.0, -1.0, 0.5]])
    mask = torch.ones(1, 3).bool()
    assert listwise_divergence(scores * 0.05, scores, mask) == pytest.approx(0.0, abs=1e-6)


def test_missing_candidates_change_nothing_and_lone_ones_say_nothing() -> None:
    cosine = torch.tensor([[0.1, 0.4, 9.0], [0.3, 0.0, 0.0]], requires_grad=True)
    scores = torch.tensor([[1.0, 0.0, float("nan")], [1.0, float("nan"), float("nan")]])
    mask = scores.isfinite()
    for loss in (listwise_divergence, ranknet):
        found = loss(cosine, torch.where(mask, scores, 0.0), mask)
        alone = loss(cosine[:1, :2], scores[:1, :2], mask[:1, :2])
        torch.testing.assert_close(found, alone)
        gradient = torch.autograd.grad(found, cosine)[0]
        assert gradient[0, :2].any()
        assert not gradient[0, 2] and not gradient[1].any()


def test_ranknet_has_closed_forms() -> None:
    mask = torch.ones(1, 3).bool()
    scores = torch.tensor([[3.0, 2.0, 1.0]])
    assert ranknet(torch.zeros(1, 3), scores, mask).item() == pytest.approx(math.log(2))
    two = ranknet(torch.tensor([[0.1, 0.3]]), scores[:, :2], mask[:, :2], temperature=0.1)
    assert two.item() == pytest.approx(math.log(1 + math.exp(2)), rel=1e-6)
    assert ranknet(torch.zeros(1, 3), torch.ones(1, 3), mask) == 0


def test_candidates_that_do_not_fit_are_refused() -> None:
    for loss in (listwise_divergence, ranknet):
        with pytest.raises(ValueError, match=r"must all be \(B, C\)"):
            loss(torch.ones(2, 3), torch.ones(2, 2), torch.ones(2, 3).bool())
