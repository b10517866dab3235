"""lambda* and hard negatives equal brute force; what has no negatives is told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling_sail.training import mining
from modeling_sail.training.mining import best_threshold, mine


def brute(queries, targets, query_ids, target_ids, count):
    """Every threshold, every pair."""
    scores = (queries @ targets.T).double().numpy().astype(np.float32)
    size = len(queries)
    positives_of = {}
    for query, target in zip(query_ids, target_ids, strict=True):
        positives_of.setdefault(query, set()).add(target)
    out = np.array([[target in positives_of[query] for target in target_ids] for query in query_ids])
    positives, negatives = scores.diagonal(), scores[~out]
    best = (-1.0, 0.0)
    for threshold in np.unique(np.concatenate([positives, negatives])):
        true, false = (positives >= threshold).sum(), (negatives >= threshold).sum()
        best = max(best, (2 * true / (true + false + size), threshold)) if true else best
    hard = []
    for row in range(size):
        order = sorted(
            (j for j in range(size) if not out[row, j] and scores[row, j] < best[1]), key=lambda j: -scores[row, j]
        )
        seen, kept = set(), []
        for j in order:
            if target_ids[j] not in seen:
                seen.add(target_ids[j])
                kept.append(scores[row, j])
        hard.append(kept[:count])
    return best, hard, negatives


@st.composite
def pairs(draw):
    size = draw(st.integers(2, 12))
    seed = draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    levels = draw(st.sampled_from([0, 2, 3]))
    if levels:  # small whole numbers: exact products, many ties
        queries, targets = (torch.randint(0, levels, (size, 3), generator=generator).float() for _ in range(2))
    else:
        queries = torch.randn(size, 6, generator=generator)
        targets = queries + draw(st.sampled_from([0.3, 1.0, 5.0])) * torch.randn(size, 6, generator=generator)
    kinds = draw(st.integers(1, 2 * size))
    numbers = torch.randint(0, kinds, (2, size), generator=generator)
    return queries, targets, [f"q{n}" for n in numbers[0].tolist()], [f"t{n}" for n in numbers[1].tolist()]


@settings(deadline=None, max_examples=200)
@given(pairs(), st.integers(1, 4), st.sampled_from([0, 40, 1 << 20]))
def test_threshold_and_negatives_equal_brute_force(made, count, spare) -> None:
    """With little memory hardly a negative is kept: then they are counted in a second pass."""
    queries, targets, query_ids, target_ids = made
    expected, hard, negatives = brute(*made, count)
    options = {"query_ids": query_ids, "target_ids": target_ids, "num_negatives": count}
    if not len(negatives):
        with pytest.raises(ValueError, match="no negative"):
            mine(queries, targets, **options)
        return
    found = mine(queries, targets, **options, memory_bytes=16 * len(queries) + spare)
    assert found.threshold.f1 == pytest.approx(expected[0], abs=1e-12)
    assert found.threshold.value == pytest.approx(float(expected[1]), abs=1e-5)
    for row, kept_scores in enumerate(hard):
        scores = found.scores[row][~found.scores[row].isnan()]
        assert scores.tolist() == pytest.approx(kept_scores, abs=1e-5)
        places = found.negatives[row][found.negatives[row] >= 0].tolist()
        assert len({target_ids[place] for place in places}) == len(places)
    assert bool(found.degenerate) == (not any(hard))


@pytest.mark.parametrize("level", [1.0, 0.5])
def test_where_all_scores_are_equal_the_threshold_is_theirs_and_the_reason_is_told(level) -> None:
    queries, targets = torch.full((4, 1), level), torch.ones(4, 1)
    found = mine(queries, targets, query_ids="abcd", target_ids="abcd")
    assert found.threshold.value == level
    assert found.threshold.f1 == pytest.approx(2 * 4 / (4 + 12 + 4))
    assert (found.negatives < 0).all() and found.false_negatives.tolist() == [3] * 4
    assert "does not tell these items apart" in found.degenerate


def test_ids_may_be_numbers_and_the_highest_false_negative_is_named() -> None:
    queries = torch.nn.functional.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    targets = queries.clone()
    targets[7] = queries[3]  # a second right answer to query 3
    numbers = np.arange(50)
    found = mine(queries, targets, query_ids=numbers, target_ids=numbers * 3)
    assert found.highest_false[3] == 7 and found.false_negatives[3] == 1
    assert 7 not in found.negatives[3].tolist()


class Killed(Exception):
    pass


def test_a_killed_pass_goes_on_from_its_state_to_the_same_result(tmp_path, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(200, 8, generator=generator)
    targets = queries + torch.randn(200, 8, generator=generator)
    given = {"query_ids": range(200), "target_ids": range(200), "memory_bytes": 40_000, "state": tmp_path / "state"}
    whole = mine(queries, targets, **given | {"state": None})
    monkeypatch.setattr(mining, "SECONDS_BETWEEN_SAVES", -1.0)
    block, asked = mining._Blocks.block, []

    def dies(self, begin):
        asked.append(begin)
        if len(asked) == 9:
            raise Killed
        return block(self, begin)

    monkeypatch.setattr(mining._Blocks, "block", dies)
    with pytest.raises(Killed):
        mine(queries, targets, **given)
    with pytest.raises(ValueError, match="state of another run"):
        mine(queries, targets, **given | {"num_negatives": 3})
    found = mine(queries, targets, **given)
    assert asked[9] == asked[8], "it goes on with the block that it died in"
    assert torch.equal(found.negatives, whole.negatives) and found.threshold.value == whole.threshold.value
    assert np.array_equal(found.threshold.curve, whole.threshold.curve)
    assert not given["state"].exists()


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=8),
    st.lists(st.integers(0, 5), min_size=1, max_size=30),
    st.integers(1, 30),
)
def test_some_negatives_tell_the_threshold_only_where_it_is_certain(positives, negatives, kept) -> None:
    whole = best_threshold(np.array(positives, float), np.array(negatives, float), True)
    some = best_threshold(
        np.array(positives, float), np.sort(np.array(negatives, float))[::-1][:kept], kept >= len(negatives)
    )
    assert some is None or (some.f1, some.value) == (whole.f1, whole.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"queries": torch.ones(1, 2), "targets": torch.ones(1, 2), "query_ids": "a", "target_ids": "a"},
            "at least two",
        ),
        ({"targets": torch.ones(3, 2)}, r"must both be \(N, D\)"),
        ({"query_ids": "abc"}, "3 query ids and 2 target ids for 2 pairs"),
        ({"queries": torch.full((2, 2), float("nan"))}, "queries hold NaN"),
        ({"num_negatives": 0}, "num_negatives=0"),
        ({"target_ids": "xx"}, "There is no negative"),
        ({"memory_bytes": 3}, "memory_bytes=3 does not hold one row"),
    ],
)
def test_what_cannot_be_mined_is_told(change, message) -> None:
    given = {"queries": torch.eye(2), "targets": torch.eye(2), "query_ids": "ab", "target_ids": "ab"} | change
    with pytest.raises(ValueError, match=message):
        mine(given.pop("queries"), given.pop("targets"), **given)


def test_the_curve_is_the_f1_at_every_positive_score() -> None:
    found = best_threshold(np.array([0.9, 0.5, 0.4]), np.array([0.6, 0.45, 0.1]), True)
    assert found.curve[:, 0].tolist() == [0.9, 0.5, 0.4]
    assert found.curve[:, 1] == pytest.approx([2 / 4, 4 / 6, 6 / 8])
    assert (found.value, found.f1, found.precision, found.recall) == pytest.approx((0.4, 0.75, 0.6, 1.0))
