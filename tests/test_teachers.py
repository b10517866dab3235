"""What the teachers promise: who is consumed together is near, the same seed gives the same bits, nothing leaks."""

from __future__ import annotations

import math
import sys
import warnings
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling_sail.training.recommendation import teachers as module
from modeling_sail.training.recommendation.behaviour import Interactions, split_by_time
from modeling_sail.training.recommendation.tables import IDTable
from modeling_sail.training.recommendation.teachers import (
    TEACHERS,
    Positives,
    TeacherSettings,
    als_fold_in,
    als_model,
    graph,
    item2vec,
    propagate,
    train_teachers,
)
from scipy.sparse import csr_matrix

pytest.importorskip("implicit")
pytest.importorskip("gensim")

QUICK = TeacherSettings(dim=4, bpr_epochs=3, als_iterations=2, item2vec_epochs=2, item2vec_window=3)
Event = tuple[str, str, float, int]  # user, item, time, positive behaviours


def interactions_of(*events: Event) -> Interactions:
    rows = [
        {"user": user, "item": item, "time": time, "behaviours": list("xyz"[:positives])}
        for user, item, time, positives in events
    ]
    return Interactions.from_table(pa.Table.from_pylist(rows))


def two_communities(seed: int = 0, num_users: int = 20, num_items: int = 12) -> Interactions:
    """Each user consumes half of the items of their community, in any order."""
    generator = np.random.default_rng(seed)
    return interactions_of(
        *(
            (f"{side}{user:02}", f"{side}{item:02}", float(time), 1)
            for side in "ab"
            for user in range(num_users)
            for time, item in enumerate(generator.choice(num_items, num_items // 2, replace=False))
        )
    )


def trained(before: Interactions, name: str, **given_settings: Any) -> IDTable:
    return train_teachers(before, [name], split_time=99.0, progress=False, **given_settings)[name]


def cosines(table: IDTable) -> np.ndarray:
    unit = table.vectors / np.linalg.norm(table.vectors, axis=1, keepdims=True)
    return unit @ unit.T


# --- what is learned ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEACHERS)
def test_items_of_one_community_are_nearer_to_each_other_than_to_the_others(name: str) -> None:
    table = trained(two_communities(), name)
    assert table.name == name and len(table) == 24 and table.dim == TeacherSettings().dim
    side = np.array([item[0] for item in table.ids])
    similar, same = cosines(table), side[:, None] == side
    own = np.where(same & ~np.eye(24, dtype=bool), similar, np.nan)
    others = np.where(same, np.nan, similar)
    assert (np.nanmean(own, 1) > np.nanmax(others, 1) + 0.2).all()


def test_the_last_number_of_bpr_is_what_everybody_prefers() -> None:
    rare = [(f"u{user}", f"rare{user % 4}", 1.0, 1) for user in range(20)]
    table = trained(interactions_of(*rare, *((f"u{user}", "common", 2.0, 1) for user in range(20))), "bpr")
    assert table.ids[0] == "common" and (table.vectors[0, -1] > table.vectors[1:, -1]).all()


def test_one_layer_of_lightgcn_by_hand() -> None:
    """Users A: a, b and B: b, c; each item begins as a unit vector, each user as the mean of theirs."""
    before = interactions_of(("A", "a", 0.0, 1), ("A", "b", 1.0, 1), ("B", "b", 0.0, 1), ("B", "c", 1.0, 1))
    one_layer = {"features": np.eye(3), "settings": TeacherSettings(graph_layers=1)}
    of_a, of_b = np.array([0.5, 0.5, 0]), np.array([0, 0.5, 0.5])
    # Degrees: A and B 2, a and c 1, b 2. So b gets a half of both, a and c the share 1 / sqrt(2) of their only user.
    layer = np.stack([of_a / math.sqrt(2), (of_a + of_b) / 2, of_b / math.sqrt(2)])
    table = trained(before, "graph", **one_layer)
    assert table.ids == ("a", "b", "c") and table.vectors == pytest.approx(layer)
    one_layer["settings"] = TeacherSettings(graph_layers=1, graph_layer_zero=True)
    assert trained(before, "graph", **one_layer).vectors == pytest.approx((layer + np.eye(3)) / 2)


@st.composite
def pair_matrices(draw: st.DrawFn) -> np.ndarray:
    """(U, J) of 0 and 1, no row and no column of zeros only."""
    num_users, num_items = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    matrix = np.array(
        draw(
            st.lists(
                st.lists(st.booleans(), min_size=num_items, max_size=num_items), min_size=num_users, max_size=num_users
            )
        )
    )
    matrix[np.arange(num_users), np.arange(num_users) % num_items] = True
    matrix[np.arange(num_items) % num_users, np.arange(num_items)] = True
    return matrix


@given(pair_matrices(), st.integers(1, 4), st.booleans(), st.integers(0, 9))
def test_propagation_is_that_of_the_dense_adjacency(
    pairs: np.ndarray, num_layers: int, layer_zero: bool, seed: int
) -> None:
    num_users, num_items = pairs.shape
    start = np.random.default_rng(seed).standard_normal((num_users + num_items, 3), dtype=np.float32)
    adjacency = np.zeros((len(start), len(start)))
    adjacency[:num_users, num_users:] = pairs
    adjacency += adjacency.T
    scale = np.diag(adjacency.sum(1) ** -0.5)
    layers = [np.linalg.matrix_power(scale @ adjacency @ scale, power) @ start for power in range(num_layers + 1)]
    expected = np.mean(layers[0 if layer_zero else 1 :], axis=0)[num_users:]
    matrix = csr_matrix(pairs.astype(np.float32))
    found = propagate(matrix, start[:num_users], start[num_users:], num_layers, layer_zero=layer_zero)
    assert found.dtype == np.float32 and found == pytest.approx(expected, abs=1e-5)


def test_the_graph_takes_the_features_of_the_items_that_have_a_row() -> None:
    """Features are of all items; those without a positive event are passed over."""
    before = interactions_of(("A", "b", 0.0, 1), ("A", "a", 0.0, 0), ("A", "c", 0.0, 1))
    table = trained(
        before, "graph", features=np.array([[9, 9], [1, 0], [0, 1]]), settings=TeacherSettings(graph_layers=1)
    )
    assert table.ids == ("b", "c") and table.vectors == pytest.approx(np.full((2, 2), 0.5 / math.sqrt(2)))


# --- pairs ----------------------------------------------------------------------------------------------------------


def test_pairs_are_in_the_order_in_which_they_became_positive() -> None:
    before = interactions_of(
        ("B", "z", 5.0, 3),
        ("B", "y", 4.0, 1),
        ("B", "x", 3.0, 0),
        ("B", "z", 1.0, 2),
        ("B", "y", 6.0, 2),
        ("B", "z", 9.0, 3),
        ("A", "y", 1.0, 1),
        ("A", "w", 2.0, 2),
    )
    one, two = (Positives.from_interactions(before, 99.0, positives) for positives in (1, 2))
    assert one.item_ids == ("w", "y", "z") and one.items.tolist() == [0, 2, 3] and one.num_users == 2
    assert [[one.item_ids[item] for item in sequence] for sequence in one.sequences()] == [["y", "w"], ["z", "y"]]
    assert [[two.item_ids[item] for item in sequence] for sequence in two.sequences()] == [["w"], ["z", "y"]]
    assert one.matrix().toarray().tolist() == [[1, 1, 0], [0, 1, 1]]


def test_an_item_that_is_nobodys_beside_another_is_unknown_to_item2vec(monkeypatch: pytest.MonkeyPatch) -> None:
    before = interactions_of(("A", "a", 0.0, 1), ("A", "b", 0.0, 1), ("B", "c", 0.0, 1))
    assert trained(before, "item2vec").ids == ("a", "b")
    with pytest.raises(ValueError, match="None of the 1 users has two positive items"):
        trained(before.take(before.item == 2), "item2vec")
    # Sequences that are too long for gensim are cut; what stands alone behind the cut is left.
    monkeypatch.setattr(module, "LONGEST_SENTENCE", 2)
    long = Positives.from_interactions(interactions_of(*(("A", item, 0.0, 1) for item in "abcde")), 99.0)
    assert item2vec(long, QUICK).ids == ("a", "b", "c", "d")


# --- determinism, and no leak ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEACHERS)
def test_the_same_seed_gives_the_same_bits(name: str) -> None:
    before = two_communities()
    first = trained(before, name, settings=QUICK, seed=3)
    among_others = train_teachers(before, [*TEACHERS], split_time=99.0, settings=QUICK, seed=3, progress=False)
    assert list(among_others) == list(TEACHERS)
    assert first.vectors.tobytes() == among_others[name].vectors.tobytes()
    assert not np.array_equal(first.vectors, trained(before, name, settings=QUICK, seed=4).vectors)


NAMES = st.sampled_from("abcdef")
EVENTS = st.lists(st.tuples(NAMES, NAMES, st.floats(0, 9), st.integers(0, 3)), max_size=30)


@given(EVENTS, EVENTS)
@settings(max_examples=15)
def test_nothing_from_the_split_on_changes_a_table(past: list[Event], future: list[Event]) -> None:
    """Whatever happens later, by whomever and with whatever, even users and items that were not there before."""
    past = [("b", "b", 0.0, 1), ("b", "d", 0.0, 1), *past]
    future = [("a", "a", 10.0, 3), *((f"{user}2", f"{item}2", 10 + time, count) for user, item, time, count in future)]
    future += [(user[0], item[0], time, count) for user, item, time, count in future[1:]]
    before, after, time = split_by_time(interactions_of(*past, *future), time=10.0)
    assert len(after) == len(future)
    with_future = train_teachers(before, split_time=time, settings=QUICK, progress=False)
    without = train_teachers(interactions_of(*past), split_time=time, settings=QUICK, progress=False)
    positive = {item for _, item, _, count in past if count}
    for name in TEACHERS:
        assert with_future[name].ids == without[name].ids and set(without[name].ids) <= positive
        assert with_future[name].vectors.tobytes() == without[name].vectors.tobytes()
    for name in {*TEACHERS} - {"item2vec"}:
        assert set(without[name].ids) == positive


def test_an_item_consumed_only_after_the_split_has_no_row() -> None:
    split = split_by_time(interactions_of(("A", "a", 0.0, 1), ("A", "b", 1.0, 1), ("A", "c", 2.0, 3)), time=2.0)
    for name, table in train_teachers(split.before, split_time=2.0, settings=QUICK, progress=False).items():
        _, known = table.rows_for(split.before.item_ids)
        assert split.before.item_ids == ("a", "b", "c") and known.tolist() == [True, True, False], name


def test_events_at_the_split_or_later_are_refused() -> None:
    whole = interactions_of(*(("A", item, float(time), 1) for time, item in enumerate("abc")))
    for call in (
        lambda: train_teachers(whole, split_time=1.0, progress=False),
        lambda: als_fold_in(whole, [np.array([0])], split_time=1.0),
        lambda: Positives.from_interactions(whole, 1.0),
    ):
        with pytest.raises(ValueError, match=r"2 events are at the split time 1\.0 or later and would leak"):
            call()


# --- ALS for others -------------------------------------------------------------------------------------------------


def test_folding_in_solves_the_users_equation() -> None:
    """(Y'Y + (alpha - 1) Y_u'Y_u + lambda I) x = alpha Y_u' 1 (Hu et al., 2008, eq. 4, with weights alpha and 1)."""
    chosen = TeacherSettings(dim=5, als_iterations=5, als_alpha=7.0, als_regularization=0.3)
    before = two_communities()
    histories = [np.array([0, 3, 5]), np.array([20]), np.array([7, 1, 7])]
    scores = als_fold_in(before, histories, split_time=99.0, settings=chosen, seed=2)
    items = als_model(Positives.from_interactions(before, 99.0), chosen, seed=2).item_factors.astype(np.float64)
    for history, found in zip(histories, scores, strict=True):
        own = items[np.unique(history)]
        left = items.T @ items + 6 * own.T @ own + 0.3 * np.eye(5)
        assert found == pytest.approx(items @ np.linalg.solve(left, 7 * own.sum(0)), abs=1e-4)


def test_folding_in_prefers_the_users_community_and_knows_what_it_does_not_know() -> None:
    before = interactions_of(
        ("A", "0 never positive", 0.0, 0),
        *((user, item, 0.0, 1) for user in "ABC" for item in ("a1", "a2", "a3")),
        *((user, item, 0.0, 1) for user in "DEF" for item in ("b1", "b2", "b3")),
    )
    chosen = TeacherSettings(dim=2, als_regularization=0.1)
    histories = [np.array([1]), np.array([0, 5]), np.array([0]), np.array([], dtype=np.int64)]
    scores = als_fold_in(before, histories, split_time=1.0, settings=chosen)
    assert scores.shape == (4, 7) and scores.dtype == np.float32
    assert scores[0, 1:4].min() > 0.5 > scores[0, 4:].max() and scores[1, 4:].min() > 0.5 > scores[1, 1:4].max()
    assert not scores[:, 0].any() and not scores[2:].any()
    assert als_fold_in(before, [], split_time=1.0, settings=chosen).shape == (0, 7)
    for wrong in (7, -1):
        with pytest.raises(ValueError, match=rf"History 1 holds place {wrong}; the interactions name 7 items"):
            als_fold_in(before, [np.array([0]), np.array([1, wrong])], split_time=1.0)


# --- libraries ------------------------------------------------------------------------------------------------------


def test_libraries_neither_warn_nor_write(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("implicit.utils._checked_blas_config", False)  # it warns once in a process
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_teachers(two_communities(), split_time=99.0, settings=QUICK, progress=False)
        als_fold_in(two_communities(), [np.array([0])], split_time=99.0, settings=QUICK)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "library"),
    [("bpr", "implicit.cpu.bpr"), ("als", "implicit.cpu.als"), ("item2vec", "gensim.models.word2vec")],
)
def test_a_missing_library_is_named_with_what_to_install(
    name: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"needs {library.split('.')[0]} .*sail-embedding\[recommend\]"):
        trained(two_communities(), name)
    assert len(graph(Positives.from_interactions(two_communities(), 99.0))) == 24  # needs none of them


# --- bad inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"names": ["bpr", "svd"]}, r"no teachers \['svd'\]; take some of \['bpr', 'als', 'item2vec', 'graph'\]"),
        ({"names": []}, r"no teachers \[\]"),
        ({"seed": -1}, "seed=-1 must lie between"),
        ({"features": np.ones((23, 2))}, r"float64 \(23, 2\) came; .* I = 24: one row for each"),
        ({"features": np.ones(24)}, r"\(24,\) came"),
        ({"features": np.ones((24, 0))}, r"\(24, 0\) came"),
        ({"features": np.full((24, 2), "x")}, r"<U1 \(24, 2\) came; numbers"),
        (
            {"features": np.where(np.arange(48).reshape(24, 2) < 46, 1, np.nan)},
            "of 1 items are not finite, first row 23",
        ),
        (
            {"settings": TeacherSettings(positives=2)},
            "None of the 240 events before the split has 2 positive behaviours",
        ),
    ],
)
def test_what_cannot_be_learned_from_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_teachers(two_communities(), **{"names": ["graph"], "split_time": 99.0, "progress": False, **wrong})


@pytest.mark.parametrize(
    "wrong",
    [
        {"dim": 1},
        {"positives": 0},
        {"bpr_epochs": 1.5},
        {"als_alpha": 0.0},
        {"als_regularization": -1.0},
        {"item2vec_learning_rate": math.inf},
        {"item2vec_subsampling": math.nan},
        {"item2vec_negative_power": math.nan},
        {"graph_layers": 0},
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TeacherSettings(**wrong)
