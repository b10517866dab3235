"""Losses against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from modeling_sail.training.losses import info_nce, matryoshka_nce


def test_uniform_scores_give_the_logarithm_of_the_number_of_targets() -> None:
    ones = torch.ones(5, 4)
    assert info_nce(ones, torch.ones(8, 4), temperature=0.1).item() == pytest.approx(math.log(8), abs=1e-6)


def test_two_orthogonal_pairs_have_a_closed_form() -> None:
    eye = torch.eye(2)
    expected = math.log(1 + math.exp(-1 / 0.5))
    assert info_nce(eye, eye, temperature=0.5).item() == pytest.approx(expected, abs=1e-6)


def test_length_does_not_matter_and_offset_moves_the_positive() -> None:
    generator = torch.Generator().manual_seed(0)
    query, target = torch.randn(3, 6, generator=generator), torch.randn(7, 6, generator=generator)
    shifted = info_nce(query, torch.cat([torch.zeros(2, 6) + 1e-3, target]), temperature=0.2, offset=2)
    scaled = info_nce(query * 9, torch.cat([torch.zeros(2, 6) + 1e-3, target]) * 4, temperature=0.2, offset=2)
    torch.testing.assert_close(shifted, scaled)


def test_targets_with_the_positives_id_are_no_negatives() -> None:
    query = torch.eye(3)
    target = torch.stack([query[0], query[0], query[2]])
    ids = torch.tensor([4, 4, 9])
    masked = info_nce(query[:1], target, temperature=0.5, target_ids=ids)
    expected = info_nce(query[:1], target[[0, 2]], temperature=0.5)
    torch.testing.assert_close(masked, expected)
    assert info_nce(query[:1], target, temperature=0.5) > masked


def test_matryoshka_is_the_sum_over_prefixes() -> None:
    generator = torch.Generator().manual_seed(1)
    query, target = torch.randn(4, 8, generator=generator), torch.randn(4, 8, generator=generator)
    total = matryoshka_nce(query, target, dims=[2, 8], temperature=0.1)
    parts = info_nce(query[:, :2], target[:, :2], temperature=0.1) + info_nce(query, target, temperature=0.1)
    torch.testing.assert_close(total, parts)


def test_gradients_reach_everything_and_point_the_right_way() -> None:
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(4, 8, generator=generator, requires_grad=True)
    target = torch.randn(4, 8, generator=generator, requires_grad=True)
    temperature = torch.tensor(0.1, requires_grad=True)
    loss = matryoshka_nce(query, target, dims=[4, 8], temperature=temperature)
    loss.backward()
    assert query.grad.any()
    assert target.grad.any()
    assert temperature.grad != 0
    with torch.no_grad():
        better = matryoshka_nce(query - 0.05 * query.grad, target, dims=[4, 8], temperature=temperature)
    assert better < loss


def test_half_precision_is_computed_in_float32() -> None:
    query = torch.randn(4, 8).half()
    assert info_nce(query, query, temperature=0.05).dtype == torch.float32


@pytest.mark.parametrize(
    ("query", "target", "offset", "message"),
    [
        ((2, 3), (2, 4), 0, "must be"),
        ((2, 3), (2, 3), 1, "do not lie within"),
        ((2, 3), (1, 3), 0, "do not lie within"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(query, target, offset, message) -> None:
    with pytest.raises(ValueError, match=message):
        info_nce(torch.ones(query), torch.ones(target), temperature=0.1, offset=offset)


def test_dims_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[4, 16\]"):
        matryoshka_nce(torch.ones(2, 8), torch.ones(2, 8), dims=[4, 16], temperature=0.1)
