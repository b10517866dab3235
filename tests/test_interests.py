"""What the interests promise: order, thresholds and lengths kept, no target in its sequence, nothing of the future."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from modeling_sail.training.recommendation.behaviour import History, Interactions, Items, split_by_time
from modeling_sail.training.recommendation.evidence import (
    Consumers,
    Evidence,
    cosine_similarity,
    jaccard,
    label_clusters,
)
from modeling_sail.training.recommendation.interests import (
    INTERESTS,
    Limits,
    candidates,
    collaborative_multi_peak,
    collaborative_single_peak,
    content_multi_peak,
    content_single_peak,
    drawn,
    in_proportion,
    mine_interests,
)
from modeling_sail.training.recommendation.validation import validate

NUM_ITEMS, NUM_USERS = 8, 6
LABELS = st.sets(st.sampled_from("xyz")).map(frozenset)


def history_of(*events: tuple[int, int], user: int = 0) -> History:
    """Events (item, positive behaviours), a second apart."""
    items, counts = np.array(events, dtype=np.int64).reshape(-1, 2).T
    return History(user, items, np.arange(len(events), dtype=float), counts)


def consumers_of(*users: set[int]) -> Consumers:
    """Consumers of each item."""
    starts = np.cumsum([0, *(len(some) for some in users)])
    return Consumers(starts, np.array([user for some in users for user in sorted(some)], dtype=np.int64), 0.0)


@st.composite
def evidences(draw: st.DrawFn) -> Evidence:
    """Evidence of `NUM_ITEMS` items, all of it at random."""
    vectors = draw(st.lists(st.tuples(*[st.integers(-2, 2)] * 2), min_size=NUM_ITEMS, max_size=NUM_ITEMS))
    users = draw(st.lists(st.sets(st.integers(0, NUM_USERS - 1)), min_size=NUM_ITEMS, max_size=NUM_ITEMS))
    clusters = st.lists(st.integers(0, 2), min_size=NUM_ITEMS, max_size=NUM_ITEMS).map(np.array)
    return Evidence(
        similarity=cosine_similarity(np.array(vectors)),
        labels=draw(st.lists(LABELS, min_size=NUM_ITEMS, max_size=NUM_ITEMS)),
        consumers=consumers_of(*users),
        label_clusters=draw(clusters),
        clusters=draw(clusters),
    )


@st.composite
def histories(draw: st.DrawFn) -> History:
    """Up to 30 events; times may be equal."""
    events = draw(st.lists(st.tuples(st.integers(0, NUM_ITEMS - 1), st.integers(0, 4)), min_size=1, max_size=30))
    steps = draw(st.lists(st.integers(0, 2), min_size=len(events), max_size=len(events)))
    history = history_of(*events, user=draw(st.integers(0, NUM_USERS - 1)))
    return history._replace(times=np.cumsum(steps).astype(float))


LIMITS = st.builds(
    Limits,
    history=st.integers(1, 30),
    kept=st.integers(2, 5),
    shortest=st.integers(1, 2),
    single_peak=st.integers(2, 4),
    multi_peak=st.integers(1, 2),
    behaviour=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
)


# --- what holds for all ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INTERESTS)
@given(history=histories(), evidence=evidences(), limits=LIMITS, seed=st.integers(0, 9))
def test_every_pair_keeps_the_promises(
    name: str, history: History, evidence: Evidence, limits: Limits, seed: int
) -> None:
    pair = INTERESTS[name](history, evidence, limits, random.Random(seed))
    recent = history.newest(limits.history)
    needed = limits.positives(name)
    qualified = [
        place
        for place in range(len(recent.items))
        if recent.counts[place] >= (limits.single_peak if "single" in name else limits.multi_peak)
    ]
    if pair is None:
        return
    newest = qualified[-1]
    assert pair.user == history.user and needed >= 1
    assert pair.target == recent.items[newest] and pair.time == recent.times[newest]
    assert pair.target not in pair.sequence and len(set(pair.sequence)) == len(pair.sequence)
    assert limits.shortest <= len(pair.sequence) <= limits.kept
    # Each item stands at its newest event that qualifies, which is before the target's, and in that order.
    places = [max(place for place in qualified if recent.items[place] == item) for item in pair.sequence]
    assert places == sorted(places) and places[-1] < newest
    assert pair == INTERESTS[name](history, evidence, limits, random.Random(seed))  # pure


@given(history=histories(), evidence=evidences(), limits=LIMITS)
def test_the_newest_that_are_near_enough_are_kept_and_no_other(
    history: History, evidence: Evidence, limits: Limits
) -> None:
    near = {
        content_single_peak: lambda item, target: evidence.similarity(target, np.array([item]))[0] >= limits.similarity,
        content_multi_peak: lambda item, target: jaccard(evidence.labels[item], evidence.labels[target]) >= 0.5,
    }
    for interest, is_near in near.items():
        found = candidates(history, limits.positives(interest.__name__), limits)
        pair = interest(history, evidence, limits)
        expected = [] if found is None else [item for item in found.items.tolist() if is_near(item, found.target)]
        assert list(pair.sequence if pair else ()) == (
            expected[-limits.kept :] if len(expected) >= limits.shortest else []
        )


@given(history=histories(), evidence=evidences(), limits=LIMITS)
def test_a_collaborative_single_peak_shares_consumers_with_its_target(
    history: History, evidence: Evidence, limits: Limits
) -> None:
    pair = collaborative_single_peak(history, evidence, limits)
    found = candidates(history, limits.single_peak, limits)
    if found is None:
        assert pair is None
        return
    wanted = set(evidence.consumers.of(found.target).tolist()) - {history.user}
    near = []
    for item in found.items.tolist():
        users = set(evidence.consumers.of(item).tolist()) - {history.user}
        near += (
            [item] if (len(users & wanted) / len(users | wanted) if users | wanted else 0) >= limits.behaviour else []
        )
    if len(near) <= limits.kept:  # nothing to choose: all of them, in order
        assert list(pair.sequence if pair else ()) == (near if len(near) >= limits.shortest else [])
    else:
        assert set(pair.sequence) <= set(near) and len(pair.sequence) == limits.kept


# --- thresholds, by hand --------------------------------------------------------------------------------------------


def test_the_defaults_are_the_papers() -> None:
    limits = Limits()
    assert (limits.history, limits.kept, limits.labels) == (1000, 10, 0.5)
    assert [limits.positives(name) for name in INTERESTS] == [3, 1, 3, 1]


def test_the_target_is_the_newest_item_that_qualifies() -> None:
    same = Evidence(similarity=lambda target, items: np.ones(len(items)), labels=[frozenset("x")] * 9)
    history = history_of((1, 3), (2, 2), (3, 4), (1, 1), (4, 3), (5, 2), (6, 0))
    pair = content_single_peak(history, same)
    assert (pair.sequence, pair.target, pair.time) == ((1, 3), 4, 4.0)
    pair = content_multi_peak(history, same)
    assert (pair.sequence, pair.target) == ((2, 3, 1, 4), 5)  # item 1 stands where it was seen last


def test_what_is_older_than_the_newest_thousand_is_not_seen() -> None:
    same = Evidence(labels=[frozenset("x")] * 9)
    assert content_multi_peak(history_of((1, 1), *[(2, 0)] * 999, (3, 1)), same) is None
    assert content_multi_peak(history_of((1, 1), *[(2, 0)] * 998, (3, 1)), same).sequence == (1,)


def test_labels_that_share_half_are_near_and_none_are_not() -> None:
    labels = [frozenset("xy"), frozenset("x"), frozenset("xyz"), frozenset("yzv"), frozenset()]
    history = history_of((1, 1), (2, 1), (3, 1), (4, 1), (0, 1))
    assert content_multi_peak(history, Evidence(labels=labels)).sequence == (1, 2)
    assert content_multi_peak(history_of((4, 1), (0, 1)), Evidence(labels=[frozenset()] * 5)) is None


def test_similarity_is_the_cosine_of_embeddings() -> None:
    similarity = cosine_similarity(np.array([[2, 0], [1, 1], [0, 5], [-1, 0], [0, 0]]))
    assert similarity(0, np.arange(5)) == pytest.approx([1, math.sqrt(0.5), 0, -1, 0])
    evidence = Evidence(similarity=similarity)
    assert content_single_peak(history_of((1, 3), (2, 3), (3, 3), (0, 3)), evidence).sequence == (1,)
    for wrong in (np.zeros(3), np.array([[math.nan]])):
        with pytest.raises(ValueError, match=r"shape \(I, D\)"):
            cosine_similarity(wrong)


def test_a_user_is_no_evidence_for_its_own_interest() -> None:
    consumers = consumers_of({0, 1, 2}, {0, 1}, {0}, set())
    assert consumers.jaccard(0, np.array([0, 1, 2, 3])) == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert consumers.jaccard(0, np.array([0, 1, 2, 3]), without=0) == pytest.approx([1, 1 / 2, 0, 0])
    assert consumers.jaccard(2, np.array([2, 3]), without=0) == pytest.approx([0, 0])
    alone = Evidence(consumers=consumers_of({0}, {0}), label_clusters=np.zeros(2, dtype=np.int64))
    assert collaborative_single_peak(history_of((0, 3), (1, 3), user=0), alone) is None
    assert collaborative_single_peak(history_of((0, 3), (1, 3), user=1), alone).sequence == (0,)


def test_a_collaborative_single_peak_keeps_the_users_own_distribution() -> None:
    # 16 items of cluster 0 and 8 of cluster 1, all seen by the same users; the newest 8 are all of cluster 1.
    evidence = Evidence(
        consumers=consumers_of(*[{1, 2}] * 25), label_clusters=np.array([0] * 16 + [1] * 8 + [2], dtype=np.int64)
    )
    pair = collaborative_single_peak(history_of(*((item, 3) for item in range(25))), evidence, Limits(kept=6))
    assert pair.sequence == (12, 13, 14, 15, 22, 23) and pair.target == 24


def test_a_collaborative_multi_peak_draws_by_the_clusters_of_the_history() -> None:
    # Item 0 was seen three times, so its cluster has three of the five events, as many as its items are one.
    history = history_of((0, 1), (0, 1), (0, 1), (1, 1), (2, 1), (3, 1))
    evidence = Evidence(clusters=np.array([0, 1, 1, 2]))
    first = Counter(
        collaborative_multi_peak(history, evidence, Limits(kept=1), random.Random(seed)).sequence
        for seed in range(2000)
    )
    assert first[(0,)] == pytest.approx(2000 * 3 / 5, abs=5 * math.sqrt(2000 * 0.24))
    assert first[(1,)] == pytest.approx(2000 / 5, abs=5 * math.sqrt(2000 * 0.16))
    assert set(first) == {(0,), (1,), (2,)}
    whole = collaborative_multi_peak(history, evidence, Limits(), random.Random(0))
    assert whole.sequence == (0, 1, 2)  # nothing to choose


@given(st.dictionaries(st.integers(0, 4), st.integers(1, 30), min_size=1), st.integers(1, 20))
def test_places_are_given_in_proportion(weights: dict[int, int], total: int) -> None:
    places = {name: [100 * name + number for number in range(total)] for name in weights}
    chosen = in_proportion(Counter(weights), places, total)
    taken = Counter(place // 100 for place in chosen)
    assert taken.total() == total
    for name, weight in weights.items():
        # Sainte-Laguë strays from the exact share by less than one place among two parties, by little among five.
        assert abs(taken[name] - total * weight / sum(weights.values())) < 2
        assert sorted(place for place in chosen if place // 100 == name) == places[name][total - taken[name] :]


def test_places_are_given_as_sainte_lague_gives_seats() -> None:
    votes = Counter({0: 53, 1: 24, 2: 23})
    chosen = in_proportion(votes, {name: list(range(10 * name, 10 * name + 7)) for name in votes}, 7)
    assert Counter(place // 10 for place in chosen) == {0: 3, 1: 2, 2: 2}  # D'Hondt would give 4, 2, 1


@given(st.dictionaries(st.integers(0, 4), st.integers(0, 4)), st.integers(1, 9), st.integers(0, 9))
def test_what_a_cluster_lacks_goes_to_the_others(sizes: dict[int, int], total: int, seed: int) -> None:
    places = {name: [10 * name + number for number in range(size)] for name, size in sizes.items()}
    weights = Counter({name: size + 1 for name, size in sizes.items()})
    everything = {place for some in places.values() for place in some}
    for chosen in (in_proportion(weights, places, total), drawn(weights, places, total, random.Random(seed))):
        assert len(set(chosen)) == len(chosen) == min(total, len(everything)) and set(chosen) <= everything
    assert all(len(some) == sizes[name] for name, some in places.items())  # what was given is as it was


@given(st.lists(LABELS, min_size=1, max_size=12))
def test_label_clusters_do_not_depend_on_the_order_of_items(labels: list[frozenset[str]]) -> None:
    clusters = label_clusters(labels)
    assert label_clusters(labels[::-1]).tolist() == clusters[::-1].tolist()
    assert {*clusters.tolist()} == set(range(clusters.max() + 1))
    for one, other in ((one, other) for one in range(len(labels)) for other in range(len(labels))):
        if labels[one] == labels[other]:
            assert clusters[one] == clusters[other]
        if not labels[one] & labels[other] and bool(labels[one]) != bool(labels[other]):
            assert clusters[one] != clusters[other]  # no label is a cluster of its own


# --- mining, and no leak --------------------------------------------------------------------------------------------

EVENTS = st.lists(
    st.tuples(
        st.integers(0, 4), st.integers(0, NUM_ITEMS - 1), st.integers(0, 20), st.integers(0, 4)
    ),  # user, item, time, behaviours
    min_size=1,
    max_size=60,
)


def interactions_of(events: list[tuple[int, int, int, int]]) -> Interactions:
    rows = [
        {"user": f"u{user}", "item": f"i{item}", "time": float(time), "behaviours": list("abcd"[:positive])}
        for user, item, time, positive in events
    ]
    items = Items.from_table(
        pa.table({"id": [f"i{item}" for item in range(NUM_ITEMS)], "text": [str(item) for item in range(NUM_ITEMS)]})
    )
    return validate(Interactions.from_table(pa.Table.from_pylist(rows)), items)[0]


def evidence_before(before: Interactions, time: float) -> Evidence:
    clusters = np.arange(NUM_ITEMS) % 3
    return Evidence(
        similarity=lambda target, items: np.where((items + target) % 2, 0.0, 1.0),
        labels=[frozenset({str(item % 3)}) for item in range(NUM_ITEMS)],
        consumers=Consumers.from_interactions(before, time),
        label_clusters=clusters,
        clusters=clusters,
    )


def mined_by_name(before: Interactions, time: float) -> dict[str, list[tuple[Any, ...]]]:
    mined = mine_interests(
        before, evidence_before(before, time), split_time=time, limits=Limits(kept=3, behaviour=0.3), progress=False
    )
    return {
        name: [(before.user_ids[pair.user], pair.sequence, pair.target, pair.time) for pair in pairs]
        for name, pairs in mined.pairs.items()
    }


@given(EVENTS, EVENTS, st.integers(1, 20))
def test_no_event_after_the_split_and_no_target_can_reach_a_sequence(
    events: list[tuple[int, int, int, int]], future: list[tuple[int, int, int, int]], time: int
) -> None:
    """Whatever happens from the split on, by whomever, the pairs are the same."""
    past = [event for event in events if event[2] < time]
    assume(past)
    future = [(user, item, time + later, positive) for user, item, later, positive in future]
    without = mined_by_name(interactions_of(past), float(time))
    before, after, _ = split_by_time(interactions_of([*past, *future]), time=float(time))
    assert mined_by_name(before, float(time)) == without
    assert len(after) and after.time.min() >= time
    for pairs in without.values():
        for user, sequence, target, last in pairs:
            own = {f"i{item}" for _, item, when, _ in past if when <= last}
            assert last < time and target not in sequence and {f"i{item}" for item in sequence} <= own
            assert all(any(f"u{who}" == user and item == what for who, what, _, _ in past) for item in sequence)


@given(EVENTS)
def test_a_target_does_not_decide_who_its_consumers_are(events: list[tuple[int, int, int, int]]) -> None:
    """A user's own events change nothing in the consistency of items for that user."""
    interactions = interactions_of([*events, (9, 0, 1, 4), (9, 1, 2, 4)])
    user = interactions.user_ids.index("u9")
    others = Consumers.from_interactions(interactions.take(interactions.user != user), 99.0)
    everyone = Consumers.from_interactions(interactions, 99.0)
    items = np.arange(NUM_ITEMS)
    for target in items:
        assert everyone.jaccard(target, items, without=user).tolist() == others.jaccard(target, items).tolist()


