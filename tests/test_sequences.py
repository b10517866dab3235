"""What the sequence tests promise: nothing from the target's event on in a sequence, ranks as by brute force."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from modeling_sail.evaluation.sequences import (
    UNRANKED,
    filtered_cases,
    pooled,
    recall_of_ranks,
    scores_of,
    sequence_recall,
    target_ranks,
    vanilla_cases,
)
from modeling_sail.training.recommendation.behaviour import Interactions, split_by_time
from modeling_sail.training.recommendation.evidence import jaccard
from modeling_sail.training.recommendation.interests import Pair

NUM_ITEMS, NUM_USERS, SPLIT = 10, 4, 10.0
LABELS = [frozenset("xy"), frozenset("x"), frozenset("y"), frozenset("xyz"), frozenset()] * 2
CLUSTERS = np.array([0, 0, 0, 0, 0, 1, 1, 1, -1, -1])

Event = tuple[int, int, int, int]  # user, item, time, positive behaviours
EVENTS = st.lists(
    st.tuples(st.integers(0, NUM_USERS - 1), st.integers(0, NUM_ITEMS - 1), st.integers(5, 20), st.integers(0, 3)),
    min_size=1,
    max_size=60,
)
NUMBERS = st.fixed_dictionaries(
    {
        "targets": st.integers(1, 4),
        "history": st.integers(1, 8),
        "kept": st.integers(1, 4),
        "positives": st.integers(1, 2),
    }
)


def interactions_of(events: list[Event], num_items: int = NUM_ITEMS, users: tuple[str, ...] = ()) -> Interactions:
    user, item, time, positive = np.array(events, dtype=np.int64).reshape(-1, 4).T
    order = np.lexsort((time, user))
    users = users or tuple(f"u{number}" for number in range(NUM_USERS))
    names = tuple(f"i{number}" for number in range(num_items))
    behaviours = np.arange(3) < positive[:, None]
    return Interactions(
        users, names, ("a", "b", "c"), user[order], item[order], time[order].astype(float), behaviours[order]
    )


def in_turn(*items: int, start: int = 5, user: int = 0) -> list[Event]:
    """Events of a user, a second apart, each with a positive behaviour."""
    return [(user, item, start + number, 1) for number, item in enumerate(items)]


def make(name: str, interactions: Interactions, **numbers: int) -> list[Pair]:
    if name == "vanilla":
        return vanilla_cases(interactions, SPLIT, **numbers)
    clusters = CLUSTERS if name == "clusters" else None
    return filtered_cases(interactions, SPLIT, labels=LABELS, clusters=clusters, **numbers)


def brute(name: str, interactions: Interactions, targets: int, history: int, kept: int, positives: int) -> list[Any]:
    """(user, target, time, what the sequence may be drawn from), by loops over events."""
    expected = []
    for user in range(NUM_USERS):
        mine = interactions.user == user
        events = list(zip(interactions.item[mine].tolist(), interactions.time[mine].tolist(), strict=True))
        shown: dict[int, np.ndarray] = {}
        counts = []
        for (item, _), line in zip(events, interactions.behaviours[mine], strict=True):
            shown[item] = shown.get(item, np.zeros(3, dtype=bool)) | line
            counts.append(int(shown[item].sum()))
        asked = [
            place
            for place, (item, time) in enumerate(events)
            if time >= SPLIT and counts[place] >= positives and item not in [other for other, _ in events[:place]]
        ]
        for place in asked[-targets:]:
            item, time = events[place]
            known: list[int] = []
            for (other, _), count in zip(events[:place], counts, strict=False):
                if count >= positives:
                    known = [*(some for some in known if some != other), other]
            known = known[-history:]
            if name != "vanilla":
                known = [
                    other
                    for other in known
                    if jaccard(LABELS[other], LABELS[item]) >= 0.5
                    or (name == "clusters" and CLUSTERS[other] == CLUSTERS[item] >= 0)
                ][-kept:]
            if known:
                expected.append((user, item, time, known))
    return expected


# --- cases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vanilla", "labels", "clusters"])
@given(events=EVENTS, numbers=NUMBERS)
@settings(max_examples=60)
def test_every_case_keeps_the_promises(name: str, events: list[Event], numbers: dict[str, int]) -> None:
    interactions = interactions_of(events)
    cases = make(name, interactions, **numbers)
    assert cases == make(name, interactions, **numbers)
    expected = brute(name, interactions, **numbers)
    assert [(case.user, case.target, case.time) for case in cases] == [case[:3] for case in expected]
    for case, (*_, known) in zip(cases, expected, strict=True):
        assert case.time >= SPLIT and case.target not in case.sequence
        # The items of `known` are each there once and in order, so these are order, uniqueness and "nothing later".
        assert list(case.sequence) == [item for item in known if item in case.sequence]
        assert len(case.sequence) == min(numbers["kept"], len(known))
    assert max(Counter(case.user for case in cases).values(), default=0) <= numbers["targets"]


@pytest.mark.parametrize("name", ["vanilla", "labels", "clusters"])
@given(events=EVENTS, future=EVENTS, kept=st.integers(1, 3), pick=st.integers(0, 99))
@settings(max_examples=40)
def test_nothing_from_the_targets_event_on_reaches_a_sequence(
    name: str, events: list[Event], future: list[Event], kept: int, pick: int
) -> None:
    interactions = interactions_of(events)
    cases = make(name, interactions, targets=99, kept=kept)
    assume(cases)
    case = cases[pick % len(cases)]
    places = (interactions.user == case.user) & (interactions.item == case.target)
    place = int(np.flatnonzero(places)[0])
    known = interactions.take((np.arange(len(interactions)) <= place) & (interactions.user == case.user))
    past = [
        (case.user, item, int(time), int(count))
        for item, time, count in zip(known.item, known.time, known.counts, strict=True)
    ]
    # Events of the same second come after it, too; whatever others do may be at any time.
    later = [
        (user, item, time if user != case.user else int(case.time) + time - 5, n) for user, item, time, n in future
    ]
    cut = interactions_of([*past, *later])
    mine = np.flatnonzero(cut.user == case.user)[: len(past)]
    cut.behaviours[mine] = known.behaviours
    assert case in make(name, cut, targets=99, kept=kept)


@given(events=EVENTS, numbers=NUMBERS, user=st.integers(0, NUM_USERS - 1), seed=st.integers(0, 9))
def test_draws_do_not_depend_on_who_else_is_there(
    events: list[Event], numbers: dict[str, int], user: int, seed: int
) -> None:
    everyone = vanilla_cases(interactions_of(events), SPLIT, **numbers, seed=seed)
    own = [(0, *event[1:]) for event in events if event[0] == user]
    alone = vanilla_cases(interactions_of(own, users=(f"u{user}",)), SPLIT, **numbers, seed=seed) if own else []
    assert [case._replace(user=0) for case in everyone if case.user == user] == alone


@given(events=EVENTS, seed=st.integers(0, 9))
def test_draws_do_not_depend_on_how_many_targets_there_are(events: list[Event], seed: int) -> None:
    few, many = (vanilla_cases(interactions_of(events), SPLIT, targets=n, kept=2, seed=seed) for n in (1, 9))
    assert set(few) <= set(many)


def test_the_defaults_are_the_papers() -> None:
    events = [*in_turn(*range(150), start=-200), *in_turn(*range(150, 157), start=20)]
    interactions = interactions_of(events, 157)
    cases = vanilla_cases(interactions, SPLIT)
    assert [case.target for case in cases] == [152, 153, 154, 155, 156]
    assert all(len(case.sequence) == 10 and min(case.sequence) >= case.target - 100 for case in cases)
    filtered = filtered_cases(interactions, SPLIT, labels=[frozenset("x")] * 157)
    assert [case.sequence for case in filtered] == [tuple(range(n - 10, n)) for n in range(152, 157)]


def test_a_draw_is_even_and_the_seed_changes_it() -> None:
    interactions = interactions_of([*in_turn(*range(8), start=0), *in_turn(8, start=20)])
    drawn = [vanilla_cases(interactions, SPLIT, kept=2, seed=seed)[0].sequence for seed in range(800)]
    counts = Counter(item for sequence in drawn for item in sequence)
    assert set(counts) == set(range(8))
    assert all(abs(count - 200) < 5 * math.sqrt(800 * 0.25 * 0.75) for count in counts.values())
    assert len(set(drawn)) == 8 * 7 / 2


def test_a_repeat_is_no_target_and_a_test_sequence_may_hold_what_came_after_the_split() -> None:
    # Item 1 was consumed before, if only without a positive behaviour; 3 is consumed after the split, before 4.
    interactions = interactions_of([(0, 1, 5, 0), (0, 2, 6, 1), (0, 3, 11, 1), (0, 1, 12, 1), (0, 4, 13, 1)])
    cases = vanilla_cases(interactions, SPLIT)
    assert cases == [Pair(0, (2,), 3, 11.0), Pair(0, (2, 3, 1), 4, 13.0)]


def test_a_target_with_nothing_before_it_gives_no_case() -> None:
    assert vanilla_cases(interactions_of(in_turn(1, start=11)), SPLIT) == []
    assert filtered_cases(interactions_of(in_turn(4, 0, start=11)), SPLIT, labels=LABELS) == []
    assert vanilla_cases(interactions_of(in_turn(1, 2)), SPLIT) == []  # nothing after the split


def test_tags_or_the_cluster_agree() -> None:
    # Of item 0 (x, y): 1 and 3 share enough, 4 has no label; 4 is of its cluster, 6 of another.
    interactions = interactions_of([*in_turn(1, 3, 4, 6, start=1), *in_turn(0, start=20)])
    labels = [*LABELS[:5], *[frozenset("q")] * 5]
    (case,) = filtered_cases(interactions, SPLIT, labels=labels)
    assert case.sequence == (1, 3)
    (case,) = filtered_cases(interactions, SPLIT, labels=labels, clusters=CLUSTERS)
    assert case.sequence == (1, 3, 4)
    (case,) = filtered_cases(interactions, SPLIT, labels=labels, threshold=0.6)
    assert case.sequence == (3,)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"targets": 0}, "targets=0 must be at least 1"),
        ({"history": 0}, "history=0"),
        ({"kept": 0}, "kept=0"),
        ({"positives": 0}, "positives=0"),
        ({"split_time": math.nan}, "split_time=nan"),
        ({"threshold": 1.1}, "threshold=1.1"),
        ({"labels": [frozenset()]}, "labels are of 1 items; the interactions name 10"),
        ({"clusters": np.zeros(3)}, "clusters are of 3 items"),
    ],
)
def test_cases_that_cannot_be_asked_for_are_refused(wrong: dict[str, Any], message: str) -> None:
    given = {"split_time": SPLIT, "labels": LABELS} | wrong
    with pytest.raises(ValueError, match=message):
        filtered_cases(interactions_of(in_turn(1, 2, start=11)), **given)
    if not set(wrong) & {"threshold", "labels", "clusters"}:
        del given["labels"]
        with pytest.raises(ValueError, match=message):
            vanilla_cases(interactions_of(in_turn(1, 2, start=11)), **given)


# --- scores ---------------------------------------------------------------------------------------------------------


def test_a_sequence_is_the_mean_of_its_unit_vectors() -> None:
    embeddings = np.array([[3.0, 0.0], [0.0, 0.5], [0.0, 0.0], [1.0, 1.0]])
    cases = [Pair(0, (0, 1), 3, 1.0), Pair(0, (0, 2), 1, 1.0), Pair(0, (2,), 0, 1.0)]
    assert pooled(embeddings, cases) == pytest.approx(np.array([[0.5, 0.5], [1, 0], [0, 0]]))
    root = math.sqrt(0.5)
    expected = [[root, root, -math.inf, 1], [1, 0, -math.inf, root], [-math.inf] * 4]
    assert scores_of(embeddings, cases) == pytest.approx(np.array(expected))
    assert pooled(embeddings, []).shape == (0, 2)


@given(st.integers(0, 10_000))
def test_lengths_of_embeddings_do_not_matter(seed: int) -> None:
    generator = np.random.default_rng(seed)
    embeddings, lengths = generator.normal(size=(6, 3)), generator.uniform(0.1, 9, (6, 1))
    cases = [Pair(0, tuple(generator.permutation(6)[:3].tolist()), 5, 1.0) for _ in range(3)]
    assert scores_of(embeddings * lengths, cases) == pytest.approx(scores_of(embeddings, cases), abs=1e-5)


def test_embeddings_that_are_none_are_refused() -> None:
    for wrong in (np.zeros(3), np.array([[math.nan]])):
        with pytest.raises(ValueError, match=r"shape \(I, D\)"):
            pooled(wrong, [])
    with pytest.raises(ValueError, match=r"Cases name items 1 to 7; .* of 3"):
        scores_of(np.eye(3), [Pair(0, (1,), 7, 1.0)])


# --- ranks ----------------------------------------------------------------------------------------------------------


@given(events=EVENTS, numbers=NUMBERS, seed=st.integers(0, 10_000), subset=st.booleans())
def test_ranks_equal_brute_force_with_ties(
    events: list[Event], numbers: dict[str, int], seed: int, subset: bool
) -> None:
    interactions = interactions_of(events)
    cases = vanilla_cases(interactions, SPLIT, **numbers)
    generator = np.random.default_rng(seed)
    scores = generator.integers(-1, 4, (len(cases), NUM_ITEMS)).astype(float)
    scores[scores < 0] = -np.inf
    places = {case.target for case in cases} | set(generator.integers(0, NUM_ITEMS, 4).tolist())
    candidates = np.array(sorted(places)) if subset else None
    expected = []
    for row, case in zip(scores, cases, strict=True):
        mine = interactions.item[interactions.user == case.user].tolist()
        consumed = mine[: mine.index(case.target)]
        rivals = [
            item
            for item in (sorted(places) if subset else range(NUM_ITEMS))
            if item not in consumed and item != case.target
        ]
        above = sum(row[item] >= row[case.target] for item in rivals)
        expected.append(UNRANKED if row[case.target] == -np.inf else above)
    ranks = target_ranks(scores, cases, interactions, candidates)
    assert ranks.dtype == np.int64 and ranks.tolist() == expected
    if cases:
        found = sequence_recall(scores, cases, interactions, candidates=candidates, ks=(1, 3))
        assert found == {k: sum(rank < k for rank in expected) / len(cases) for k in (1, 3)}


def test_the_best_is_first_and_a_tie_counts_against_the_target() -> None:
    interactions = interactions_of([*in_turn(0, 1, start=1), *in_turn(2, start=20)])
    (case,) = cases = vanilla_cases(interactions, SPLIT)
    assert case.target == 2
    best = np.eye(NUM_ITEMS)[[2]]
    assert sequence_recall(best, cases, interactions) == {1: 1.0, 10: 1.0, 25: 1.0}
    flat = np.zeros((1, NUM_ITEMS))
    assert target_ranks(flat, cases, interactions).tolist() == [7]  # ten without the two consumed and the target
    assert sequence_recall(flat - np.inf, cases, interactions) == {1: 0.0, 10: 0.0, 25: 0.0}


def test_what_was_consumed_is_no_rival_even_if_it_is_not_in_the_sequence() -> None:
    # 0 shows no positive behaviour, 3 comes after the target, and another user consumed 4.
    events = [(0, 0, 1, 0), (0, 1, 2, 1), (0, 2, 20, 1), (0, 3, 21, 1), (1, 4, 1, 1)]
    interactions = interactions_of(events)
    case = vanilla_cases(interactions, SPLIT)[0]
    assert (case.sequence, case.target) == ((1,), 2)
    scores = np.array([[9, 9, 1, 2, 3, 0, 0, 0, 0, 0]])
    assert target_ranks(scores, [case], interactions).tolist() == [2]
    assert target_ranks(scores, [case], interactions, np.array([0, 1, 2, 3])).tolist() == [1]


def test_a_recommender_that_knows_the_future_is_perfect_and_one_that_knows_nothing_is_as_chance() -> None:
    generator = np.random.default_rng(0)
    events = [(user, int(item), int(generator.integers(0, 20)), 1) for user in range(4) for item in range(400)]
    interactions = interactions_of(events, 400)
    cases = vanilla_cases(interactions, SPLIT, targets=100)
    perfect = np.zeros((len(cases), 400))
    perfect[np.arange(len(cases)), [case.target for case in cases]] = 1
    assert sequence_recall(perfect, cases, interactions)[1] == 1
    left = [400 - (np.flatnonzero(interactions.item[interactions.user == c.user] == c.target)[0]) for c in cases]
    expected = np.mean([min(1, 25 / number) for number in left])
    found = sequence_recall(generator.random((len(cases), 400)), cases, interactions)[25]
    assert len(cases) == 400 and found == pytest.approx(expected, abs=5 * math.sqrt(0.25 / 400))


def test_recall_of_ranks_is_the_share_below_k() -> None:
    assert recall_of_ranks(np.array([0, 9, 10, UNRANKED])) == {1: 0.25, 10: 0.5, 25: 0.75}
    for wrong in ((np.array([]), (1,)), (np.array([1]), (0,)), (np.zeros((1, 1)), (1,))):
        with pytest.raises(ValueError, match="a rank at least"):
            recall_of_ranks(*wrong)


def test_scores_and_candidates_that_do_not_fit_are_refused() -> None:
    interactions = interactions_of([*in_turn(0, 1, start=1), *in_turn(2, start=20)])
    (case,) = vanilla_cases(interactions, SPLIT)
    flat = np.zeros((1, NUM_ITEMS))
    for scores in (np.zeros((2, NUM_ITEMS)), np.zeros((1, 3)), np.full((1, NUM_ITEMS), np.nan)):
        with pytest.raises(ValueError, match=r"shape \(1, 10\) without NaN"):
            target_ranks(scores, [case], interactions)
    for candidates in (np.array([2.0]), np.ones(NUM_ITEMS, dtype=bool), np.array([2, 10]), np.array([-1, 2])):
        with pytest.raises(ValueError, match="places from 0 to 9 are needed"):
            target_ranks(flat, [case], interactions, candidates)
    with pytest.raises(ValueError, match="targets of 1 cases are not among the candidates"):
        target_ranks(flat, [case], interactions, np.array([3]))
    with pytest.raises(ValueError, match=r"no event of user 0 with item 2 at 20\.0"):
        target_ranks(flat, [case], split_by_time(interactions, time=SPLIT).before)
    with pytest.raises(ValueError, match="of user 7"):
        target_ranks(flat, [case._replace(user=7)], interactions)
    with pytest.raises(ValueError, match="Cases name items"):
        target_ranks(flat, [case._replace(target=70)], interactions)
    with pytest.raises(ValueError, match="a rank at least"):
        sequence_recall(np.zeros((0, NUM_ITEMS)), [], interactions)
