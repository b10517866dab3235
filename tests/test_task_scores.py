"""What a task's scores promise: closed forms, negatives that are none of the relevant, sequences that are means."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from modeling_sail.evaluation.tasks.task import (
    KS,
    SCORING,
    Item,
    Pairs,
    Retrieval,
    Task,
    _drawn_cosines,
    _drawn_outside,
    score,
    unit,
    with_sequences,
)

SEEDS = st.integers(0, 10_000)
APART = {f"separability_{name}" for name in ("positive_mean", "negative_mean", "overlap", "auc", "histogram")}
GOLDEN = [0.347222, 0.147628, 0.110417, 0.611111, 0.458333, 1.0]  # of the vectors below, by `score`


def encode(items: Sequence[Item], side: str) -> np.ndarray:
    """The vector that an item names."""
    return np.array([item["vector"] for item in items], dtype=np.float32)


def named(vectors: Any, prefix: str = "") -> dict[str, Item]:
    return {f"{prefix}{place}": {"vector": tuple(map(float, vector))} for place, vector in enumerate(vectors)}


@st.composite
def retrievals(draw: st.DrawFn) -> Retrieval:
    """Small, with ties and zeros; sometimes all that is not relevant is excluded."""
    generator = np.random.default_rng(draw(SEEDS))
    num_queries, num_targets = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    one, other = (generator.integers(-1, 2, (rows, 3)) for rows in (num_queries, num_targets))
    relevant, excluded = {}, {}
    for query in range(num_queries):
        kind = draw(st.lists(st.sampled_from("roi"), min_size=num_targets, max_size=num_targets))
        assume("r" in kind)
        relevant[str(query)] = frozenset(f"t{place}" for place, letter in enumerate(kind) if letter == "r")
        excluded[str(query)] = frozenset(f"t{place}" for place, letter in enumerate(kind) if letter == "o")
    return Retrieval(named(one), named(other, "t"), relevant, excluded)


# --- retrieval ------------------------------------------------------------------------------------------------------


def test_retrieval_in_closed_form() -> None:
    queries, corpus = named(np.eye(3)[:2]), named([[2, 0, 0], [0, 3, 0], [1, 0, 0], [0, 0, 1]], "t")
    data = Retrieval(queries, corpus, {"0": frozenset({"t0"}), "1": frozenset({"t1"})}, {"0": frozenset({"t2"})})
    found = score(data, encode)
    assert set(found) == {f"{name}_at_{k}" for name in ("recall", "ndcg", "mrr") for k in KS} | APART | {"left_out"}
    assert found["left_out"] == 0
    assert all(found[f"{name}_at_{k}"] == 1 for name in ("recall", "ndcg", "mrr") for k in KS)
    assert [found[f"separability_{name}"] for name in ("positive_mean", "negative_mean", "overlap", "auc")] == [
        1,
        0,
        0,
        1,
    ]
    tied = score(Retrieval(queries, corpus, data.relevant), encode)  # t2 now is as near to the first query as t0
    assert tied["recall_at_1"] == tied["ndcg_at_1"] == tied["mrr_at_1"] == 0.5
    assert tied["recall_at_10"] == 1 and tied["mrr_at_10"] == 0.75
    assert tied["ndcg_at_10"] == pytest.approx((1 / np.log2(3) + 1) / 2)


def test_a_constant_model_earns_nothing_before_the_end() -> None:
    corpus = named(np.random.default_rng(0).normal(size=(11, 3)), "t")
    queries = named(np.eye(3))
    data = Retrieval(queries, corpus, {name: frozenset({"t4"}) for name in queries})
    found = score(data, lambda items, side: np.full((len(items), 7), 0.1, dtype=np.float32))
    assert found["recall_at_1"] == found["recall_at_10"] == 0 and found["recall_at_25"] == 1
    assert found["separability_overlap"] == 1 and found["separability_auc"] == 0.5


@given(retrievals(), SEEDS)
@settings(max_examples=60)
def test_drawn_negatives_are_neither_relevant_nor_excluded_and_as_many_as_positives(data: Retrieval, seed: int) -> None:
    place = {name: index for index, name in enumerate(data.corpus)}
    sides = [
        [np.array(sorted(place[one] for one in side[name]), dtype=np.int64) for name in data.queries]
        for side in (data.relevant, data.excluded)
    ]
    # Along one-hot targets, the cosine of query i with target j says which they are.
    marks = np.arange(1, len(data.queries) * len(data.corpus) + 1, dtype=float).reshape(len(data.queries), -1)
    positive, negative = _drawn_cosines(marks, np.eye(len(data.corpus)), *sides, seed)
    others = [
        np.setdiff1d(marks[row], marks[row, np.union1d(*both)]) for row, both in enumerate(zip(*sides, strict=True))
    ]
    assert sorted(positive) == sorted(marks[row, one] for row, right in enumerate(sides[0]) for one in right)
    assert set(negative) <= set(np.concatenate(others))
    assert len(negative) == sum(len(right) for right, left in zip(sides[0], others, strict=True) if len(left))


def test_negatives_are_drawn_from_all_that_are_left_alike() -> None:
    drawn = _drawn_outside(np.array([0, 2, 3, 7]), 9, 10_000, np.random.default_rng(0))
    counts = np.bincount(drawn, minlength=9)
    assert not counts[[0, 2, 3, 7]].any() and (np.abs(counts[[1, 4, 5, 6, 8]] - 2000) < 200).all()
    assert not len(_drawn_outside(np.arange(4), 4, 5, np.random.default_rng(0)))


def test_at_most_ten_positives_of_a_query_are_drawn() -> None:
    positive, negative = _drawn_cosines(
        np.eye(40)[:2], np.eye(40), [np.arange(25), np.arange(3)], [np.arange(0)] * 2, 0
    )
    assert len(positive) == len(negative) == 10 + 3


@given(retrievals(), SEEDS)
@settings(max_examples=60)
def test_scores_of_any_small_corpus_are_within_bounds_and_left_out_where_nothing_is(data: Retrieval, seed: int) -> None:
    found = score(data, encode, seed=seed)
    there = {name for side in (data.queries, data.corpus) for name, item in side.items() if any(item["vector"])}
    zeros = [item for side in (data.queries, data.corpus) for item in side.values() if not any(item["vector"])]
    assert found["left_out"] == len(zeros)
    asked = [name for name in data.queries if name in there]
    left = any(set(data.corpus) - data.relevant[name] - data.excluded[name] for name in asked)
    assert set(found) & APART in (set(), APART)
    if not left or not any(data.relevant[name] & there for name in asked):
        assert not set(found) & APART
    elif not zeros:
        assert set(found) & APART == APART
    bounds = {name: -1 if name.endswith("mean") else 0 for name in set(found) - {"left_out", "separability_histogram"}}
    assert all(low - 1e-6 <= found[name] <= 1 + 1e-6 for name, low in bounds.items())
    assert all(found[f"recall_at_{low}"] <= found[f"recall_at_{high}"] for low, high in zip(KS, KS[1:], strict=False))
    assert found == score(data, encode, seed=seed)
    reverse = Retrieval(
        dict(reversed(data.queries.items())), dict(reversed(data.corpus.items())), data.relevant, data.excluded
    )
    again = score(reverse, encode, seed=seed)
    assert {name: again[name] for name in found if name not in APART} == pytest.approx(
        {name: found[name] for name in found if name not in APART}
    )


def test_the_histogram_counts_the_cosines_that_separability_is_of() -> None:
    corpus = named([[1, 0], [0.6, 0.8], [0, 1], [-1, 0]], "t")
    data = Retrieval({"q": {"vector": (1.0, 0.0)}}, corpus, {"q": frozenset({"t0", "t1"})}, {"q": frozenset({"t3"})})
    found = score(data, encode)["separability_histogram"]
    assert set(found) == {"edges", "positive", "negative"} and all(type(side) is list for side in found.values())
    assert found["edges"][0] == -1 and found["edges"][-1] == 1 and len(found["edges"]) == 51
    assert [place for place, count in enumerate(found["positive"]) if count] == [40, 49]  # 0.6 and 1
    assert found["negative"][25] == sum(found["negative"]) == 2 and found["edges"][25] == 0  # t2, twice
    assert json.loads(json.dumps(found)) == found


def test_what_cannot_be_embedded_separates_nothing_and_is_counted() -> None:
    """Of three candidates of each query one is zero: a cosine of 0 would lie between the right and the wrong ones."""
    corpus = named([[1, 0], [0, 0], [-1, 0], [0, 0]], "t")
    queries = named([[1, 0], [1, 0], [0, 0]])
    data = Retrieval(queries, corpus, {name: frozenset({"t0", "t1"}) for name in queries})
    found = score(data, encode)
    assert found["left_out"] == 3
    assert found["separability_positive_mean"] == 1 and found["separability_negative_mean"] == -1
    assert sum(found["separability_histogram"]["positive"]) == 2
    lost = score(data, lambda items, side: np.zeros((len(items), 2)))
    assert lost["left_out"] == 7 and lost["recall_at_1"] == 0 and not set(lost) & APART


def test_models_meet_the_same_draws_whatever_they_cannot_embed() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(60, 4))
    relevant = [np.array([row]) for row in range(60)]
    none = [np.zeros(0, dtype=np.int64)] * 60
    whole = _drawn_cosines(unit(vectors), unit(vectors), relevant, none, 0)
    gone = vectors.copy()
    gone[7] = 0
    part = _drawn_cosines(unit(gone), unit(vectors), relevant, none, 0)
    assert [np.delete(side, 7).tolist() for side in whole] == [side.tolist() for side in part]


def test_scores_of_fixed_vectors_are_those_of_this_number_of_the_scoring() -> None:
    """When this fails, and is meant to, raise `SCORING`: what is kept was measured otherwise."""
    generator = np.random.default_rng(12)
    corpus = named(generator.normal(size=(40, 4)), "t")
    corpus["t5"] = {"vector": (0.0,) * 4}
    relevant = {str(row): frozenset(f"t{(7 * row + step) % 40}" for step in range(1 + row % 3)) for row in range(12)}
    queries = named(generator.normal(size=(12, 4)))
    queries["0"] = {"sequence": [corpus["t3"], corpus["t5"], corpus["t9"]]}
    found = score(Retrieval(queries, corpus, relevant, {"1": frozenset({"t0"})}), with_sequences(encode))
    shown = ("recall_at_10", "ndcg_at_10", "mrr_at_10", "separability_auc", "separability_overlap", "left_out")
    assert SCORING == 2
    assert [found[name] for name in shown] == pytest.approx(GOLDEN, abs=1e-6)


# --- pairs ----------------------------------------------------------------------------------------------------------


def test_pairs_in_closed_form() -> None:
    queries, targets = [*named([[1, 0]] * 4).values()], [*named([[1, 0], [0, 1], [1, 1], [0, 2]]).values()]
    found = score(Pairs(queries, targets, [1, 1, 0, 0]), encode)  # cosines 1, 0, 0.71, 0
    assert found["auc"] == found["separability_auc"] == pytest.approx((2 + 0.5) / 4)
    assert found["average_precision"] == pytest.approx((1 + 2 / 4) / 2)  # the tie of the last two counts against
    assert found["separability_positive_mean"] == pytest.approx(0.5)
    assert found["separability_negative_mean"] == pytest.approx(0.5**0.5 / 2)
    assert found["separability_overlap"] == pytest.approx(0.5)


# --- sequences ------------------------------------------------------------------------------------------------------


def direction(vector: Sequence[float]) -> np.ndarray:
    """Of length 1, or zero."""
    length = np.linalg.norm(vector)
    return np.asarray(vector) / length if length else np.zeros(len(vector))


@given(st.lists(st.lists(st.tuples(*[st.integers(-2, 2)] * 3), max_size=4), min_size=1, max_size=4))
def test_a_sequence_is_the_mean_of_the_directions_of_its_items(sequences: list[list[tuple[int, ...]]]) -> None:
    assume(any(sequences))
    seen: list[tuple[Item, str]] = []

    def noted(items: Sequence[Item], side: str) -> np.ndarray:
        seen.extend((item, side) for item in items)
        return encode(items, side)

    items = [{"sequence": [{"vector": vector} for vector in some]} for some in sequences]
    found = with_sequences(noted)(items, "query")
    for row, some in zip(found, sequences, strict=True):
        there = [direction(vector) for vector in some if any(vector)]  # an item without a vector does not count
        np.testing.assert_allclose(row, np.mean(there, axis=0) if there else np.zeros(3), atol=1e-6)
    asked = [item["vector"] for item, _ in seen]
    assert len(asked) == len(set(asked)) and set(asked) == {vector for some in sequences for vector in some}
    assert {side for _, side in seen} == {"target"}


def test_a_query_beside_sequences_is_asked_as_a_query_and_what_it_alone_would_be() -> None:
    asked: list[tuple[str, int]] = []

    def sided(items: Sequence[Item], side: str) -> np.ndarray:
        asked.append((side, len(items)))
        return encode(items, side) * (1 if side == "target" else -1)

    plain = {"vector": (0.0, 2.0)}
    mixed = [{"sequence": [{"vector": (1.0, 0.0)}, plain]}, plain, {"sequence": []}]
    found = with_sequences(sided)(mixed, "query")
    assert sorted(asked) == [("query", 1), ("target", 2)]
    np.testing.assert_allclose(found, [[0.5, 0.5], [0, -1], [0, 0]])
    assert with_sequences(sided)([{"sequence": []}, plain], "query").tolist() == [[0, 0], [0, -1]]


def test_without_sequences_the_model_is_asked_as_it_is() -> None:
    def sided(items: Sequence[Item], side: str) -> np.ndarray:
        return np.full((len(items), 2), float(side == "query"))

    assert with_sequences(sided)([{"title": "owl"}] * 2, "query").tolist() == [[1, 1], [1, 1]]


def test_sounds_that_begin_and_end_alike_are_two_items() -> None:
    silence, tone = np.zeros(5000, dtype=np.float32), np.zeros(5000, dtype=np.float32)
    tone[2000:3000] = 1
    assert repr(silence) == repr(tone)

    def loud(items: Sequence[Item], side: str) -> np.ndarray:
        return np.array([[1.0, 0.0] if item["audio"][0].any() else [0.0, 1.0] for item in items])

    found = with_sequences(loud)([{"sequence": [{"audio": (sound, 8000)}]} for sound in (silence, tone)], "query")
    assert found.tolist() == [[0, 1], [1, 0]]


def test_a_sequence_finds_what_its_items_point_to() -> None:
    corpus = named([[1, 0], [0, 1], [1, 1], [-1, 0]], "t")
    query = {"sequence": [corpus["t0"], corpus["t1"]]}
    data = Retrieval({"u": query}, corpus, {"u": frozenset({"t2"})}, {"u": frozenset({"t0", "t1"})})
    found = score(data, with_sequences(encode))
    assert found["recall_at_1"] == found["ndcg_at_1"] == 1


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "vectors", [np.zeros((3, 2)), np.zeros(2), np.array([[1.0, np.nan], [1.0, 0.0]])], ids=["count", "flat", "nan"]
)
def test_a_model_that_gives_other_vectors_is_told(vectors: np.ndarray) -> None:
    data = Retrieval(named(np.eye(2)), named(np.eye(2), "t"), {"0": frozenset({"t0"}), "1": frozenset({"t1"})})
    with pytest.raises(ValueError, match=r"for 2 items; \(2, D\), all finite, is needed"):
        score(data, lambda items, side: vectors)


def test_a_query_with_nothing_relevant_empty_sequences_and_unknown_families_are_refused() -> None:
    with pytest.raises(ValueError, match="1 queries have no relevant candidate"):
        score(Retrieval(named(np.eye(2)[:1]), named(np.eye(2), "t"), {"0": frozenset()}), encode)
    with pytest.raises(ValueError, match="All of 2 sequences are empty"):
        with_sequences(encode)([{"sequence": []}, {"sequence": []}], "query")
    with pytest.raises(ValueError, match="family='i2t'"):
        Task("a", "i2t", "", "", "", "", ("", ""), {}, ["text"], ["text"], "auc", dict)


def test_unit_vectors_keep_rows_of_zeros() -> None:
    np.testing.assert_allclose(unit(np.array([[3.0, 4.0], [0.0, 0.0]])), [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)


def test_a_pair_that_cannot_be_embedded_comes_last_and_separates_nothing() -> None:
    vectors = {"there": [1.0, 0.0], "against": [-1.0, 0.0], "lost": [0.0, 0.0]}
    items = [{"text": name} for name in ("there", "there", "lost", "there")]
    targets = [{"text": name} for name in ("there", "against", "there", "against")]
    found = score(
        Pairs(items, targets, [1, 0, 1, 0]), lambda some, side: np.array([vectors[item["text"]] for item in some])
    )
    assert found["auc"] == 0.5, "the lost pair is behind both wrong ones, the other before them"
    assert found["separability_positive_mean"] == 1.0 and found["separability_negative_mean"] == -1.0
    nothing = score(Pairs(items, targets, [1, 0, 1, 0]), lambda some, side: np.zeros((len(some), 2)))
    assert nothing["auc"] == 0.5 and "separability_auc" not in nothing