def test_mining_refuses_what_would_leak() -> None:
    interactions = interactions_of([(0, item, item, 3) for item in range(NUM_ITEMS)])
    before, _, time = split_by_time(interactions, time=5.0)
    evidence = evidence_before(before, time)
    with pytest.raises(ValueError, match="3 events are at the split time 5.0 or later"):
        mine_interests(interactions, evidence, split_time=time, progress=False)
    with pytest.raises(ValueError, match="3 events are at the split time"):
        Consumers.from_interactions(interactions, time)
    late = Evidence(consumers=Consumers.from_interactions(interactions, 99.0))
    with pytest.raises(ValueError, match=r"learned up to 99\.0, after the split time"):
        mine_interests(before, late, split_time=time, progress=False)


def test_evidence_that_is_missing_or_of_other_items_is_refused() -> None:
    before = interactions_of([(0, item, item, 3) for item in range(NUM_ITEMS)])
    needs = {
        "content_single_peak": "similarity",
        "content_multi_peak": "labels",
        "collaborative_single_peak": "consumers",
        "collaborative_multi_peak": "clusters",
    }
    for interest, name in needs.items():
        with pytest.raises(ValueError, match=rf"{interest}' needs Evidence\({name}="):
            mine_interests(before, Evidence(), split_time=99.0, interests=[interest], progress=False)
    for wrong in (Evidence(clusters=np.zeros(3)), Evidence(consumers=consumers_of(set()))):
        with pytest.raises(ValueError, match="the interactions name 8"):
            mine_interests(before, wrong, split_time=99.0, progress=False)
    with pytest.raises(ValueError, match=r"no interests \['peak'\]"):
        mine_interests(before, Evidence(), split_time=99.0, interests=["peak"], progress=False)
    with pytest.raises(ValueError, match="draws: give it"):
        collaborative_multi_peak(history_of((1, 1)), Evidence(clusters=np.zeros(3, dtype=int)))


