"""lambda* and hard negatives equal brute force; what has no negatives is told."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling_sail.training import mining, mining_blocks
from modeling_sail.training.mining import NothingToMine, best_threshold, mine
from torch import Tensor


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
    hard, false = [], []
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
        false.append(int((scores[row][~out[row]] >= best[1]).sum()))
    return best, hard, negatives, false


@st.composite
def pairs(draw):
    size = draw(st.integers(2, 30))
    seed = draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    levels = draw(st.sampled_from([0, 2, 3]))
    if levels:  # small whole numbers: exact products, many ties
        queries, targets = (torch.randint(0, levels, (size, 3), generator=generator).float() for _ in range(2))
    else:
        queries = torch.randn(size, 6, generator=generator)
        targets = queries + draw(st.sampled_from([0.3, 1.0, 5.0])) * torch.randn(size, 6, generator=generator)
        queries, targets = ((16 * side).round() / 16 for side in (queries, targets))  # exact products again
    kinds = draw(st.integers(1, 2 * size))
    numbers = torch.randint(0, kinds, (2, size), generator=generator)
    said_again = draw(st.sampled_from(["nothing", "targets", "queries", "both"]))  # an id is one item, or may be many
    if said_again in ("queries", "both"):
        queries = queries[numbers[0] % size]
    if said_again in ("targets", "both"):
        targets = targets[numbers[1] % size]
    return queries, targets, [f"q{n}" for n in numbers[0].tolist()], [f"t{n}" for n in numbers[1].tolist()]


LIMITS = st.fixed_dictionaries(
    {
        "TILE": st.sampled_from([(1024, 16_384), (5, 7), (64, 3)]),  # one tile, several, more than one a row
        "SPARE": st.sampled_from([0, 2, 24]),  # with few, most rows are looked at again
        "KEPT_A_PAIR": st.sampled_from([1, 16]),  # with few, negatives are counted in a second pass
        "MASKED_AT_ONCE": st.sampled_from([1, 10, 1 << 20]),
        "COMPARED": st.sampled_from([3, 4096]),
        "ROWS_WEIGHED": st.sampled_from([2, 128]),
    }
)


@settings(max_examples=300)
@given(pairs(), st.integers(1, 4), LIMITS, st.sampled_from([100, 2000, 1 << 30]))
def test_threshold_and_negatives_equal_brute_force(made, count, limits, memory) -> None:
    queries, targets, query_ids, target_ids = made
    expected, hard, negatives, false = brute(*made, count)
    options = {"query_ids": query_ids, "target_ids": target_ids, "num_negatives": count, "memory_bytes": memory}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in limits.items():
            patch.setattr(mining if hasattr(mining, name) else mining_blocks, name, value)
        if not len(negatives):
            with pytest.raises(NothingToMine, match="no negative"):
                mine(queries, targets, **options)
            return
        found = mine(queries, targets, **options)
    assert found.threshold.f1 == pytest.approx(expected[0], abs=1e-12)
    assert found.threshold.value == pytest.approx(float(expected[1]), abs=1e-5)
    assert found.false_negatives.tolist() == false
    assert (found.highest_false >= 0).tolist() == [number > 0 for number in false]
    for row, place in enumerate(found.highest_false.tolist()):
        if place >= 0:
            right = {target for query, target in zip(query_ids, target_ids, strict=True) if query == query_ids[row]}
            others = [column for column, target in enumerate(target_ids) if target not in right]
            assert place in others
            assert (queries[row] @ targets[place]).item() == pytest.approx(
                (queries[row] @ targets[others].T).max().item(), abs=1e-5
            )
    for row, kept_scores in enumerate(hard):
        scores = found.scores[row][~found.scores[row].isnan()]
        assert scores.tolist() == pytest.approx(kept_scores, abs=1e-5)
        places = found.negatives[row][found.negatives[row] >= 0].tolist()
        assert len({target_ids[place] for place in places}) == len(places) == len(scores)
        assert scores.tolist() == pytest.approx((queries[row] @ targets[places].T).tolist(), abs=1e-5)


@pytest.mark.parametrize(("size", "noise", "names"), [(3000, 1.0, 3000), (2500, 20.0, 2500), (2000, 0.5, 20)])
def test_many_pairs_equal_brute_force_where_the_model_is_good_where_it_is_weak_and_with_few_names(
    size, noise, names, monkeypatch
) -> None:
    monkeypatch.setattr(mining_blocks, "TILE", (256, 1000))
    generator = torch.Generator().manual_seed(0)
    targets = torch.nn.functional.normalize(torch.randn(names, 16, generator=generator), dim=1)
    which = torch.arange(size) % names
    queries = targets[which] + noise * torch.randn(size, 16, generator=generator) / 4
    queries = torch.nn.functional.normalize(queries, dim=1)
    ids = {"query_ids": np.arange(size), "target_ids": which.numpy()}
    found = mine(queries, targets[which], **ids, num_negatives=5)
    scores = (queries @ targets.T)[:, which].numpy()
    out = (which[:, None] == which[None]).numpy()
    positives, negatives = scores.diagonal(), np.sort(scores[~out])
    rising = np.sort(positives)
    true = size - np.searchsorted(rising, rising)
    f1 = 2 * true / (true + len(negatives) - np.searchsorted(negatives, rising) + size)
    assert found.threshold.f1 == pytest.approx(f1.max(), rel=1e-6)
    assert (np.abs(rising[f1 >= f1.max() * (1 - 1e-6)] - found.threshold.value) < 1e-5).any()
    of_names = (queries @ targets.T).masked_fill(torch.arange(names)[None] == which[:, None], -torch.inf)
    of_names = of_names.masked_fill(of_names >= found.threshold.value, -torch.inf)
    expected = of_names.topk(5, dim=1).values
    expected = expected.masked_fill(~expected.isfinite(), torch.nan)
    torch.testing.assert_close(found.scores, expected, atol=1e-5, rtol=0, equal_nan=True)


@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), max_size=8), max_size=12), st.integers(1, 30))
def test_the_highest_are_kept_with_their_weights_whenever_they_come(parts, keep) -> None:
    kept = mining._Highest(keep, "cpu", weighted=True)
    for part in parts:
        values, weights = (torch.tensor([pair[side] for pair in part], dtype=torch.long) for side in (0, 1))
        kept.add(values.float(), weights)
    found = [round(value) for value, times in zip(*map(Tensor.tolist, kept.all()), strict=True) for _ in range(times)]
    expected = sorted((value for part in parts for value, times in part for _ in range(times)), reverse=True)
    assert found == expected[: len(found)] and len(found) >= min(keep, len(expected))
    assert len(found) < keep + 5


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


@pytest.mark.parametrize(("asks", "names"), [(200, 200), (200, 40), (60, 200), (60, 40)])  # distinct ones of a side
def test_a_killed_pass_goes_on_from_its_state_to_the_same_result(tmp_path, monkeypatch, asks, names) -> None:
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(200, 8, generator=generator)
    targets = queries + torch.randn(200, 8, generator=generator)
    queries, targets = queries[torch.arange(200) % asks], targets[torch.arange(200) % names]
    given = {"query_ids": np.arange(200) % asks, "target_ids": np.arange(200) % names, "state": tmp_path / "state"}
    height = 16 if asks == 200 else 5
    monkeypatch.setattr(mining_blocks, "TILE", (height, 64))
    whole = mine(queries, targets, **given | {"state": None})
    monkeypatch.setattr(mining, "SECONDS_BETWEEN_SAVES", -1.0)
    search, asked = mining._search_band, []

    def dies(blocks, rows, *rest):
        asked.append(rows)
        if len(asked) == 9:
            raise Killed
        search(blocks, rows, *rest)

    monkeypatch.setattr(mining, "_search_band", dies)
    with pytest.raises(Killed):
        mine(queries, targets, **given)
    with pytest.raises(ValueError, match="state of another run .its count differ"):
        mine(queries, targets, **given | {"num_negatives": 3})
    with pytest.raises(ValueError, match="state of another run .its .*data differ"):
        mine(targets, queries, **given)
    found = mine(queries, targets, **given)
    assert asked[9] == asked[8], "it goes on with the band that it died in"
    assert torch.equal(found.negatives, whole.negatives) and found.threshold.value == whole.threshold.value
    assert np.array_equal(found.threshold.curve, whole.threshold.curve)
    again = mine(queries, targets, **given)
    assert len(asked) == -(-asks // height) + 1, "a pass that is done is not gone through again"
    assert torch.equal(again.negatives, whole.negatives)
    given["state"].write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot be read as the state of a mining"):
        mine(queries, targets, **given)


def test_a_state_knows_which_row_says_what(tmp_path) -> None:
    """The same distinct queries with the same ids, but another row of them."""
    queries, targets = torch.ones(5, 2), torch.nn.functional.normalize(torch.arange(10.0).view(5, 2) + 1, dim=1)
    given = {"target_ids": "vwxyz", "state": tmp_path / "state"}
    mine(queries, targets, query_ids="ababa", **given)
    with pytest.raises(ValueError, match="its data differ"):
        mine(queries, targets, query_ids="abbaa", **given)


@pytest.mark.parametrize(("gap", "distinct"), [(0.5e-5, 50), (2e-5, 100)])
def test_rows_of_one_id_are_one_where_they_differ_by_noise_alone(gap, distinct) -> None:
    vectors = torch.nn.functional.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    noise = torch.nn.functional.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    rows, ids = torch.cat([vectors, vectors + gap * noise]), np.arange(100) % 50
    assert len(mining_blocks.Distinct.of(rows, ids).first) == distinct


def test_embeddings_that_differ_by_noise_alone_are_told_apart_by_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.nn.functional.normalize(torch.randn(1, 16, generator=generator), dim=1).expand(300, -1)
    sides = [one + 1e-8 * torch.randn(300, 16, generator=generator) for _ in range(2)]
    found = mine(*sides, query_ids=range(300), target_ids=range(300))
    assert "does not tell these items apart" in found.degenerate


@pytest.mark.parametrize("names", [20_000, 15_000, 4_000])
def test_memory_beside_the_result_stays_within_what_is_given(names) -> None:
    """In a process of its own: the peak of memory above what was there before."""
    code = (
        "import torch, numpy as np\n"
        "from modeling_sail.evaluation.benchmarks.child import measured\n"
        "from modeling_sail.training.mining import mine\n"
        "torch.manual_seed(0)\n"
        "q = torch.nn.functional.normalize(torch.randn(20000, 16), dim=1)\n"
        "t = torch.nn.functional.normalize(q + torch.randn(20000, 16) / 8, dim=1)\n"
        f"ids = np.arange(20000) % {names}\n"
        "q, t = q[ids], t[ids]\n"
        "mine(q[:100], t[:100], query_ids=ids[:100], target_ids=ids[:100])\n"
        "go = lambda: mine(q, t, query_ids=ids, target_ids=ids, num_negatives=4, memory_bytes=64 << 20)\n"
        "print(measured(go, 1)['extra_bytes'])\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "262144"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) < (64 << 20) + 12 * 28 * 20_000 * 4, done.stdout


@settings(max_examples=100)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=8),
    st.lists(st.integers(0, 5), min_size=1, max_size=30),
    st.integers(1, 30),
)
def test_some_negatives_tell_the_threshold_only_where_it_is_certain(positives, negatives, kept) -> None:
    values, times = np.unique(np.array(negatives, float), return_counts=True)
    whole = best_threshold(np.array(positives, float), np.array(negatives, float), True)
    some = best_threshold(
        np.array(positives, float), np.sort(np.array(negatives, float))[::-1][:kept], kept >= len(negatives)
    )
    assert some is None or (some.f1, some.value) == (whole.f1, whole.value)
    by_weight = best_threshold(np.array(positives, float), values, True, times)
    assert (by_weight.f1, by_weight.value) == (whole.f1, whole.value)
    few = max(1, len(values) // 2)
    some = best_threshold(np.array(positives, float), values[-few:], few == len(values), times[-few:])
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
        ({"memory_bytes": 3}, "memory_bytes=3 holds no score"),
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
