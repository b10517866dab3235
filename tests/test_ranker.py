"""What the ranker's rows and features promise: counts by hand, nothing of a row's own second or later, a fair gauge."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling_sail.evaluation.ranker import (
    FEATURE_SETS,
    SECONDS_A_DAY,
    Features,
    Rows,
    available_from,
    base_features,
    compare,
    evaluate_ranker,
    joined,
    match_features,
    newest_positives,
    ranking_rows,
    sid_features,
)
from modeling_sail.training.recommendation.behaviour import Interactions, Items

BEHAVIOURS = ("fine", "liked", "loved")
NUM_USERS, NUM_ITEMS = 4, 6
Event = tuple[int, int, float, int]


def log_of(*events: Event, users: int = NUM_USERS, items: int = NUM_ITEMS) -> Interactions:
    """Events (user, item, time, positive behaviours)."""
    ordered = sorted(events, key=lambda event: (event[0], event[2]))  # stable
    user, item, time, counts = (np.array(column) for column in zip(*ordered, strict=True))
    names = tuple(f"u{place}" for place in range(users)), tuple(f"i{place}" for place in range(items))
    return Interactions(*names, BEHAVIOURS, user, item, time.astype(float), np.arange(3) < counts[:, None])


def items_of(*labels: str, released: list[float] | None = None) -> Items:
    """Items with a label for each letter."""
    ids = tuple(f"i{place}" for place in range(len(labels)))
    times = np.full(len(ids), math.nan) if released is None else np.array(released)
    return Items(ids, tuple({"id": name, "title": name} for name in ids), tuple(map(frozenset, labels)), times)


def rows_of(log: Interactions, *asked: tuple[int, int, float], history: int = 3, positives: int = 2) -> Rows:
    """Rows (user, item, time), labelled and cut at will."""
    user, item, time = (np.array(column) for column in zip(*asked, strict=True))
    known = newest_positives(log, user, time.astype(float), history)
    label = np.arange(len(user)) % 2 == 0
    return Rows(user, item, time.astype(float), label, label, known, len(log.item_ids), positives, 0.0)


ITEMS = items_of("ab", "a", "b", "bc", "", "c", released=[0.0, 0.0, SECONDS_A_DAY, 0.0, math.nan, 0.0])
EVENTS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 9).map(float), st.integers(0, 3)),
    min_size=1,
    max_size=40,
)


# --- rows -----------------------------------------------------------------------------------------------------------

LOG = log_of((0, 0, 1, 2), (0, 1, 2, 1), (1, 0, 3, 0), (0, 2, 4, 3), (1, 2, 5, 2), (0, 3, 6, 0), (1, 1, 7, 1))


def test_liked_has_a_row_for_each_event_after_the_first_cut() -> None:
    rows = ranking_rows(LOG, 4.0, history=2)
    assert list(zip(rows.user, rows.item, rows.time, strict=True)) == [(0, 2, 4), (1, 2, 5), (0, 3, 6), (1, 1, 7)]
    assert rows.label.tolist() == [True, True, False, False]
    assert rows.train.tolist() == [True, True, False, False] and rows.test_time == 6
    assert rows.history.tolist() == [[1, 0], [-1, -1], [2, 1], [2, -1]]
    assert ranking_rows(LOG, 4.0, positives=3).label.tolist() == [True, False, False, False]
    assert ranking_rows(LOG, 4.0, share=0.25).test_time == 5


def test_chosen_has_negatives_that_were_there_and_that_the_user_never_had() -> None:
    rows = ranking_rows(LOG, 4.0, question="chosen", negatives=4)
    found = list(zip(rows.user.tolist(), rows.item.tolist(), rows.time.tolist(), rows.label.tolist(), strict=True))
    # At 4, item 2 has no earlier event and no release: it could be no negative, so it is no positive either. At 5, user
    # 1 has had 0 and 2, and 1 is left. At 7 the user has had 0 and 1 and 2, and only 3 is left.
    assert found == [(1, 2, 5.0, True), (1, 1, 5.0, False), (1, 1, 7.0, True), (1, 3, 7.0, False)]


def test_a_release_makes_an_item_a_candidate_unless_nobody_ever_has_it() -> None:
    items = items_of(*"abcdef", released=[0.0, 9.0, 4.0, 4.5, 0.0, math.nan])
    # 1 is seen at 2, before its release; 4 and 5 have no event at all.
    expected = [0.0, np.nextafter(2.0, 3), 4.0, 4.5, math.inf, math.inf]
    assert available_from(LOG, items).tolist() == expected
    rows = ranking_rows(LOG, 4.0, question="chosen", items=items)
    first = rows.time == 4
    assert rows.item[first].tolist() == [2] and rows.label[first].tolist() == [True]  # 0, 1 and 2 are the user's own
    assert rows.item[rows.time == 5].tolist() == [2, 1, 3]


@given(events=EVENTS, seed=st.integers(0, 5), negatives=st.integers(1, 3))
@settings(max_examples=60)
def test_rows_keep_their_promises(events: list[Event], seed: int, negatives: int) -> None:
    log = log_of((0, 0, -2.0, 1), (1, 1, -1.0, 1), *events, (2, 0, 10.0, 1), (3, 1, 11.0, 2))
    rows = ranking_rows(log, 0.0, question="chosen", negatives=negatives, share=0.99, seed=seed)
    again = ranking_rows(log, 0.0, question="chosen", negatives=negatives, share=0.99, seed=seed)
    assert np.array_equal(rows.item, again.item)
    assert (np.diff(rows.time) >= 0).all() and (rows.time >= 0).all()
    assert np.array_equal(rows.train, rows.time < rows.test_time)
    all_events = list(zip(log.user, log.item, log.time, log.counts, strict=True))
    for user, item, time, label in zip(rows.user, rows.item, rows.time, rows.label, strict=True):
        assert any(event[1] == item and event[2] < time for event in all_events), "seen in an earlier event"
        own = [event for event in all_events if event[0] == user and event[1] == item and event[2] <= time]
        assert any(event[2] == time and event[3] > 0 for event in own) if label else not own
    for row, (user, time) in enumerate(zip(rows.user, rows.time, strict=True)):
        earlier = [event for event in all_events if event[0] == user and event[2] < time and event[3] > 0]
        known = rows.history[row][rows.history[row] >= 0].tolist()
        assert known == [event[1] for event in earlier[::-1]][:20]


def test_the_draws_are_uniform_and_of_different_items() -> None:
    catalogue = [(0, item, 0.0, 1) for item in range(10)]
    log = log_of(*catalogue, *((user, 0, 5.0 + user % 2, 1) for user in range(1, 801)), users=801, items=10)
    rows = ranking_rows(log, 1.0, question="chosen", negatives=3)
    drawn = rows.item[~rows.label]
    counts = np.bincount(drawn, minlength=10)
    assert counts[0] == 0 and len(drawn) == 2400
    assert np.abs(counts[1:] - 2400 / 9).max() < 5 * math.sqrt(2400 / 9)
    for user in range(1, 801):
        assert len(set(rows.item[rows.user == user])) == 4
    other = ranking_rows(log, 1.0, question="chosen", negatives=3, seed=1)
    assert not np.array_equal(other.item, rows.item)


# --- base features --------------------------------------------------------------------------------------------------


def test_base_features_are_the_counts_one_makes_by_hand() -> None:
    log = log_of((0, 0, 1, 2), (0, 1, 2, 1), (1, 0, 3, 0), (0, 3, 4, 3))
    day = SECONDS_A_DAY
    rows = rows_of(log, (0, 0, 4), (1, 3, 2 * day))
    matrix, categorical, names = base_features(rows, log, ITEMS)
    assert names[-3:] == ("label=a", "label=b", "label=c") and not categorical and matrix.dtype == np.float32
    found = [dict(zip(names, line.tolist(), strict=True)) for line in matrix]
    # At 4 there are three events, one of them liked; of user 0 two with one liked; of item 0 two with one liked.
    own = (1 + 5 / 3) / (2 + 5)
    assert found[0] == pytest.approx(
        {
            "item_positives": 1,
            "item_liked_share": (1 + 5 / 3) / (2 + 5),
            "user_events": 2,
            "user_liked_share": own,
            "pair_positives": 1,
            "label_share": 3 / 3,  # a, b of item 0, a of item 1: all of them are the item's
            "label_liked_share": ((1 + 5 * own) / (2 + 5) + (1 + 5 * own) / (1 + 5)) / 2,
            "item_age_days": 4 / day,
            "label=a": 1,
            "label=b": 1,
            "label=c": 0,
        }
    )
    # Two days later there are four, two of them liked; user 1 has but one, of item 0, which was not for them.
    own = (0 + 5 / 2) / (1 + 5)
    expected = {"item_positives": 1, "item_liked_share": (1 + 5 / 2) / (1 + 5), "user_events": 1}
    expected |= {"user_liked_share": own, "label_liked_share": (5 * own / (1 + 5) + own) / 2, "item_age_days": 2}
    assert {name: found[1][name] for name in expected} == pytest.approx(expected)
    assert math.isnan(found[1]["label_share"]), "nothing positive yet"


def test_an_item_without_labels_or_release_is_unknown_there() -> None:
    log = log_of((0, 0, 1, 2), (0, 4, 2, 2))
    matrix, _, names = base_features(rows_of(log, (0, 4, 5)), log, ITEMS)
    found = dict(zip(names, matrix[0].tolist(), strict=True))
    assert all(math.isnan(found[name]) for name in ("label_share", "label_liked_share", "item_age_days"))
    assert found["item_positives"] == 1 and found["label=a"] == found["label=b"] == found["label=c"] == 0


def test_rows_of_one_time_do_not_see_each_other() -> None:
    before = [(0, 0, 1.0, 2), (1, 0, 1.0, 1)]
    together = [(0, 1, 5.0, 3), (0, 2, 5.0, 3), (1, 1, 5.0, 2), (2, 1, 5.0, 0)]
    log = log_of(*before, *together)
    rows = ranking_rows(log_of(*before, *together, (3, 5, 6.0, 0)), 5.0, share=0.9)
    rows = replace(rows, **{name: getattr(rows, name)[:4] for name in ("user", "item", "time", "label", "history")})
    alone = base_features(rows, log_of(*before), ITEMS)
    assert np.array_equal(base_features(rows, log, ITEMS).matrix, alone.matrix, equal_nan=True)
    assert rows.history[:, 0].tolist() == [0, 0, 0, -1]
    columns = {name: alone.names.index(name) for name in ("item_positives", "user_events")}
    assert alone.matrix[:, columns["item_positives"]].tolist() == [0, 0, 0, 0]
    assert alone.matrix[:, columns["user_events"]].tolist() == [1, 1, 1, 0]


@given(events=EVENTS, others=EVENTS, time=st.integers(1, 9).map(float))
@settings(max_examples=60)
def test_whatever_happens_from_a_row_s_time_on_changes_none_of_its_features(
    events: list[Event], others: list[Event], time: float
) -> None:
    """Everything at or after the time is taken away, and other events are put there."""
    early = [(0, 0, 0.0, 2), *(event for event in events if event[2] < time)]
    late = [event for event in events if event[2] >= time]
    changed = [(user, item, time + when, counts) for user, item, when, counts in others]
    asked = [(user, item, time) for user in range(NUM_USERS) for item in range(NUM_ITEMS)]
    vectors, codes = np.random.default_rng(0).normal(size=(NUM_ITEMS, 4)), np.arange(12).reshape(NUM_ITEMS, 2) % 5
    found = []
    for log in (log_of(*early, *late), log_of(*early, *changed), log_of(*early)):
        rows = rows_of(log, *asked, history=4)
        parts = base_features(rows, log, ITEMS), match_features(rows, vectors), sid_features(rows, codes)
        found.append((rows.history, joined(*parts).matrix))
    for history, matrix in found[1:]:
        assert np.array_equal(history, found[0][0])
        assert np.array_equal(matrix, found[0][1], equal_nan=True)


@given(events=EVENTS, seed=st.integers(0, 9))
@settings(max_examples=40)
def test_one_pass_counts_what_a_scan_for_each_row_counts(events: list[Event], seed: int) -> None:
    log = log_of((0, 0, 0.0, 2), *events)
    generator = np.random.default_rng(seed)
    asked = [
        (int(generator.integers(4)), int(generator.integers(6)), float(generator.integers(1, 11))) for _ in "123456"
    ]
    matrix, _, names = base_features(rows_of(log, *asked), log, ITEMS)
    found = {name: matrix[:, place] for place, name in enumerate(names)}
    for row, (user, item, time) in enumerate(asked):
        there = log.time < time
        its, own = there & (log.item == item), there & (log.user == user)
        liked = log.counts >= 2
        everybody = liked[there].mean()
        assert found["item_positives"][row] == (its & (log.counts > 0)).sum()
        assert found["user_events"][row] == own.sum()
        assert found["pair_positives"][row] == (its & own & (log.counts > 0)).sum()
        assert found["item_liked_share"][row] == pytest.approx((liked[its].sum() + 5 * everybody) / (its.sum() + 5))
        assert found["user_liked_share"][row] == pytest.approx((liked[own].sum() + 5 * everybody) / (own.sum() + 5))
        mine = [label for place in log.item[own & (log.counts > 0)] for label in ITEMS.labels[place]]
        if mine and ITEMS.labels[item]:
            share = sum(label in ITEMS.labels[item] for label in mine) / len(mine)
            assert found["label_share"][row] == pytest.approx(share)
        else:
            assert math.isnan(found["label_share"][row])


# --- match and semantic IDs -----------------------------------------------------------------------------------------


def test_match_features_are_cosines_with_the_mean_the_newest_and_the_nearest() -> None:
    log = log_of((0, 0, 1, 1), (0, 1, 2, 1), (1, 0, 1, 0), (2, 5, 1, 1))
    vectors = np.array([[2, 0], [0, 3], [4, 4], [-1, 0], [0, 0], [0, 0]])
    rows = rows_of(log, (0, 0, 3), (0, 2, 3), (0, 3, 2), (1, 0, 3), (0, 4, 3), (2, 0, 3))
    matrix, categorical, names = match_features(rows, vectors)
    half = math.sqrt(0.5)
    expected = [[half, 0, 1], [1, half, half], [-1, -1, -1]]
    assert names == ("match_mean", "match_newest", "match_max") and not categorical
    assert matrix[:3] == pytest.approx(np.array(expected), abs=1e-6)
    assert np.isnan(matrix[3:]).all(), "no history, no vector of the item, none of the history"


def test_a_history_is_read_without_items_that_have_no_vector() -> None:
    log = log_of((0, 0, 1, 1), (0, 4, 2, 1))
    vectors = np.array([[1.0, 0], [1, 0], [0, 1], [1, 1], [0, 0], [1, 0]])
    assert match_features(rows_of(log, (0, 1, 3)), vectors).matrix.tolist() == [[1, 1, 1]]
    opposite = log_of((0, 0, 1, 1), (0, 1, 2, 1))
    vectors[1] = [-1, 0]
    assert match_features(rows_of(opposite, (0, 0, 3)), vectors).matrix.tolist() == [[0, -1, 1]], "a mean of nothing: 0"


def test_sid_features_are_codes_and_the_share_that_begins_alike() -> None:
    log = log_of((0, 0, 1, 1), (0, 1, 2, 1), (0, 2, 3, 1))
    codes = np.array([[1, 2, 3], [1, 2, 4], [1, 5, 3], [7, 2, 3], [0, 0, 0], [0, 0, 0]])
    matrix, categorical, names = sid_features(rows_of(log, (0, 0, 9), (0, 3, 9), (1, 0, 9)), codes)
    assert names == ("sid_1", "sid_2", "sid_agree_1", "sid_agree_2", "sid_agree_3") and categorical == (0, 1)
    assert matrix[0] == pytest.approx(np.array([1, 2, 1, 2 / 3, 1 / 3]))
    assert matrix[1].tolist() == [7, 2, 0, 0, 0]  # the same codes behind another first one mean something else
    assert matrix[2, :2].tolist() == [1, 2] and np.isnan(matrix[2, 2:]).all()
    assert sid_features(rows_of(log, (0, 0, 9)), codes[:, :1]).names == ("sid_1", "sid_agree_1")


def test_joined_columns_keep_their_kind_and_name() -> None:
    one = Features(np.zeros((2, 2)), (1,), ("a", "b"))
    found = joined(one, Features(np.ones((2, 1)), (), ("c",)), one)
    assert found.matrix.tolist() == [[0, 0, 1, 0, 0]] * 2
    assert found.categorical == (1, 4) and found.names == ("a", "b", "c", "a", "b")


# --- the ranker -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted() -> tuple[Interactions, Items, np.ndarray]:
    """Users and items with a taste of two dimensions: who likes what is a matter of the angle between them."""
    generator = np.random.default_rng(0)
    users, items = generator.normal(size=(60, 2)), generator.normal(size=(80, 2))
    events = []
    for number, pair in enumerate(generator.permutation(60 * 80).tolist()):  # each once: no item is liked again
        user, item = divmod(pair, 80)
        cosine = users[user] @ items[item] / np.linalg.norm(users[user]) / np.linalg.norm(items[item])
        events.append((user, item, float(number), 2 if cosine + generator.normal(0, 0.3) > 0.2 else 0))
    return log_of(*events, users=60, items=80), items_of(*[""] * 80), items


def test_embeddings_that_know_the_taste_raise_the_auc_and_noise_does_not(planted) -> None:
    log, items, tastes = planted
    rows = ranking_rows(log, 2400.0)
    base = base_features(rows, log, items)
    noise = np.random.default_rng(1).normal(size=(80, 2))
    codes = np.stack([tastes[:, 0] > 0, tastes[:, 1] > 0], axis=1).astype(int)
    knows = compare(rows, base, match_features(rows, tastes), sid_features(rows, codes), seeds=(0, 1))
    guesses = compare(rows, base, match_features(rows, noise), seeds=(0, 1))
    assert list(knows) == list(FEATURE_SETS) and list(guesses) == ["base", "base+match"]
    for name in ("auc", "gauc"):
        assert knows["base"][name] == guesses["base"][name] < 0.7
        assert knows["base+match"][name] > knows["base"][name] + 0.15
        assert knows["base+sids"][name] > knows["base"][name] + 0.1
        assert abs(guesses["base+match"][name] - guesses["base"][name]) < 0.05
    assert json.loads(json.dumps(knows)) == knows
    assert knows["base"]["rows"] == (~rows.train).sum() == 1200
    assert 0.9 < knows["base"]["gauc_share"] <= 1
    assert knows["base"]["auc"] == pytest.approx(np.mean([run["auc"] for run in knows["base"]["runs"]]))


def test_a_feature_that_is_the_label_and_one_that_says_nothing(planted) -> None:
    rows = ranking_rows(planted[0], 2400.0)
    truth, nothing = rows.label[:, None].astype(np.float32), np.zeros((len(rows), 1), dtype=np.float32)
    found = evaluate_ranker(rows, {"truth": (truth, ()), "category": (truth, (0,)), "nothing": Features(nothing)})
    assert found["truth"]["auc"] == found["truth"]["gauc"] == found["category"]["auc"] == 1
    assert found["nothing"]["auc"] == found["nothing"]["gauc"] == 0.5


def test_the_second_cut_keeps_test_rows_out_of_training(planted) -> None:
    """Labels of the test are turned round: the scores are the same, so the AUC is turned round."""
    rows = ranking_rows(planted[0], 2400.0)
    features = {"match": match_features(rows, planted[2])}
    turned = replace(rows, label=np.where(rows.train, rows.label, ~rows.label))
    one, other = (evaluate_ranker(some, features)["match"]["auc"] for some in (rows, turned))
    assert one > 0.75 and one + other == pytest.approx(1)


def test_one_seed_gives_one_ranker(planted) -> None:
    rows = ranking_rows(planted[0], 2400.0)
    features = {"match": match_features(rows, planted[2])}
    one, again, other = (evaluate_ranker(rows, features, seed=seed)["match"]["auc"] for seed in (1, 1, 2))
    assert one == again != other


# --- bad inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"question": "bought"}, "not one of liked, chosen"),
        ({"positives": 0}, "positives=0"),
        ({"negatives": 0}, "negatives=0"),
        ({"history": 0}, "history=0"),
        ({"share": 1.0}, "share=1.0"),
        ({"t1": 0.0}, "leaves 0 events before"),
        ({"t1": 99.0}, "and 0 after"),
        ({"items": items_of("a", "b")}, "items are of 2 items"),
    ],
)
def test_requests_that_cannot_be_are_refused(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranking_rows(LOG, **{"t1": 4.0, **changed})


def test_without_a_positive_event_nothing_is_chosen() -> None:
    log = log_of((0, 0, 1, 1), (0, 1, 5, 0), (1, 0, 6, 0))
    with pytest.raises(ValueError, match="None of 2 events"):
        ranking_rows(log, 4.0, question="chosen")


def test_events_that_lack_a_part_are_refused() -> None:
    log = replace(LOG, item=np.where(LOG.item == 3, -1, LOG.item))
    with pytest.raises(ValueError, match="validate"):
        ranking_rows(log, 4.0)
    with pytest.raises(ValueError, match="validate"):
        base_features(ranking_rows(LOG, 4.0), log, ITEMS)


def test_features_of_other_items_or_shapes_are_refused() -> None:
    rows = ranking_rows(LOG, 4.0)
    with pytest.raises(ValueError, match="items are of 2"):
        base_features(rows, LOG, items_of("a", "b"))
    for wrong in (np.zeros((5, 2)), np.zeros(6), np.full((6, 2), np.nan)):
        with pytest.raises(ValueError, match="embeddings are of 5|shape"):
            match_features(rows, wrong)
    for wrong in (np.zeros((5, 2), dtype=int), np.zeros((6, 2)), np.full((6, 2), -1), np.zeros((6, 0), dtype=int)):
        with pytest.raises(ValueError, match=r"codes are of 5|Codes of shape"):
            sid_features(rows, wrong)
    with pytest.raises(ValueError, match=r"'wide' are of shape \(3, 1\); \(4, F\) is needed"):
        evaluate_ranker(rows, {"wide": (np.zeros((3, 1)), ())})


def test_a_side_with_one_label_is_refused() -> None:
    rows = ranking_rows(LOG, 4.0)
    with pytest.raises(ValueError, match="2 rows to train with have not both labels"):
        evaluate_ranker(rows, {"any": (np.zeros((4, 1)), ())})
    with pytest.raises(ValueError, match="seeds is empty"):
        compare(rows, Features(np.zeros((4, 1))), seeds=())


def test_without_lightgbm_it_says_what_to_install(planted, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = importlib.import_module

    def without(name: str):
        if name == "lightgbm":
            raise ImportError("No module named 'lightgbm'")
        return whole(name)

    monkeypatch.setattr(importlib, "import_module", without)
    rows = ranking_rows(planted[0], 2400.0)
    with pytest.raises(ImportError, match=r"sail-embedding\[recommend\]"):
        evaluate_ranker(rows, {"match": match_features(rows, planted[2])})