@given(EVENTS)
def test_statistics_account_for_every_user(events: list[tuple[int, int, int, int]]) -> None:
    before = interactions_of(events)
    limits = Limits(kept=3)
    pairs, statistics = mine_interests(
        before, evidence_before(before, 99.0), split_time=99.0, limits=limits, progress=False
    )
    assert json.loads(json.dumps(statistics)) == statistics and set(statistics) == set(pairs) == set(INTERESTS)
    for name, numbers in statistics.items():
        lengths = [len(pair.sequence) for pair in pairs[name]]
        assert numbers["histories"] == before.num_users == numbers["kept"] + sum(numbers["dropped"].values())
        assert numbers["kept"] == len(lengths) and numbers["full"] == lengths.count(3)
        assert numbers["mean_length"] == pytest.approx(np.mean(lengths) if lengths else 0)


def test_why_a_user_is_dropped_is_told() -> None:
    before = interactions_of([(0, 1, 1, 0), (1, 1, 1, 1), (2, 1, 1, 1), (2, 2, 2, 1), (3, 1, 1, 1), (3, 4, 2, 1)])
    evidence = Evidence(labels=[frozenset({str(item % 3)}) for item in range(NUM_ITEMS)])
    _, statistics = mine_interests(before, evidence, split_time=99.0, interests=["content_multi_peak"], progress=False)
    assert statistics["content_multi_peak"] == {
        "histories": 4,
        "kept": 1,
        "share": 0.25,
        "mean_length": 1.0,
        "full": 0,
        "dropped": {
            "no item with enough positive behaviours": 1,
            "too few items before the target": 1,
            "too few items like the target": 1,
        },
    }


@pytest.mark.parametrize(
    "wrong",
    [{"history": 0}, {"kept": 0}, {"shortest": 11}, {"labels": 1.5}, {"similarity": -2}, {"behaviour": math.nan}],
)
def test_limits_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Limits(**wrong)
