"""NCE against closed forms, and its blocks against the whole matrix."""

from __future__ import annotations

import math

import pytest
import torch
from modeling_sail.training import contrastive
from modeling_sail.training.contrastive import info_nce, matryoshka_nce
from torch.nn import functional as F  # noqa: N812  the field's own abbreviation


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


# --- blocks against the plain dense form ----------------------------------------------------------------------------


def dense_nce(query, target, dims, temperature, ids=None, offset=0, hard=None, hard_mask=None, margin=None):
    """The whole matrix, as the paper writes it: what the blocks must equal."""
    total = 0
    here, positive = torch.arange(len(query)), torch.arange(len(query)) + offset
    for dim in dims:
        q, t = F.normalize(query[:, :dim], dim=-1), F.normalize(target[:, :dim], dim=-1)
        cosine = q @ t.T
        out = torch.zeros_like(cosine, dtype=torch.bool)
        if ids is not None:
            out |= ids[positive][:, None] == ids
        if hard is not None:
            cosine = torch.cat([cosine, torch.einsum("bd,bkd->bk", q, F.normalize(hard[..., :dim], dim=-1))], dim=1)
            out = torch.cat([out, ~hard_mask], dim=1)
        if margin is not None:
            out |= cosine > cosine[here, positive][:, None] + margin
        out[here, positive] = False
        total = total + F.cross_entropy((cosine / temperature).masked_fill(out, float("-inf")), positive)
    return total


CASES = {
    "plain": {},
    "ids": {"ids": True},
    "gathered": {"ids": True, "offset": 5},
    "hard": {"hard": 3},
    "all": {"ids": True, "offset": 2, "hard": 3, "margin": 0.1},
}


@pytest.mark.parametrize("block", [1, 100, 1 << 24])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dims", [[16], [4, 9, 16], [3, 12]])
def test_blocks_equal_the_dense_matrix_in_value_and_gradient(monkeypatch, block, case, dims) -> None:
    monkeypatch.setattr(contrastive, "BLOCK_SCORES", block)
    options, generator = CASES[case], torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    query, target = draw(9, 16), draw(17, 16)
    hard = draw(9, options["hard"], 16) if "hard" in options else None
    hard_mask = torch.rand(9, 3, generator=generator) > 0.3 if hard is not None else None
    ids = torch.randint(0, 6, (17,), generator=generator) if "ids" in options else None
    offset, margin = options.get("offset", 0), options.get("margin")
    leaves = [query, target, torch.tensor(0.2, dtype=torch.float64), *([hard] if hard is not None else [])]
    for leaf in leaves:
        leaf.requires_grad_()
    expected = 3 * dense_nce(query, target, dims, leaves[2], ids, offset, hard, hard_mask, margin)
    wanted = torch.autograd.grad(expected, leaves)
    found = 3 * matryoshka_nce(
        query,
        target,
        dims=dims,
        temperature=leaves[2],
        target_ids=ids,
        offset=offset,
        hard_negatives=hard,
        hard_mask=hard_mask,
        margin=margin,
    )
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    for one, other in zip(torch.autograd.grad(found, leaves), wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


def test_half_precision_and_autocast_are_computed_in_float32() -> None:
    generator = torch.Generator().manual_seed(4)
    query, target = (torch.randn(6, 16, generator=generator).bfloat16().requires_grad_() for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = matryoshka_nce(query, target, dims=[8, 16], temperature=0.05)
    assert loss.dtype == torch.float32
    expected = dense_nce(query.float(), target.float(), [8, 16], 0.05)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=0)
    loss.backward()
    assert query.grad.dtype == torch.bfloat16


def test_a_zero_embedding_gives_no_nan() -> None:
    query = torch.zeros(2, 4, requires_grad=True)
    matryoshka_nce(query, torch.eye(4)[:2], dims=[2, 4], temperature=0.1).backward()
    assert query.grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": [2, 5]}, r"dims \[2, 5\] do not fit"),
        ({"dims": [0]}, r"dims \[0\] do not fit"),
        ({"target_ids": torch.zeros(2)}, r"target_ids \(2,\) must be \(3,\)"),
        ({"hard_negatives": torch.zeros(2, 1, 4)}, r"hard_negatives \(2, 1, 4\) must be"),
        ({"hard_mask": torch.ones(3, 1, dtype=torch.bool)}, r"hard_mask \(3, 1\) must be"),
        ({"query": torch.zeros(0, 4)}, r"no query \(B = 0\)"),
    ],
)
def test_sizes_that_do_not_fit_are_named(change, message) -> None:
    arguments = {"query": torch.eye(4)[:3], "target": torch.eye(4)[:3], "dims": [4], "temperature": 0.1} | change
    query, target = arguments.pop("query"), arguments.pop("target")
    with pytest.raises(ValueError, match=message):
        matryoshka_nce(query, target, **arguments)


def test_ranks_with_different_numbers_of_queries_average_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(5)
    query, target = (torch.randn(5, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    whole = matryoshka_nce(query, target, dims=[4, 8], temperature=0.1)
    options = {"dims": [4, 8], "temperature": 0.1, "count": 5 / 3}
    parts = [matryoshka_nce(query[a:b], target, offset=a, **options) for a, b in ((0, 4), (4, 5), (5, 5))]
    torch.testing.assert_close(sum(parts) / 3, whole, atol=1e-12, rtol=0)
    assert parts[2] == 0


def test_a_graph_that_was_kept_can_be_gone_back_through_twice() -> None:
    query = torch.randn(4, 8, requires_grad=True)
    loss = matryoshka_nce(query, torch.randn(4, 8), dims=[8], temperature=0.1)
    first = torch.autograd.grad(loss, query, retain_graph=True)[0].clone()
    torch.testing.assert_close(torch.autograd.grad(2 * loss, query)[0], 2 * first)
