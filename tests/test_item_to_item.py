"""What item-to-item recall and the alignment promise: closed forms, brute force, clear errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from modeling_sail.evaluation import similarity
from modeling_sail.evaluation.item_to_item import (
    alignment,
    cluster_relevant,
    content_pairs_relevant,
    copair_targets,
    i2i_recall,
    unit_vectors,
)
from modeling_sail.evaluation.metrics import kendall_tau, top_k_overlap
from modeling_sail.training.recommendation.behaviour import Interactions, Items

NUM_ITEMS, NUM_USERS = 10, 4
Event = tuple[int, int, int, int]  # user, item, time, positive behaviours


def interactions_of(events: list[Event], num_items: int = NUM_ITEMS, users: tuple[str, ...] = ()) -> Interactions:
    user, item, time, positive = np.array(events, dtype=np.int64).reshape(-1, 4).T
    order = np.lexsort((time, user))
    users = users or tuple(f"u{number}" for number in range(NUM_USERS))
    names = tuple(f"i{number}" for number in range(num_items))
    behaviours = np.arange(3) < positive[:, None]
    return Interactions(
        users, names, ("a", "b", "c"), user[order], item[order], time[order].astype(float), behaviours[order]
    )


# --- item to item ---------------------------------------------------------------------------------------------------


def test_films_are_related_by_a_director_or_two_of_the_cast() -> None:
    items = Items.from_table(
        pa.table(
            {
                "id": list("abcdef"),
                "title": ["t"] * 6,
                "nickname": ["Joel Coen, Ethan Coen", " ethan coen", "Ed Begley, Jr.", "Al Mock, Jr.", None, None],
                "ocr": [None, "Ann, Bob, Cid", "Bob , ann", "Ann, Dan", "Ed Begley, Jr., Ann", "Al Mock, Jr., Ann"],
                "labels": [["x"]] * 6,
            }
        )
    )
    related = content_pairs_relevant(items)
    assert {tuple(pair) for pair in np.argwhere(np.triu(related)).tolist()} == {(0, 1), (1, 2)}
    assert (related == related.T).all() and not related.diagonal().any()
    bare = Items.from_table(pa.table({"id": list("ab"), "title": ["t", "t"]}))
    assert not content_pairs_relevant(bare).any()
    lists = Items.from_table(pa.table({"id": list("ab"), "ocr": [["Ann", "Bob"], ["Bob, Ann"]]}))
    assert content_pairs_relevant(lists).sum() == 2


def test_clusters_relate_their_members_and_a_negative_one_is_none() -> None:
    related = cluster_relevant(np.array([0, 1, 0, -1, -1]))
    assert np.argwhere(related).tolist() == [[0, 2], [2, 0]]
    with pytest.raises(ValueError, match=r"shape \(I,\)"):
        cluster_relevant(np.zeros((2, 2)))


def test_what_is_near_is_found_and_what_has_no_vector_is_not() -> None:
    clusters = np.repeat(np.arange(4), 3)
    embeddings = np.eye(4)[clusters] + 0.01 * np.random.default_rng(0).normal(size=(12, 4))
    relevant = cluster_relevant(clusters)
    assert i2i_recall(embeddings, relevant, ks=(1, 2)) == {1: pytest.approx(0.5), 2: 1.0}
    assert i2i_recall(embeddings[::-1].copy(), np.roll(relevant, 1, (0, 1)), ks=(2,))[2] < 1
    embeddings[0] = 0  # its two fellows each find one of two, and it finds none
    assert i2i_recall(embeddings, relevant, ks=(11,))[11] == pytest.approx((9 + 2 * 0.5) / 12)
    assert i2i_recall(np.zeros((12, 4)), relevant, ks=(2, 12)) == {2: 0.0, 12: 0.0}
    assert i2i_recall(np.ones((12, 4)), relevant, ks=(2,)) == {2: 0.0}


@given(st.integers(0, 10_000), st.integers(1, 8))
def test_i2i_recall_equals_brute_force(seed: int, k: int) -> None:
    generator = np.random.default_rng(seed)
    embeddings, clusters = generator.normal(size=(8, 3)), generator.integers(-1, 2, 8)
    relevant = cluster_relevant(clusters)
    assume(relevant.any())
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    shares = []
    for query in np.flatnonzero(relevant.any(axis=1)):
        order = sorted((item for item in range(8) if item != query), key=lambda item: -(unit[query] @ unit[item]))  # noqa: B023
        shares.append(relevant[query, order[:k]].sum() / relevant[query].sum())
    assert i2i_recall(embeddings, relevant, ks=(k,))[k] == pytest.approx(np.mean(shares))


def test_relations_that_do_not_fit_are_refused() -> None:
    for relevant in (np.ones((3, 3)), np.zeros((3, 3)), np.ones((2, 2))):
        with pytest.raises(ValueError, match=r"\(3, 3\) is needed, False on the diagonal"):
            i2i_recall(np.eye(3), relevant)


# --- alignment ------------------------------------------------------------------------------------------------------


def consumed_by(*users: set[int]) -> Interactions:
    """Who consumed each item; an event without a positive behaviour makes no consumer."""
    events = [(user, item, 11, 1) for item, some in enumerate(users) for user in some]
    return interactions_of([*events, *((user, 0, 12, 0) for user in range(NUM_USERS))])


def test_a_copair_is_the_other_item_that_most_shares_its_consumers() -> None:
    after = consumed_by({0, 1}, {0, 1, 2}, {1, 2, 3}, {2, 3}, {3})
    # 0-1: 2/3; 1-2: 2/4; 2-3: 2/3; 4 has too few; the ties of 1 and of 2 are none.
    assert copair_targets(after, minimum=2).tolist() == [[0, 1], [1, 0], [2, 3], [3, 2]]
    assert copair_targets(after, minimum=3).tolist() == [[1, 2], [2, 1]]
    tied = consumed_by({0, 1}, {0, 1}, {0, 1}, {2, 3})
    assert copair_targets(tied, minimum=2).tolist() == [[0, 1], [1, 0], [2, 0]]  # 3 shares nobody
    for minimum in (5, 4):
        with pytest.raises(ValueError, match=f"with {minimum} consumers or more share one"):
            copair_targets(after, minimum=minimum)
    with pytest.raises(ValueError, match="minimum=0"):
        copair_targets(after, minimum=0)


@given(st.lists(st.sets(st.integers(0, NUM_USERS - 1)), min_size=2, max_size=NUM_ITEMS), st.integers(1, 3))
def test_copairs_equal_brute_force(users: list[set[int]], minimum: int) -> None:
    expected = []
    for item, own in enumerate(users):
        others = [place for place, some in enumerate(users) if place != item and len(some) >= minimum and some & own]
        if len(own) >= minimum and others:
            best = max(others, key=lambda place: (len(users[place] & own) / len(users[place] | own), -place))  # noqa: B023
            expected.append([item, best])
    assume(expected)
    assert copair_targets(consumed_by(*users), minimum=minimum).tolist() == expected


def test_pairs_that_lie_together_are_aligned_and_random_ones_are_as_chance() -> None:
    generator = np.random.default_rng(0)
    pairs = np.arange(200).reshape(100, 2)
    random = generator.normal(size=(200, 16))
    together = random.copy()
    together[1::2] = together[::2] + 1e-4 * generator.normal(size=(100, 16))
    found = alignment(together, pairs, clusters=8, k=20)
    assert found["nmi"] > 0.95 > 0.4 > found["nmi_by_chance"]
    assert found["kendall_tau"] > 0.99 and found["top_k_overlap"] > 0.99 and found["bijective_accuracy"] == 1
    assert found["pairs"] == 100 and found == alignment(together, pairs, clusters=8, k=20)
    found = alignment(random, pairs, clusters=8, k=20)
    assert found["nmi"] == pytest.approx(found["nmi_by_chance"], abs=0.1)
    assert found["kendall_tau"] == pytest.approx(0, abs=0.1)
    assert found["top_k_overlap"] == pytest.approx(0.1, abs=0.05)


def test_alignment_ranks_all_items_by_either_side_without_a_matrix_of_all_pairs(monkeypatch) -> None:
    """Beside the dense way: two (P, M) arrays of cosines, ranked by the metrics of their names."""
    vectors = np.random.default_rng(4).normal(size=(200, 6)).astype(np.float32)
    vectors[::7] = vectors[3]  # ties
    vectors[190:] = 0
    unit = unit_vectors(vectors).astype(np.float64)
    pairs = np.stack([np.arange(180), np.roll(np.arange(180), 5)], axis=1)
    dense = [(unit[side] @ unit[:190].T).round(9) for side in pairs.T]
    rows = []
    monkeypatch.setattr(similarity, "kendall_tau", lambda one, other: rows.append(len(one)) or kendall_tau(one, other))
    found = alignment(vectors, pairs, clusters=4, k=10)
    assert found["kendall_tau"] == pytest.approx(kendall_tau(*dense), abs=1e-6)
    assert found["top_k_overlap"] == pytest.approx(top_k_overlap(*dense, 10), abs=1e-6)
    assert sum(rows) == 180 and max(rows) < 100


def test_an_item_in_both_groups_does_not_find_itself() -> None:
    vectors = np.random.default_rng(2).normal(size=(30, 4))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    nearest = (unit @ unit.T - 2 * np.eye(30)).argmax(axis=1)
    around = np.stack([np.arange(30), np.roll(np.arange(30), 1)], axis=1)  # each is a query once and a target once
    expected = (nearest[nearest] == np.arange(30)).mean()
    assert 0.2 < expected < 0.9
    assert alignment(vectors, around, clusters=3, k=5)["bijective_accuracy"] == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_collapsed_embedding_earns_nothing() -> None:
    found = alignment(np.ones((20, 4)), np.arange(20).reshape(10, 2), clusters=4, k=5)
    assert found == {
        "nmi": 0,
        "nmi_by_chance": 0,
        "kendall_tau": 0,
        "top_k_overlap": 0,
        "bijective_accuracy": 0,
        "pairs": 10,
    }


def test_items_without_a_vector_change_nothing_in_the_alignment() -> None:
    embeddings = np.random.default_rng(1).normal(size=(30, 5))
    pairs = np.array([[0, 1], [1, 0], [2, 3], [4, 1]])
    more = np.concatenate([embeddings, np.zeros((3, 5))])
    assert alignment(more, pairs, clusters=3, k=5) == pytest.approx(alignment(embeddings, pairs, clusters=3, k=5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": np.array([0, 1])}, r"shape \(P, 2\)"),
        ({"pairs": np.empty((0, 2), dtype=int)}, "at least one"),
        ({"pairs": np.array([[0.0, 1.0]])}, "integers"),
        ({"pairs": np.array([[0, 6]])}, "Pairs name items 0 to 6; the embeddings are of 6"),
        ({"pairs": np.array([[0, 1], [2, 2]])}, "1 of 2 pairs are of an item with itself"),
        ({"pairs": np.array([[0, 5]])}, "1 of 1 pairs"),
        ({"clusters": 6}, "clusters=6 must be at least 1 and at most the 5 items"),
        ({"k": 6}, "k=6 must be at least 1 and at most the 5"),
        ({"embeddings": np.zeros(3)}, r"shape \(I, D\)"),
    ],
)
def test_an_alignment_that_cannot_be_measured_is_refused(change: dict[str, Any], message: str) -> None:
    embeddings = np.eye(6)
    embeddings[5] = 0
    given = {"embeddings": embeddings, "pairs": np.array([[0, 1]]), "clusters": 2, "k": 2} | change
    with pytest.raises(ValueError, match=message):
        alignment(**given)
